"""A hang becomes an exit, with the stacks of every rank: each rank has its own watchdog.

Where one rank hangs, the others hang in the next collective with it, so all of them end; the first to end stays for a
moment, so that the others have their stacks too.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from pretrain.cluster.endings import note_end

EXIT_HUNG = os.EX_SOFTWARE  # 70
PATIENCE = 3.0  # how much longer the first step, a save and an evaluation may take
MOST_FOR_OTHERS = 30.0  # seconds for the ranks that began the same thing later
LAST_SECONDS = 5.0  # for a sleep that the interpreter's lock keeps from ending
STDERR = 2


class Watchdog:
    """Ends the process with :data:`EXIT_HUNG` when what it was told to expect takes too long.

    If the interpreter itself is stuck, its lock held by a call that does not come back, ``faulthandler`` does the same
    a quarter later: stacks on stderr only, exit code 1.

    Args:
        seconds: that a step may take; 0: no watchdog.
        stacks_file: where the stacks of all threads go; they go to stderr as well.
    """

    def __init__(self, seconds: float, rank: int, stacks_file: Path) -> None:
        self._seconds, self._rank, self._file = seconds, rank, stacks_file
        self._expected = ("nothing", 0.0, float("inf"))  # what, seconds, deadline
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def expect(self, what: str, patience: float = 1.0) -> None:
        """From now on ``what`` is done, in ``patience`` times the seconds of a step."""
        if self._seconds:
            seconds = patience * self._seconds
            self._expected = (what, seconds, time.monotonic() + seconds)
            faulthandler.dump_traceback_later(1.25 * seconds, exit=True, file=STDERR)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 10)):
            what, seconds, deadline = self._expected
            if time.monotonic() > deadline:
                self._end(f"rank {self._rank} hangs: no end of {what} after {seconds:.0f} s")

    def _end(self, line: str) -> None:
        note_end(EXIT_HUNG, line)
        try:
            faulthandler.dump_traceback(STDERR)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("w", encoding="utf-8") as file:
                print(line, file=file, flush=True)
                faulthandler.dump_traceback(file)
            line += f"; the stacks are in {self._file}"
        finally:  # a full disk must not keep it alive
            print(line, file=sys.stderr, flush=True)
            # Once this rank is gone, the collective of the others fails: before, their time is to be up too.
            others = min(MOST_FOR_OTHERS, self._seconds / 4)
            faulthandler.dump_traceback_later(others + LAST_SECONDS, exit=True, file=STDERR)
            time.sleep(others)
            os._exit(EXIT_HUNG)
