"""Before the first step: whether the nodes of a job can train together. Seconds on many nodes, milliseconds on one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.checkpointing.folder import checkpoints_in
from pretrain.cluster.meeting import Meeting, Report, some
from pretrain.cluster.network import clock_offsets, measure_all_reduce, read_clocks
from pretrain.console import say
from pretrain.data.manifest import Manifest
from pretrain.errors import PreflightError
from pretrain.model.size import checkpoint_bytes
from pretrain.place import asked_nodes, asked_world_size
from pretrain.recipe import Recipe
from pretrain.recipe_io import flatten, recipe_to_dict
from pretrain.run_folder import RunFolder
from pretrain.topology import Topology, arrival_seconds, meeting_at
from pretrain.versions import versions

VISIBLE_SECONDS = 60.0  # network file systems may show another node's file that much later
LARGEST_SKEW_SECONDS = 5.0  # which rank failed first is told from times that nodes noted
CHECKPOINTS = 2  # must fit: the newest, and the one that is being written


def preflight(recipe: Recipe, topology: Topology, folder: RunFolder) -> dict[str, float]:
    """Refuse ranks, nodes, disks and networks that a run would fail on later; a collective of all ranks.

    Returns:
        world_size, nodes, free_disk_bytes; of several ranks also all_reduce_gigabytes_per_second (bus bandwidth, as
        nccl-tests define it); of several nodes also clock_skew_seconds, between the two that differ most.

    Raises:
        PreflightError: on all ranks, the same, naming the nodes and the way out.
    """
    begin, several = time.perf_counter(), topology.world_size > 1
    store = dist.distributed_c10d._get_default_store() if several else None
    meeting = meeting_at(store, topology, arrival_seconds(recipe))
    figures = _compare(meeting, recipe, folder)
    if figures["nodes"] > 1:
        _check_shared(meeting, folder.path)
    if several:
        figures["all_reduce_gigabytes_per_second"] = _check_all_reduce(meeting, topology)
    if figures["nodes"] > 1:
        figures["clock_skew_seconds"] = _check_clocks(meeting, topology)
    if several and topology.is_first:
        say(_describe(figures, time.perf_counter() - begin))
    return figures


def _compare(meeting: Meeting, recipe: Recipe, folder: RunFolder) -> dict[str, float]:
    """What needs no network: the number of ranks and nodes, versions, recipes, disk."""
    text = json.dumps(flatten(recipe_to_dict(recipe)), sort_keys=True)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    meeting.put(sha256, text)
    found = {"asked": asked_world_size(), "versions": versions(), "recipe": sha256}
    figures: dict[str, float] = meeting.agree("the preflight", found, partial(_judge_facts, meeting, recipe, folder))
    return figures


def _judge_facts(meeting: Meeting, recipe: Recipe, folder: RunFolder, reports: list[Report]) -> dict[str, float]:
    problems = [*_world_problems(reports), *_version_problems(reports), *_recipe_problems(meeting, reports)]
    if problems:
        raise PreflightError("; ".join(problems))
    free = _check_disk(recipe, folder)
    return {"world_size": len(reports), "nodes": len({report.node for report in reports}), "free_disk_bytes": free}


def _world_problems(reports: list[Report]) -> Iterator[str]:
    ranks = Counter(report.node for report in reports)
    there = f"{len(reports)} rank(s) on {len(ranks)} node(s) ({some(f'{node}: {n}' for node, n in ranks.items())})"
    asked = {report.found["asked"] for report in reports} - {None}
    nodes = asked_nodes() or 1
    way_out = "start with slurm/launch.sh, which starts ranks on every node of the job"
    if asked - {len(reports)}:
        wanted = " and ".join(str(number) for number in sorted(asked - {len(reports)}))
        yield f"{there} were started, but PRETRAIN_WORLD_SIZE asks for {wanted}: {way_out}, or unset the variable"
    elif not asked and len(ranks) < nodes:
        yield (
            f"{there} were started, but the SLURM job has {nodes} nodes: {way_out}, or give "
            f"PRETRAIN_WORLD_SIZE={len(reports)} if this is meant"
        )


def _version_problems(reports: list[Report]) -> Iterator[str]:
    for package in reports[0].found["versions"]:
        usual, others = _odd_ones(reports, [report.found["versions"][package] for report in reports])
        for value, nodes in others.items():
            yield (
                f"{package} is {value} on {some(nodes)}, but {usual[0]} on {some(usual[1])}: give all nodes the same "
                "environment (slurm/cluster.env)"
            )


def _recipe_problems(meeting: Meeting, reports: list[Report]) -> Iterator[str]:
    usual, others = _odd_ones(reports, [report.found["recipe"] for report in reports])
    for sha256, nodes in others.items():
        here, there = (json.loads(meeting.get(name)) for name in (usual[0], sha256))
        keys = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        values = some((f"{key} is {there.get(key)!r} there, {here.get(key)!r} elsewhere" for key in keys), 3)
        yield (
            f"the recipe on {some(nodes)} has SHA-256 {sha256[:12]}, but {usual[0][:12]} on {some(usual[1])} "
            f"({values}): start all ranks with the same file and overrides"
        )


def _odd_ones(reports: list[Report], values: Sequence[str]) -> tuple[tuple[str, list[str]], dict[str, list[str]]]:
    """The most frequent value with its nodes, and every other one with those where it is."""
    nodes: dict[str, list[str]] = {}
    for report, value in zip(reports, values, strict=True):
        nodes.setdefault(value, []).append(report.node)
    usual = Counter(values).most_common(1)[0][0]
    return (usual, nodes.pop(usual)), nodes


def _check_disk(recipe: Recipe, folder: RunFolder) -> int:
    """
    Returns:
        Bytes that are free.

    Raises:
        PreflightError: two checkpoints do not fit. One that the run has already counts.
    """
    manifest = Manifest.read(Path(recipe.data.folder))
    if manifest is None:
        raise PreflightError(f"{recipe.data.folder} is not prepared; run: python -m pretrain prepare RECIPE")
    each = checkpoint_bytes(recipe.model, manifest.vocab_size, recipe.precision)
    needed = each * max(1, CHECKPOINTS - len(checkpoints_in(folder.checkpoints)))
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        raise PreflightError(
            f"{folder.path} has {_bytes(free)} free on its disk, but a checkpoint takes about {_bytes(each)} and "
            f"{_bytes(needed)} are needed: make room, or put output_root on another file system"
        )
    return free


def _check_shared(meeting: Meeting, folder: Path) -> None:
    """
    Raises:
        PreflightError: a file that rank 0 writes into the run folder does not show on another node.
    """
    token, path, problem = "", folder / "", ""
    with contextlib.ExitStack() as stack:
        if meeting.rank == 0:
            token = secrets.token_hex(8)
            path = folder / f".preflight_{token}"  # a new name: nodes remember for a while that a file was not there
            stack.callback(path.unlink, missing_ok=True)
            try:
                path.write_text(token, encoding="utf-8")
            except OSError as error:
                problem = f"rank 0 on {meeting.node} cannot write {path}: {error.strerror}"
        token = meeting.agree("the check of the run folder", problem, partial(_token_or_problem, token))
        unseen = None
        if meeting.is_first_of_node("folder") and not _shows(folder / f".preflight_{token}", token):
            unseen = str(folder.absolute())
        meeting.agree("the check of the run folder", unseen, _judge_shared)


def _token_or_problem(token: str, reports: list[Report]) -> str:
    if reports[0].found:
        raise PreflightError(reports[0].found)
    return token


def _shows(path: Path, token: str) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _judge_shared(reports: list[Report]) -> None:
    unseen = {report.node: report.found for report in reports if report.found is not None}
    if unseen:
        raise PreflightError(
            f"the run folder is not shared: what rank 0 on {reports[0].node} wrote there does not show within "
            f"{VISIBLE_SECONDS:.0f} s in {some(f'{path} on {node}' for node, path in unseen.items())}. Put output_root "
            "on a file system that all nodes mount, at the same path"
        )


def _check_all_reduce(meeting: Meeting, topology: Topology) -> float:
    """
    Returns:
        Bus bandwidth in 10^9 bytes per second, as rank 0 saw it.

    Raises:
        PreflightError: it fails, hangs, or gives a wrong sum.
    """
    try:
        found: Any = measure_all_reduce(topology, meeting.seconds / 2)  # the others still wait then
    except (RuntimeError, ArithmeticError) as error:
        found = (str(error).strip() or repr(error)).splitlines()[0]
    rate: float = meeting.agree("the all-reduce", found, _judge_all_reduce)
    return rate


def _judge_all_reduce(reports: list[Report]) -> float:
    failed = {report.node: report.found for report in reports if isinstance(report.found, str)}
    if failed:
        raise PreflightError(
            f"an all-reduce over {len(reports)} ranks fails: {some(f'on {n}: {e}' for n, e in failed.items())}. The "
            "network interface between the nodes is chosen by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
            "(slurm/cluster.env)"
        )
    rate: float = reports[0].found
    return rate


def _check_clocks(meeting: Meeting, topology: Topology) -> float:
    """
    Returns:
        Seconds between the clocks that differ most.

    Raises:
        PreflightError: one is surely further than LARGEST_SKEW_SECONDS from the middle one.
    """
    clocks = read_clocks(topology)
    found = clocks if meeting.is_first_of_node("clocks") else None
    skew: float = meeting.agree("the comparison of clocks", found, _judge_clocks)
    return skew


def _judge_clocks(reports: list[Report]) -> float:
    offsets = clock_offsets({report.node: report.found for report in reports if report.found is not None})
    middle = sorted(offset for offset, _ in offsets.values())[(len(offsets) - 1) // 2]
    wrong = {
        node: offset - middle
        for node, (offset, margin) in offsets.items()
        if abs(offset - middle) - margin > LARGEST_SKEW_SECONDS
    }
    if wrong:
        right = some(node for node in offsets if node not in wrong)
        off = some(f"{node} is {abs(by):.1f} s {'ahead' if by > 0 else 'behind'}" for node, by in wrong.items())
        raise PreflightError(
            f"clocks differ by more than {LARGEST_SKEW_SECONDS:.0f} s: {off}, compared with {right}. Set them by NTP "
            "(chronyc makestep), or leave the nodes out with --exclude"
        )
    return max(offset for offset, _ in offsets.values()) - min(offset for offset, _ in offsets.values())


def _describe(figures: dict[str, float], seconds: float) -> str:
    skew = figures.get("clock_skew_seconds")
    return (
        f"preflight: {figures['world_size']} ranks on {figures['nodes']} node(s), all-reduce "
        f"{figures['all_reduce_gigabytes_per_second']:.2f} GB/s, "
        + (f"clocks within {1000 * skew:.1f} ms, " if skew is not None else "")
        + f"{_bytes(figures['free_disk_bytes'])} free, in {seconds:.1f} s"
    )


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"
