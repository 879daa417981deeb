"""What a study would take: parameters, tokens, floating-point operations, memory and time of each run, by formula."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.cluster.memory import RankMemory, memory_per_rank
from pretrain.console import age_in_words, bytes_in_words, table_lines
from pretrain.data.manifest import Manifest, inputs_of
from pretrain.errors import RecipeError, UserError
from pretrain.model.size import ModelSize, model_size, peak_flops, training_flops_per_token
from pretrain.recipe import Recipe
from pretrain.study.grid import Cell, cells_of, grouped, vocab_size_of
from pretrain.study.study_file import Study

HEAD = ("run", "parameters", "embeddings", "tokens", "steps", "FLOPs", "memory/rank", "time")
GIB = 2**30


@dataclass(frozen=True)
class PlannedRun:
    """One run of the plan.

    Attributes:
        world_size: ranks it would run on. tokens: to train on. flops: of the whole training, all ranks together.
        seconds: at the asked model FLOPs utilisation; None where the peak of the device is not known.
    """

    cell: Cell
    world_size: int
    size: ModelSize
    tokens: int
    flops: float
    memory: RankMemory
    seconds: float | None

    @property
    def memory_bytes(self) -> int:
        """Of a rank, by formula: on a CPU with what is offloaded to the host, as it is one memory."""
        return self.memory.total + (self.memory.host if _on_cpu(self.cell.recipe) else 0)


@dataclass(frozen=True)
class Resources:
    """What the runs of a study are planned for.

    Attributes:
        world_size: ranks of a job; None: what each recipe starts on this machine by itself.
        parallel_runs: so many at a time.
        memory_bytes: that a rank may take; None: what this machine has, unless it is for a cluster.
        peak: dense FLOP/s of a device; None: of this machine's GPU, where it is known.
        utilisation: model FLOPs utilisation, the share of the peak that does the model's work.
    """

    world_size: int | None = None
    parallel_runs: int = 1
    memory_bytes: float | None = None
    peak: float | None = None
    utilisation: float = 0.4


def make_plan(study: Study, resources: Resources) -> list[PlannedRun]:
    """Every run; nothing is written and nothing started.

    Raises:
        UserError: runs that are impossible, all of them, each with what is wrong.
    """
    cells, refused = cells_of(study)
    planned, count = [], len(cells) + len(refused)
    for cell in cells:
        try:
            run = _planned(cell, resources)
        except UserError as error:
            refused[cell.name] = error.problems if isinstance(error, RecipeError) else [str(error)]
            continue
        planned.append(run)
        limit, whose = _memory_limit(cell.recipe, resources)
        if limit is not None and run.memory_bytes > limit:
            refused[cell.name] = [
                f"a rank needs {bytes_in_words(run.memory_bytes)} by formula, {whose} {bytes_in_words(int(limit))}; "
                "take a smaller batch.micro_batch_size, another parallel.sharding or more ranks, or exclude the run"
            ]
    _check_data(cells, refused)
    if refused:
        of = f"{len(refused)} of the {count} run(s) of the study {study.name} cannot be"
        raise UserError(f"{of}:\n" + "\n".join(grouped(refused)))
    return planned


def _planned(cell: Cell, resources: Resources) -> PlannedRun:
    recipe = cell.recipe
    world_size = resources.world_size or recipe.local_world_size
    vocab_size, manifest = vocab_size_of(recipe), Manifest.read(Path(recipe.data.folder))
    epoch = None if manifest is None else -(-manifest.splits["train"].tokens // recipe.tokens_per_step)
    tokens = recipe.batch.train_steps * recipe.tokens_per_step
    flops = tokens * training_flops_per_token(recipe.model, vocab_size)
    peak = resources.peak or _peak_of_this_machine(recipe)
    return PlannedRun(
        cell,
        world_size,
        model_size(recipe.model, vocab_size),
        tokens,
        flops,
        memory_per_rank(recipe, world_size, vocab_size, epoch),
        None if peak is None else flops / (resources.utilisation * peak * world_size),
    )


def _on_cpu(recipe: Recipe) -> bool:
    import torch

    return recipe.device == "cpu" or not torch.cuda.is_available()


def _memory_limit(recipe: Recipe, resources: Resources) -> tuple[float | None, str]:
    """Bytes of a rank, and whose they are, for the message."""
    if resources.memory_bytes is not None:
        return resources.memory_bytes, "and --memory-gib gives it"
    if resources.world_size is not None:  # of a cluster nothing is known
        return None, ""
    if _on_cpu(recipe):
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return whole / (recipe.local_world_size * resources.parallel_runs), "and its share of this machine's memory is"
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory), "and the GPU of this machine has"


def _peak_of_this_machine(recipe: Recipe) -> float | None:
    import torch

    return None if _on_cpu(recipe) else peak_flops(torch.cuda.get_device_name(0))


def _check_data(cells: Sequence[Cell], refused: dict[str, list[str]]) -> None:
    """Runs that share a data folder must want the same in it, and what is in it if it is prepared."""
    owners: dict[str, Cell] = {}
    for cell in cells:
        manifest = Manifest.read(Path(cell.recipe.data.folder))
        if manifest is not None and inputs_of(cell.recipe.data) != {
            "corpus": manifest.corpus,
            "tokenizer": manifest.tokenizer,
        }:
            refused.setdefault(cell.name, []).append(
                f"{cell.recipe.data.folder} was prepared from another corpus or tokenizer: give another data.folder"
            )
        owner = owners.setdefault(cell.recipe.data.folder, cell)
        if inputs_of(owner.recipe.data) != inputs_of(cell.recipe.data):
            refused.setdefault(cell.name, []).append(
                f"it has the data.folder of {owner.name}, {cell.recipe.data.folder}, but another corpus or tokenizer"
            )


def data_of(plan: Sequence[PlannedRun]) -> dict[Path, Recipe]:
    """Each data folder that the runs share, with a recipe that prepares it."""
    folders: dict[Path, Recipe] = {}
    for run in plan:
        folders.setdefault(Path(run.cell.recipe.data.folder), run.cell.recipe)
    return folders


def plan_lines(study: Study, plan: Sequence[PlannedRun], resources: Resources) -> Iterator[str]:
    """The plan in words and one table."""
    yield f"{study.name}: {study.question}"
    yield f"{len(plan)} run(s) in {study.folder}"
    yield ""
    yield from table_lines(HEAD, [_row(run) for run in plan], HEAD[1:])
    yield ""
    tokens, flops = sum(run.tokens for run in plan), sum(run.flops for run in plan)
    yield f"together: {tokens:,} tokens, {flops:.3g} FLOPs, memory of a rank at most " + bytes_in_words(
        max(run.memory_bytes for run in plan)
    )
    yield _time_line(plan, resources)
    for folder, recipe in data_of(plan).items():
        there = "prepared" if Manifest.read(folder) is not None else "to be prepared once"
        yield f"data: {folder}, vocabulary {vocab_size_of(recipe):,}, {there}"
    yield "nothing was started"


def _row(run: PlannedRun) -> tuple[str, ...]:
    size = run.size
    return (
        run.cell.name,
        f"{size.total:,}",
        f"{size.total - size.without_embeddings:,}",
        f"{run.tokens:,}",
        f"{run.cell.recipe.batch.train_steps:,}",
        f"{run.flops:.3g}",
        bytes_in_words(run.memory_bytes),
        "?" if run.seconds is None else age_in_words(run.seconds),
    )


def _time_line(plan: Sequence[PlannedRun], resources: Resources) -> str:
    times = [run.seconds for run in plan if run.seconds is not None]
    if len(times) < len(plan):
        return "time: unknown, as the peak of this machine's devices is; --peak-tflops gives it (dense, of one device)"
    worlds = [run.world_size for run in plan]
    hours = sum(seconds * world / 3600 for seconds, world in zip(times, worlds, strict=True))
    at_a_time = min(resources.parallel_runs, len(plan))
    wall = max(max(times), sum(times) / at_a_time)
    ranks = f"{min(worlds)}" if min(worlds) == max(worlds) else f"{min(worlds)} to {max(worlds)}"
    return (
        f"time at a model FLOPs utilisation of {resources.utilisation:.0%}, on {ranks} rank(s) a run and "
        f"{at_a_time} run(s) at a time: about {age_in_words(wall)}, {hours:,.1f} device hours; without "
        "start-up, saving and evaluation"
    )
