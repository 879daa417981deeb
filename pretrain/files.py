"""Files that appear whole or not at all, their hashes, and one writer at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pretrain.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as of Lustre that is mounted without flock


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; it becomes ``path`` when the block ends, and is removed when it raises."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Put a folder's entries on disk: a file that was created or renamed in it is there after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def without_infinities(tree: Any) -> Any:
    """The same with None for numbers that JSON has no name for."""
    if isinstance(tree, dict):
        return {key: without_infinities(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [without_infinities(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def json_bytes(content: Any) -> bytes:
    """JSON as all files here have it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, json_bytes(content))


def read_json(path: Path) -> Any:
    """What a file holds; None: there is no such file, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_problem(folder: Path, name: str, sha256: str) -> str | None:
    """What is wrong with a file, if it cannot be read or has other bytes than those of ``sha256``."""
    try:
        right = file_sha256(folder / name) == sha256
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if right else f"{name} has another SHA-256 than the manifest says"


@contextlib.contextmanager
def folder_lock(folder: Path, doing: str, way_out: str = "wait until it ends", *, wait: bool = False) -> Iterator[bool]:
    """Hold the one lock of a folder. It ends with the process, however that ends.

    Args:
        doing: what the lock protects, for the message.
        wait: wait for the other holder; otherwise refuse.

    Yields:
        Whether it is held, see :func:`lock_file`.

    Raises:
        UserError: another process holds it, and ``wait`` is False.
    """
    with (folder / ".lock").open("w") as file:
        try:
            held = lock_file(file, f"{doing} {folder}", wait=wait)
        except BlockingIOError:
            raise UserError(f"another process is {doing} {folder}; {way_out}") from None
        yield held


def lock_file(file: IO[Any], doing: str, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed.

    Args:
        doing: what the lock protects, for the message.

    Returns:
        False where the file system has no locks. That is said, and it is up to people to start one process at a time.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"no lock on {file.name} ({error.strerror}): see to it that nothing else is {doing}", file=sys.stderr)
        return False
    return True


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
