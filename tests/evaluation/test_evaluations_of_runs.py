"""``evaluate RUN``: which checkpoint goes to which file, and what is refused before anything is computed."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.__main__ import main
from pretrain.checkpointing.folder import read_manifest, write_manifest
from pretrain.evaluation.evaluate import write_evaluation
from pretrain.evaluation.evaluation_file import read_evaluation
from pretrain.run_folder import EVALUATION_FORMAT, RunFolder
from pretrain.topology import connect
from tests.distributed import run_ranks
from tests.small_runs import change, train_on_ranks
from tests.training.processes import write_recipe


@pytest.fixture(scope="module")
def run(prepared_recipe, tmp_path_factory):
    recipe = change(prepared_recipe, output_root=str(tmp_path_factory.mktemp("runs")), checkpoint={"every_steps": 3})
    train_on_ranks(recipe, 1)
    return RunFolder(recipe.run_folder)


def refused(capfd, *arguments) -> str:
    capfd.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err and err.count("error: ") == 1
    return err


def test_the_newest_checkpoint_and_older_ones(run, capfd):
    assert main(["evaluate", str(run.path), "--checkpoint", "3"]) == 0
    assert not run.evaluation_file.exists()
    assert main(["evaluate", str(run.path)]) == 0
    older = json.loads((run.path / "evaluations" / "step_00000003.json").read_text())
    newest = json.loads(run.evaluation_file.read_text())
    assert (older["checkpoint_step"], newest["checkpoint_step"]) == (3, 6)
    assert older["format"] == newest["format"] == EVALUATION_FORMAT == 4
    assert older["seed"] == 1234 and older["isotropy"] != newest["isotropy"]
    assert 0 < older["training"]["seconds"] < newest["training"]["seconds"]
    assert (run.path / "evaluations" / "step_00000003.npz").exists() and run.evaluation_arrays.exists()
    capfd.readouterr()
    for options in ([], ["--checkpoint", "3"], ["--checkpoint", "6"]):
        assert main(["evaluate", str(run.path), *options]) == 0
        assert "is evaluated already" in capfd.readouterr().out


def test_where_a_run_was_trained_comes_from_its_checkpoint(run):
    """It may be evaluated on another machine; earlier versions noted the layout alone."""
    checkpoint = run.checkpoints / "step_00000003"
    manifest = read_manifest(checkpoint)
    elsewhere = manifest["trained_on"] | {"hardware": "another machine", "world_size": 8, "sharding": "zero3"}
    earlier = {key: value for key, value in manifest.items() if key != "trained_on"}
    assert manifest["trained_on"]["hardware"] and manifest["trained_on"]["versions"] == manifest["versions"]
    cases = [(manifest | {"trained_on": elsewhere}, elsewhere),
             (earlier, manifest["trained_on"] | {"hardware": None})]  # fmt: skip
    for given, expected in cases:
        (run.path / "evaluations" / "step_00000003.json").unlink(missing_ok=True)
        write_manifest(checkpoint, given)
        assert main(["evaluate", str(run.path), "--checkpoint", "3"]) == 0
        training = read_evaluation(run.path / "evaluations" / "step_00000003.json")["training"]
        assert {key: training[key] for key in expected} == expected
    write_manifest(checkpoint, manifest)


def test_an_evaluation_of_an_older_version_is_made_again(run, capfd):
    assert main(["evaluate", str(run.path)]) == 0
    tree = json.loads(run.evaluation_file.read_text())
    run.evaluation_file.write_text(json.dumps(tree | {"format": 3}))
    assert main(["evaluate", str(run.path)]) == 0
    assert "evaluated already" not in capfd.readouterr().out.splitlines()[-1]
    assert json.loads(run.evaluation_file.read_text())["perplexity"] == tree["perplexity"]


@pytest.mark.parametrize("file", ["evaluation_file", "evaluation_arrays"])
def test_the_way_out_of_a_damaged_evaluation(run, tmp_path, capfd, file):
    """What ``report`` says to run mends it."""
    assert main(["evaluate", str(run.path)]) == 0
    path, page = getattr(run, file), ["report", str(run.path), "--output", str(tmp_path / "page.html")]
    whole = run.evaluation_file.read_text()
    tree = json.loads(whole)
    tree["perplexity"]["total"] = "x"
    path.write_text(json.dumps(tree) if file == "evaluation_file" else "torn")
    capfd.readouterr()
    assert main(page) == 2
    assert f"run `python -m pretrain evaluate {run.path}` again" in capfd.readouterr().err
    assert main(["evaluate", str(run.path)]) == 0
    assert main(page) == 0
    assert json.loads(run.evaluation_file.read_text())["perplexity"] == json.loads(whole)["perplexity"]


def test_word_pairs_may_be_given_later_and_corrected(run, tmp_path, capfd):
    pairs = tmp_path / "pairs.tsv"
    given = [str(run.path), f"reporting.word_similarity=[{pairs}]"]
    for scores in ((3, 1, 2), (1, 2, 3)):
        pairs.write_text("a\tb\t{}\nb\tc\t{}\na\tc\t{}\n".format(*scores))
        assert main(["evaluate", *given]) == 0
        found = json.loads(run.evaluation_file.read_text())["word_similarity"]["pairs"]
        assert found["pairs"] == 3 and "evaluated already" not in capfd.readouterr().out
        assert main(["evaluate", *given]) == 0
        assert "evaluated already" in capfd.readouterr().out
    assert "only reporting.word_similarity" in refused(capfd, run.path, "seed=3")


def test_what_cannot_be_evaluated(run, tmp_path, capfd):
    assert "has no checkpoint of step 5; there are: 3, 6" in refused(capfd, run.path, "--checkpoint", 5)
    empty = RunFolder(tmp_path)
    empty.recipe_file.write_text(run.recipe_file.read_text())
    assert "has no checkpoint yet" in refused(capfd, tmp_path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("sun moon 3\n", "pairs.tsv:1: 'sun moon 3' is not word TAB word TAB score"),
        ("sun\tmoon\t3\nsun\tstar\tfar\n", "pairs.tsv:2: the score 'far' is not a number"),
        ("sun\tmoon\t3\n", "holds 1 word pairs"),
        (None, "cannot read the word pairs"),
        (
            "sun\tmoon\t3\nsun\tQQQ\t1\nQQ\tmoon\t2\n",
            "or the unknown one, for 'QQQ', 'QQ': take the pairs",
        ),
    ],
)
def test_bad_word_pairs_are_refused_before_anything_is_computed(run, tmp_path, capfd, monkeypatch, content, part):
    from pretrain.data.tokenizer import Tokenizer

    real = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [] if "QQ" in text else real(self, text))
    pairs = tmp_path / "pairs.tsv"
    if content is not None:
        pairs.write_text(content)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.recipe_file.write_text(
        run.recipe_file.read_text().replace("word_similarity: []", f"word_similarity: [{pairs}]")
    )
    folder.checkpoints.symlink_to(run.checkpoints)
    monkeypatch.setattr("pretrain.topology.connect", None)
    assert part in refused(capfd, folder.path)
    assert not folder.evaluation_file.exists()


def test_what_would_lose_a_finished_evaluation_is_refused_before_it(run, capfd, monkeypatch, tmp_path):
    """A place that cannot be written to, and records that cannot be read."""
    monkeypatch.setattr("pretrain.evaluation.evaluate.build_run", None)
    folder = RunFolder(tmp_path)
    for path in (run.recipe_file, run.metrics_file):
        shutil.copy(path, tmp_path)
    folder.checkpoints.symlink_to(run.checkpoints)
    (tmp_path / "evaluations").touch()
    assert "cannot create the folder" in refused(capfd, tmp_path, "--checkpoint", 3)
    folder.metrics_file.unlink()
    assert f"cannot read {folder.metrics_file}" in refused(capfd, tmp_path)


def threads_of_groups() -> int:
    names = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
    return sum(name.read_text().startswith("gloo_tcp_loop") for name in names if name.exists())


def degree_of_rank(rank, world_size, recipe):
    return connect(recipe).data_parallel_size


def test_a_process_lets_go_of_its_groups(prepared_recipe, tmp_path):
    """And so of its engines, which hold them: a notebook may train, evaluate and generate one after the other.

    None is left to a forked process either, which would wait for threads that a fork does not have.
    """
    recipe = change(prepared_recipe, output_root=str(tmp_path), device="cpu")
    gc.collect()
    before = threads_of_groups()
    for command in (["train", write_recipe(recipe, tmp_path)], ["evaluate", str(recipe.run_folder)]):
        assert main(command) == 0
    assert main(["generate", str(recipe.run_folder), "--prompt", "the", "--max-new-tokens", "2"]) == 0
    gc.collect()
    assert threads_of_groups() <= before
    assert run_ranks(degree_of_rank, 2, recipe, timeout_s=60) == [2, 2]


def test_numbers_and_arrays_are_written_together(tmp_path):
    """A disk that is full with the second file leaves the first as it was."""
    file, arrays = tmp_path / "evaluation.json", tmp_path / "evaluation.npz"
    tree = {"run": "r", "checkpoint_step": 3, "split": "test", "perplexity": {"total": 2.0}, "isotropy": 0.5,
            "mean_cosine": 0.5}  # fmt: skip
    write_evaluation(tree, {"row_norms": np.ones(3)}, file, arrays)
    before = file.read_bytes(), arrays.read_bytes()
    with pytest.raises(TypeError):
        write_evaluation(tree | {"split": object()}, {"row_norms": np.zeros(3)}, file, arrays)
    with pytest.raises(ValueError, match="allow_pickle"):
        write_evaluation(tree | {"split": "valid"}, {"row_norms": np.array([None])}, file, arrays)
    assert (file.read_bytes(), arrays.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.npz"]
