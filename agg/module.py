"""Counting, gating and loss behind one call, for any trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from agg import kernels
from agg.decayed_frequency import DecayedTokenFrequency
from agg.frequency import TokenFrequency
from agg.gating import Gates, alpha_of_counts, gates_of_counts, rare_candidates
from agg.linear_cross_entropy import (
    as_under_autocast,
    check_inputs,
    check_reduction,
    gated_linear_cross_entropy,
    outside_vocabulary,
)
from agg.probe import LossProbe
from agg.settings import agree_on_settings
from agg.vocab_shard import VocabShard


class AdaptiveGradientGating(torch.nn.Module):
    """A cross-entropy that keeps rare tokens alive; in ``eval()`` the plain cross-entropy.

    Without gradient accumulation, call it once per optimizer step. With it, call :meth:`begin_step` with all targets
    of the step before its first forward pass, which then hides the exchange of the counts; then the loss once per
    micro-batch. Do the one or the other, not both; a :meth:`begin_step` that is forgotten later on cannot be told from
    one more micro-batch. For the gradient of the whole step divide sums
    (``reduction="sum"``) by its valid targets: a mean is of one micro-batch of one rank.

    A loss that is not finite comes back as it is, as from torch's; unless :meth:`undo_step` takes the step back, all
    data-parallel ranks raise FloatingPointError in the step after (on a GPU, the one after that), so that none is left
    waiting for another. The optimizer has stepped by then: look at the loss before, if weights must stay finite. A
    loss is of one rank, a step of all: what one finds the others must be told, so that all take the step back or none.

    ``state_dict()`` holds this rank's part of the counts. Of several ranks that is not the whole window, so a
    checkpoint that rank 0 alone writes loses the rest; and torch.distributed.checkpoint cannot load it even on one
    rank, as its sizes change from step to step. Save ``get_extra_state()`` of each rank in a file of its own, beside
    the state of the model (``pretrain/examples`` show it).

    Where activation checkpointing holds the loss, what it does again is not counted again. Under ``torch.compile`` on
    a CPU the answer is the same, and the graph breaks wherever a value is read.

    Building one is a collective of all ranks of its groups, which compare what they were given; with NCCL each needs
    its device set before. A data-parallel group that is too small cannot be told from a right one, since other kinds of
    parallelism have ranks too. What is wrong with the targets of one rank, or with a call without :meth:`begin_step`,
    is told to all its data-parallel ranks; see :meth:`agg.TokenFrequency.update`. What one tensor-parallel rank
    refuses of a step or of a call is told to the others if their group is gloo's; what it refuses in :meth:`begin_step`
    it raises where they hear of it, when gates are first asked for, so that none leaves before a forward pass whose
    collectives the others enter. A call that is refused after :meth:`begin_step` no other data-parallel rank hears of:
    that would take a collective of all in each call.

    Args:
        shard: the rows of the output embedding on this rank; ``VocabShard(0, V, V)`` if it is not split.
        alpha: tokens with fewer occurrences per ``reference_batch_tokens`` are rare. Or give
        rare_fraction: this share of the ids that have occurred is rare, whatever the corpus.
        window_steps: optimizer steps over which occurrences are counted; one epoch is the paper's choice.
        window: ``sliding`` is exact; ``exponential`` fades by ``1 - 1 / window_steps`` and needs no history.
        reference_batch_tokens: unit of alpha.
        excluded_ids: ids that are never rare (bos, eos, pad, unk).
        data_parallel_group: ranks that see other parts of the global batch.
        ignore_index, label_smoothing, chunk_tokens, z_loss, soft_cap: see :func:`~agg.gated_linear_cross_entropy`.

    Raises:
        ValueError: on all ranks, an option of one out of its range, or settings or shards that do not fit together; on
            this rank alone, it is not in the data-parallel group.
    """

    def __init__(
        self,
        shard: VocabShard,
        *,
        alpha: float | None = None,
        rare_fraction: float | None = None,
        window_steps: int,
        window: Literal["sliding", "exponential"] = "sliding",
        reference_batch_tokens: int = 32_768,
        excluded_ids: Sequence[int] | torch.Tensor = (),
        data_parallel_group: dist.ProcessGroup | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        chunk_tokens: int | None = None,
        z_loss: float = 0.0,
        soft_cap: float = 0.0,
    ) -> None:
        super().__init__()
        self.shard = shard
        self.alpha, self.rare_fraction = alpha, rare_fraction
        self.reference_batch_tokens = reference_batch_tokens
        self.ignore_index = ignore_index
        self.z_loss, self.soft_cap = z_loss, soft_cap
        self.label_smoothing = label_smoothing
        self.chunk_tokens = chunk_tokens
        settings = {
            "alpha": alpha,
            "rare_fraction": rare_fraction,
            "window_steps": window_steps,
            "window": window,
            "reference_batch_tokens": reference_batch_tokens,
            "excluded_ids": excluded_ids,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "chunk_tokens": chunk_tokens,
            "z_loss": z_loss,
            "soft_cap": soft_cap,
        }
        agree_on_settings(shard, data_parallel_group, settings)
        # Also where a model is built on the meta device, this stays real.
        self.excluded_ids = torch.as_tensor(excluded_ids, dtype=torch.int64, device="cpu")
        kind = TokenFrequency if window == "sliding" else DecayedTokenFrequency
        self.frequency: TokenFrequency | DecayedTokenFrequency = kind(shard, window_steps, data_parallel_group)
        self.gates: Gates | None = None  # of the current step
        self._candidates: torch.Tensor | None = None  # ids that may be rare
        self._fault: torch.Tensor | None = None  # bool []: a loss since the last count was not finite
        self._explicit_steps: bool | None = None
        self._unheard = False  # tensor-parallel ranks may have refused the step

    def begin_step(self, targets: torch.Tensor) -> None:
        """Count all targets of this rank in the coming optimizer step, of any shape, on the device of the loss.

        Starts the all-reduce of the counts, or, where there is one data-parallel rank, their gather over the
        tensor-parallel ranks, so that all of them call it.

        Raises:
            ValueError, FloatingPointError, TypeError: see :meth:`agg.TokenFrequency.update`; on a CPU with one
                data-parallel rank already here. Where tensor-parallel ranks tell one another
                (:attr:`agg.VocabShard.tells_refusals`), only what was refused of the step before, if nobody asked for
                its gates.
            RuntimeError: the loss was called without it before.
        """
        self._set_explicit(True)
        self._count(targets)

    def undo_step(self) -> None:
        """Take back the count of a step that is skipped, and what its loss was: on all ranks.

        Raises:
            RuntimeError: there is none to take back; only the last one can be.
            ValueError, FloatingPointError, TypeError: it was refused; see :meth:`current_gates`.
        """
        self._hear()
        self.frequency.undo_update()
        self.gates = self._fault = None

    def current_gates(self) -> Gates:
        """The gates of this step, of this rank's rows; before the first step, those of no counts, on the CPU (where
        NCCL gathers nothing: with tensor-parallel ranks on GPUs ask in a step).

        The first call of a step awaits the counts, and on all tensor-parallel ranks is a collective of theirs.

        Raises:
            ValueError, FloatingPointError, TypeError: what a rank was told of with the counts, or refused itself;
                see :meth:`agg.TokenFrequency.update` and :meth:`agg.TokenFrequency.of_all_shards`.
        """
        if self.gates is None:
            self._unheard = False
            # Gathered once, threshold and gates of the whole vocabulary need no further collective.
            counts = self.frequency.of_all_shards()
            if self._candidates is None or self._candidates.device != counts.device:
                self._candidates = rare_candidates(len(counts), self.shard.vocab_size, self.excluded_ids, counts.device)
            reference = self.reference_batch_tokens
            given = (counts, self._candidates, self.frequency.tokens)
            alpha: float | torch.Tensor | None = self.alpha
            if self.rare_fraction is not None:
                alpha = alpha_of_counts(*given, self.rare_fraction, reference)
            assert alpha is not None
            self.gates = gates_of_counts(*given, alpha, reference, self.shard)
        return self.gates

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        reduction: str = "mean",
        probe: LossProbe | None = None,
    ) -> torch.Tensor:
        """The loss of ``hidden`` against ``target`` under ``weight``; shapes and errors as below.

        On a GPU, where looking at targets would stall it, those outside the vocabulary are ignored in training, and
        all data-parallel ranks raise in a later step, if there is one: an assertion on the device would end the process
        before. Of targets that were not counted, :meth:`undo_step` forgets that.

        Args:
            hidden: [T, D]. weight: [V_local, D]. target: int64 [T].
            reduction, probe: see :func:`agg.gated_linear_cross_entropy`.

        Returns:
            [], or [T] with reduction ``none``; float32 at least.

        Raises:
            ValueError: see :func:`agg.gated_linear_cross_entropy`; without :meth:`begin_step` such a call is not
                counted.
            IndexError: a target outside the vocabulary that was not counted, as in ``eval()``.
            ValueError, FloatingPointError, TypeError: see :meth:`current_gates`.
        """
        gates = outside = None
        again = _runs_in_backward()
        if again:
            probe = None  # it was told before
        hidden, weight = as_under_autocast(hidden, weight)  # once, as both are looked at before they are used
        if self.training:
            if self._explicit_steps is not True:
                self._set_explicit(False)
                if not again:
                    self._count(target, _problem_of(hidden, weight, target, self.shard, reduction))
            gates = self.current_gates()
            if not kernels.values_are_at_hand(target):
                outside = outside_vocabulary(target, self.ignore_index, self.shard)
                target = torch.where(outside, self.ignore_index, target)
        loss = gated_linear_cross_entropy(
            hidden,
            weight,
            target,
            gates,
            self.shard,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
            chunk_tokens=self.chunk_tokens,
            z_loss=self.z_loss,
            soft_cap=self.soft_cap,
            probe=probe,
        )
        if self.training and not again:
            fault = ~torch.isfinite(loss.detach()).all()
            if outside is not None:
                fault |= outside.any()  # where it was counted, its own message comes first
            self._fault = fault if self._fault is None else self._fault | fault
        return loss

    def get_extra_state(self) -> dict[str, Any]:
        """For ``state_dict()``: this rank's part of the counts, on the CPU; all ranks save theirs."""
        return self.frequency.state_dict()

    def set_extra_state(self, state: dict[str, Any] | Iterable[dict[str, Any]]) -> None:
        """For ``load_state_dict()``: this rank's part or, on another layout, those of all ranks.

        Raises:
            ValueError: see :meth:`agg.TokenFrequency.load_state_dict`.
        """
        self.frequency.load_state_dict(state)
        self.gates = self._fault = None
        self._unheard = False

    def _count(self, targets: torch.Tensor, problem: Exception | None = None) -> None:
        self._hear()
        fault, self._fault, self.gates = self._fault, None, None
        try:
            self.frequency.update(targets, self.ignore_index, fault, problem)
            problem = None
        except (FloatingPointError, TypeError, ValueError) as refused:
            if not self.shard.tells_refusals:
                raise
            problem = refused  # raised once the tensor-parallel ranks are told, with the counts
        self.frequency.start_gather(problem)
        self._unheard = self.shard.tells_refusals

    def _hear(self) -> None:
        """What tensor-parallel ranks refused of a step whose gates nobody asked for, before it is too late to."""
        if self._unheard:
            self.current_gates()

    def _set_explicit(self, explicit: bool) -> None:
        if self._explicit_steps is not None and self._explicit_steps != explicit:
            raise RuntimeError(
                "begin_step() was not called for every step: call it before each step, or never and then call "
                "the loss once per step; otherwise targets would be counted twice or not at all"
            )
        self._explicit_steps = explicit


def _runs_in_backward() -> bool:
    """Whether activation checkpointing does again what was done: it counts once."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def _problem_of(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, shard: VocabShard, reduction: str
) -> Exception | None:
    """What the loss would refuse, before the targets are counted."""
    try:
        check_inputs(hidden, weight, target, shard)
        check_reduction(reduction)
    except ValueError as problem:
        return problem
    return None
