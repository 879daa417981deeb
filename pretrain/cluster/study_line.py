"""One run of a study: ``python -m pretrain.cluster.study_line FILE INDEX``, for ``slurm/study.sbatch``.

Prints, a line each, the folder of the run, the recipe, and its overrides.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import EXIT_USER_ERROR, UserError
from pretrain.recipe_io import load_recipe


def main(arguments: Sequence[str]) -> int:
    try:
        file, index = arguments
        words = words_of_line(Path(file), index)
        print(load_recipe(words[0], words[1:]).run_folder, *words, sep="\n")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def words_of_line(file: Path, index: str) -> list[str]:
    """The recipe and the overrides of a line; the first is 1, blank lines and comments are not counted.

    Raises:
        UserError: no such file or line, or a quote that does not end.
    """
    if not index.isdigit():
        raise UserError("SLURM_ARRAY_TASK_ID is not set: submit with sbatch --array=1-N slurm/study.sbatch FILE")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the study {str(file)!r}: {error}") from error
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not 1 <= int(index) <= len(lines):
        raise UserError(f"{file} has {len(lines)} run(s), and this is job {index} of the array: --array=1-{len(lines)}")
    try:
        return shlex.split(lines[int(index) - 1])
    except ValueError as error:
        raise UserError(f"run {index} of {file}, {lines[int(index) - 1]!r}: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
