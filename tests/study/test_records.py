"""The table of a study: what is read back, and what is refused."""

from __future__ import annotations

import errno
import fcntl
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pretrain.errors import UserError
from pretrain.evaluation.evaluation_file import ARRAYS
from pretrain.study import records
from pretrain.study.grid import cells_of
from pretrain.study.records import read_records, write_records
from pretrain.study.state import RunState, write_state
from pretrain.study.study_file import load_study
from pretrain.study.study_folder import StudyFolder
from tests.study.studies import write_study

EVALUATION = {
    "checkpoint_step": 6, "parameters": 20_000, "parameters_without_embeddings": 4_000,
    "training": {"hardware": "a processor", "versions": {"torch": "2.13.0", "pretrain": "0.6.0"}},
}  # fmt: skip


@pytest.fixture
def claimed(prepared_recipe, tmp_path):
    study = load_study(write_study(tmp_path, prepared_recipe))
    folder = StudyFolder(study.folder)
    folder.claim(study, cells_of(study)[0])
    return folder


def test_no_run_is_done(claimed):
    assert write_records(claimed.path) == claimed.records_file
    table = read_records(claimed.path)
    assert table.num_rows == 0 and {"run", "method", "axis.size", "axis.seed"} <= set(table.column_names)
    assert read_records(claimed.records_file).equals(table)


def test_a_file_system_without_locks(claimed, monkeypatch, capfd):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    assert write_records(claimed.path) == claimed.records_file
    assert f"see to it that nothing else is writing the records of {claimed.path}" in capfd.readouterr().err


def test_numbers_only_and_no_lists():
    tree = {"format": 4, "a": {"b": 1, "none": None}, "c": [1.0], "d": "x", "e": True, "f": 0.5}
    assert records._measures(tree) == {"measure.a.b": 1.0, "measure.a.none": None, "measure.f": 0.5}


def test_a_run_that_skipped_a_step_stays_at_its_scale(claimed, prepared_recipe, monkeypatch):
    """Six steps of 256 tokens, one of which the second seed skipped."""
    for seed, tokens in (("1", 6 * 256), ("2", 5 * 256)):
        run = claimed.run(f"xs-plain-seed{seed}")
        run.claim(prepared_recipe, "")
        write_state(run.path, RunState(), "done")
        run.evaluation_file.write_text(str(tokens))
    monkeypatch.setattr(records, "read_evaluation", lambda file: EVALUATION | {"tokens": int(file.read_text())})
    whole, skipped = read_records(write_records(claimed.path)).to_pylist()
    assert whole["planned_tokens"] == skipped["planned_tokens"] == 6 * 256
    assert whole["flops"] == skipped["flops"] > 0
    assert (whole["consumed_tokens"], skipped["consumed_tokens"]) == (6 * 256, 5 * 256)


def test_the_vocabulary_where_the_data_are_gone(claimed, prepared_recipe, monkeypatch):
    """The recipe's number says nothing where a tokenizer was given: the evaluation counted the ids."""
    gone = replace(prepared_recipe, data=replace(prepared_recipe.data, folder=str(claimed.path / "gone")))
    run = claimed.run("xs-plain-seed1")
    run.claim(gone, "")
    write_state(run.path, RunState(), "done")
    run.evaluation_file.write_text("{}")
    np.savez(run.evaluation_arrays, **{name: np.zeros(321) for name in ARRAYS})
    monkeypatch.setattr(records, "read_evaluation", lambda file: EVALUATION | {"tokens": 6 * 256})
    (row,) = read_records(write_records(claimed.path)).to_pylist()
    assert row["vocab_size"] == 321


def test_types_of_axes():
    rows = [
        {"axis.whole": 1, "axis.number": 1, "axis.text": 1, "measure.x": None, "measure.y": 1.0},
        {"axis.whole": 2, "axis.number": 0.5, "axis.text": "a", "measure.x": None},
    ]
    table = records._table(rows, [])
    types = {field.name: field.type for field in table.schema}
    assert types == {
        "axis.whole": pa.int64(), "axis.number": pa.float64(), "axis.text": pa.string(), "measure.y": pa.float64(),
    }  # fmt: skip
    assert table["axis.text"].to_pylist() == ["1", "a"] and table["measure.y"].to_pylist() == [1.0, None]


def test_of_another_version(claimed, monkeypatch):
    monkeypatch.setattr(records, "RECORDS_FORMAT", 7)
    write_records(claimed.path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 7, this version reads 1: .* --report writes them again"):
        read_records(claimed.path)


def test_what_is_no_table(claimed):
    with pytest.raises(UserError, match="records.parquet is not there: no run of the study is done yet"):
        read_records(claimed.path)
    pyarrow.parquet.write_table(pa.table({"a": [1]}), claimed.records_file)
    with pytest.raises(UserError, match="holds no records of a study"):
        read_records(claimed.path)
    claimed.records_file.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_records(claimed.path)
    with pytest.raises(UserError, match="is not the folder of a study"):
        write_records(claimed.path.parent)


def test_a_plan_of_another_version(claimed):
    claimed.plan_file.write_text(claimed.plan_file.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="has format 9, this version reads 1: run the study again"):
        write_records(claimed.path)
