"""The safetensors files of a Hugging Face folder: written as tensors come, read by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import UserError
from pretrain.files import write_json

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def missing_packages(error: ImportError) -> UserError:
    return UserError(
        f"Hugging Face folders need packages that are not installed ({error}): pip install -e '.[huggingface]' in the "
        "repository"
    )


class TensorWriter:
    """Collects tensors, and writes a file whenever the next one would make it too large.

    Args:
        max_file_bytes: a larger tensor gets a file of its own.

    Attributes:
        tensors, total_bytes: how many were added, and their bytes together.
    """

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        self._folder, self._max_file_bytes = folder, max_file_bytes
        self.total_bytes = 0
        self._file_of: dict[str, int] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._written = 0

    @property
    def tensors(self) -> int:
        return len(self._file_of)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The tensor must have memory of its own."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_file_bytes:
            self._write()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self._file_of[name] = self._written

    def finish(self) -> list[str]:
        """Names of the files: one alone is ``model.safetensors``; several are numbered and get an index."""
        self._write()
        names = [SINGLE_FILE]
        if self._written > 1:
            names = [f"model-{number:05d}-of-{self._written:05d}.safetensors" for number in range(1, self._written + 1)]
            weight_map = {tensor: names[number] for tensor, number in self._file_of.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self._folder / INDEX_FILE, index)
        for number, name in enumerate(names):
            self._part(number).rename(self._folder / name)
        return names

    def _write(self) -> None:
        try:
            from safetensors import SafetensorError
            from safetensors.torch import save_file
        except ImportError as error:
            raise missing_packages(error) from error
        path = self._part(self._written)
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{path} cannot be written: {error}") from error
        self._pending, self._pending_bytes = {}, 0
        self._written += 1

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"


class HuggingFaceFolder:
    """A folder with ``config.json`` and safetensors; tensors stay on disk until they are asked for.

    Raises:
        UserError: it is not such a folder, a file of it is missing or damaged, or packages are missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise missing_packages(error) from error
        self.path = folder
        self.config: dict[str, Any] = self._json("config.json")
        names = self._indexed_files() if (folder / INDEX_FILE).exists() else [SINGLE_FILE]
        self._file_of: dict[str, Any] = {}
        for name in names:
            try:
                file = safe_open(folder / name, framework="pt")
            except (OSError, ValueError, SafetensorError) as error:  # ValueError: no file can have that name
                raise UserError(f"{str(folder / name)!r} cannot be read as safetensors: {error}") from error
            self._file_of |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None: there is no such tensor."""
        return tuple(self._file_of[name].get_slice(name).get_shape()) if name in self._file_of else None

    def dtype(self, name: str) -> str:
        """As safetensors calls it."""
        return str(self._file_of[name].get_slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """In the type it was written in."""
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def _indexed_files(self) -> list[str]:
        weight_map = self._json(INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{self.path / INDEX_FILE} is damaged: its weight_map is not an object")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
                raise UserError(
                    f"{self.path / INDEX_FILE} is damaged: its weight_map has {name!r} for {tensor!r}, and must have "
                    "the name of a file beside it"
                )
        return sorted(set(weight_map.values()))

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{self.path} is not a Hugging Face folder: {name}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} is damaged: it holds {type(content).__name__}, not an object")
        return content
