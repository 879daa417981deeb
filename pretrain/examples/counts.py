"""What the examples that save token counts, a file a rank, share."""

from __future__ import annotations

from pathlib import Path


def remove_older_parts(folder: Path, ranks: int) -> None:
    """Those that a save of more ranks left in ``folder``: they would be loaded among those of this one."""
    for part in folder.glob("token_counts_*.pt"):
        if int(part.stem.rpartition("_")[2]) >= ranks:
            part.unlink(missing_ok=True)  # all ranks try
