"""Reading run folders: what is there, what is torn, what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.report.run_records import read_runs
from tests.report.synthetic_runs import STEPS, TOKENS_PER_STEP, write_evaluation, write_published_model, write_run


def test_reading_a_run(tmp_path: Path) -> None:
    (record,) = read_runs([write_run(tmp_path, "one")])
    assert record.name == "one"
    assert record.recipe["objective"]["alpha"] == 0.012
    tokens, loss = record.series("loss")
    assert len(tokens) == len(loss) == STEPS // 10
    assert tokens[-1] == STEPS * TOKENS_PER_STEP
    assert len(record.series("validation_perplexity", "rare")[0]) == STEPS // 100
    assert record.series("never_measured")[0].shape == (0,)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "one")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2010, "tok')
    assert read_runs([folder])[0].metrics[-1]["step"] == STEPS


@pytest.mark.parametrize("broken", ['{"step": 2010, "tok', '{"tokens": 3}', "[1]"])
def test_any_other_broken_line_is_named(tmp_path: Path, broken: str) -> None:
    folder = write_run(tmp_path, "one")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(broken + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:201: not a JSON record"):
        read_runs([folder])


def test_steps_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "one")
    again = {"step": 500, "tokens": 500 * TOKENS_PER_STEP, "loss": 123.0}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(again) + "\n")
    tokens, loss = read_runs([folder])[0].series("loss")
    assert len(tokens) == STEPS // 10
    assert (np.diff(tokens) > 0).all()
    assert loss[49] == 123.0


def test_what_is_not_an_evaluated_run_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "one")
    with pytest.raises(UserError, match=r"nowhere is not a run folder: it has no recipe\.yaml"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="at least one run folder"):
        read_runs([])
    with pytest.raises(UserError, match="given twice"):
        read_runs([folder, tmp_path / "x" / ".." / "one"])
    (folder / "evaluation.npz").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"cannot read .*evaluation\.npz .*: run `python .* evaluate .*one` again"):
        read_runs([folder])
    (folder / "evaluation.npz").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot read .*evaluation\.npz"):
        read_runs([folder])
    np.savez(folder / "evaluation.npz", groups=np.zeros(3))
    with pytest.raises(UserError, match="lacks token_counts, row_norms"):
        read_runs([folder])
    (folder / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"has not been evaluated: run `python -m pretrain evaluate .*one` first"):
        read_runs([folder])


def test_an_evaluation_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"evaluation\.json has format 1, this version reads 4: run `python .*one` again"
    ):
        read_runs([write_run(tmp_path, "one", format=1)])
    folder = write_run(tmp_path, "two")
    path = folder / "evaluation.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    del tree["isotropy"], tree["training"]
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match="lacks isotropy, training"):
        read_runs([folder])
    path.write_text('{"format": 4,\n"run": }', encoding="utf-8")
    with pytest.raises(UserError, match=r"evaluation\.json:2: not JSON"):
        read_runs([folder])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place, "same") for place in ("a", "b")]
    assert [record.name for record in read_runs(folders)] == [f"same ({folder})" for folder in folders]


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("perplexity", 3.0, "perplexity is 3.0"),
        ("perplexity", None, "perplexity is None"),
        ("seed", "one", "seed is 'one'"),
        ("isotropy", [0.5], r"isotropy is \[0.5\], not a number"),
        ("bits_per_byte", None, "bits_per_byte is None, without text_bytes"),
        ("bits_per_byte", {"total": 1.2}, "bits_per_byte is {'total': 1.2}, without text_bytes"),
        ("generation", [1], "generation is"),
        ("generation", {"examples": [{"prompt": "a"}]}, "generation.examples is no list of prompt, greedy"),
        ("under_trained_tokens", {"tokens": {"id": 1}}, "under_trained_tokens.tokens is no list of id, text"),
    ],
)
def test_entries_of_another_kind_are_damage(entry: str, value: object, said: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "one")
    path = folder / "evaluation.json"
    write_evaluation(folder, json.loads(path.read_text(encoding="utf-8")) | {entry: value})
    with pytest.raises(UserError, match=rf"evaluation\.json is damaged: {said}.*run `python .*one` again"):
        read_runs([folder])


def test_arrays_that_do_not_fit_are_damage(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "one")
    arrays = dict(np.load(folder / "evaluation.npz"))
    np.savez(folder / "evaluation.npz", **(arrays | {"row_norms": arrays["row_norms"][:-1]}))
    with pytest.raises(UserError, match=r"evaluation\.npz is damaged: arrays of the vocabulary have"):
        read_runs([folder])


@pytest.mark.parametrize("place", ["flags", "method"])
def test_arrays_with_a_changed_bit_are_damage(place: str, tmp_path: Path) -> None:
    """Each makes another kind of error in zipfile: a password is needed, or a compression that is not known."""
    path = write_run(tmp_path, "one") / "evaluation.npz"
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + {"flags": 8, "method": 10}[place]] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*evaluation\.npz .*: run `python .* evaluate .*one` again"):
        read_runs([path.parent])
    np.save(path.open("wb"), np.arange(3))
    with pytest.raises(UserError, match=r"cannot read .*evaluation\.npz .*: run `python .* evaluate .*one` again"):
        read_runs([path.parent])


def test_the_way_out_for_a_published_model_is_its_own_command(tmp_path: Path) -> None:
    folder = write_published_model(tmp_path)
    tree = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    write_evaluation(folder, tree | {"format": 3})
    with pytest.raises(UserError, match=f"evaluate HF_FOLDER --data RECIPE --output {folder}` that made it again"):
        read_runs([folder])


@pytest.mark.parametrize("arrays", [True, False])
def test_a_published_model_has_neither_recipe_nor_metrics(arrays: bool, tmp_path: Path) -> None:
    (record,) = read_runs([write_published_model(tmp_path, arrays=arrays)])
    assert (record.recipe, record.recipe_text, record.metrics, record.seed) == ({}, "", [], None)
    assert ("row_norms" in record.arrays) == arrays
    assert record.number("isotropy") is not None


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl"])
def test_a_run_without_its_files_is_no_published_model(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "one")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"is not a run folder: it has no {name}"):
        read_runs([folder])
