"""Runs a study on this machine: one run after the other, or several at a time, each in processes of its own.

A run is trained and then evaluated by the verbs that a person would use. What is done stays; a run that was stopped
goes on from its checkpoint; one that fails is tried once more after all others, and then named.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, get_args

from pretrain.console import say
from pretrain.errors import UserError
from pretrain.files import make_folder
from pretrain.launch import PR_SET_PDEATHSIG
from pretrain.study.live import LiveTable
from pretrain.study.plan import PlannedRun, data_of
from pretrain.study.records import write_records
from pretrain.study.state import RunState, State, write_state
from pretrain.study.study_file import Study
from pretrain.study.study_folder import StudyFolder, git_commit, is_finished, unevaluated
from pretrain.training.stopping import EXIT_STOPPED, REPEAT_SECONDS

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.1
LOG_NAME = "study.log"


def prepare_data(plan: Sequence[PlannedRun]) -> None:
    """Each data folder once, one after the other; nothing is done where it is prepared already."""
    from pretrain.data.prepare import prepare

    for recipe in data_of(plan).values():
        prepare(recipe)


def run_locally(study: Study, plan: Sequence[PlannedRun], parallel_runs: int) -> int:
    """Run what is left, in a folder that was claimed and whose data are prepared.

    Returns:
        0 when all runs are done; 75 when it was stopped; 1 when runs failed, which are named.
    """
    return _Runner(study, plan, parallel_runs).run()


@dataclass
class _Child:
    """A run that is under way in a slot."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: int
    asked_to_stop: bool = False


@dataclass
class _Runner:
    study: Study
    plan: Sequence[PlannedRun]
    parallel_runs: int
    stopping: int | None = None  # the signal
    stopped_at: float = 0.0
    leaves_at_once: bool = False
    children: list[_Child] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = StudyFolder(self.study.folder)
        self.states = self.folder.states([run.cell for run in self.plan])
        self.gpus = _gpus(self.plan, self.parallel_runs)
        self.commit = git_commit()
        self.tried_again: set[str] = {name for name, state in self.states.items() if state.state == "failed"}
        waiting = [run for run in self.plan if self.states[run.cell.name].state != "done"]
        # Failed ones come last, so that what can be done is done first.
        self.waiting = deque(sorted(waiting, key=lambda run: run.cell.name in self.tried_again))
        self.live = LiveTable(self.folder, self.plan)

    def run(self) -> int:
        free = list(range(self.parallel_runs))
        with self._signals():
            try:
                while self.children or (self.waiting and self.stopping is None):
                    while free and self.waiting and self.stopping is None:
                        self._start(self.waiting.popleft(), free.pop(0))
                    self._pass_on_stop()
                    for child in [child for child in self.children if child.process.poll() is not None]:
                        if not self._goes_on(child):
                            free.append(child.slot)
                    self.live.draw(self.states)
                    time.sleep(POLL_SECONDS)
            finally:
                self._kill()
        self.live.end(self.states)
        write_records(self.folder.path)
        return self._summary()

    def _start(self, run: PlannedRun, slot: int) -> None:
        name = run.cell.name
        logs = make_folder(self.folder.run(name).logs)
        log = (logs / LOG_NAME).open("ab")
        self._note(name, "running", commit=self.commit)
        arguments = ["train", str(self.folder.recipe_file(name))]
        self.children.append(_Child(run, self._process(arguments, run, log, slot), log, slot))

    def _goes_on(self, child: _Child) -> bool:
        """What follows the end of a process: evaluations after training. Returns whether the run goes on."""
        name, code, run = child.run.cell.name, child.process.returncode, self.folder.run(child.run.cell.name)
        recipe = child.run.cell.recipe
        if code == 0 and self.stopping is None:
            steps = unevaluated(run, recipe, self.study.evaluate)
            if steps:
                arguments = ["evaluate", str(run.path), "--checkpoint", str(steps[0])]
                child.process = self._process(arguments, child.run, child.log, child.slot)
                return True
        child.log.close()
        self.children.remove(child)
        if is_finished(run, recipe, self.study.evaluate):
            self._note(name, "done")
            write_records(self.folder.path)
        elif self.stopping is not None or code == EXIT_STOPPED:
            why = "STOP is there" if run.stop_file.exists() else "its process was asked to stop"
            self._note(name, "preempted", why if self.stopping is None else signal.Signals(self.stopping).name)
        else:
            self._note(name, "failed", _cause(run.logs / LOG_NAME, code))
            if name not in self.tried_again:
                self.tried_again.add(name)
                self.waiting.append(child.run)
        return False

    def _process(self, arguments: Sequence[str], run: PlannedRun, log: IO[bytes], slot: int) -> subprocess.Popen[bytes]:
        ranks = run.cell.recipe.local_world_size
        threads = len(os.sched_getaffinity(0)) // (ranks * self.parallel_runs)
        environment = {"OMP_NUM_THREADS": str(max(1, threads))} | os.environ
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[slot * ranks : (slot + 1) * ranks])
        log.write(f"\n$ python -m pretrain {' '.join(arguments)}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "pretrain", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to the runner alone, which passes it on
            preexec_fn=_stop_with_parent,
        )

    def _note(self, name: str, state: State, cause: str = "", commit: str | None = None) -> None:
        before: RunState = self.states[name]
        self.states[name] = write_state(self.folder.run(name).path, before, state, cause, commit)
        self.live.note(name, self.states[name])

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hear) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks all to save and stop, one that comes a second later to leave at once."""
        now = time.monotonic()
        if self.stopping is None:
            self.stopping, self.stopped_at = number, now
        elif now - self.stopped_at > REPEAT_SECONDS:
            self.leaves_at_once = True

    def _pass_on_stop(self) -> None:
        for child in self.children:
            if self.leaves_at_once:
                child.process.kill()
            elif self.stopping is not None and not child.asked_to_stop:
                child.process.terminate()
                child.asked_to_stop = True

    def _kill(self) -> None:
        """After an error of the runner itself."""
        for child in self.children:
            child.process.terminate()
        for child in self.children:
            child.process.wait()

    def _summary(self) -> int:
        count = {state: [name for name, one in self.states.items() if one.state == state] for state in get_args(State)}
        parts = [f"{len(names)} {state}" for state, names in count.items() if names]
        say(f"{self.study.name}: {', '.join(parts)}; records: {self.folder.records_file}")
        for name in count["failed"]:
            one = self.states[name]
            say(f"  {name} failed {one.failures} time(s): {one.cause} (log: {self.folder.run(name).logs / LOG_NAME})")
        for name in count["preempted"]:
            say(f"  {name} stopped: {self.states[name].cause}; the same command goes on")
        if self.stopping is not None or count["preempted"]:
            return EXIT_STOPPED
        return 1 if count["failed"] else 0


def _gpus(plan: Sequence[PlannedRun], parallel_runs: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name; empty where runs need not be told, or have none.

    Raises:
        UserError: not enough for so many runs at a time.
    """
    import torch

    if all(run.cell.recipe.device == "cpu" for run in plan) or not torch.cuda.is_available() or parallel_runs == 1:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    needed = parallel_runs * max(run.cell.recipe.local_world_size for run in plan)
    if needed > len(gpus):
        raise UserError(
            f"--parallel-runs {parallel_runs} needs {needed} GPUs, one for each rank; this machine has {len(gpus)}"
        )
    return gpus


def _cause(log: Path, code: int) -> str:
    """What the process said last that reads like a reason."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    words = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].startswith(("error: ", "stopped: ", "$ "))), 0)
    said = " ".join(lines[words:]) if lines[words : words + 1] and not lines[words].startswith("$ ") else lines[-1]
    return f"exit code {code}: {said}"[:500]


def _stop_with_parent() -> None:
    """Linux: a training whose runner was killed saves and stops."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
