"""``python -m pretrain.cluster.node VERB ...``: torchrun on one node of a job, started there by ``slurm/launch.sh``."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pretrain.cluster.endings import LOGS
from pretrain.cluster.job import ask, node_name, rendezvous_port
from pretrain.files import write_json
from pretrain.training.stopping import hold_back_signals


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m pretrain ARGUMENTS`` on every rank of this node.

    The nodes meet on the job's first one. SLURM sends its signals to every process of a step, so the ranks of a
    training hear them without torchrun, which would give them 30 s to save; it does not hear them.

    Returns:
        0, or the exit code of the rank that failed first.
    """
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    first = ask(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()[0]
    # slurmd allows cores of any size, and a rank's is as large as its memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # A gloo group takes three descriptors for each other rank; the usual limit of 1,024 ends at 340 ranks.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if arguments[0] == "train":
        hold_back_signals()
    try:
        torchrun.main(
            [
                f"--nnodes={nodes}",
                f"--nproc-per-node={os.environ['RANKS_PER_NODE']}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={first}:{rendezvous_port()}",
                f"--rdzv-id={os.environ['PRETRAIN_INCARNATION']}",
                "--max-restarts=0",
                "--module",
                "pretrain",
                *arguments,
            ]
        )
    except Exception as error:  # torchrun itself: no place for its files, nodes that do not meet
        if not isinstance(error, ChildFailedError):
            _note({"code": 1, "reason": f"torchrun: {type(error).__name__}: {error}", "ended": time.time()})
            raise
        failures = [
            {"rank": rank, "code": failure.exitcode, "ended": float(failure.timestamp)}
            for rank, failure in error.failures.items()
        ]
        _note({"failures": failures})
        code = int(error.get_first_failure()[1].exitcode)
        return code if code > 0 else 128 - code
    return 0


def _note(record: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the ranks' own words have to do
        write_json(Path(os.environ[LOGS]) / f"node_{node_name()}.json", {"host": node_name()} | record)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
