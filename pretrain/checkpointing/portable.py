"""A checkpoint of any layout, read as the tensors of the unsplit model. Needs no process group, GPU or engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpointing.deepspeed_files import DeepSpeedFiles, Kind
from pretrain.checkpointing.folder import check_whole, rank_file
from pretrain.checkpointing.split import Split
from pretrain.files import write_json

PARAMETERS_FILE = "parameters.json"


def write_parameters(folder: Path, splits: Mapping[str, Split], optimizer_order: Sequence[str]) -> None:
    """Beside DeepSpeed's files, what they do not tell.

    Args:
        splits: of all parameters, in the model's order.
        optimizer_order: under ZeRO 0 the names in the order of Adam's states, which are saved by number; else empty.
    """
    parameters = {name: dataclasses.asdict(split) for name, split in splits.items()}
    write_json(folder / PARAMETERS_FILE, {"parameters": parameters, "optimizer_order": list(optimizer_order)})


class PortableCheckpoint:
    """Tensors of the unsplit model, read one at a time.

    Args:
        manifest: of a checkpoint that was verified; None: it is read, and sizes are compared.

    Attributes:
        layout: of the ranks that saved, as in the manifest.
        step, consumed_samples, consumed_tokens: progress of the run.
        adam_step: updates that Adam has made.

    Raises:
        DamagedCheckpoint: the checkpoint is not whole.
        UserError: it is one that loads only on the layout that saved it.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any] | None = None) -> None:
        manifest = manifest or check_whole(folder)
        described = json.loads((folder / PARAMETERS_FILE).read_text(encoding="utf-8"))
        self.folder = folder
        self.layout: dict[str, Any] = manifest["layout"]
        self.step: int = manifest["step"]
        self.consumed_samples: int = manifest["consumed_samples"]
        self.consumed_tokens: int = manifest["consumed_tokens"]
        self.splits = {
            name: Split(tuple(entry["shape"]), entry["dim"], entry["stride"])
            for name, entry in described["parameters"].items()
        }
        self._files = DeepSpeedFiles(folder, self.layout, described["optimizer_order"])
        self.adam_step = self._files.adam_step()

    def names(self) -> list[str]:
        """All parameters, in the model's order; a tied embedding is one."""
        return list(self.splits)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the unsplit parameter, with the rows that pad the vocabulary."""
        return self.splits[name].shape

    def tensor(self, name: str, kind: Kind = "weight") -> torch.Tensor:
        """A whole parameter in fp32, also under bf16, or its Adam state. Do not write to it: it may be the file."""
        return self.part(name, kind, 0, 1)

    def part(self, name: str, kind: Kind, rank: int, size: int) -> torch.Tensor:
        """The same, as ``rank`` of ``size`` tensor-parallel ranks holds it."""
        split, saved_size = self.splits[name], self.layout["tensor_model_parallel_size"]
        if size == saved_size:
            return self._saved_part(name, kind, rank)
        holders = saved_size if split.dim is not None else 1
        return split.part(split.merge([self._saved_part(name, kind, r) for r in range(holders)]), rank, size)

    def rank_states(self) -> Iterator[dict[str, Any]]:
        """What each rank saved beside the engine (its part of the token counts), in rank order, one at a time."""
        for rank in range(self.layout["world_size"]):
            yield torch.load(self.folder / rank_file(rank), map_location="cpu", weights_only=False)["rank_state"]

    def _saved_part(self, name: str, kind: Kind, rank: int) -> torch.Tensor:
        shape = torch.Size(self.splits[name].part_shape(self.layout["tensor_model_parallel_size"]))
        return self._files.flat(name, kind, rank)[: shape.numel()].view(shape)
