"""``python -m pretrain.cluster.node VERB ...``: torchrun on one node of a job, started there by ``slurm/launch.sh``."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pretrain.cluster.endings import LOGS
from pretrain.cluster.job import ask
from pretrain.files import write_json
from pretrain.training.stopping import hold_back_signals


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m pretrain ARGUMENTS`` on every rank of this node.

    The nodes meet on the job's first one. SLURM sends its signals to every process of a step, so the ranks of a
    training hear them without torchrun, which would give them 30 s to save; it does not hear them.

    Returns:
        0, or the exit code of the rank that failed first.
    """
    job_id, nodes = os.environ["SLURM_JOB_ID"], os.environ["SLURM_JOB_NUM_NODES"]
    first = ask(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()[0]
    if arguments[0] == "train":
        hold_back_signals()
    try:
        torchrun.main(
            [
                f"--nnodes={nodes}",
                f"--nproc-per-node={os.environ['RANKS_PER_NODE']}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={first}:{20_000 + int(job_id) % 20_000}",
                f"--rdzv-id={os.environ['PRETRAIN_INCARNATION']}",
                "--max-restarts=0",
                "--module",
                "pretrain",
                *arguments,
            ]
        )
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "code": failure.exitcode, "ended": float(failure.timestamp)}
            for rank, failure in error.failures.items()
        ]
        host = socket.gethostname()
        write_json(Path(os.environ[LOGS]) / f"node_{host}.json", {"host": host, "failures": failures})
        code = int(error.get_first_failure()[1].exitcode)
        return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
