"""What is done to rows of the output embedding around the optimizer's step, wherever DeepSpeed keeps their parts.

Every ZeRO stage steps torch's AdamW on flat float32 tensors, and :func:`optimizer_fragments` tells which elements of
the embedding lie where in them: a rank may hold any run of elements, from the middle of a row to the middle of another.
What is needed over all rows is a sum of each column, so one reduction of size D. The model's own weights are made from
the float32 ones after the step, by DeepSpeed. No state is added to Adam's, so checkpoints are as they are without.

Letters: D hidden size, V vocabulary, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from agg import VocabShard
from pretrain.checkpointing.fragments import optimizer_fragments
from pretrain.errors import UserError

FrozenRows = Callable[[], torch.Tensor | None]


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of this rank's vocabulary rows, flattened; those that only pad left out.

    Attributes:
        flat: what Adam updates; the piece begins there at ``offset``.
    """

    start: int
    numel: int
    flat: torch.Tensor
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The piece's part [numel] of ``flat`` or of a state of the same shape."""
        return flat.detach().view(-1)[self.offset : self.offset + self.numel]


class RowUpdates:
    """Couples, centers and freezes rows; what is asked for happens in each optimizer step from now on.

    Args:
        couples: Coupled Adam (arXiv 2502.08441): the second moments ``v_k`` of the rows are replaced by their mean
            over the vocabulary, ``1 / V sum_k v_k`` [D], where they scale the update; Adam's state keeps those of the
            rows, as the mean of moving averages is the moving average of the mean. Tied, all of the embedding is
            coupled; untied, the output side, whose updates the paper is about.
        centers: mu-centering (arXiv 2601.02031): ``w_k -= 1 / V sum_j w_j`` after the update. Tied, the input
            embedding is the same matrix and is centered with it.
        frozen_rows: bool [V_local], rows that this step leaves as they are, input side included if tied: they get no
            gradient, and neither momentum nor weight decay moves them. What it returns may be None: none in this step.
        device: for reductions; offloaded tensors are elsewhere.

    Raises:
        UserError: DeepSpeed keeps its tensors where they cannot be found (NVMe).
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        shard: VocabShard,
        device: torch.device,
        *,
        couples: bool,
        centers: bool,
        frozen_rows: FrozenRows | None,
    ) -> None:
        weight = engine.module.output_embedding
        self._width = engine.module.config.hidden_size
        self._shard, self._device = shard, device
        self._couples, self._centers = couples, centers
        self._frozen_rows: FrozenRows = frozen_rows or (lambda: None)
        self._replicated = not engine.zero_optimization()
        try:
            self._pieces = list(_pieces_of(engine, engine.param_names[weight], shard.real * self._width))
        except UserError as error:
            asked = "optimizer.couple_embeddings, objective.center_rows and rare rows that are frozen"
            raise UserError(f"{asked} do not work with this sharding: {error}") from error
        self._stepping: list[tuple[Piece, dict[str, Any], torch.Tensor]] = []
        engine.basic_optimizer.register_step_pre_hook(self._before)
        engine.basic_optimizer.register_step_post_hook(self._after)
        if frozen_rows is not None:
            weight.register_hook(self._without_frozen)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """DeepSpeed may step one group of parameters at a time; all ranks the same one."""
        keeps = self._couples or self._frozen_rows() is not None
        self._stepping = [
            (piece, group, piece.of(piece.flat).clone() if keeps else piece.flat)
            for group in optimizer.param_groups
            for piece in self._pieces
            if any(piece.flat is parameter for parameter in group["params"])
        ]

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._couples:
            self._couple(optimizer)
        frozen = self._frozen_rows()
        if frozen is not None:
            for piece, _group, old in self._stepping:
                values = piece.of(piece.flat)
                values.copy_(torch.where(self._elements(piece, frozen), old, values))
        if self._centers:
            mean = self._mean([(piece, piece.of(piece.flat)) for piece, _group, _old in self._stepping])
            for piece, _group, _old in self._stepping:
                for part, mean_part in _by_column(piece.of(piece.flat), piece.start, mean):
                    part -= mean_part
        self._stepping = []

    def _couple(self, optimizer: torch.optim.Optimizer) -> None:
        """Take Adam's step back where it was, and make it again with the mean of the second moments."""
        states, pieces = optimizer.state, [piece for piece, _group, _old in self._stepping]
        mean = self._mean([(piece, piece.of(states[piece.flat]["exp_avg_sq"])) for piece in pieces])
        for piece, group, old in self._stepping:
            state, (beta1, beta2), rate = states[piece.flat], group["betas"], group["lr"]
            steps = float(state["step"])
            scale = (mean / (1 - beta2**steps)).sqrt() + group["eps"]
            values, momentum = piece.of(piece.flat), piece.of(state["exp_avg"])
            values.copy_(old).mul_(1 - rate * group["weight_decay"])
            for (part, scale_part), (momentum_part, _) in zip(
                _by_column(values, piece.start, scale), _by_column(momentum, piece.start, scale), strict=True
            ):
                part.addcdiv_(momentum_part, scale_part, value=-rate / (1 - beta1**steps))

    def _mean(self, parts: list[tuple[Piece, torch.Tensor]]) -> torch.Tensor:
        """float64 [D]: the mean of all V rows, the same on all ranks; of zeros where the embedding is not stepped."""
        sums = torch.zeros(self._width, dtype=torch.float64, device=self._device)
        for piece, values in parts:
            whole = len(values) // self._width * self._width
            own = values[:whole].view(-1, self._width).sum(0, dtype=torch.float64)
            own[: len(values) - whole] += values[whole:]
            sums += own.roll(piece.start % self._width).to(self._device)
        if self._replicated:
            self._shard.all_reduce(sums)
        else:
            dist.all_reduce(sums)
        return sums / self._shard.vocab_size

    def _elements(self, piece: Piece, rows: torch.Tensor) -> torch.Tensor:
        """bool [numel] from bool [V_local]: whether the row of each element is marked."""
        first, begin = divmod(piece.start, self._width)
        last = (piece.start + piece.numel - 1) // self._width
        spread = rows[first : last + 1].to(piece.flat.device).repeat_interleave(self._width)
        return spread[begin : begin + piece.numel]

    def _without_frozen(self, gradient: torch.Tensor) -> torch.Tensor:
        frozen = self._frozen_rows()
        return gradient if frozen is None else gradient.masked_fill(frozen[:, None], 0)


def _pieces_of(engine: deepspeed.DeepSpeedEngine, name: str, real_elements: int) -> Iterator[Piece]:
    for fragment in optimizer_fragments(engine):
        numel = min(fragment.numel, real_elements - fragment.start)
        if fragment.name == name and numel > 0:
            yield Piece(fragment.start, numel, fragment.flat, fragment.offset)


def _by_column(values: torch.Tensor, start: int, row: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A run of elements that begins at element ``start`` of a matrix, each beside its column's entry of ``row`` [D].

    Returns:
        Views of ``values``: as many whole lengths of D as there are [n, D], with [D], and the rest [r], with [r].
    """
    width = len(row)
    aligned = row.roll(-(start % width)).to(values)
    whole = len(values) // width * width
    return [(values[:whole].view(-1, width), aligned), (values[whole:], aligned[: len(values) - whole])]
