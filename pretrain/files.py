"""Writing files so that they are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pretrain.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``; a crash leaves the old file or the new one."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``; a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: Path, tree: Any) -> None:
    write_atomically(path, json.dumps(tree, indent=2) + "\n")


def make_folder(path: Path) -> Path:
    """Create a folder that must be writable.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"the folder {path} is not writable")
    return path
