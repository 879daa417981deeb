"""What each verb does. Heavy imports wait until a verb needs them, so that errors in a recipe show at once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
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
from pretrain.checkpointing.identity import CHANGEABLE, check_identity, identity_of
from pretrain.cluster.endings import note
from pretrain.cluster.incarnation import forget_incarnation, has_gone_back, has_taken_over, note_going_back
from pretrain.console import say
from pretrain.errors import UserError
from pretrain.files import make_folder
from pretrain.quiet import quiet_third_party
from pretrain.recipe import Recipe
from pretrain.recipe_io import find_recipe, load_recipe
from pretrain.run_folder import RunFolder
from pretrain.run_lock import run_lock
from pretrain.topology import (
    Topology,
    check_devices,
    check_plain_start,
    choose_device,
    connect,
    data_parallel_size_of,
    disconnect,
    place_from_environment,
)
from pretrain.training.stopping import EXIT_STOPPED, StopSignals, why_stopped

if TYPE_CHECKING:
    from pretrain.data.prepared import PreparedData


def prepare(options: argparse.Namespace) -> None:
    quiet_third_party()
    from pretrain.data.prepare import prepare as prepare_data

    prepare_data(load_recipe(options.recipe, options.overrides))


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
            prepared = _check_before_start(recipe, recipe.local_world_size if place is None else place.world_size)
            given = text_as_given(options.recipe, options.overrides)
            if not options.from_scratch:
                folder.check(recipe, allow_changes=options.allow_changes)
            make_folder(folder.path)
            lock = stack.enter_context(run_lock(folder.path, succeeds=has_taken_over(folder.path)))
            forget_incarnation(folder.path)
            _set_aside(options, folder, recipe, prepared)
            folder.claim(recipe, given, allow_changes=options.allow_changes)
            if place is None and is_done(recipe):
                say(f"{recipe.name} is trained already: step {recipe.batch.train_steps:,} of {recipe.run_folder}")
                return 0
            if place is None and recipe.local_world_size > 1:
                stop = [] if options.stop_at_step is None else ["--stop-at-step", str(options.stop_at_step)]
                allow = ["--allow-changes"] if options.allow_changes else []
                arguments = ["train", options.recipe, *options.overrides, *stop, *allow, "--claimed"]
                return _run_ranks(arguments, recipe, folder, signals, [lock])
        from pretrain.training.loop import train as train_run

        topology = stack.enter_context(_connected(recipe))
        progress = train_run(recipe, topology, options.stop_at_step, signals, options.allow_changes)
        stopped = progress.step < min(options.stop_at_step or recipe.batch.train_steps, recipe.batch.train_steps)
        if stopped:
            note(stopped_by=why_stopped(signals, folder.stop_file))
        if topology.is_first:
            saved = f"step {progress.step:,} saved in {folder.checkpoints}" if progress.step else "nothing trained yet"
            say(f"{recipe.name}: {saved}" + ("; stopped as asked, the same command goes on" if stopped else ""))
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
            _check_before_start(on_cpu, on_cpu.local_world_size if place is None else place.world_size)
            lock = stack.enter_context(run_lock(folder.path, succeeds=has_taken_over(folder.path)))
            if place is None and recipe.local_world_size > 1:
                arguments = ["checkpoint", "reshard", str(options.folder), *options.overrides]
                arguments += ["--step", str(step_of(checkpoint)), "--claimed"]
                return _run_ranks(arguments, recipe, folder, inherited=[lock])
        from pretrain.checkpointing.reshard import reshard as reshard_checkpoint

        with _connected(on_cpu) as topology:
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
    saved = _recipe_of(folder, options.overrides)
    checkpoint = choose_checkpoint(folder.checkpoints, options.checkpoint, check=place_from_environment() is None)
    recipe = _on_layout_of(checkpoint, saved)
    from pretrain.evaluation.evaluation_file import is_evaluated

    if is_evaluated(folder, checkpoint, recipe):
        say(f"{recipe.name}: {checkpoint.name} is evaluated already")
        return 0
    choose_device(recipe)
    quiet_third_party()
    if place_from_environment() is None:
        _check_evaluation(recipe)
        if recipe.local_world_size > 1:
            arguments = ["evaluate", str(options.folder), *options.overrides, *_checkpoint_option(options)]
            return _run_ranks(arguments, recipe, folder)
    from pretrain.evaluation.evaluate import evaluate_run

    with _connected(recipe) as topology:
        evaluate_run(folder, recipe, topology, checkpoint)
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
    check_devices(recipe, 1)
    from pretrain.evaluation.huggingface import evaluate_huggingface

    evaluate_huggingface(folder, recipe, make_folder(options.output))
    return 0


def generate(options: argparse.Namespace) -> int:
    _check_generation(options)
    folder = RunFolder(options.folder)
    checkpoint = choose_checkpoint(folder.checkpoints, options.checkpoint, check=place_from_environment() is None)
    if any(not given.startswith("device=") for given in options.overrides):
        raise UserError(f"generate takes {options.folder} as it was trained: only device=... may be given")
    recipe = _on_layout_of(checkpoint, _recipe_of(folder, options.overrides))
    choose_device(recipe)
    quiet_third_party()
    if place_from_environment() is None:
        check_devices(recipe, recipe.local_world_size)
        if recipe.local_world_size > 1:
            arguments = ["generate", str(options.folder), *options.overrides, "--prompt", options.prompt]
            arguments += ["--max-new-tokens", str(options.max_new_tokens), "--temperature", str(options.temperature)]
            return _run_ranks([*arguments, *_checkpoint_option(options)], recipe, folder)
    from pretrain.evaluation.generate import generate_text

    with _connected(recipe) as topology:
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
    quiet_third_party()
    from pretrain.report.page import write_report
    from pretrain.report.table import summary_table

    output = options.output or options.folders[0] / "report.html"
    methods = write_report(options.folders, output)
    say(summary_table(methods))
    say(f"report: {output}")


def _check_before_start(recipe: Recipe, world_size: int) -> PreparedData:
    if place_from_environment() is None:
        check_devices(recipe, recipe.local_world_size)
    return check_run(recipe, world_size)


def check_run(recipe: Recipe, world_size: int) -> PreparedData:
    """Everything that can be refused before ranks start, on any machine: layout, DeepSpeed's file, data."""
    from pretrain.data.prepared import PreparedData, check_length
    from pretrain.training.deepspeed_config import deepspeed_config

    stop_file = RunFolder(recipe.run_folder).stop_file
    if stop_file.exists():
        raise UserError(f"{stop_file} asks this run to stop: delete it to go on")
    deepspeed_config(recipe, data_parallel_size_of(recipe, world_size))
    prepared = PreparedData.open(recipe)
    check_length(prepared, recipe)
    if recipe.model.init_from and not checkpoints_in(RunFolder(recipe.run_folder).checkpoints):
        from pretrain.checkpointing.huggingface.initial_weights import check_initial_weights

        check_initial_weights(recipe, prepared)
    return prepared


def _check_evaluation(recipe: Recipe) -> None:
    check_devices(recipe, recipe.local_world_size)
    if not recipe.reporting.word_similarity:
        return
    from pretrain.data.prepared import TOKENIZER_NAME
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.evaluation.word_similarity import read_encoded, words_in_text

    tokenizer = Tokenizer.load(Path(recipe.data.folder) / TOKENIZER_NAME)
    for name in recipe.reporting.word_similarity:
        read_encoded(Path(name), words_in_text(tokenizer))


def _set_aside(options: argparse.Namespace, folder: RunFolder, recipe: Recipe, prepared: PreparedData) -> None:
    """What ``--from-scratch`` or ``--resume-from`` leave behind; once, however often SLURM starts the same command."""
    if not options.from_scratch and options.resume_from is None:
        return
    if has_gone_back(folder.path):
        say("an earlier start of this job has gone back as asked: this one goes on from the newest checkpoint")
        return
    if options.from_scratch:
        aside = folder.start_again()
    else:
        checkpoint = choose_checkpoint(folder.checkpoints, options.resume_from)
        free = CHANGEABLE if options.allow_changes else ()
        check_identity(checkpoint, read_manifest(checkpoint), identity_of(recipe, prepared), free)
        aside = folder.go_back_to(options.resume_from)
    if aside is not None:
        say(f"what was there is kept in {aside}")
    note_going_back(folder.path)


def text_as_given(recipe: str, overrides: Sequence[str]) -> str:
    """What a run remembers of its command."""
    return find_recipe(recipe).read_text(encoding="utf-8") + "".join(f"# override: {entry}\n" for entry in overrides)


def is_done(recipe: Recipe, *, hashed: bool = True) -> bool:
    last = RunFolder(recipe.run_folder).checkpoints / checkpoint_name(recipe.batch.train_steps)
    return last.is_dir() and not problems_of(last, hashed=hashed)


def _recipe_of(folder: RunFolder, overrides: Sequence[str]) -> Recipe:
    """As it was trained, but for ``overrides``."""
    return load_recipe(str(folder.recipe_file), overrides) if overrides else folder.saved_recipe()


def _on_layout_of(checkpoint: Path, recipe: Recipe) -> Recipe:
    """The recipe, where it leaves the number of ranks to the launcher with the one that the checkpoint was saved on."""
    if recipe.parallel.data_parallel_size is not None:
        return recipe
    size = read_manifest(checkpoint)["layout"]["data_parallel_size"]
    return dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, data_parallel_size=size))


@contextlib.contextmanager
def _connected(recipe: Recipe) -> Iterator[Topology]:
    try:
        yield connect(recipe)
    finally:
        disconnect()


def _run_ranks(
    arguments: list[str],
    recipe: Recipe,
    folder: RunFolder,
    signals: StopSignals | None = None,
    inherited: Sequence[int] = (),
) -> int:
    from pretrain.launch import run_local_ranks

    return run_local_ranks(arguments, recipe.local_world_size, folder.logs, signals, inherited)


def _checkpoint_option(options: argparse.Namespace) -> list[str]:
    return [] if options.checkpoint is None else ["--checkpoint", str(options.checkpoint)]
