"""The table of a study: what is read back, and what is refused."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet
import pytest

from pretrain.errors import UserError
from pretrain.study import records
from pretrain.study.grid import cells_of
from pretrain.study.records import read_records, write_records
from pretrain.study.study_file import load_study
from pretrain.study.study_folder import StudyFolder
from tests.study.studies import write_study


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


def test_numbers_only_and_no_lists():
    tree = {"format": 3, "a": {"b": 1, "none": None}, "c": [1.0], "d": "x", "e": True, "f": 0.5}
    assert records._measures(tree) == {"measure.a.b": 1.0, "measure.a.none": None, "measure.f": 0.5}


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
