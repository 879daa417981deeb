"""What a running study shows: a table that is drawn over itself on a terminal, and lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence

from pretrain.cluster.run_records import tail_records
from pretrain.console import age_in_words, say, table_lines
from pretrain.study.plan import PlannedRun
from pretrain.study.state import RunState
from pretrain.study.study_folder import StudyFolder

TERMINAL_SECONDS = 1.0
LINE_SECONDS = 60.0
HEAD = ("run", "state", "step", "loss", "tokens/s", "left")
TO_THE_RIGHT = HEAD[2:]


class LiveTable:
    """Progress of runs, read from their metrics."""

    def __init__(self, folder: StudyFolder, plan: Sequence[PlannedRun]) -> None:
        self._folder, self._plan = folder, plan
        self._terminal = sys.stdout.isatty()
        self._drawn_at, self._lines = time.monotonic(), 0
        self._began, self._done_before = time.monotonic(), self._work()

    def note(self, name: str, state: RunState) -> None:
        """A run has come into another state; said as a line where there is no table."""
        if not self._terminal:
            say(f"{name}: {state.state}{state.cause and f': {state.cause}'}")

    def draw(self, states: Mapping[str, RunState]) -> None:
        """Now and then."""
        now = time.monotonic()
        if now - self._drawn_at < (TERMINAL_SECONDS if self._terminal else LINE_SECONDS):
            return
        self._drawn_at = now
        if self._terminal:
            self._draw(states)
        else:
            say(self._progress(states))

    def end(self, states: Mapping[str, RunState]) -> None:
        """The last table."""
        if self._terminal:
            self._draw(states)

    def _draw(self, states: Mapping[str, RunState]) -> None:
        columns, rows = shutil.get_terminal_size()
        shown = [run for run in self._plan if states[run.cell.name].state == "running"]
        others = [run for run in self._plan if states[run.cell.name].state != "running"]
        shown += others[: max(0, rows - 4 - len(shown))]
        order = {run.cell.name: place for place, run in enumerate(self._plan)}
        shown.sort(key=lambda run: order[run.cell.name])
        lines = [*table_lines(HEAD, [self._row(run, states[run.cell.name]) for run in shown], TO_THE_RIGHT)]
        lines.append(self._progress(states))
        up = f"\033[{self._lines}A" if self._lines else ""
        sys.stdout.write(up + "".join(f"\033[2K{line[: columns - 1]}\n" for line in lines) + "\033[J")
        sys.stdout.flush()
        self._lines = len(lines)

    def _row(self, run: PlannedRun, state: RunState) -> tuple[str, ...]:
        steps = run.cell.recipe.batch.train_steps
        records, _ = tail_records(self._folder.run(run.cell.name).metrics_file)
        last = records[-1] if records else {}
        step, loss, rate = last.get("step", 0), last.get("loss"), last.get("tokens_per_second")
        left = ""
        if state.state == "running" and rate:
            left = age_in_words((steps - step) * run.cell.recipe.tokens_per_step / rate)
        return (
            run.cell.name,
            state.state,
            f"{steps if state.state == 'done' else step:,}/{steps:,}",
            "" if loss is None else f"{loss:.3f}",
            "" if rate is None or state.state != "running" else f"{rate:,.0f}",
            left,
        )

    def _progress(self, states: Mapping[str, RunState]) -> str:
        """How many are done, and when all will be at the rate of this session; work is counted in FLOPs."""
        done = sum(state.state == "done" for state in states.values())
        running = sum(state.state == "running" for state in states.values())
        failed = sum(state.state == "failed" for state in states.values())
        work, whole = self._work(), sum(run.flops for run in self._plan)
        rate = (work - self._done_before) / max(1e-9, time.monotonic() - self._began)
        left = f"about {age_in_words((whole - work) / rate)} left" if rate > 0 else "no estimate yet"
        words = f"{done} of {len(self._plan)} done, {running} running" + (f", {failed} failed" if failed else "")
        return f"{words}; {work / whole:.0%} of the work; {left}"

    def _work(self) -> float:
        """FLOPs of the steps that are recorded."""
        total = 0.0
        for run in self._plan:
            records, _ = tail_records(self._folder.run(run.cell.name).metrics_file)
            step = records[-1]["step"] if records else 0
            total += run.flops * min(1.0, step / run.cell.recipe.batch.train_steps)
        return total
