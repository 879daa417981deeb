"""What each verb does. Heavy imports wait until a verb needs them, so that errors in a recipe show at once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.checkpointing.folder import (
    checkpoint_name,
    checkpoints_in,
    choose_checkpoint,
    problems_of,
    read_manifest,
    step_of,
)
from pretrain.checkpointing.identity import check_newest
from pretrain.cluster.endings import note
from pretrain.cluster.incarnation import TOKEN, forget_incarnation, has_gone_back, has_taken_over, note_going_back
from pretrain.console import say
from pretrain.errors import UserError
from pretrain.files import make_folder
from pretrain.place import Place, check_plain_start, choose_device, data_parallel_size_of, place_from_environment
from pretrain.quiet import quiet_third_party, quiet_warnings
from pretrain.recipe import Recipe
from pretrain.recipe_io import load_recipe, text_as_given
from pretrain.run_folder import RunFolder
from pretrain.run_lock import run_lock
from pretrain.training.stopping import EXIT_STOPPED, StopSignals, why_stopped

if TYPE_CHECKING:
    from pretrain.data.prepared import PreparedData


def prepare(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    quiet_warnings()
    from pretrain.data.prepare import prepare as prepare_data

    prepare_data(recipe)


def train(options: argparse.Namespace) -> int:
    with StopSignals() as signals:
        return _train(options, signals)


def _train(options: argparse.Namespace, signals: StopSignals) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    folder, place = RunFolder(recipe.run_folder), place_from_environment()
    check_plain_start(place, recipe.local_world_size)
    is_first = place is None or place.rank == 0
    choose_device(recipe)
    quiet_third_party()
    with contextlib.ExitStack() as stack:
        if is_first and not options.claimed:
            goes_on_from = _to_go_on_from(options, folder)
            prepared = _check_before_start(recipe, place, folder, goes_on_from)
            given = text_as_given(options.recipe, options.overrides)
            if not options.from_scratch:
                folder.check(recipe, allow_changes=options.allow_changes)
            check_newest(goes_on_from, recipe, prepared, allow_changes=options.allow_changes)
            make_folder(folder.path)
            lock = stack.enter_context(run_lock(folder.path, succeeds=has_taken_over(folder.path)))
            forget_incarnation(folder.path)
            _set_aside(options, folder)
            folder.claim(recipe, given, allow_changes=options.allow_changes)
            if place is None and is_done(recipe):
                say(f"{recipe.name} is trained already: step {recipe.batch.train_steps:,} of {recipe.run_folder}")
                return 0
            if place is None and recipe.local_world_size > 1:
                stop = [] if options.stop_at_step is None else ["--stop-at-step", str(options.stop_at_step)]
                allow = ["--allow-changes"] if options.allow_changes else []
                arguments = ["train", options.recipe, *options.overrides, *stop, *allow, *_going_back(options)]
                return _run_ranks([*arguments, "--claimed"], recipe, folder, signals, [lock])
        from pretrain.topology import connected
        from pretrain.training.loop import train as train_run

        topology = stack.enter_context(connected(recipe))
        progress = train_run(recipe, topology, options.stop_at_step, signals, options.allow_changes)
        stopped = progress.step < min(options.stop_at_step or recipe.batch.train_steps, recipe.batch.train_steps)
        if stopped:
            note(stopped_by=why_stopped(signals, folder.stop_file))
        if topology.is_first:
            saved = f"step {progress.step:,} saved in {folder.checkpoints}" if progress.step else "nothing trained yet"
            option = "" if TOKEN in os.environ else " ".join(_going_back(options))  # a job goes back once
            again = f"the same command{option and ' without '}{option} goes on"
            say(f"{recipe.name}: {saved}" + (f"; stopped as asked, {again}" if stopped else ""))
    return EXIT_STOPPED if stopped else 0


def reshard(options: argparse.Namespace) -> int:
    folder, place = RunFolder(options.folder), place_from_environment()
    checkpoint = choose_checkpoint(folder.checkpoints, options.step, check=place is None)
    recipe = load_recipe(str(folder.recipe_file), options.overrides)
    on_cpu = dataclasses.replace(recipe, device="cpu")  # it moves tensors, and computes nothing
    choose_device(on_cpu)
    quiet_third_party()
    with contextlib.ExitStack() as stack:
        if not options.claimed and (place is None or place.rank == 0):
            folder.check(recipe)
            _check_before_start(on_cpu, place, folder, [checkpoint])
            lock = stack.enter_context(run_lock(folder.path, succeeds=has_taken_over(folder.path)))
            if place is None and recipe.local_world_size > 1:
                arguments = ["checkpoint", "reshard", str(options.folder), *options.overrides]
                arguments += ["--step", str(step_of(checkpoint)), "--claimed"]
                return _run_ranks(arguments, recipe, folder, inherited=[lock])
        from pretrain.checkpointing.reshard import reshard as reshard_checkpoint
        from pretrain.topology import connected

        with connected(on_cpu) as topology:
            reshard_checkpoint(folder, checkpoint, on_cpu, topology)
            if topology.is_first:
                folder.claim(recipe, "")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    folder = RunFolder(options.folder)
    if not folder.recipe_file.exists() and (options.folder / "config.json").exists():
        return _evaluate_huggingface(options)
    others = [given for given in options.overrides if not given.startswith(("reporting.word_similarity=", "device="))]
    if options.data or options.output or others:
        raise UserError(
            "--data, --output and key=value are for a Hugging Face folder, with its config.json; "
            f"{options.folder} is none: a run is measured on its own data, and only reporting.word_similarity=[...] "
            "and device=... may be given"
        )
    saved, place = folder.saved_recipe(options.overrides), place_from_environment()
    checkpoint = choose_checkpoint(folder.checkpoints, options.checkpoint, check=place is None)
    recipe = _on_layout_of(checkpoint, saved)
    from pretrain.evaluation.evaluation_file import is_evaluated

    nothing_to_do = f"{recipe.name}: {checkpoint.name} is evaluated already"
    if place is None and is_evaluated(folder, checkpoint, recipe):
        say(nothing_to_do)
        return 0
    choose_device(recipe)
    if place is None:
        _check_evaluation(recipe)
        if recipe.local_world_size > 1:
            arguments = ["evaluate", str(options.folder), *options.overrides]
            return _run_ranks([*arguments, "--checkpoint", str(step_of(checkpoint))], recipe, folder)
    quiet_third_party()
    from pretrain.evaluation.evaluate import evaluate_run
    from pretrain.topology import connected

    with connected(recipe) as topology:
        done = topology.is_first and is_evaluated(folder, checkpoint, recipe)
        checkpoint, done = _choice_of_first(checkpoint, done)
        if not done:
            evaluate_run(folder, recipe, topology, checkpoint)
        elif topology.is_first:
            say(nothing_to_do)
    return 0


def _evaluate_huggingface(options: argparse.Namespace) -> int:
    folder = options.folder
    if options.data is None or options.output is None:
        raise UserError(
            f"{folder} is a Hugging Face folder: say on the corpus of which recipe to measure it, with --data RECIPE "
            "[key=value ...], and where to write evaluation.json, with --output FOLDER"
        )
    if options.checkpoint is not None:
        raise UserError(f"{folder} is a Hugging Face folder and has no steps: leave --checkpoint out")
    if RunFolder(options.output).recipe_file.exists():
        raise UserError(
            f"--output {options.output} is a run, which has an evaluation of its own: choose another folder"
        )
    recipe = load_recipe(options.data, options.overrides)
    choose_device(recipe)
    quiet_third_party()
    _check_devices(recipe, 1)
    from pretrain.evaluation.huggingface import evaluate_huggingface

    evaluate_huggingface(folder, recipe, make_folder(options.output))
    return 0


def generate(options: argparse.Namespace) -> int:
    _check_generation(options)
    folder, place = RunFolder(options.folder), place_from_environment()
    checkpoint = choose_checkpoint(folder.checkpoints, options.checkpoint, check=place is None)
    if any(not given.startswith("device=") for given in options.overrides):
        raise UserError(f"generate takes {options.folder} as it was trained: only device=... may be given")
    recipe = _on_layout_of(checkpoint, folder.saved_recipe(options.overrides))
    choose_device(recipe)
    if place is None:
        _check_devices(recipe, recipe.local_world_size)
        if recipe.local_world_size > 1:
            # In one word: argparse takes a second one that begins with a dash for an option.
            arguments = ["generate", str(options.folder), *options.overrides, f"--prompt={options.prompt}"]
            arguments += ["--max-new-tokens", str(options.max_new_tokens), "--temperature", str(options.temperature)]
            return _run_ranks([*arguments, "--checkpoint", str(step_of(checkpoint))], recipe, folder)
    quiet_third_party()
    from pretrain.evaluation.generate import generate_text
    from pretrain.topology import connected

    with connected(recipe) as topology:
        checkpoint, _ = _choice_of_first(checkpoint)
        text = generate_text(checkpoint, recipe, topology, options.prompt, options.max_new_tokens, options.temperature)
        if topology.is_first:
            say(text)
    return 0


def _check_generation(options: argparse.Namespace) -> None:
    """
    Raises:
        UserError: a temperature that is none, or a prompt that is not UTF-8.
    """
    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature is {options.temperature}, must be 0 or a finite number above it")
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt {options.prompt!r} is not UTF-8: {error.reason}; give it as UTF-8 text") from error


def report(options: argparse.Namespace) -> None:
    quiet_warnings()
    from pretrain.report.page import write_report
    from pretrain.report.table import summary_table

    output = options.output or options.folders[0] / "report.html"
    methods = write_report(options.folders, output)
    say(summary_table(methods))
    say(f"report: {output}")


def _check_before_start(
    recipe: Recipe, place: Place | None, folder: RunFolder, goes_on_from: Sequence[Path]
) -> PreparedData:
    if place is None:
        _check_devices(recipe, recipe.local_world_size)
    return check_run(recipe, recipe.local_world_size if place is None else place.world_size, folder, goes_on_from)


def check_run(recipe: Recipe, world_size: int, folder: RunFolder, goes_on_from: Sequence[Path]) -> PreparedData:
    """Everything that can be refused before ranks start, on any machine: layout, DeepSpeed's file, data, first weights.

    Args:
        folder: of the run, which may have been moved since its recipe was written.
        goes_on_from: checkpoints; without any, the first weights are needed.
    """
    from pretrain.data.prepared import PreparedData, check_length
    from pretrain.training.deepspeed_config import deepspeed_config

    if folder.stop_file.exists():
        raise UserError(f"{folder.stop_file} asks this run to stop: delete it to go on")
    deepspeed_config(recipe, data_parallel_size_of(recipe, world_size))
    prepared = PreparedData.open(recipe)
    check_length(prepared, recipe)
    if recipe.model.init_from and not goes_on_from:
        from pretrain.checkpointing.huggingface.initial_weights import check_initial_weights

        check_initial_weights(recipe, prepared)
    return prepared


def _check_devices(recipe: Recipe, local_ranks: int) -> None:
    if recipe.device == "cpu":  # nothing to look for, and torch need not be imported
        return
    from pretrain.topology import check_devices

    check_devices(recipe, local_ranks)


def _check_evaluation(recipe: Recipe) -> None:
    _check_devices(recipe, recipe.local_world_size)
    if not recipe.reporting.word_similarity:
        return
    from pretrain.data.prepared import TOKENIZER_NAME
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.evaluation.word_similarity import read_encoded, words_in_text

    tokenizer = Tokenizer.load(Path(recipe.data.folder) / TOKENIZER_NAME)
    for name in recipe.reporting.word_similarity:
        read_encoded(Path(name), words_in_text(tokenizer))


def _to_go_on_from(options: argparse.Namespace, folder: RunFolder) -> list[Path]:
    """The checkpoints of which training will load the newest that verifies."""
    if not _going_back(options) or has_gone_back(folder.path):
        return checkpoints_in(folder.checkpoints)
    return [choose_checkpoint(folder.checkpoints, options.resume_from)] if options.resume_from else []


def _set_aside(options: argparse.Namespace, folder: RunFolder) -> None:
    """What ``--from-scratch`` or ``--resume-from`` leave behind; once, however often SLURM starts the same command."""
    if not _going_back(options):
        return
    if has_gone_back(folder.path):
        say("an earlier start of this job has gone back as asked: this one goes on from the newest checkpoint")
        return
    aside = folder.start_again() if options.from_scratch else folder.go_back_to(options.resume_from)
    if aside is not None:
        say(f"what was there is kept in {aside}")
    note_going_back(folder.path)


def _going_back(options: argparse.Namespace) -> list[str]:
    """The option that moves progress aside, if one was given."""
    step = options.resume_from
    return ["--resume-from", str(step)] if step else ["--from-scratch"] if options.from_scratch else []


def is_done(recipe: Recipe, *, hashed: bool = True) -> bool:
    last = RunFolder(recipe.run_folder).checkpoints / checkpoint_name(recipe.batch.train_steps)
    return last.is_dir() and not problems_of(last, hashed=hashed)


def _on_layout_of(checkpoint: Path, recipe: Recipe) -> Recipe:
    """The recipe, where it leaves the number of ranks to the launcher with the one that the checkpoint was saved on."""
    if recipe.parallel.data_parallel_size is not None:
        return recipe
    size = read_manifest(checkpoint)["layout"]["data_parallel_size"]
    return dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, data_parallel_size=size))


def _run_ranks(
    arguments: list[str],
    recipe: Recipe,
    folder: RunFolder,
    signals: StopSignals | None = None,
    inherited: Sequence[int] = (),
) -> int:
    from pretrain.launch import run_local_ranks

    return run_local_ranks(arguments, recipe.local_world_size, folder.logs, signals, inherited)


def _choice_of_first(checkpoint: Path, done: bool = False) -> tuple[Path, bool]:
    """The first rank's, and whether it is done, on all ranks, as a run that trains has another newest one soon."""
    import torch.distributed as dist

    choice = [(checkpoint.name, done)]
    dist.broadcast_object_list(choice, src=0)
    return checkpoint.with_name(choice[0][0]), choice[0][1]
