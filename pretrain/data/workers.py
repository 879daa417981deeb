"""Processes that share the work of ``prepare``."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool, _ExecutorManagerThread

from pretrain.errors import UserError


@contextlib.contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Forked processes, which end with the block or with this process; open it before threads are started.

    Raises:
        UserError: one of them was killed; nothing that it worked on would come.
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), initializer=_begin)
    try:
        pool.submit(os.getpid).result()  # the first task forks them all
        yield pool
    except BrokenProcessPool as error:
        if _leaves_the_queue_open():
            pool._call_queue._reader.close()  # type: ignore[attr-defined]
        raise UserError(
            f"one of {processes} worker processes was killed, probably because memory ran out: set "
            "data.prepare_processes lower and run it again, it continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _leaves_the_queue_open() -> bool:
    """Before Python 3.11.5 (gh-94777) the thread that writes tasks waits for ever for somebody to read a large one."""
    does = _ExecutorManagerThread.terminate_broken.__code__.co_names
    return not {"_reader", "_terminate_broken"} & set(does)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that waits for its next task would not see that nobody is there any more to give it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
