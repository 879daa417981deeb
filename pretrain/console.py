"""What the terminal shows: bars with an ETA on long work, and single lines. Nothing else prints."""

from __future__ import annotations

import sys
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
