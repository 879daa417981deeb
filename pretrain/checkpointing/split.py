"""How the tensor-parallel ranks of one replica share a parameter: cut it, and put it together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Split:
    """megatron-core's cut of one parameter, the same for every tensor-parallel degree.

    Attributes:
        shape: of the whole parameter.
        dim: it is cut along this dimension; None: every rank holds all of it.
        stride: blocks along ``dim`` of which every rank has its share. 2 for the first matrix of a gated linear unit:
            a rank holds ``[gate_r; up_r]``, and the whole is ``[gate; up]``. Rows of queries, keys and values are
            grouped by query group, so there it is 1.
    """

    shape: tuple[int, ...]
    dim: int | None
    stride: int = 1

    def part(self, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """What ``rank`` of ``size`` holds; as megatron-core's ``_initialize_affine_weight_cpu`` cuts it."""
        if self.dim is None:
            return whole
        return torch.cat(whole.chunk(self.stride * size, self.dim)[rank::size], self.dim)

    def part_shape(self, size: int) -> tuple[int, ...]:
        """The shape of one of ``size`` parts."""
        return tuple(length // size if dim == self.dim else length for dim, length in enumerate(self.shape))

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole, from the parts of all ranks in order."""
        if self.dim is None:
            return parts[0]
        blocks = [part.chunk(self.stride, self.dim) for part in parts]
        return torch.cat([of_rank[block] for block in range(self.stride) for of_rank in blocks], self.dim)


def parameter_splits(model: torch.nn.Module, tensor_parallel_size: int) -> dict[str, Split]:
    """The splits of all parameters of one rank's model, from the marks that megatron-core leaves on them."""
    splits = {}
    for name, parameter in model.named_parameters():
        shape = list(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO 3 the parameter itself is empty
        if getattr(parameter, "tensor_model_parallel", False):
            dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
            shape[dim] *= tensor_parallel_size
            splits[name] = Split(tuple(shape), dim, stride)
        else:
            splits[name] = Split(tuple(shape), None)
    return splits
