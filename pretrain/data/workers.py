"""Processes that share the work of ``prepare``; one that is killed is told, where ``multiprocessing`` would wait."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import signal
from collections.abc import Callable
from typing import TypeVar

from pretrain.errors import UserError

Result = TypeVar("Result")
LOOK_SECONDS = 1.0


class Workers:
    """Forked processes; open it before threads are started. Leaving it ends them, also after an error."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.pool = multiprocessing.get_context("fork").Pool(processes, initializer=_ignore_interrupts)
        self._first = self._alive()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.terminate()

    def wait_for(self, get: Callable[[float], Result]) -> Result:
        """``get(seconds)`` of something that the pool gave, however long it takes.

        Raises:
            UserError: a worker is gone, and what it worked on will not come: the pool starts another in its place.
        """
        while True:
            try:
                return get(LOOK_SECONDS)
            except multiprocessing.TimeoutError:
                if self._alive() != self._first:
                    raise UserError(
                        f"one of {self.processes} worker processes was killed, probably because memory ran out: set "
                        "data.prepare_processes lower and run it again, it continues"
                    ) from None

    def _alive(self) -> set[int | None]:
        return {process.pid for process in self.pool._pool if process.is_alive()}  # type: ignore[attr-defined]


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
