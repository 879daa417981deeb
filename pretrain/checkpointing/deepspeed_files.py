"""What DeepSpeed wrote into a checkpoint, by parameter: fp32 weights and Adam's state, before any merging over ranks
that are tensor-parallel.

With T tensor-parallel and D data-parallel ranks (t and d are one of them) there are

    ZeRO 0     mp_rank_t_model_states.pt: weights, and Adam's state of each parameter by number
    ZeRO 1, 2  mp_rank_t_model_states.pt: names and shapes, in the order in which each group of parameters was
               flattened; zero_pp_rank_d_mp_rank_t_optim_states.pt: the d-th of D equal pieces of each group
    ZeRO 3     zero_pp_rank_d_mp_rank_t_*.pt: each parameter in D equal pieces, padded, and joined in sub-groups

DeepSpeed's own readers of the same are ``utils/zero_to_fp32.py`` and ``checkpoint/ds_to_universal.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pretrain.errors import UserError

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]

OPTIMIZERS = (  # whose files are understood
    "AdamW",  # ZeRO 0 in fp32
    "FP16_UnfusedOptimizer",  # ZeRO 0 in bf16
    "BF16_Optimizer",  # ZeRO 1 in bf16
    "DeepSpeedZeroOptimizer",  # ZeRO 1 in fp32, ZeRO 2
    "DeepSpeedZeroOptimizer_Stage3",
)


@dataclass(frozen=True)
class _Place:
    """Where a parameter is: which flat group, from which element on, and how many. Of each rank's piece under ZeRO 3,
    of all pieces together under ZeRO 1 and 2."""

    group: int
    begin: int
    numel: int


class DeepSpeedFiles:
    """Files are mapped, not read: what is not asked for stays on disk.

    Args:
        layout: from the manifest.
        optimizer_order: names of the numbers that Adam's states have under ZeRO 0.

    Raises:
        UserError: the state was kept on NVMe, or by an optimizer that is not known here.
    """

    def __init__(self, folder: Path, layout: dict[str, Any], optimizer_order: Sequence[str]) -> None:
        if layout["optimizer"] not in OPTIMIZERS or (folder / "offloaded_tensors").exists():
            where = "NVMe" if (folder / "offloaded_tensors").exists() else f"DeepSpeed's {layout['optimizer']}"
            raise UserError(f"{folder} holds optimizer state of {where}: it loads on the layout that saved it only")
        self._folder = folder
        self._stage, self._bf16, self._ranks = layout["zero_stage"], layout["bf16"], layout["data_parallel_size"]
        self._saved_without_padding = layout["optimizer"] == "DeepSpeedZeroOptimizer"
        self._number = {name: number for number, name in enumerate(optimizer_order)}
        self._open: dict[str, dict[str, Any]] = {}
        self._known_places: dict[int, dict[str, _Place]] = {}

    def flat(self, name: str, kind: Kind, tensor_parallel_rank: int) -> torch.Tensor:
        """One tensor-parallel rank's part of a parameter, fp32, flattened; ZeRO 3 may pad the end."""
        if kind != "weight" and not self._adam_states(tensor_parallel_rank, 0):  # before the first step
            return torch.zeros_like(self.flat(name, "weight", tensor_parallel_rank))
        if self._stage == 0:
            return self._unsharded(name, kind, tensor_parallel_rank).flatten()
        pieces = self._even_pieces if self._stage == 3 else self._consecutive_pieces
        return torch.cat(list(pieces(name, kind, tensor_parallel_rank)))

    def adam_step(self) -> int:
        """Updates that Adam has made, the same for every parameter."""
        states = self._adam_states(0, 0)
        return int(states[0]["step"]) if states else 0

    def _unsharded(self, name: str, kind: Kind, tensor_parallel_rank: int) -> torch.Tensor:
        saved, number = self._model_file(tensor_parallel_rank), self._number[name]
        found: torch.Tensor
        if kind != "weight":
            found = self._adam_states(tensor_parallel_rank, 0)[number][kind]
        elif self._bf16:
            found = [master for group in saved["optimizer"]["fp32_groups"] for master in group][number]
        else:
            found = saved["module"][name]
        return found.detach()

    def _consecutive_pieces(self, name: str, kind: Kind, tensor_parallel_rank: int) -> Iterator[torch.Tensor]:
        """ZeRO 1 and 2: a group is cut evenly, so a parameter may lie on one rank or on several."""
        place = self._places(tensor_parallel_rank)[name]
        for rank in range(self._ranks):
            flat, size = self._flat_group(place.group, kind, tensor_parallel_rank, rank)
            low, high = max(place.begin, rank * size), min(place.begin + place.numel, (rank + 1) * size)
            if low < high:
                yield flat[low - rank * size : high - rank * size]

    def _even_pieces(self, name: str, kind: Kind, tensor_parallel_rank: int) -> Iterator[torch.Tensor]:
        """ZeRO 3: every rank has a piece of the same length, the last ones padded."""
        place = self._places(tensor_parallel_rank)[name]
        for rank in range(self._ranks):
            flat, _ = self._flat_group(place.group, kind, tensor_parallel_rank, rank)
            yield flat[place.begin : place.begin + place.numel]

    def _flat_group(self, group: int, kind: Kind, tensor_parallel_rank: int, rank: int) -> tuple[torch.Tensor, int]:
        """One rank's piece of a flat group, and its length with padding, which may not have been saved."""
        saved = self._optimizer_file(tensor_parallel_rank, rank)
        weights = saved["fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"][group].detach()
        size = len(weights) + (saved["group_paddings"][group] if self._saved_without_padding else 0)
        if kind == "weight":
            return weights, size
        return self._adam_states(tensor_parallel_rank, rank)[group][kind], size

    def _places(self, tensor_parallel_rank: int) -> dict[str, _Place]:
        if tensor_parallel_rank not in self._known_places:
            self._known_places[tensor_parallel_rank] = dict(self._find_places(tensor_parallel_rank))
        return self._known_places[tensor_parallel_rank]

    def _find_places(self, tensor_parallel_rank: int) -> Iterator[tuple[str, _Place]]:
        paddings = self._optimizer_file(tensor_parallel_rank, 0).get("param_alignment_paddings")
        for group, shapes in enumerate(self._model_file(tensor_parallel_rank)["param_shapes"]):
            begin = 0
            for position, (name, shape) in enumerate(shapes.items()):
                numel = torch.Size(shape).numel()
                if self._stage == 3:
                    numel = -(-numel // self._ranks)
                yield name, _Place(group, begin, numel)
                begin += numel + (paddings[group][position] if paddings else 0)

    def _adam_states(self, tensor_parallel_rank: int, rank: int) -> dict[int, dict[str, Any]]:
        """By number of the parameter (ZeRO 0) or of the flat group; empty before the first step."""
        if self._stage == 0:
            saved = self._model_file(tensor_parallel_rank)["optimizer"]
        else:
            saved = self._optimizer_file(tensor_parallel_rank, rank)
        keys = {"base_optimizer_state", "optimizer_state_dict"} & saved.keys()  # none: it is torch's own state dict
        states: dict[int, dict[str, Any]] = (saved[keys.pop()] if keys else saved)["state"]
        return states

    def _model_file(self, tensor_parallel_rank: int) -> dict[str, Any]:
        prefix = "zero_pp_rank_0_" if self._stage == 3 else ""
        return self._mapped(f"{prefix}mp_rank_{tensor_parallel_rank:02d}_model_states.pt")

    def _optimizer_file(self, tensor_parallel_rank: int, rank: int) -> dict[str, Any]:
        prefix = "bf16_" if self._bf16 else ""
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_{tensor_parallel_rank:02d}_optim_states.pt"
        optimizer: dict[str, Any] = self._mapped(name)["optimizer_state_dict"]
        return optimizer

    def _mapped(self, name: str) -> dict[str, Any]:
        if name not in self._open:
            self._open[name] = torch.load(self._folder / name, map_location="cpu", mmap=True, weights_only=False)
        return self._open[name]
