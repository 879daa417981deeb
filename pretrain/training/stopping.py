"""A stop that was asked for: by a signal, or by a file ``STOP`` in the run folder.

The ranks finish the step they are in, save, and exit with :data:`EXIT_STOPPED`; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pretrain.cluster.endings import note_end

if TYPE_CHECKING:
    from pretrain.topology import Topology

# sysexits.h: "temporary failure, the user is invited to retry". Schedulers may start the same command again.
EXIT_STOPPED = os.EX_TEMPFAIL  # 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 1.0  # a scheduler and a launcher may both deliver the first one


class StopSignals:
    """Hears SIGTERM, SIGUSR1 and Ctrl-C while it is entered; a second one leaves at once, with exit code 128 + n.

    A thread listens, as the main thread may be inside a collective that does not come back. Enter it in the main
    thread. Without entering it nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested: int | None = None  # the first signal
        self._requested_at = 0.0
        self._ranks: Sequence[subprocess.Popen[bytes]] | None = None
        self._relaying = threading.Lock()

    def __enter__(self) -> StopSignals:
        self._heard, written = socket.socketpair()
        written.setblocking(False)
        self._written = written
        self._handlers = {number: signal.signal(number, _to_the_thread) for number in STOP_SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the launcher holds them back until here
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._written.close()  # ends the thread

    @contextlib.contextmanager
    def relayed_to(self, ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
        """Every signal, those before included, goes to these processes, and this one leaves only when they have."""
        with self._relaying:
            self._ranks = ranks
            if self.requested is not None:
                self._relay(self.requested)
        try:
            yield
        finally:
            with self._relaying:
                self._ranks = None

    def _listen(self) -> None:
        while numbers := self._heard.recv(64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    with self._relaying:
                        self._take(number)
        self._heard.close()

    def _take(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._ranks is not None:
            self.requested = self.requested or number
            self._relay(number)
        elif self.requested is None:
            self.requested, self._requested_at = number, now
            print(f"{name}: finishes the step, saves and stops; a second signal leaves at once", file=sys.stderr)
        elif now - self._requested_at > REPEAT_SECONDS:
            print(f"{name} again: leaves at once, nothing is saved", file=sys.stderr, flush=True)
            note_end(128 + number, f"{name} twice: left without saving")
            os._exit(128 + number)

    def _relay(self, number: int) -> None:
        for process in self._ranks or ():
            process.send_signal(number)


def why_stopped(signals: StopSignals, file: Path) -> list[str]:
    """What this rank knows of the cause: the signal's name, ``STOP`` for the file; both or nothing."""
    causes = [] if signals.requested is None else [signal.Signals(signals.requested).name]
    return causes + (["STOP"] if file.exists() else [])


def hold_back_signals() -> None:
    """Keep signals pending until :class:`StopSignals` is entered; inherited by the program that is started next."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


class Stop:
    """Whether all ranks stop. A rank may be the only one that knows: what it knows rides on a reduction of the step."""

    def __init__(self, signals: StopSignals, file: Path, topology: Topology) -> None:
        self._signals, self._file, self._topology = signals, file, topology

    def wanted_here(self) -> bool:
        """On this rank alone; the first one also looks for the file."""
        return self._signals.requested is not None or (self._topology.is_first and self._file.exists())

    def wanted(self) -> bool:
        """On any rank; a collective, for the moments without a step to ride on."""
        import torch  # not above: the launcher hears signals too, and starts without
        import torch.distributed as dist

        flag = torch.tensor(float(self.wanted_here()), device=self._topology.device)
        dist.all_reduce(flag)
        return bool(flag)


def _to_the_thread(number: int, frame: object) -> None:
    """The wake-up file descriptor tells the thread; Python wants a handler beside it."""
