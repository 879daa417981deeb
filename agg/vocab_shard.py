"""Which rows of a vocabulary this rank holds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class VocabShard:
    """The half-open range ``[start, stop)`` of padded ids that one tensor-parallel rank holds.

    Attributes:
        start, stop: range of *padded* ids.
        vocab_size: unpadded size of the whole vocabulary; ids at or above it only pad.
        group: the tensor-parallel group over which the vocabulary is split; None: not split.

    Raises:
        ValueError: an empty range, no vocabulary, or this rank is not in the group. Whether the rows of all ranks are
            the whole is looked at where they meet (:meth:`check_whole`), and :class:`agg.AdaptiveGradientGating`
            tells all ranks.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a shard needs 0 <= start < stop, got [{self.start}, {self.stop})")
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}, must be at least 1")
        if self.group is not None and dist.get_rank(self.group) < 0:
            raise ValueError("this rank is not in the tensor-parallel group that it was given")

    @classmethod
    def of_rank(
        cls, vocab_size: int, rank: int, world_size: int, group: dist.ProcessGroup | None = None, multiple_of: int = 128
    ) -> VocabShard:
        """The shard of ``rank``, after padding the vocabulary to the next multiple of ``multiple_of``.

        The padded size does not depend on ``world_size``, so weights mean the same on every layout.

        Raises:
            ValueError: ``world_size`` does not divide the padded size, ``rank`` is not in it, or they are not those of
                the group.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if group is not None and dist.get_world_size(group) != world_size:
            raise ValueError(f"world_size is {world_size}, but the group has {dist.get_world_size(group)} ranks")
        if group is not None and dist.get_rank(group) not in (rank, -1):
            raise ValueError(f"rank is {rank}, but this is rank {dist.get_rank(group)} of the group")
        padded = padded_vocab_size(vocab_size, multiple_of)
        if padded % world_size:
            raise ValueError(
                f"a vocabulary of {vocab_size} padded to {padded} (multiple_of {multiple_of}) "
                f"does not divide over {world_size} ranks"
            )
        size = padded // world_size
        return cls(rank * size, (rank + 1) * size, vocab_size, group)

    def __deepcopy__(self, memo: dict[int, Any]) -> VocabShard:
        return self  # as nothing in it changes, and groups cannot be copied

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def real(self) -> int:
        """How many of the rows are real ids; those after them only pad. They may be none."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    @functools.cached_property
    def world_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @functools.cached_property
    def rank(self) -> int:
        """This one's place in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def check_whole(self) -> None:
        """
        Raises:
            ValueError: without a group, these rows are not all; with one, they are not the even share of this rank.
        """
        rank, size = self.rank, len(self)
        if self.world_size > 1 and (self.start != rank * size or self.world_size * size < self.vocab_size):
            raise ValueError(
                f"[{self.start}, {self.stop}) of {self.vocab_size} ids is not the even share of rank {rank} in a "
                f"group of {self.world_size}"
            )
        if self.world_size == 1 and (self.start, self.real) != (0, self.vocab_size):
            raise ValueError(
                f"the shard [{self.start}, {self.stop}) is a part of {self.vocab_size} ids, but names no group that "
                "holds the others"
            )

    @functools.cached_property
    def tells_refusals(self) -> bool:
        """Whether tensor-parallel ranks tell one another of a step or call that one of them refuses: with gloo.

        With NCCL a GPU would have to wait for it: there the others end with the launcher, or at the time-out of the
        group.
        """
        return self.world_size > 1 and bool(dist.get_backend(self.group) == dist.Backend.GLOO)

    def problem_of_any(self, problem: Exception | None) -> Exception | None:
        """``problem`` of this rank; where it has none, but another tensor-parallel rank has, a ValueError to raise.

        A collective of the group where it :attr:`tells_refusals`.
        """
        if not self.tells_refusals:
            return problem
        refusing = int(self.all_reduce(torch.tensor(int(problem is not None), dtype=torch.int32)))
        if problem is None and refusing:
            return refused_elsewhere(refusing)
        return problem

    def to_local(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of global ids, and which of them are here. Rows of ids held elsewhere are 0."""
        here = (ids >= self.start) & (ids < self.stop)
        return torch.where(here, ids - self.start, 0), here

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce in place over the tensor-parallel ranks; nothing to do where the vocabulary is not split."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[...] of each tensor-parallel rank, of one shape, to [ranks, ...]."""
        return self.start_all_gather(tensor).get()

    def start_all_gather(self, tensor: torch.Tensor) -> Gathering:
        """:meth:`all_gather` in the background. Await it in any case, before ``tensor`` changes or it is let go."""
        if self.world_size == 1:
            return Gathering(tensor[None], None)
        gathered = tensor.new_empty(self.world_size, *tensor.shape)
        work = dist.all_gather(list(gathered.unbind()), tensor.contiguous(), group=self.group, async_op=True)
        return Gathering(gathered, work)


@dataclass
class Gathering:
    """A gather under way."""

    _gathered: torch.Tensor
    _work: dist.Work | None

    def get(self) -> torch.Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._gathered


def refused_elsewhere(ranks: int) -> ValueError:
    """What a tensor-parallel rank raises that refuses nothing itself, where ``ranks`` others do."""
    return ValueError(f"{ranks} tensor-parallel ranks could not take part in this step; their own messages say why")


def padded_vocab_size(vocab_size: int, multiple_of: int) -> int:
    """The next multiple of ``multiple_of`` at or above ``vocab_size``."""
    return -(-vocab_size // multiple_of) * multiple_of
