"""Whether a rank was given what it can use, and all ranks what fits together; looked at before the first step."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from agg.gating import check_no_mask
from agg.linear_cross_entropy import check_options
from agg.step_counts import check_membership, check_window_steps
from agg.vocab_shard import VocabShard

MAY_BE_LEFT_OUT = ("alpha", "rare_fraction", "chunk_tokens")


def check_settings(shard: VocabShard, settings: Mapping[str, Any]) -> None:
    """
    Args:
        settings: of :class:`~agg.AdaptiveGradientGating`, by the names of its arguments.

    Raises:
        ValueError: one is out of its range.
    """
    alpha, rare_fraction, window = settings["alpha"], settings["rare_fraction"], settings["window"]
    reference = settings["reference_batch_tokens"]
    shard.check_whole()
    for kind, what, names in (
        (numbers.Real, "a number", ("alpha", "rare_fraction", "label_smoothing", "z_loss", "soft_cap")),
        (numbers.Integral, "a whole number", ("ignore_index", "chunk_tokens")),
    ):
        for name in names:
            value = settings[name]
            if not isinstance(value, kind) and not (value is None and name in MAY_BE_LEFT_OUT):
                raise ValueError(f"{name} is {value!r}, must be {what}")
    if window not in ("sliding", "exponential"):
        raise ValueError(f"window is {window!r}, must be sliding or exponential")
    check_window_steps(settings["window_steps"])
    if (alpha is None) == (rare_fraction is None):
        raise ValueError(f"give alpha or rare_fraction, and not both: got {alpha} and {rare_fraction}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha is {alpha}, must be above 0")
    if rare_fraction is not None and not 0 < rare_fraction < 1:
        raise ValueError(f"rare_fraction is {rare_fraction}, must be above 0 and below 1")
    if not isinstance(reference, int) or reference < 1:
        raise ValueError(f"reference_batch_tokens is {reference}, must be a whole number of at least 1")
    check_no_mask(settings["excluded_ids"])
    for excluded in _ids(settings["excluded_ids"]):
        if not isinstance(excluded, numbers.Integral):
            raise ValueError(f"excluded_ids has {excluded!r}, must be whole numbers")
        if not 0 <= int(excluded) < shard.vocab_size:
            raise ValueError(f"excluded_ids has {excluded}, outside the vocabulary of {shard.vocab_size} ids")
    check_options(settings["label_smoothing"], settings["chunk_tokens"], settings["z_loss"], settings["soft_cap"])


def agree_on_settings(
    shard: VocabShard, data_parallel_group: dist.ProcessGroup | None, settings: Mapping[str, Any]
) -> None:
    """Check them and compare them over both groups; a collective of all data-parallel x tensor-parallel ranks.

    Raises:
        ValueError: on all of these ranks, if one was given what it cannot use, or two what does not fit together; on
            this rank alone, it is not in the data-parallel group.
    """
    if dist.is_initialized() and data_parallel_group is None and dist.get_world_size() > shard.world_size:
        warnings.warn(
            f"torch.distributed has {dist.get_world_size()} ranks, but no data_parallel_group was given: each counts "
            "only its own targets. Give the group whose ranks see other parts of the global batch.",
            stacklevel=3,
        )
    check_membership(data_parallel_group)
    problem = _own_problem(shard, settings)
    mine: dict[str, Any] = {}
    if problem is None:  # else they may be anything, also what cannot be sent
        excluded = sorted(set(_ids(settings["excluded_ids"])))  # too many to be shown
        mine = {**settings, "rows": (shard.start, shard.stop), "vocab_size": shard.vocab_size}
        mine["excluded_ids"] = f"{len(excluded)} ids of hash {hash(tuple(excluded))}"

    everyone = _gathered((problem, mine), data_parallel_group)
    problem = _first(told for told, _ in everyone) or _difference(everyone, "data-parallel", mine.keys())
    everyone = _gathered((problem, mine), shard.group)
    problem = _first(told for told, _ in everyone) or _difference(everyone, "tensor-parallel", mine.keys() - {"rows"})
    problem = problem or _gap(shard, [its["rows"] for _, its in everyone])
    # What one tensor-parallel group found, another has not seen.
    problem = _first(_gathered(problem, data_parallel_group))
    if problem is not None:
        raise ValueError(problem)


def _own_problem(shard: VocabShard, settings: Mapping[str, Any]) -> str | None:
    try:
        check_settings(shard, settings)
    except (TypeError, ValueError) as problem:  # a TypeError of what is no sequence of ids
        return str(problem)
    return None


def _ids(excluded: Sequence[Any] | torch.Tensor) -> list[Any]:
    return excluded.tolist() if isinstance(excluded, torch.Tensor) else list(excluded)


def _gathered(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None or dist.get_world_size(group) == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _difference(everyone: list[tuple[str | None, dict[str, Any]]], name: str, keys: Iterable[str]) -> str | None:
    first = everyone[0][1]
    for rank, (_, its) in enumerate(everyone):
        for key in sorted(keys):
            if its[key] != first[key]:
                return f"{key} is {first[key]} on rank 0 of the {name} group and {its[key]} on rank {rank}"
    return None


def _gap(shard: VocabShard, rows: list[tuple[int, int]]) -> str | None:
    size = len(shard)
    for rank, (start, stop) in enumerate(rows):
        if (start, stop) != (rank * size, (rank + 1) * size):
            return (
                f"rank {rank} of the tensor-parallel group has rows [{start}, {stop}) of the vocabulary, where "
                f"[{rank * size}, {(rank + 1) * size}) belong"
            )
    return None
