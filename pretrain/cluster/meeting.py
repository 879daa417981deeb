"""Ranks tell the first one what they found and hear its verdict, all through the store at which they meet.

A collective hangs while a rank is missing, and says nothing. Here everybody waits for a bounded time, and who is
missing is named. The first rank reads N short texts, every other rank one.
"""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from pretrain.errors import PreflightError, UserError

GRACE_SECONDS = 30.0  # what the others wait longer than the first rank, so that they hear whom it missed
LAST_WORD_SECONDS = 10.0  # the first rank may be the store: it stays until its verdict was heard
_MEETINGS = itertools.count()  # the same on all ranks, as all of them come to every one


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank runs: the node, and which ranks were started beside it, ``first_beside`` to ``end_beside`` - 1."""

    node: str
    first_beside: int
    end_beside: int


@dataclass(frozen=True)
class Report:
    rank: int
    node: str
    found: Any


class Meeting:
    """One rank's seat.

    Args:
        store: shared by all ranks; not used in a world of one.
        seconds: how long to wait for a rank.
        nodes_of_job: asked when ranks are missing, to name nodes of which nothing was heard.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        whereabouts: Whereabouts,
        seconds: float,
        nodes_of_job: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self.rank, self.world_size, self.node, self.seconds = rank, world_size, whereabouts.node, seconds
        self._store, self._whereabouts = store, whereabouts
        self._nodes_of_job = nodes_of_job
        self._name, self._rounds = f"meeting/{next(_MEETINGS)}", itertools.count()

    def agree(self, what: str, found: Any, judge: Callable[[list[Report]], Any]) -> Any:
        """Tell what this rank found; a collective.

        Args:
            what: is done here, for the message about a missing rank.
            found: anything that JSON can carry.
            judge: called by the first rank alone, with the reports of all ranks in order.

        Returns:
            What ``judge`` returned, on all ranks.

        Raises:
            PreflightError: on all ranks with the same message: ``judge`` raised a UserError, or ranks are missing.
        """
        if self._store is None:
            return judge([Report(self.rank, self.node, found)])
        key = f"{self._name}/{next(self._rounds)}"
        own = [self.node, self._whereabouts.first_beside, self._whereabouts.end_beside, found]
        self._store.set(f"{key}/{self.rank}", json.dumps(own))
        verdict = self._judge(key, what, judge) if self.rank == 0 else self._hear(key, what)
        if "problem" in verdict:
            raise PreflightError(verdict["problem"])
        return verdict["answer"]

    def is_first_of_node(self, what: str) -> bool:
        """Whether this rank is the one that does ``what`` for its node: the first that asks."""
        return self._store is None or self._store.add(f"{self._name}/first/{what}/{self.node}", 1) == 1

    def put(self, key: str, text: str) -> None:
        if self._store is not None:
            self._store.set(f"{self._name}/{key}", text)

    def get(self, key: str) -> str:
        """What some rank has put before it reported."""
        assert self._store is not None
        return str(self._store.get(f"{self._name}/{key}"), "utf-8")

    def _judge(self, key: str, what: str, judge: Callable[[list[Report]], Any]) -> dict[str, Any]:
        heard = self.world_size - 1
        try:
            there = self._arrived(key)
            reports = self._read(key, there)
            if len(there) < self.world_size:
                heard = len(there) - 1
                raise PreflightError(self._missing(what, reports))
            verdict = {"answer": judge([Report(rank, node, found) for rank, (node, _, _, found) in reports.items()])}
        except UserError as error:
            verdict = {"problem": str(error)}
        except BaseException as error:
            verdict = {"problem": f"rank 0 on {self.node} failed in {what}: {error!r}"}
            raise
        finally:
            self._publish(key, verdict, heard)
        return verdict

    def _publish(self, key: str, verdict: dict[str, Any], heard: int) -> None:
        assert self._store is not None
        self._store.set(f"{key}/verdict", json.dumps(verdict))
        deadline = time.monotonic() + LAST_WORD_SECONDS
        while "problem" in verdict and self._store.add(f"{key}/heard", 0) < heard and time.monotonic() < deadline:
            time.sleep(0.01)

    def _hear(self, key: str, what: str) -> dict[str, Any]:
        assert self._store is not None
        try:
            self._store.wait([f"{key}/0"], datetime.timedelta(seconds=self.seconds))
            self._store.wait([f"{key}/verdict"], datetime.timedelta(seconds=self.seconds + GRACE_SECONDS))
            verdict: dict[str, Any] = json.loads(self._store.get(f"{key}/verdict"))
            self._store.add(f"{key}/heard", 1)
        except RuntimeError as error:
            alone = PreflightError(
                f"rank {self.rank} on {self.node} heard nothing from rank 0 within {self.seconds:.0f} s in {what} "
                f"({str(error).splitlines()[0]}): the log of rank 0 says why"
            )
            alone.on_all_ranks = False  # the first rank is not there to say it
            raise alone from error
        return verdict

    def _arrived(self, key: str) -> list[int]:
        """The ranks that report in time."""
        assert self._store is not None
        everyone = range(self.world_size)
        try:
            self._store.wait([f"{key}/{rank}" for rank in everyone], datetime.timedelta(seconds=self.seconds))
        except RuntimeError:
            return [rank for rank in everyone if self._store.check([f"{key}/{rank}"])]
        return list(everyone)

    def _read(self, key: str, ranks: Sequence[int]) -> dict[int, list[Any]]:
        assert self._store is not None
        keys = [f"{key}/{rank}" for rank in ranks]
        at_once = self._store.has_extended_api()  # type: ignore[attr-defined]
        texts = self._store.multi_get(keys) if at_once else map(self._store.get, keys)
        return {rank: json.loads(text) for rank, text in zip(ranks, texts, strict=True)}

    def _missing(self, what: str, reports: dict[int, list[Any]]) -> str:
        missing = [rank for rank in range(self.world_size) if rank not in reports]
        node_of = {rank: node for node, first, end, _ in reports.values() for rank in range(first, end)}
        at: dict[str, list[int]] = {}
        for rank in missing:
            at.setdefault(node_of.get(rank, ""), []).append(rank)
        places = [f"{numbers('rank', ranks)}{node and f' on {node}'}" for node, ranks in at.items()]
        silent = [node for node in self._nodes_of_job() if node not in {report[0] for report in reports.values()}]
        nothing = f"; of {some(silent)} nothing was heard" if silent else ""
        return (
            f"{len(missing)} of {self.world_size} ranks did not come to {what} within {self.seconds:.0f} s: "
            f"{', '.join(places)}{nothing}. Their logs say what they do; hang_timeout_minutes gives them more time"
        )


def numbers(noun: str, values: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 3, 8-15``."""
    spans: list[list[int]] = []
    for value in sorted(values):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    text = some([str(low) if low == high else f"{low}-{high}" for low, high in spans])
    return f"{noun} {text}" if len(spans) == 1 and spans[0][0] == spans[0][1] else f"{noun}s {text}"


def some(names: Iterable[str], most: int = 8) -> str:
    """Names with commas; of many the first ones."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
