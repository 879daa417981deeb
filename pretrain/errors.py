"""The one error family of what a user can put right: a recipe, a corpus, a checkpoint, a layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

EXIT_USER_ERROR = 2


class UserError(Exception):
    """Input that cannot be used. The message names the thing, the value and the way out.

    The command line prints it without a traceback and exits with ``EXIT_USER_ERROR``.
    """

    on_all_ranks = False  # agreed on by all ranks, the same: the first one says it
    on_its_node = False  # each rank of a node finds it by itself, the same: the first one of each node says it


class RecipeError(UserError):
    """Everything that is wrong with a recipe, in one message."""

    on_its_node = True

    def __init__(self, problems: Sequence[str], where: str = "the recipe"):
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{where} has {count}:\n{lines}")


class PreflightError(UserError):
    """Nodes that cannot train together: found before the first step."""

    on_all_ranks = True


class CheckpointError(UserError):
    """A checkpoint that cannot be saved or loaded."""

    on_its_node = True


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that does not verify.

    Attributes:
        problems: a line for each bad file.
    """

    on_its_node = False  # one rank alone may fail to read its manifest

    def __init__(self, checkpoint: Path, problems: Sequence[str], way_out: str = ""):
        self.problems = list(problems)
        super().__init__(f"{checkpoint} is damaged: {'; '.join(self.problems)}{way_out and '. '}{way_out}")


class SpikeError(RuntimeError):
    """A step that must not be trained on. Training stops on all ranks before the update."""


class NonFiniteError(SpikeError):
    """A loss or gradient that is not finite."""
