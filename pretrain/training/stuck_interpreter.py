"""Ends a rank whose interpreter is stuck. The watchdog runs this beside it, as a script: nothing else is imported.

It counts the seconds that it saw pass itself. A timer inside the rank could not: while a job is suspended the clock
runs on, and the timer fires as soon as the job continues, before any Python does.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import sys
from pathlib import Path

ENDING_SIGNAL = signal.SIGALRM  # on which the rank dumps its stacks and ends


def guard(rank: int, watched: int, tick: float) -> None:
    """Read from stdin how many seconds the rank may be silent from then on, each time a double; end it after those.

    Args:
        watched: the process of the rank, which started this one.
        tick: seconds, at most, between two looks.
    """
    left = float("inf")
    while os.getppid() == watched:  # when it has gone, its number may be another process's
        if select.select([0], [], [], tick)[0]:
            told = os.read(0, 65536)
            if not told:
                return
            (left,) = struct.unpack("d", told[-8:])
        elif not _is_stopped(watched):
            left -= tick
        if left <= 0:
            print(f"rank {rank} hangs, and its interpreter is stuck; its stacks:", file=sys.stderr, flush=True)
            os.kill(watched, ENDING_SIGNAL)
            return


def _is_stopped(process: int) -> bool:
    """By SIGSTOP or a debugger, while this process is not."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return False
    return after_name.split()[0] in "Tt"


if __name__ == "__main__":
    guard(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
