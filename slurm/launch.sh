#!/usr/bin/env bash
# The only launcher: starts a verb of pretrain on every node of the job it runs in.
#   bash slurm/launch.sh train RECIPE [key=value ...]
# One torchrun on each node; they meet on the first. RANKS_PER_NODE: default one per GPU, or 1 without GPUs.
set -euo pipefail
: "${SLURM_JOB_ID:?launch.sh runs inside a SLURM job: sbatch slurm/train.sbatch RECIPE}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec srun --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" \
    "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID" --max-restarts=0 \
    -m pretrain "$@"
