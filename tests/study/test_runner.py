"""A real study of two small runs: stopped, gone on with, recorded; what fails, what changed, who else is there."""

from __future__ import annotations

import json
import signal

import pytest

from pretrain.__main__ import main
from pretrain.run_folder import RunFolder
from pretrain.run_lock import run_lock
from pretrain.study.grid import cells_of
from pretrain.study.records import read_records
from pretrain.study.state import read_state
from pretrain.study.study_file import load_study
from pretrain.study.study_folder import StudyFolder
from tests.study.studies import OBJECTIVES, write_study
from tests.training.processes import end_of, start, wait_until

STEPS = 160


@pytest.fixture(scope="module")
def stopped(prepared_recipe, tmp_path_factory):
    """A study of two runs that was interrupted in the first, and what it said."""
    folder = tmp_path_factory.mktemp("study")
    study = write_study(
        folder,
        prepared_recipe,
        axes={"objective": OBJECTIVES},
        evaluate="all",
        recipe_sections={
            "batch": {"train_steps": STEPS},
            "checkpoint": {"every_steps": 100, "keep_last": 5},
            "reporting": {"geometry_every_steps": 0, "validate_every_steps": 0},
        },
    )
    process = start("study", study)
    metrics = folder / "out/small/plain/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    locked = main(["study", study])
    process.send_signal(signal.SIGINT)
    return folder, study, end_of(process), locked


def test_a_study_that_is_interrupted_and_goes_on(stopped, capfd):
    folder, study, (code, said), locked = stopped
    out = StudyFolder(folder / "out/small")
    assert code == 75 and "plain stopped: SIGINT; the same command goes on" in said, said
    assert locked == 2  # another runner was refused
    first = read_state(out.path / "plain")
    reached = len((out.path / "plain/metrics.jsonl").read_text().splitlines())
    assert (first.state, first.cause) == ("preempted", "SIGINT") and 3 <= reached < STEPS
    assert read_state(out.path / "agg").state == "planned" and read_records(out.path).num_rows == 0
    [saved] = [path.name for path in (out.path / "plain/checkpoints").glob("step_*") if int(path.name[5:]) != 100]
    assert saved == f"step_{reached:08d}"  # it saved where it stopped

    process = start("study", study, "--parallel-runs", "2")
    code, said = end_of(process)
    assert code == 0 and "2 done" in said, said
    for name in OBJECTIVES:
        assert read_state(out.path / name).state == "done"
        steps = [json.loads(line)["step"] for line in (out.path / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, STEPS + 1))
    log = (out.path / "plain/logs/study.log").read_text()
    assert log.count("$ python -m pretrain train") == 2 and f"step {reached}" in log
    _check_records(out, reached)

    before = {path: path.stat().st_mtime_ns for path in out.path.rglob("*.jsonl")}
    assert main(["study", study]) == 0
    assert "2 done" in capfd.readouterr().out and before == {path: path.stat().st_mtime_ns for path in before}


def _check_records(out: StudyFolder, reached: int) -> None:
    rows = read_records(out.path).to_pylist()
    steps = {name: [row["step"] for row in rows if row["run"] == name] for name in OBJECTIVES}
    assert steps == {"plain": sorted({100, reached, STEPS}), "agg": [100, STEPS]}
    for row in rows:
        assert (row["format"], row["study"], row["state"], row["seed"]) == (1, "small", "done", 1234)
        assert row["method"] == row["axis.objective"] == row["run"]
        assert row["planned_tokens"] == row["consumed_tokens"] == row["step"] * 256 and row["vocab_size"] == 500
        run = RunFolder(out.path / row["run"])
        last = row["step"] == STEPS
        file = run.evaluation_file if last else run.path / f"evaluations/step_{row['step']:08d}.json"
        evaluation = json.loads(file.read_text())
        assert row["measure.perplexity.rare"] == evaluation["perplexity"]["rare"]
        assert row["measure.isotropy"] == evaluation["isotropy"]
        assert row["hardware"] and row["version.torch"] and len(row["recipe_sha256"]) == 64
    table = out.csv_file.read_text().splitlines()
    assert len(table) == len(rows) + 1 and '"measure.isotropy"' in table[0]


def test_a_base_that_changed_under_runs_is_refused(stopped, capfd):
    folder, study, *_ = stopped
    before = (folder / "out/small/plan.json").read_text()
    assert main(["study", study, "optimizer.learning_rate=0.5"]) == 2
    message = capfd.readouterr().err
    assert "the study small has changed under runs that have begun" in message
    assert "plain, agg: optimizer.learning_rate: there 0.003, asked for 0.5" in message.replace(
        "agg, plain:", "plain, agg:"
    )
    assert (folder / "out/small/plan.json").read_text() == before
    assert main(["study", study, "reporting.log_every_steps=5", "--dry-run"]) == 0


def test_what_fails_is_tried_once_more_and_named_and_the_rest_is_done(prepared_recipe, tmp_path, capfd):
    """A run whose folder holds something else is refused by train; that does not keep the other from being done."""
    study = write_study(tmp_path, prepared_recipe, axes={"objective": OBJECTIVES})
    planned = load_study(study)
    StudyFolder(planned.folder).claim(planned, cells_of(planned)[0])
    out = tmp_path / "out/small"
    (out / "plain/thesis.tex").touch()
    assert main(["study", study]) == 1
    said = capfd.readouterr().out
    failed, done = read_state(out / "plain"), read_state(out / "agg")
    assert (failed.state, failed.failures, done.state) == ("failed", 2, "done")
    assert failed.cause.startswith("exit code 2: error: ") and "is not empty and not a run" in failed.cause
    assert "plain failed 2 time(s): exit code 2" in said and "1 failed, 1 done" in said
    assert [row["run"] for row in read_records(out).to_pylist()] == ["agg"]
    (out / "plain/thesis.tex").unlink()
    assert main(["study", study]) == 0
    assert read_state(out / "plain").failures == 0 and read_records(out).num_rows == 2


def test_two_runners(prepared_recipe, tmp_path, capfd):
    study = write_study(tmp_path, prepared_recipe, axes={"objective": OBJECTIVES})
    folder = load_study(study).folder
    folder.mkdir(parents=True)
    with run_lock(folder):
        assert main(["study", study]) == 2
    assert "another process" in capfd.readouterr().err and not (folder / "plan.json").exists()


def test_a_folder_of_something_else(prepared_recipe, tmp_path, capfd):
    study = write_study(tmp_path, prepared_recipe)
    (tmp_path / "out/small").mkdir(parents=True)
    (tmp_path / "out/small/thesis.tex").touch()
    assert main(["study", study]) == 2
    assert "is not empty and not a study" in capfd.readouterr().err


@pytest.mark.long
def test_the_quick_study(tmp_path):
    """As it is shipped: eight runs on the embedded corpus."""
    process = start("study", "quick", f"output_root={tmp_path}", f"data.folder={tmp_path / 'data'}")
    said, errors = process.communicate(timeout=3600)
    assert process.returncode == 0, said + errors
    rows = read_records(tmp_path / "quick").to_pylist()
    assert len(rows) == 8 and {row["step"] for row in rows} == {200}
