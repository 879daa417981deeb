#!/usr/bin/env bash
# The only launcher: starts a verb of pretrain on every node of the job it runs in.
#   bash slurm/launch.sh train RECIPE [key=value ...]
# srun starts one torchrun on each node; they meet on the first. Facts of the site are in cluster.env.
set -euo pipefail
: "${SLURM_JOB_ID:?launch.sh runs inside a SLURM job: sbatch slurm/train.sbatch RECIPE}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=${PRETRAIN_CLUSTER_ENV:-$here/cluster.env}
if [[ -f $site ]]; then
    set +u # site files and what they load read variables that are not set
    source "$site"
    set -u
elif [[ -n ${PRETRAIN_CLUSTER_ENV:-} ]]; then
    echo "error: PRETRAIN_CLUSTER_ENV names $site, which is not a file" >&2
    exit 2
fi
python=${PYTHON:-python}

gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # with --exclusive the second one is all that the node has
export RANKS_PER_NODE=${RANKS_PER_NODE:-${gpus##*:}}
export PRETRAIN_WORLD_SIZE=$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))
export PRETRAIN_INCARNATION=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
over=${PRETRAIN_TIME_IS_OVER:-} srun= # SLURM warns once, and this shell alone (--signal=B:USR1): it is told to srun
trap 'over=1; [[ -z $srun ]] || kill -USR1 "$srun" 2> /dev/null || true' USR1
PRETRAIN_JOB_LOGS=$("$python" -m pretrain.cluster.batch begin "$@")
export PRETRAIN_JOB_LOGS
[[ -z $over ]] || exec "$python" -m pretrain.cluster.batch end "$PRETRAIN_JOB_LOGS" $((128 + $(kill -l USR1)))

# shellcheck disable=SC2086  # SRUN_OPTIONS are words
srun --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --output="$PRETRAIN_JOB_LOGS/node_%N.log" ${SRUN_OPTIONS:-} \
    "$python" -m pretrain.cluster.node "$@" < /dev/null &
srun=$!
trap 'kill -TERM "$srun" 2> /dev/null || true' TERM INT # before, it ends this shell, as nothing is to be saved
[[ -z $over ]] || kill -USR1 "$srun" 2> /dev/null || true # it came just before
tail --pid="$srun" -n +1 -F "$PRETRAIN_JOB_LOGS/rank_00000.log" 2> /dev/null &
tail=$!
while kill -0 "$srun" 2> /dev/null; do wait "$srun" || true; done # a signal ends wait before srun has ended
code=0
wait "$srun" || code=$?
[[ -z $over || $code == 0 ]] || code=$((128 + $(kill -l USR1))) # srun that still waited for its step ends with 1
wait "$tail" || true
exec "$python" -m pretrain.cluster.batch end "$PRETRAIN_JOB_LOGS" "$code"
