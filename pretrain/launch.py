"""Starts the ranks of a run on this machine, when no launcher did.

One process for each rank. Rank 0 has the terminal; what the others print goes to files, of which the end is shown
when one of them fails first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.files import make_folder
from pretrain.place import LISTENING_SOCKET
from pretrain.training.stopping import EXIT_STOPPED, StopSignals, hold_back_signals

GRACE_SECONDS = 10.0
PR_SET_PDEATHSIG = 1


def run_local_ranks(
    arguments: Sequence[str],
    world_size: int,
    log_folder: Path,
    signals: StopSignals | None = None,
    inherited: Sequence[int] = (),
) -> int:
    """Run ``python -m pretrain ARGUMENTS`` on ``world_size`` ranks and wait. Signals to this process reach every rank.

    Args:
        signals: entered already, for a verb whose ranks enter :class:`StopSignals` too: none gets lost in between.
        inherited: file descriptors that stay open in every rank.

    Returns:
        0, :data:`EXIT_STOPPED`, or the exit code of the rank that failed first; the others are then ended.
    """
    make_folder(log_folder)
    with contextlib.ExitStack() as stack:
        prepare = _die_with_parent if signals is None else _die_with_parent_and_hold_back_signals
        heard = stack.enter_context(StopSignals()) if signals is None else signals
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ranks = [
                _start(arguments, rank, world_size, listener, log_folder, stack, prepare, inherited)
                for rank in range(world_size)
            ]
        try:
            with heard.relayed_to(ranks):
                code, failed = _wait(ranks)
        finally:
            _end(ranks)
    if failed is not None and failed > 0:
        _show_end(log_folder / f"rank_{failed:05d}.log", failed, code)
    return code


def _start(
    arguments: Sequence[str],
    rank: int,
    world_size: int,
    listener: socket.socket,
    log_folder: Path,
    stack: contextlib.ExitStack,
    prepare: Callable[[], None],
    inherited: Sequence[int],
) -> subprocess.Popen[bytes]:
    """``listener`` is where the ranks meet: rank 0 inherits it, so that nobody takes its port before rank 0 listens."""
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
    }
    if rank == 0:
        environment[LISTENING_SOCKET] = str(listener.fileno())
        inherited = [*inherited, listener.fileno()]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world_size)))
    output = None if rank == 0 else stack.enter_context((log_folder / f"rank_{rank:05d}.log").open("wb"))
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        preexec_fn=prepare,
        pass_fds=inherited,
    )


def _die_with_parent() -> None:
    """Linux: a rank must not go on when its launcher was killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _die_with_parent_and_hold_back_signals() -> None:
    _die_with_parent()
    hold_back_signals()


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int | None]:
    """Until all ranks ended well, or one did not: its exit code and number. To stop as asked is to end well.

    A rank that was first alone is the cause, the others fail because it left. Where all stop together for one cause,
    rank 0 speaks for them.
    """
    while True:
        codes = [process.poll() for process in ranks]
        failures = [rank for rank, code in enumerate(codes) if code not in (None, 0, EXIT_STOPPED)]
        if failures:
            failed = failures[0]
            time.sleep(0.5)
            if ranks[0].poll() == codes[failed]:
                failed = 0
            code = codes[failed] or ranks[failed].poll() or 1
            return (128 - code if code < 0 else code), failed
        if None not in codes:
            return max(code or 0 for code in codes), None
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, once more for a rank that finishes its step first, then SIGKILL."""
    for action in ("terminate", "terminate", "kill"):
        for process in ranks:
            getattr(process, action)()  # nothing for one that has ended
        deadline = time.monotonic() + GRACE_SECONDS / 2
        for process in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))


def _show_end(log: Path, rank: int, code: int) -> None:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    print(f"rank {rank} ended with exit code {code}; the end of {log}:", file=sys.stderr)
    print("\n".join(lines[-25:]), file=sys.stderr)
