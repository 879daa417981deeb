"""Of two incarnations of a job only the newer one writes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.cluster import incarnation as module
from pretrain.cluster.incarnation import EXIT_FENCED, forget_incarnation, take_over
from pretrain.cluster.job import Job
from pretrain.errors import UserError
from pretrain.run_lock import run_lock
from tests.small_runs import change
from tests.test_run_lock import hold
from tests.training.processes import write_recipe

ROOT = Path(__file__).resolve().parents[2]


def job(job_id: str, restarts: int = 0) -> Job:
    return Job(job_id, restarts, job_id, ("node1",))


@pytest.fixture(autouse=True)
def scheduler(monkeypatch):
    """Which jobs SLURM says are over."""
    over: set[str] = set()
    monkeypatch.setattr(module, "is_over", lambda job_id: job_id in over)
    return over


def leaves(folder: Path, token: str | None, call: str = "leave_if_fenced(folder)") -> tuple[int, str]:
    code = "import sys; from pathlib import Path; from pretrain.cluster import incarnation\n"
    code += f"from pretrain.cluster.incarnation import *\nfolder = Path(sys.argv[1])\n{call}"
    environment = {name: value for name, value in os.environ.items() if name != module.TOKEN}
    environment |= {} if token is None else {module.TOKEN: token}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stderr


def test_an_older_start_of_the_same_job_leaves(tmp_path):
    take_over(tmp_path, job("7"))
    assert leaves(tmp_path, "7.0") == (0, "")
    take_over(tmp_path, job("7", 1))
    code, words = leaves(tmp_path, "7.0")
    assert code == EXIT_FENCED and "incarnation 7.0 on " in words and "belongs to 7.1" in words
    assert leaves(tmp_path, "7.1") == (0, "")
    assert leaves(tmp_path, None) == (0, "")  # outside a job


def test_it_looks_also_while_the_main_thread_waits(tmp_path):
    take_over(tmp_path, job("7", 1))
    call = "incarnation.LOOK_SECONDS = 0.1; watch_fence(folder); import time; time.sleep(60)"
    assert leaves(tmp_path, "7.0", call)[0] == EXIT_FENCED


def test_another_job_does_not_take_a_run_that_is_trained(tmp_path, scheduler):
    take_over(tmp_path, job("7"))
    process = hold(tmp_path)
    with pytest.raises(UserError, match="another process is training"):
        take_over(tmp_path, job("8"))
    assert (tmp_path / ".incarnation").read_text() == "7.0"
    scheduler.add("7")  # its node is lost and it is not to run again; its tasks live on
    take_over(tmp_path, job("8"))
    assert (tmp_path / ".incarnation").read_text() == "8.0"
    process.kill()
    process.wait()


def test_a_training_outside_jobs_is_not_taken_over_and_fences_what_was_before(tmp_path, scheduler, monkeypatch):
    take_over(tmp_path, job("7"))
    scheduler.add("7")
    monkeypatch.delenv(module.TOKEN, raising=False)
    process = hold(tmp_path)
    forget_incarnation(tmp_path)
    with pytest.raises(UserError, match="another process is training"):
        take_over(tmp_path, job("7", 1))
    code, words = leaves(tmp_path, "7.0")
    assert code == EXIT_FENCED and "another training" in words
    process.kill()
    process.wait()


def test_the_lock_waits_for_a_predecessor_that_leaves(tmp_path):
    process = hold(tmp_path)
    begin = time.monotonic()
    end = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
    with run_lock(tmp_path, succeeds=True):
        assert time.monotonic() - begin > 0.5
    end.wait()
    process.wait()


def test_the_lock_is_done_without_when_the_predecessor_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.run_lock.ENDING_SECONDS", 0.3)
    process = hold(tmp_path)
    with run_lock(tmp_path, succeeds=True):
        assert process.poll() is None
    process.kill()
    process.wait()


def fenced_writer(folder: Path) -> str:
    return (
        "from pretrain.training.metrics import MetricsWriter\n"
        "writer = MetricsWriter(folder / 'metrics.jsonl', 0, None)\n"
        "writer.write({'step': 1})\n"
        "(folder / '.incarnation').write_text('7.1')\n"
        "writer.write({'step': 2})\nraise SystemExit('written')"
    )


def test_no_record_is_written_after_the_fence(tmp_path):
    take_over(tmp_path, job("7"))
    assert leaves(tmp_path, "7.0", fenced_writer(tmp_path))[0] == EXIT_FENCED
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("background", [False, True])
def test_no_checkpoint_gets_its_name_after_the_fence(prepared_recipe, tmp_path, background):
    one = change(
        prepared_recipe,
        output_root=str(tmp_path),
        parallel={"tensor_model_parallel_size": 1, "data_parallel_size": 1},
        checkpoint={"every_steps": 1, "background": background},
        reporting={"log_every_steps": 100, "geometry_every_steps": 0, "validate_every_steps": 0},
    )
    folder = tmp_path / one.name
    folder.mkdir()
    (folder / ".incarnation").write_text("7.1")
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "train", write_recipe(one, tmp_path)],
        cwd=ROOT,
        env=os.environ | {module.TOKEN: "7.0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXIT_FENCED and "belongs to 7.1" in done.stderr
    assert not list((folder / "checkpoints").glob("step_*")) and not (folder / "checkpoints" / "latest").exists()
    assert (folder / "metrics.jsonl").read_text() == ""
