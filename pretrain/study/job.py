"""What a job of a study says of its run, for ``slurm/study.sbatch``.

``python -m pretrain.study.job begin RUN``: it is running. ``steps RUN``: prints the checkpoints that are to be
evaluated. ``end RUN CODE``: it is done, stopped or failed. A run that no study planned has no ``state.json``: its
newest checkpoint is evaluated, and nothing is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.checkpointing.folder import checkpoints_in, step_of
from pretrain.cluster.endings import STOPPED
from pretrain.cluster.job import read_events
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
    before, said = read_state(run.path), [event for event in read_events(run.jobs_file) if event["event"] == "end"]
    if code == 0 and is_finished(run, run.saved_recipe(), _evaluate(run)):
        write_state(run.path, before, "done")
        write_records(run.path.parent)
        return
    reason = str(said[-1].get("reason", "")) if said and said[-1].get("code") == code else ""
    cause = f"exit code {code}" + (f": {reason}" if reason else "")
    write_state(run.path, before, "preempted" if code == STOPPED else "failed", cause)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
