"""A hang becomes an exit, with the stacks of every rank: each rank has its own watchdog.

Where one rank hangs, the others hang in the next collective with it, so all of them end; the first to end stays for a
moment, so that the others have their stacks too.

Two timers divide the work. A thread ends what hangs while Python runs: a collective, a file, a lock. Where it cannot
run, because a call into C keeps the interpreter's lock, a small process beside the rank does, a quarter later
(:mod:`pretrain.training.stuck_interpreter`). Neither counts time in which the job was suspended (SLURM's preemption,
SIGSTOP): both add up short waits of their own, of which a suspension lengthens one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from pretrain.cluster.endings import note_end
from pretrain.training import stuck_interpreter

EXIT_HUNG = os.EX_SOFTWARE  # 70
PATIENCE = 3.0  # how much longer the first step, a save and an evaluation may take
MOST_FOR_OTHERS = 30.0  # seconds for the ranks that began the same thing later
LAST_SECONDS = 5.0  # for a sleep that the interpreter's lock keeps from ending
STDERR = 2


class Watchdog:
    """Ends the process with :data:`EXIT_HUNG` when what it was told to expect takes too long.

    If the interpreter itself is stuck, it ends by SIGALRM a quarter later, with stacks on stderr only.

    Args:
        seconds: that a step may take; 0: no watchdog.
        stacks_file: where the stacks of all threads go; they go to stderr as well.
    """

    def __init__(self, seconds: float, rank: int, stacks_file: Path) -> None:
        self._seconds, self._rank, self._file = seconds, rank, stacks_file
        self._tick = min(1.0, seconds / 10)
        self._expected = ("nothing", 0.0, float("inf"))  # what, seconds, deadline on the clock below
        self._ran, self._looked = 0.0, time.monotonic()  # seconds in which this process was seen to run, and until when
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._guard = self._start_guard()
            faulthandler.register(stuck_interpreter.ENDING_SIGNAL, STDERR, all_threads=True, chain=True)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed.set()
            guard, self._guard = self._guard, None
        if guard is not None:
            with guard:  # closes its pipe and waits for it
                guard.kill()
            faulthandler.unregister(stuck_interpreter.ENDING_SIGNAL)

    def expect(self, what: str, patience: float = 1.0) -> None:
        """From now on ``what`` is done, in ``patience`` times the seconds of a step."""
        if self._seconds:
            seconds = patience * self._seconds
            with self._lock:
                self._expected = (what, seconds, self._clock() + seconds)
                self._allow_silence(1.25 * seconds)

    def _watch(self) -> None:
        while not self._closed.wait(self._tick):
            with self._lock:
                what, seconds, deadline = self._expected
                left = deadline - self._clock()
                self._allow_silence(left + seconds / 4)
            if left < 0:
                self._end(f"rank {self._rank} hangs: no end of {what} after {seconds:.0f} s")

    def _clock(self) -> float:
        """Seconds in which this process ran. The thread looks each tick, unless it was suspended or had no lock."""
        now = time.monotonic()
        self._ran += min(now - self._looked, 2 * self._tick)
        self._looked = now
        return self._ran

    def _start_guard(self) -> subprocess.Popen[bytes]:
        """It keeps all signals blocked: those that ask a job to stop reach every process of it."""
        own = [sys.executable, "-I", "-S", stuck_interpreter.__file__]
        arguments = [str(self._rank), str(os.getpid()), str(self._tick)]
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            guard = subprocess.Popen([*own, *arguments], stdin=subprocess.PIPE, stdout=STDERR, bufsize=0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert guard.stdin is not None
        os.set_blocking(guard.stdin.fileno(), False)  # it may be gone or starved: training goes on
        return guard

    def _allow_silence(self, seconds: float) -> None:
        """Tell the guard how long it may hear nothing from now on."""
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.write(struct.pack("d", seconds))

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
            with self._lock:
                self._allow_silence(others + LAST_SECONDS)
            time.sleep(others)
            os._exit(EXIT_HUNG)
