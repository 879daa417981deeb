"""What a job of a study says of its run, for ``slurm/study.sbatch``.

``python -m pretrain.study.job begin RUN``: it is running. ``steps RUN``: prints the checkpoints that are to be
evaluated. ``end RUN CODE``: it is done, stopped or failed. A run that no study planned has no ``state.json``: its
newest checkpoint is evaluated, and nothing is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.checkpointing.folder import checkpoints_in, step_of
from pretrain.cluster.batch import ENDING
from pretrain.cluster.endings import STOPPED
from pretrain.cluster.job import incarnation_of
from pretrain.errors import EXIT_USER_ERROR, UserError
from pretrain.run_folder import RunFolder
from pretrain.study.records import write_records
from pretrain.study.state import STATE_FILE, read_state, write_state
from pretrain.study.study_folder import StudyFolder, git_commit, is_finished, unevaluated


def main(arguments: Sequence[str]) -> int:
    word, path, *code = arguments
    run = RunFolder(Path(path))
    try:
        if not (run.path / STATE_FILE).exists():
            if word == "steps":
                print(*[step_of(checkpoint) for checkpoint in checkpoints_in(run.checkpoints)[:1]])
        elif word == "begin":
            write_state(run.path, read_state(run.path), "running", commit=git_commit())
        elif word == "steps":
            print(*unevaluated(run, run.saved_recipe(), _evaluate(run)))
        else:
            _end(run, int(code[0]))
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _evaluate(run: RunFolder) -> str:
    return str(StudyFolder(run.path.parent).plan()["evaluate"])


def _end(run: RunFolder, code: int) -> None:
    before = read_state(run.path)
    if code == 0 and is_finished(run, run.saved_recipe(), _evaluate(run)):
        write_state(run.path, before, "done")
        write_records(run.path.parent)
        return
    reason = _reason(run, code)
    cause = f"exit code {code}" + (f": {reason}" if reason else "")
    write_state(run.path, before, "preempted" if code == STOPPED else "failed", cause)


def _reason(run: RunFolder, code: int) -> str:
    """What the last part of this start of the job, training or an evaluation, said of its end; empty if nothing."""
    endings = sorted(run.logs.glob(f"{incarnation_of()}*/{ENDING}"), key=lambda path: path.stat().st_mtime_ns)
    said = json.loads(endings[-1].read_text(encoding="utf-8")) if endings else {}
    return str(said.get("reason", "")) if said.get("code") == code else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
