"""Tidy records of a study: one row per run and evaluated checkpoint, as Parquet and CSV.

format, study, run, state, method, seed      what it is; method is the point of the objective axis
step, planned_tokens, flops                  of this checkpoint; tokens of all steps up to it, FLOPs of them by formula
consumed_tokens                              that were trained on: fewer where steps were skipped
parameters, parameters_without_embeddings, vocab_size
axis.NAME                                    a column for each axis
measure.PATH                                 each number of evaluation.json, dots between keys; lists are left out
hardware, commit, version.torch, version.pretrain, recipe_sha256

They are made of evaluations, recipes and states, never of logs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pretrain.errors import UserError
from pretrain.evaluation.evaluation_file import read_arrays, read_evaluation
from pretrain.files import file_sha256, lock_file, replacing
from pretrain.model.size import training_flops_per_token
from pretrain.recipe_io import flatten
from pretrain.run_folder import RunFolder
from pretrain.study.state import read_state
from pretrain.study.study_cells import MEASURES
from pretrain.study.study_folder import StudyFolder

RECORDS_FORMAT = 1
_FORMAT_KEY = b"pretrain.study.records"  # in the metadata of the schema, so that an empty table has it too
_TYPES = {
    "format": pa.int64(), "study": pa.string(), "run": pa.string(), "state": pa.string(), "method": pa.string(),
    "seed": pa.int64(), "step": pa.int64(), "planned_tokens": pa.int64(), "consumed_tokens": pa.int64(),
    "parameters": pa.int64(),
    "parameters_without_embeddings": pa.int64(), "vocab_size": pa.int64(), "flops": pa.float64(),
    "hardware": pa.string(), "commit": pa.string(), "version.torch": pa.string(), "version.pretrain": pa.string(),
    "recipe_sha256": pa.string(),
}  # fmt: skip


def write_records(study_folder: Path) -> Path:
    """Write ``records.parquet`` and ``records.csv`` of everything that is done; the path of the first.

    Several jobs may do it at once: each waits for the one before, and reads after it.

    Raises:
        UserError: the folder is not a study's, or an evaluation of a done run is damaged or of another version.
    """
    folder = StudyFolder(study_folder)
    folder.plan()  # before a lock is written beside it
    with (study_folder / ".records.lock").open("w") as lock:
        lock_file(lock, f"writing the records of {study_folder}", wait=True)
        plan = folder.plan()
        rows = [row for name, run in plan["runs"].items() for row in _rows(folder.run(name), plan, run)]
        table = _table(rows, list(plan["axes"]))
        with replacing(folder.records_file) as temporary:
            pyarrow.parquet.write_table(table, temporary)
        with replacing(folder.csv_file) as temporary:
            pyarrow.csv.write_csv(table, temporary)
    return folder.records_file


def read_records(path: Path) -> pa.Table:
    """The records of a study: its folder, or the Parquet file.

    Raises:
        UserError: there are none, they cannot be read, or another version wrote them.
    """
    file = path / "records.parquet" if path.is_dir() else path
    again = "python -m pretrain study STUDY --report writes them again"
    if not file.is_file():
        raise UserError(f"{file} is not there: no run of the study is done yet, or it is elsewhere; {again}")
    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as Parquet ({error}); {again}") from error
    found = (table.schema.metadata or {}).get(_FORMAT_KEY)
    if found is None:
        raise UserError(f"{file} holds no records of a study: it says no format; {again}")
    if found != str(RECORDS_FORMAT).encode():
        raise UserError(f"{file} has format {found.decode()}, this version reads {RECORDS_FORMAT}: {again}")
    return table


def _rows(run: RunFolder, plan: dict[str, Any], entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    state = read_state(run.path)
    if state.state != "done":
        return
    recipe, sha256 = run.saved_recipe(), file_sha256(run.recipe_file)
    for file in (*sorted((run.path / "evaluations").glob("step_*.json")), run.evaluation_file):
        evaluation = read_evaluation(file)
        vocab_size = _vocab_size(recipe.data.folder, file.with_suffix(".npz"))
        # Not those that were trained on: a skipped step would make a scale of its own, and part a run from its pair.
        planned = evaluation["checkpoint_step"] * recipe.tokens_per_step
        training = evaluation["training"]
        yield {
            "format": RECORDS_FORMAT,
            "study": plan["study"],
            "run": run.path.name,
            "state": state.state,
            "method": entry["method"],
            "seed": recipe.seed,
            "step": evaluation["checkpoint_step"],
            "planned_tokens": planned,
            "consumed_tokens": evaluation["tokens"],
            "parameters": evaluation["parameters"],
            "parameters_without_embeddings": evaluation["parameters_without_embeddings"],
            "vocab_size": vocab_size,
            "flops": planned * training_flops_per_token(recipe.model, vocab_size),
            **{f"axis.{axis}": label for axis, label in entry["labels"].items()},
            **_measures(evaluation),
            "hardware": training["hardware"],
            "commit": state.commit,
            "version.torch": training["versions"]["torch"],
            "version.pretrain": training["versions"]["pretrain"],
            "recipe_sha256": sha256,
        }


def _measures(evaluation: dict[str, Any]) -> dict[str, float | None]:
    """Numbers, and what is null because it could not be measured."""
    flat = {key: value for key, value in flatten(evaluation).items() if key != "format"}
    return {
        f"measure.{key}": None if value is None or not math.isfinite(value) else float(value)
        for key, value in flat.items()
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }


def _vocab_size(data_folder: str, arrays: Path) -> int:
    """Where the data are gone, by the evaluation: a given tokenizer need not have the number of ids of the recipe."""
    from pretrain.data.manifest import Manifest

    manifest = Manifest.read(Path(data_folder))
    return len(read_arrays(arrays, ["token_counts"])["token_counts"]) if manifest is None else manifest.vocab_size


def _table(rows: list[dict[str, Any]], axes: list[str]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row)) or [*_TYPES, *(f"axis.{axis}" for axis in axes)]
    columns = {name: [row.get(name) for row in rows] for name in names}
    columns = {name: values for name, values in columns.items() if not _is_empty(name, values)}
    fields = [pa.field(name, _type(name, values)) for name, values in columns.items()]
    for field in fields:
        if field.type == pa.string():
            columns[field.name] = [None if value is None else str(value) for value in columns[field.name]]
    schema = pa.schema(fields, metadata={_FORMAT_KEY: str(RECORDS_FORMAT).encode()})
    return pa.table(columns, schema=schema)


def _is_empty(name: str, values: list[Any]) -> bool:
    """A measure that no run has: null where others have a section. What the page shows stays, as not measured."""
    shown = {f"measure.{measure.column}" for measure in MEASURES}
    return name.startswith("measure.") and name not in shown and all(value is None for value in values)


def _type(name: str, values: list[Any]) -> pa.DataType:
    """Of an axis: whole numbers, numbers, or texts if one of them is a text."""
    if name in _TYPES:
        return _TYPES[name]
    if name.startswith("measure."):
        return pa.float64()
    kinds = {type(value) for value in values}
    if kinds and kinds <= {int}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()
