"""What the terminal shows: bars with an ETA on long work, and single lines. Nothing else prints."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TextIO

from tqdm import tqdm


def bar(total: int | None, description: str, unit: str, *, show: bool = True, initial: int = 0) -> tqdm[Any]:
    """A progress bar on stderr. In a file or a pipe it writes a line every 15 s at most, not a stream of them.

    What is set beside it should not draw it: ``set_postfix_str(..., refresh=False)``.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=f" {unit}",
        unit_scale=unit == "bytes",
        disable=not show,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        mininterval=0.2 if terminal else 15.0,
        maxinterval=15.0,
        smoothing=0.1,
        file=sys.stderr if terminal else _Lines(sys.stderr),
    )


class _Lines:
    """A bar draws itself over what it drew before; in a file each drawing is a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if line := text.strip():
            self._file.write(line + "\n")

    def flush(self) -> None:
        self._file.flush()


def say(text: str) -> None:
    """One line on stdout, without tearing a bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]], to_the_right: Collection[str]) -> Iterator[str]:
    """Columns under their names; those that are named in ``to_the_right`` end there, as numbers do."""
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        signs = (">" if name in to_the_right else "<" for name in head)
        yield "  ".join(f"{cell:{sign}{width}}" for sign, cell, width in zip(signs, cells, widths, strict=True))


def bytes_in_words(count: int) -> str:
    """``1.23 GB``, in powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def age_in_words(seconds: float) -> str:
    """``3 h``."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
