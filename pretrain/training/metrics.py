"""``metrics.jsonl``: one record a logged step. Units are in the names, and how each is reduced is said here.

step                        steps done, those that were skipped included
tokens                      targets trained on so far, all ranks
loss                        nats per token, mean over the global batch of this step
learning_rate               of this step
grad_norm                   global, before clipping
tokens_per_second           all ranks, mean since the last record
step_seconds                mean since the last record
mfu                         share of the devices' dense bf16 peak, where it is known
rare_fraction               share of the vocabulary that is rare in this step, and so gated (objective.rare_rows)

Every reporting.geometry_every_steps, and after the last step; the same on any layout:

isotropy, isotropy_unit_norm, mean_cosine, mean_shift, effective_rank, top_singular_share, mean_row_norm
                            of the output embedding's rows after the step (pretrain.evaluation.geometry)
seen_rows                   the same of the rows whose ids occur in the train shards; absent where all do
row_norm_by_decile          mean norm of the output embedding's rows by training count: 1 is the most frequent tenth of
                            the ids that occur, 10 the rarest; never_seen the ids that do not
g1_by_decile, g2_by_decile  mean gates of this step; 1 is open
gated_share                 what gates took from this step's gradient of the logits, over the global batch: of_all and
                            of_rare, what pushes rare rows away (agg.probe); frozen rows count as their gates say
loss_by_group               nats per token of this step's global batch by frequency group; total is loss

Every reporting.validate_every_steps, and after the last step:

validation_loss             nats per token, mean over the valid split or its first sequences
validation_perplexity       the same by frequency group

When it happens:

skipped                     of a step that was not trained on, instead of loss, learning_rate and grad_norm: reason,
                            loss and grad_norm; after a rollback also back_to_step, whose records up to here are gone
                            (pretrain.training.spikes)
checkpoint_blocked_seconds  that training stood still for the last save
checkpoint_disk_seconds     from its begin until it was on disk and named; in the first record after that
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pretrain.cluster.incarnation import leave_if_fenced
from pretrain.errors import UserError
from pretrain.files import without_infinities, write_text


class MetricsWriter:
    """Appends records; a run that goes on drops what was written after its checkpoint.

    Args:
        path: the JSON lines.
        done_steps: the step a run continues from.
        tensorboard_folder: where to mirror numbers, if TensorBoard is installed; None: nowhere.
    """

    def __init__(self, path: Path, done_steps: int, tensorboard_folder: Path | None) -> None:
        self._path, self._board_folder = path, tensorboard_folder
        self._open(done_steps)

    def _open(self, done_steps: int) -> None:
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(self._path, "".join(line + "\n" for line in lines if _step_of(line) <= done_steps))
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = None
        if self._board_folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(self._board_folder), purge_step=done_steps + 1)

    def go_back(self, done_steps: int) -> None:
        """Drop the records after this step, as its checkpoint was loaded again."""
        self.close()
        self._open(done_steps)

    def write(self, record: dict[str, Any]) -> None:
        leave_if_fenced(self._path.parent)
        record = without_infinities(record)
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # tries once more to write
                self._file.close()
            raise UserError(f"cannot write to {self._file.name}: {error.strerror}") from error
        if self._board is not None:
            for name, value in record.items():
                parts = value.items() if isinstance(value, dict) else [("", value)]
                for part, number in parts:
                    if isinstance(number, (int, float)):
                        self._board.add_scalar(f"{name}/{part}".rstrip("/"), number, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records by step; of a step that was repeated, the last one.

    Raises:
        UserError: the file cannot be read, or a line of it is not a record. A torn last line, as a crash leaves it,
            is passed over.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the run was stopped while it wrote
                break
            raise UserError(f"{path}:{number}: not a JSON record: {error.msg}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{path}:{number}: not a JSON record with a whole-number step")
        by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def _step_of(line: str) -> float:
    """The step of a record; infinite for a line that a crash tore."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
