"""The one harness for tests on several ranks: forked processes, gloo, a file as rendezvous.

Two ranks start in about 0.1 s, and inherit what a test has patched. A process that has touched CUDA can't be forked.
"""

from __future__ import annotations

import datetime
import gc
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0, method: str = "fork"
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on every rank and return what each returned.

    With ``method="spawn"`` they begin as new processes, which inherit nothing.
    A rank that raises fails the test with its traceback; a rank that hangs is killed after ``timeout_s``.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(function, world_size, folder, *args, method=method)
        for process in processes:
            process.join(timeout_s)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        outcomes = {int(path.stem): pickle.loads(path.read_bytes()) for path in Path(folder).glob("*.pickle")}
    errors = [text for kind, text in outcomes.values() if kind == "error"]
    if errors:
        raise AssertionError("\n".join(errors))
    if hung:
        raise AssertionError(f"ranks {hung} were still running after {timeout_s} s")
    missing = sorted(set(range(world_size)) - set(outcomes))
    if missing:
        raise AssertionError(f"ranks {missing} died: exit codes {[processes[rank].exitcode for rank in missing]}")
    return [outcomes[rank][1] for rank in range(world_size)]


def start_ranks(
    function: Callable[..., Any], world_size: int, folder: str, *args: Any, method: str = "fork"
) -> list[Any]:
    """The ranks of :func:`run_ranks` as processes, for tests that kill them; ``folder`` takes what they return."""
    context = multiprocessing.get_context(method)
    processes = [
        context.Process(target=_rank, args=(function, rank, world_size, folder, args), daemon=True)
        for rank in range(world_size)
    ]
    gc.freeze()  # else a collection in a forked rank touches, and so copies, every page of the parent's objects
    for process in processes:
        process.start()
    gc.unfreeze()
    return processes


def caught(function: Callable[[], Any]) -> str:
    """The error of ``function`` as text; every rank must come here."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _rank(function: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=120),
        )
        outcome = ("result", function(rank, world_size, *args))
        dist.barrier()  # no rank leaves while another still talks to it
    except BaseException:
        outcome = ("error", f"rank {rank}:\n{traceback.format_exc()}")
    temporary = Path(folder) / f"{rank}.tmp"
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.rename(Path(folder) / f"{rank}.pickle")
    os._exit(0)
