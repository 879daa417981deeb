"""What both kinds of window share: the histogram of one optimizer step, reduced over the data-parallel ranks.

Letters: K window in optimizer steps, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from agg import kernels
from agg.vocab_shard import VocabShard

STATE_VERSION = 1


class StepCounts(ABC):
    """Counts of targets over a window, one update for each optimizer step.

    Args:
        shard: the vocabulary rows to count.
        window_steps: K.
        data_parallel_group: ranks that see other parts of the same global batch; None: this rank sees all of it.

    Raises:
        ValueError: ``window_steps`` below 1.
    """

    def __init__(
        self, shard: VocabShard, window_steps: int, data_parallel_group: dist.ProcessGroup | None = None
    ) -> None:
        if window_steps < 1:
            raise ValueError(f"window_steps is {window_steps}, must be at least 1")
        self.shard = shard
        self.window_steps = window_steps
        self._group = data_parallel_group
        self._rank = 0 if data_parallel_group is None else dist.get_rank(data_parallel_group)
        self._world_size = 1 if data_parallel_group is None else dist.get_world_size(data_parallel_group)
        self._updates = 0
        self._totals: torch.Tensor | None = None  # [V_local + 1], the last entry counts all targets
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None

    @property
    def steps(self) -> int:
        """Steps counted so far, at most ``window_steps``."""
        self._settled()
        return min(self._updates, self.window_steps)

    @property
    def appearances(self) -> torch.Tensor:
        """[V_local]: occurrences as a target in the window, all data-parallel ranks."""
        return self._settled()[:-1]

    @property
    def tokens(self) -> torch.Tensor:
        """[]: targets counted in the window, all data-parallel ranks, whole vocabulary."""
        return self._settled()[-1]

    def update(self, targets: torch.Tensor, ignore_index: int = -100, fault: torch.Tensor | None = None) -> None:
        """Count one optimizer step. The all-reduce runs in the background until a count is read.

        Args:
            targets: global ids of any shape, all targets of this rank in this step. Every data-parallel rank
                calls once per step, with an empty tensor if it has none. Fewer than 2**31 over all ranks.
            ignore_index: targets with this value are not counted.
            fault: bool [], this rank's loss of the step before was not finite; travels with the counts.

        Raises:
            ValueError: when the counts are next read, on all ranks of the group, if any of them gave an id
                outside the vocabulary.
            FloatingPointError: likewise, if any of them told of a fault.
                On a GPU, where looking would stall it, both are device-side assertions.
        """
        totals = self._settled(targets.device)
        if totals.device != targets.device:  # loaded from a checkpoint
            self._totals = totals.to(targets.device)
        histogram = step_histogram(targets, self.shard, ignore_index)
        if fault is not None:
            histogram[-1] = fault
        delta = self._outgoing(histogram)
        work = dist.all_reduce(delta, group=self._group, async_op=True) if self._world_size > 1 else None
        self._pending = (work, delta)

    def _settled(self, device: torch.device | None = None) -> torch.Tensor:
        """The totals, after the all-reduce under way has been added."""
        if self._totals is None:
            self._totals = torch.zeros(len(self.shard) + 1, dtype=self._totals_dtype, device=device)
        if self._pending is not None:
            work, delta = self._pending
            if work is not None:
                work.wait()
            self._pending = None
            self._apply(checked_histogram(delta, self.shard))
            self._updates += 1
        return self._totals

    def _outgoing(self, histogram: torch.Tensor) -> torch.Tensor:
        """What this rank gives to the all-reduce, from its histogram of the step."""
        return histogram

    def _merge_totals(self, parts: Sequence[dict[str, Any]], kind: str | None) -> torch.Tensor:
        """This rank's totals, on the CPU, from saved parts of any layout.

        Raises:
            ValueError: parts of another window, vocabulary or version, or that do not cover this rank's rows.
        """
        if not parts:
            raise ValueError("no saved token counts were given")
        size, start = len(self.shard), self.shard.start
        totals = torch.zeros(size + 1, dtype=self._totals_dtype)
        totals[-1] = parts[0]["totals"][-1]
        covered = torch.zeros(size, dtype=torch.bool)
        for part in parts:
            for key, expected in (
                ("version", STATE_VERSION),
                ("window", kind),
                ("window_steps", self.window_steps),
                ("vocab_size", self.shard.vocab_size),
                ("updates", parts[0]["updates"]),
            ):
                if part.get(key) != expected:
                    raise ValueError(f"saved token counts have {key} {part.get(key)}, this run has {expected}")
            low, high = max(start, part["start"]), min(self.shard.stop, part["stop"])
            if low < high:
                totals[low - start : high - start] = part["totals"][low - part["start"] : high - part["start"]]
                covered[low - start : high - start] = True
        if not bool(covered[: self.shard.real].all()):
            raise ValueError(
                f"the saved token counts do not cover ids {start} to {start + self.shard.real}; "
                "give the parts of all tensor-parallel ranks"
            )
        return totals

    _totals_dtype: torch.dtype

    @abstractmethod
    def _apply(self, delta: torch.Tensor) -> None:
        """Bring the totals up to date with the reduced histogram [V_local + 1] of a step."""

    @abstractmethod
    def undo_update(self) -> None:
        """Take back the last update, for a step that was skipped. Only one can be taken back.

        Raises:
            RuntimeError: there is none to take back.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, on the CPU; the parts of all ranks together are the whole window."""

    @abstractmethod
    def load_state_dict(self, states: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Continue from saved parts. Counts move to the device of the next targets.

        Args:
            states: the part of this rank if the layout is the one that saved; the parts of all ranks, in any
                order, if the data-parallel or tensor-parallel degree changed.

        Raises:
            ValueError: another window, vocabulary or version, or parts that do not cover this rank's share.
        """


def step_histogram(targets: torch.Tensor, shard: VocabShard, ignore_index: int) -> torch.Tensor:
    """int32 [V_local + 3]: occurrences of each row; how many targets; how many outside the vocabulary; 0."""
    size = len(shard)
    flat = targets.reshape(-1)
    counted = flat != ignore_index
    outside = counted & ((flat < 0) | (flat >= shard.vocab_size))
    rows, here = shard.to_local(flat)
    histogram = torch.zeros(size + 3, dtype=torch.int32, device=targets.device)
    # Others land in the last entry, which is cleared: picking them out would make a GPU wait.
    histogram.index_add_(
        0, torch.where(here & counted & ~outside, rows, size + 2), torch.ones_like(flat, dtype=torch.int32)
    )
    histogram[size:] = torch.stack([counted.sum(), outside.sum(), torch.zeros_like(counted.sum())])
    return histogram


def checked_histogram(histogram: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """[V_local + 1]: without the last two entries, which must be 0 on all ranks.

    Raises:
        ValueError, FloatingPointError: see :meth:`StepCounts.update`.
    """
    outside, faults = histogram[-2], histogram[-1]
    if not kernels.values_are_at_hand(histogram):
        torch._assert_async(outside == 0)
        torch._assert_async(faults == 0)
    elif outside > 0:
        raise ValueError(f"{int(outside)} targets of this step are outside the vocabulary of {shard.vocab_size} ids")
    elif faults > 0:
        raise FloatingPointError(
            f"the loss of the step before was not finite on {int(faults)} data-parallel ranks; hidden states or "
            "weights hold NaN or infinity"
        )
    return histogram[:-2]
