"""What DeepSpeed saves, on its way to disk: hashed by the rank that writes it, and synced."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from pretrain.files import sync_folder

CHUNK_BYTES = 2**24


class CheckpointFiles(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's checkpoint engine, for the files of one rank.

    An error is kept instead of raised: DeepSpeed saves between collectives, where a rank that leaves would let the
    others wait for ever. The saver tells all ranks.

    Attributes:
        background: keep the bytes in memory until :meth:`write_pending`.
        written: name in the checkpoint -> bytes and sha256.
        error: "PATH: CAUSE" of the first file that could not be written.
    """

    def __init__(self, *, background: bool) -> None:
        super().__init__()
        self.background = background
        self.begin()

    def begin(self) -> None:
        """Forget the last checkpoint."""
        self.written: dict[str, dict[str, Any]] = {}
        self.error: str | None = None
        self._pending: list[tuple[Path, io.BytesIO]] = []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: the first rank has made the folder, where a failure can be told to all ranks."""

    def save(self, state_dict: Any, path: str) -> None:
        if self.background:
            memory = io.BytesIO()
            torch.save(state_dict, memory)
            self._pending.append((Path(path), memory))
        else:
            self._write(Path(path), state_dict)

    def write_pending(self) -> None:
        """Write what :meth:`save` kept; may run in a thread."""
        while self._pending:
            path, memory = self._pending.pop(0)
            self._write(path, memory)

    def _write(self, path: Path, content: Any) -> None:
        if self.error is not None:
            return
        try:
            with path.open("xb") as raw:
                file = _HashedFile(raw)
                if isinstance(content, io.BytesIO):
                    view = content.getbuffer()
                    for start in range(0, len(view), CHUNK_BYTES):
                        file.write(view[start : start + CHUNK_BYTES])
                else:
                    torch.save(content, file)  # type: ignore[arg-type]  # it only writes and flushes
                if file.error is not None:
                    raise file.error
                raw.flush()
                os.fsync(raw.fileno())
            sync_folder(path.parent)
            self.written[path.name] = {"bytes": file.bytes, "sha256": file.sha256.hexdigest()}
        except OSError as error:
            self.error = f"{path}: {error.strerror or error}"


class _HashedFile:
    """A file that torch.save writes to: it reports nothing but a RuntimeError of its own, so the cause is kept here."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        self.sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        pass
