"""What both kinds of window share: the histogram of one optimizer step, reduced over the data-parallel ranks.

Letters: K window in optimizer steps, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from agg.histogram import COMPLAINTS, NEWS, STEPS_MODULO, places_of_ids, step_histogram
from agg.host_copy import HostCopy
from agg.vocab_shard import Gathering, VocabShard, refused_elsewhere

STATE_VERSION = 1


class StepCounts(ABC):
    """Counts of targets over a window, one update for each optimizer step.

    Args:
        shard: the vocabulary rows to count.
        window_steps: K.
        data_parallel_group: ranks that see other parts of the same global batch; None: this rank sees all of it.

    Raises:
        ValueError: ``window_steps`` is not a whole number of at least 1, or this rank is not in the group.
    """

    def __init__(
        self, shard: VocabShard, window_steps: int, data_parallel_group: dist.ProcessGroup | None = None
    ) -> None:
        check_window_steps(window_steps)
        check_membership(data_parallel_group)
        self.shard = shard
        self.window_steps = window_steps
        self._group = data_parallel_group
        self._rank = 0 if data_parallel_group is None else dist.get_rank(data_parallel_group)
        self._world_size = 1 if data_parallel_group is None else dist.get_world_size(data_parallel_group)
        self._updates = 0
        self._totals: torch.Tensor | None = None  # [V_local + 1], the last entry counts all targets
        self._places: torch.Tensor | None = None  # of ids in a step's histogram
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None
        self._gathering: Gathering | None = None  # of the totals
        # Of the last histogram, looked at once that costs no wait; and what the sum of steps must be.
        self._news: tuple[HostCopy, int] | None = None
        self._undo: Any = None  # what takes back the last update; None: there is none
        self._refusal: Exception | None = None  # why this rank cannot take part in the gather of the step

    def __deepcopy__(self, memo: dict[int, Any]) -> StepCounts:
        self._settled()
        if self._gathering is not None:
            self._gathering.get()  # both keep it: a copy that one rank makes alone may cost the others no collective
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self._group)] = self._group  # groups are shared, and cannot be copied
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

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

    def start_gather(self, refusal: Exception | None = None) -> None:
        """Begin what :meth:`of_all_shards` awaits, unless it would have to wait for an all-reduce first.

        Args:
            refusal: why this rank cannot take part in the step; see :meth:`of_all_shards`.
        """
        self._refusal = refusal
        if self._world_size == 1:
            self._gathering = self._gather()

    def of_all_shards(self) -> torch.Tensor:
        """[padded V]: :attr:`appearances` of all tensor-parallel ranks; each call is a collective of theirs.

        Raises:
            ValueError: another tensor-parallel rank cannot take part, if :attr:`agg.VocabShard.tells_refusals`; this
                one's last update is taken back.
            ValueError, FloatingPointError, TypeError: this rank cannot; see :meth:`update`.
        """
        gathering, self._gathering = self._gathering or self._gather(), None  # not kept: that would be memory
        refusal, self._refusal = self._refusal, None
        totals = gathering.get()
        if self.shard.tells_refusals:
            refusing = sum(tokens < 0 for tokens in totals[:, -1].tolist())
            if refusal is not None:
                raise refusal
            if refusing:
                self.undo_update()
                raise refused_elsewhere(refusing)
        return totals[:, :-1].flatten()

    def _gather(self) -> Gathering:
        """Of the totals of all shards [ranks, V_local + 1]. Those of a rank that cannot take part are -1, so that to
        be told of it costs no collective of its own."""
        try:
            totals = self._settled()
        except (FloatingPointError, TypeError, ValueError):
            if self._refusal is None or self._totals is None:
                raise
            totals = torch.full_like(self._totals, -1)
        return self.shard.start_all_gather(totals)

    def _forget_gathered(self) -> None:
        """Before the totals change: a gather under way reads them."""
        if self._gathering is not None:
            self._gathering.get()
            self._gathering = None

    def update(
        self,
        targets: torch.Tensor,
        ignore_index: int = -100,
        fault: torch.Tensor | None = None,
        problem: Exception | None = None,
    ) -> None:
        """Count one optimizer step. The all-reduce runs in the background until a count is read.

        What is wrong with it on one data-parallel rank is told with the counts, so that on CPUs none is left waiting
        for another. On GPUs the others hear of it too late for the step at hand, and end with the launcher or the
        time-out of their group. Tensor-parallel ranks hear of it in :meth:`of_all_shards`.

        Args:
            targets: global ids of any shape, all targets of this rank in this step. Every data-parallel rank
                calls once per step, with an empty tensor if it has none. Fewer than 2**31 over all ranks.
            ignore_index: targets with this value are not counted.
            fault: bool [], this rank's loss of the step before was not finite; travels with the counts.
            problem: why this rank cannot take part in the step; it is raised here, and told to the others.

        Raises:
            ValueError: on all ranks of the group, when the counts are next read, if any of them gave an id outside
                the vocabulary, or had a problem. On a GPU, where looking would stall it, at the update after that.
            ValueError: likewise, if they have counted different numbers of steps.
            FloatingPointError: likewise, if any of them told of a fault.
            TypeError: targets that are not integers.
        """
        self._forget_gathered()
        if (told := self._complaint()) is not None:
            raise told
        self._refusal = None  # whoever read the counts of that step was told
        totals = self._settled(targets.device)
        if totals.device != targets.device:  # loaded from a checkpoint
            self._totals = totals.to(targets.device)
        self._undo = None  # if this step is refused, the one before must not be taken for it
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            problem = problem or TypeError(f"targets must be integer ids, got {targets.dtype}")
        if problem is not None:
            self._tell(problem, targets.device)
        if self._places is None or self._places.device != targets.device:
            self._places = places_of_ids(self.shard, targets.device)
        histogram = step_histogram(targets, self._places, len(self.shard), ignore_index)
        if fault is not None:
            histogram[-3] = fault
        if self._world_size > 1:
            histogram[-1] = self._updates % STEPS_MODULO
        delta = self._outgoing(histogram)
        work = dist.all_reduce(delta, group=self._group, async_op=True) if self._world_size > 1 else None
        self._pending = (work, delta)

    def _tell(self, problem: Exception, device: torch.device) -> NoReturn:
        """Take part in the all-reduce of this step with nothing but the news of ``problem``, and raise it."""
        if self._world_size > 1:
            histogram = torch.zeros(len(self.shard) + 1 + NEWS, dtype=torch.int32, device=device)
            histogram[-2], histogram[-1] = 1, self._updates % STEPS_MODULO
            dist.all_reduce(self._outgoing(histogram), group=self._group)
        raise problem

    def _settled(self, device: torch.device | None = None) -> torch.Tensor:
        """The totals, after the all-reduce under way has been added.

        Raises:
            ValueError, FloatingPointError, TypeError: see :meth:`update`; where tensor-parallel ranks are to be told,
                again until they are.
        """
        if self._totals is None:
            self._totals = torch.zeros(len(self.shard) + 1, dtype=self._totals_dtype, device=device)
        if self._pending is not None:
            work, delta = self._pending
            if work is not None:
                work.wait()
            self._pending = None
            news, steps = HostCopy(delta[-NEWS:]), self._updates % STEPS_MODULO
            self._news = (news, steps * self._world_size if self._world_size > 1 else 0)
            told = self._complaint() if news.is_here else None
            if told is not None:
                self._refusal = told if self.shard.tells_refusals else None
                raise told
            self._apply(delta[:-NEWS])
            self._updates += 1
        if self._refusal is not None:
            raise self._refusal
        return self._totals

    def _complaint(self) -> Exception | None:
        """What the last histogram tells of: see :meth:`update`."""
        if self._news is None:
            return None
        (news, expected_steps), self._news = self._news, None
        *complaints, steps = news.get().tolist()
        for (error, message), count in zip(COMPLAINTS, complaints, strict=True):
            if count:
                return error(message.format(count=count, vocab_size=self.shard.vocab_size))
        if steps != expected_steps:
            return ValueError(
                "data-parallel ranks have counted different numbers of steps, so that their windows no longer fit "
                "together: take a step back on all ranks or on none, and load counts of one step on all"
            )
        return None

    def _outgoing(self, histogram: torch.Tensor) -> torch.Tensor:
        """What this rank gives to the all-reduce, from its histogram of the step."""
        return histogram

    def load_state_dict(self, states: dict[str, Any] | Iterable[dict[str, Any]]) -> None:
        """Continue from saved parts. Counts move to the device of the next targets.

        Args:
            states: the part of this rank if the layout is the one that saved; the parts of all ranks, in any
                order, if the data-parallel or tensor-parallel degree changed. They are taken one at a time: give a
                generator, and no rank holds them all.

        Raises:
            ValueError: another window, vocabulary or version, parts of different steps or runs, or that do not cover
                this rank's share; nothing has changed then.
        """
        size, start = len(self.shard), self.shard.start
        totals = torch.zeros(size + 1, dtype=self._totals_dtype, device="cpu")
        covered = torch.zeros(size + 1, dtype=torch.bool, device="cpu")
        updates: int | None = None
        kept: dict[int, Any] = {}
        for part in [states] if isinstance(states, dict) else states:
            updates = part["updates"] if updates is None else updates
            self._check_part(part, updates)
            low = max(start, part["start"])
            high = max(low, min(self.shard.stop, part["stop"]))
            rows = slice(low - start, high - start), slice(low - part["start"], high - part["start"])
            for here, there in (rows, (slice(size, None), slice(-1, None))):  # the last is of all targets
                theirs = part["totals"][there].cpu()
                # As where a save of fewer ranks left parts of an older one beside its own.
                if bool((covered[here] & (totals[here] != theirs)).any()):
                    raise ValueError(
                        "the parts of the saved token counts are of different runs, as they have counted other "
                        "targets: give those of one checkpoint"
                    )
                totals[here], covered[here] = theirs, True
            self._keep(kept, part)
        if updates is None:
            raise ValueError("no saved token counts were given")
        if not bool(covered[: self.shard.real].all()):
            raise ValueError(
                f"the saved token counts do not cover ids {start} to {start + self.shard.real}; "
                "give the parts of all tensor-parallel ranks"
            )
        self._resume(updates, kept)
        self._forget_gathered()
        self._totals, self._updates = totals, updates
        self._pending = self._news = self._undo = self._refusal = None

    def _check_part(self, part: dict[str, Any], updates: int) -> None:
        for key, expected in (
            ("version", STATE_VERSION),
            ("window", self._kind),
            ("window_steps", self.window_steps),
            ("vocab_size", self.shard.vocab_size),
        ):
            if part.get(key) != expected:
                raise ValueError(f"saved token counts have {key} {part.get(key)}, this run has {expected}")
        if part["updates"] != updates:
            raise ValueError(
                f"the parts of the saved token counts are of different steps, {updates} and {part['updates']}: "
                "give those of one checkpoint"
            )

    @abstractmethod
    def _keep(self, kept: dict[int, Any], part: dict[str, Any]) -> None:
        """Add to ``kept`` what this rank needs of a saved part, beside the totals."""

    @abstractmethod
    def _resume(self, updates: int, kept: dict[int, Any]) -> None:
        """Go on with what was kept.

        Raises:
            ValueError: something of it is missing; nothing has changed then.
        """

    _kind: str | None  # of the window, as states name it
    _totals_dtype: torch.dtype

    @abstractmethod
    def _apply(self, delta: torch.Tensor) -> None:
        """Bring the totals up to date with the reduced histogram [V_local + 1] of a step; sets what undoes it."""

    def undo_update(self) -> None:
        """Take back the last update, for a step that was skipped: on all ranks. Only one can be taken back.

        Raises:
            RuntimeError: there is none to take back.
        """
        self._settled()
        if self._undo is None:
            raise RuntimeError("no update to take back: only the last one can be undone, and only once")
        self._forget_gathered()
        undo, self._undo = self._undo, None
        self._take_back(undo)
        self._updates -= 1

    @abstractmethod
    def _take_back(self, undo: Any) -> None:
        """As if the last :meth:`_apply`, which left ``undo``, had not been."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, on the CPU; the parts of all ranks together are the whole window."""


def check_membership(data_parallel_group: dist.ProcessGroup | None) -> None:
    """
    Raises:
        ValueError: this rank is not in it.
    """
    if data_parallel_group is not None and dist.get_rank(data_parallel_group) < 0:
        raise ValueError("this rank is not in the data-parallel group that it was given")


def check_window_steps(window_steps: int) -> None:
    """
    Raises:
        ValueError: it is not a whole number of at least 1.
    """
    if not isinstance(window_steps, int) or window_steps < 1:
        raise ValueError(f"window_steps is {window_steps}, must be a whole number of at least 1")
