"""What is decided before ranks start, or by the first of them: which checkpoint, what is refused, what is told."""

from __future__ import annotations

import shutil

import pytest
import yaml

from pretrain import commands, topology
from pretrain.__main__ import main, parse
from pretrain.checkpointing.checkpoint import Progress
from pretrain.checkpointing.folder import checkpoint_name
from pretrain.data.prepare import prepare
from pretrain.evaluation import evaluate, evaluation_file, generate
from pretrain.recipe import TokenizerRecipe
from pretrain.recipe_io import recipe_to_dict
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks
from tests.small_runs import change, train_on_ranks


@pytest.fixture(scope="module")
def trained(prepared_recipe, tmp_path_factory):
    """Four steps on two ranks, a checkpoint every two."""
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path_factory.mktemp("choices")),
        batch={"train_steps": 4},
        checkpoint={"every_steps": 2},
        reporting={"geometry_every_steps": 0, "validate_every_steps": 0},
    )
    train_on_ranks(recipe, 2)
    return change(recipe, parallel={"data_parallel_size": 2})


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained.run_folder, tmp_path / trained.name)
    return change(trained, output_root=str(tmp_path))


@pytest.fixture
def started(monkeypatch):
    """What the launcher gives its ranks, which are not started."""
    given = []
    monkeypatch.setattr(commands, "_run_ranks", lambda arguments, *_, **__: given.append(parse(arguments)) or 0)
    return given


def write(recipe, path):
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)), encoding="utf-8")
    return str(path)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("launched", [False, True])
def test_what_cannot_go_on_changes_nothing(copy, started, tmp_path, monkeypatch, capfd, launched):
    """Another vocabulary is another model, which --allow-changes does not cover; its recipe must not be the run's."""
    other = {"folder": str(tmp_path / "data"), "tokenizer": TokenizerRecipe(vocab_size=400)}
    prepare(change(copy, data=other))
    path, before = write(change(copy, data=other), tmp_path / "other.yaml"), contents(copy.run_folder)
    if launched:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
    assert main(["train", path, "--allow-changes"]) == 2
    assert "step_00000004 is of another run (vocab_size: saved with 500, now 400)" in capfd.readouterr().err
    assert contents(copy.run_folder) == before and started == []
    RunFolder(copy.run_folder).check(copy)


@pytest.mark.parametrize(
    ("options", "in_a_job", "words"),
    [
        ([], False, "the same command goes on"),
        (["--resume-from", "2"], False, "the same command without --resume-from 2 goes on"),
        (["--from-scratch"], False, "the same command without --from-scratch goes on"),
        (["--resume-from", "2"], True, "the same command goes on"),  # where it goes back once
    ],
)
def test_how_a_stopped_run_goes_on(copy, started, tmp_path, monkeypatch, capfd, options, in_a_job, words):
    """The first rank says it, so it must know what the launcher was told."""
    (newest := RunFolder(copy.run_folder).checkpoints / checkpoint_name(4)).rename(newest.with_name("step_00000003"))
    if in_a_job:
        monkeypatch.setenv("SLURM_JOB_ID", "5")
        monkeypatch.setenv("PRETRAIN_INCARNATION", "5.0")
    path = write(copy, tmp_path / "recipe.yaml")
    assert main(["train", path, *options]) == 0
    monkeypatch.setattr("pretrain.training.loop.train", lambda *_: Progress(3, 24, 768))
    monkeypatch.setattr(topology, "connect", lambda _: topology.Topology(0, 2, 0, *[None] * 7))
    monkeypatch.setattr(topology, "disconnect", lambda: None)
    assert started[0].claimed and commands.train(started[0]) == 75
    out = capfd.readouterr().out
    assert f"stopped as asked, {words}\n" in out and ("is kept in" in out) == bool(options)


def test_ranks_are_given_what_was_chosen(copy, started, capfd):
    """A prompt may begin with a dash, and a run that trains has another newest checkpoint by the time they look."""
    run = str(copy.run_folder)
    assert main(["evaluate", run]) == main(["generate", run, "--prompt=-Once"]) == 0
    assert [options.checkpoint for options in started] == [4, 4] and started[1].prompt == "-Once"


def choose_on_rank(rank, world_size, verb, run, evaluated):
    """Rank 1 takes an older checkpoint for the newest, and sees another evaluation or none."""
    chosen = []
    commands.choose_checkpoint = lambda folder, *_, **__: folder / checkpoint_name((4, 2)[rank])
    topology.disconnect = lambda: None  # the harness does
    evaluation_file.is_evaluated = lambda *_: evaluated[rank]
    evaluate.evaluate_run = lambda folder, recipe, topology, checkpoint: chosen.append(checkpoint.name)
    generate.generate_text = lambda checkpoint, *_: chosen.append(checkpoint.name) or ""
    return [main([verb, run, *(["--prompt", "ab"] if verb == "generate" else [])]), *chosen]


@pytest.mark.parametrize(
    ("verb", "evaluated", "chosen"),
    [
        ("generate", (False, False), ["step_00000004"]),
        ("evaluate", (False, True), ["step_00000004"]),
        ("evaluate", (True, False), []),
    ],
)
def test_the_first_rank_chooses(copy, verb, evaluated, chosen):
    assert run_ranks(choose_on_rank, 2, verb, str(copy.run_folder), evaluated) == [[0, *chosen]] * 2


def test_reshard_looks_at_the_folder_it_was_given(copy, started, tmp_path, monkeypatch, capfd):
    """Not at the one that its recipe names, which may be another run's by now."""
    monkeypatch.chdir(tmp_path)
    RunFolder(copy.run_folder).claim(change(copy, output_root="runs"), "")
    moved, named = RunFolder(copy.run_folder.rename(tmp_path / "moved")), RunFolder(tmp_path / "runs" / copy.name)
    named.path.mkdir(parents=True)
    command = ["checkpoint", "reshard", "moved", "parallel.sharding=zero3"]
    named.stop_file.touch()
    assert main(command) == 0 and len(started) == 1
    named.stop_file.rename(moved.stop_file)
    assert main(command) == 2 and len(started) == 1
    assert "moved/STOP asks this run to stop" in capfd.readouterr().err
