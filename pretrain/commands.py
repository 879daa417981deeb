"""What each verb does. Heavy imports wait until a verb needs them, so that errors in a recipe show at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.checkpointing.folder import checkpoint_name, choose_checkpoint, latest_checkpoint
from pretrain.console import say
from pretrain.errors import UserError
from pretrain.quiet import quiet_third_party
from pretrain.recipe import Recipe
from pretrain.recipe_io import find_recipe, load_recipe
from pretrain.run_folder import RunFolder
from pretrain.topology import connect, data_parallel_size_of, disconnect, place_from_environment


def prepare(options: argparse.Namespace) -> None:
    quiet_third_party()
    from pretrain.data.prepare import prepare as prepare_data

    prepare_data(load_recipe(options.recipe, options.overrides))


def train(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    quiet_third_party()
    place = place_from_environment()
    if place is None or place.rank == 0:
        _check_before_start(recipe, recipe.local_world_size if place is None else place.world_size)
        given = find_recipe(options.recipe).read_text(encoding="utf-8") + "".join(
            f"# override: {override}\n" for override in options.overrides
        )
        RunFolder(recipe.run_folder).claim(recipe, given)
    if _is_done(recipe):  # every rank that a launcher started sees it
        if place is None or place.rank == 0:
            say(f"{recipe.name} is trained already: step {recipe.batch.train_steps:,} of {recipe.run_folder}")
        return 0
    if place is None and recipe.local_world_size > 1:
        return _run_ranks(["train", options.recipe, *options.overrides, *_stop_option(options)], recipe)
    from pretrain.training.loop import train as train_run

    topology = connect(recipe)
    try:
        progress = train_run(recipe, topology, options.stop_at_step)
        if topology.is_first:
            say(f"{recipe.name}: step {progress.step:,} saved in {RunFolder(recipe.run_folder).checkpoints}")
    finally:
        disconnect()
    return 0


def evaluate(options: argparse.Namespace) -> int:
    folder = RunFolder(options.folder)
    recipe = folder.saved_recipe()
    checkpoint = choose_checkpoint(folder.checkpoints, options.checkpoint)
    if folder.is_evaluated(checkpoint):
        say(f"{recipe.name}: {checkpoint.name} is evaluated already")
        return 0
    quiet_third_party()
    if place_from_environment() is None and recipe.local_world_size > 1:
        step = [] if options.checkpoint is None else ["--checkpoint", str(options.checkpoint)]
        return _run_ranks(["evaluate", str(options.folder), *step], recipe)
    from pretrain.evaluation.evaluate import evaluate_run

    topology = connect(recipe)
    try:
        evaluate_run(folder, recipe, topology, checkpoint)
    finally:
        disconnect()
    return 0


def generate(options: argparse.Namespace) -> int:
    folder = RunFolder(options.folder)
    recipe = folder.saved_recipe()
    checkpoint = choose_checkpoint(folder.checkpoints, options.checkpoint)
    if options.temperature < 0:
        raise UserError(f"--temperature is {options.temperature}, must not be negative")
    quiet_third_party()
    if place_from_environment() is None and recipe.local_world_size > 1:
        arguments = ["generate", str(options.folder), "--prompt", options.prompt]
        arguments += ["--max-new-tokens", str(options.max_new_tokens), "--temperature", str(options.temperature)]
        arguments += [] if options.checkpoint is None else ["--checkpoint", str(options.checkpoint)]
        return _run_ranks(arguments, recipe)
    from pretrain.evaluation.generate import generate_text

    topology = connect(recipe)
    try:
        text = generate_text(checkpoint, recipe, topology, options.prompt, options.max_new_tokens, options.temperature)
        if topology.is_first:
            say(text)
    finally:
        disconnect()
    return 0


def report(options: argparse.Namespace) -> None:
    quiet_third_party()
    from pretrain.report.page import summary_table, write_report
    from pretrain.report.run_records import read_runs

    output = options.output or options.folders[0] / "report.html"
    written = write_report(options.folders, output)
    say(summary_table(read_runs(options.folders)))
    say(f"report: {written}")


def _check_before_start(recipe: Recipe, world_size: int) -> None:
    """Everything that can be refused before ranks start: layout, DeepSpeed's file, data."""
    from pretrain.data.prepare import PreparedData
    from pretrain.training.deepspeed_config import deepspeed_config

    deepspeed_config(recipe, data_parallel_size_of(recipe, world_size))
    PreparedData.open(recipe)


def _is_done(recipe: Recipe) -> bool:
    latest = latest_checkpoint(RunFolder(recipe.run_folder).checkpoints)
    return latest is not None and latest.name == checkpoint_name(recipe.batch.train_steps)


def _run_ranks(arguments: list[str], recipe: Recipe) -> int:
    from pretrain.launch import run_local_ranks

    return run_local_ranks(arguments, recipe.local_world_size, Path(RunFolder(recipe.run_folder).logs))


def _stop_option(options: argparse.Namespace) -> list[str]:
    return [] if options.stop_at_step is None else ["--stop-at-step", str(options.stop_at_step)]
