"""One rank of two hangs: both end, each with its stacks; a process that is stuck with the lock held ends as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from pretrain.training.watchdog import EXIT_HUNG, Watchdog
from tests.small_runs import change
from tests.training.processes import ROOT, hanging_script, start, write_recipe


def test_one_hanging_rank_ends_all_with_stacks(prepared_recipe, tmp_path):
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        parallel={"data_parallel_size": 2},
        hang_timeout_minutes=0.2,
    )
    process = start("train", write_recipe(recipe, tmp_path), script=hanging_script(tmp_path))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == EXIT_HUNG == 70, output + errors
    run = tmp_path / "small"
    assert "rank 0 hangs: no end of step 3 after 12 s; the stacks are in " in errors
    stacks = [(run / "stacks" / f"rank_0000{rank}.txt").read_text() for rank in range(2)]
    for rank, text in enumerate(stacks):
        assert text.startswith(f"rank {rank} hangs: no end of step 3 after 12 s\n")
    assert "in deaf_rank" in stacks[1] and "all_reduce" not in stacks[1]
    assert "in train_step" in stacks[0] and "all_reduce" in stacks[0]
    assert "rank 1 hangs: no end of step 3" in (run / "logs" / "rank_00001.log").read_text()


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


LONG = """
import ctypes, time
from pathlib import Path
from pretrain.training.watchdog import Watchdog
with Watchdog({seconds}, 5, Path({file!r})) as dog:
    {body}
print("left alone")
"""


STUCK = "ctypes.PyDLL(None).sleep(60)"  # a call into C that keeps the interpreter's lock: no Python thread can run


def test_a_lock_that_is_never_given_back(tmp_path):
    done = run_python(LONG.format(seconds=1, file=str(tmp_path / "x"), body=f"dog.expect('step 1'); {STUCK}"))
    assert done.returncode == -signal.SIGALRM and 'File "<string>", line 6 in <module>' in done.stderr
    assert "rank 5 hangs, and its interpreter is stuck" in done.stderr


def test_a_lock_that_is_kept_in_time(tmp_path):
    body = "dog.expect('step 1', 4); ctypes.PyDLL(None).sleep(3)"
    done = run_python(LONG.format(seconds=1, file=str(tmp_path / "x"), body=body))
    assert (done.returncode, done.stdout) == (0, "left alone\n"), done.stderr


def suspended(tmp_path, bodies, *, with_guard):
    """Exit codes and what was said by processes that are suspended for twice the time that their steps may take."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-u", "-c", LONG.format(seconds=1, file=str(tmp_path / "x"), body=body)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for body in (f"dog.expect('step 1'); print('began'); {body}" for body in bodies)
    ]  # fmt: skip
    send = os.killpg if with_guard else os.kill
    for process in processes:
        assert process.stdout.readline() == "began\n"
        send(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    for process in processes:
        send(process.pid, signal.SIGCONT)
    said = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, out + errors) for process, (out, errors) in zip(processes, said, strict=True)]


@pytest.mark.parametrize("with_guard", [True, False], ids=["the job", "the rank"])
def test_time_in_which_a_job_is_suspended_does_not_count(tmp_path, with_guard):
    bodies = ("time.sleep(0.1)", "time.sleep(60)", STUCK)
    alive, hanging, stuck = suspended(tmp_path, bodies, with_guard=with_guard)
    assert alive == (0, "left alone\n")
    assert hanging[0] == EXIT_HUNG and "rank 5 hangs: no end of step 1 after 1 s" in hanging[1]
    assert stuck[0] == -signal.SIGALRM and "its interpreter is stuck" in stuck[1]


def test_no_process_is_left(tmp_path):
    """Of a rank that was killed the guard ends too, though a forked child keeps the pipe between them."""
    body = "os.fork() or (os.closerange(1, 3), time.sleep(20), os._exit(0)); os.kill(os.getpid(), 9)"
    begin = time.monotonic()
    done = run_python("import os\n" + LONG.format(seconds=60, file=str(tmp_path / "x"), body=body))
    assert done.returncode == -signal.SIGKILL
    assert time.monotonic() - begin < 15  # the guard's stderr was waited for


def test_stacks_need_no_folder(tmp_path):
    """A full or dead disk: the process ends all the same, stacks are on stderr."""
    (tmp_path / "file").write_text("")
    code = LONG.format(
        seconds=0.5, file=str(tmp_path / "file" / "x"), body="dog.expect('saving at step 3'); time.sleep(60)"
    )
    done = run_python(code)
    assert done.returncode == EXIT_HUNG
    assert "rank 5 hangs: no end of saving at step 3 after 0 s" in done.stderr and "Thread" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "body"),
    [
        (3, "for step in range(8): dog.expect(f'step {step}'); time.sleep(0.5)"),
        (1.5, "dog.expect('saving', patience=4); time.sleep(2.5)"),
        (1, "dog.expect('step 1'); dog.__exit__(None, None, None); time.sleep(2.5)"),
        (0, "dog.expect('step 1'); time.sleep(1)"),
    ],
    ids=["each step in time", "patience", "closed", "off"],
)
def test_who_is_not_late_is_left_alone(tmp_path, seconds, body):
    done = run_python(LONG.format(seconds=seconds, file=str(tmp_path / "x"), body=body))
    assert done.stdout == "left alone\n" and done.returncode == 0
    assert not (tmp_path / "x").exists()


def test_off_starts_nothing(tmp_path):
    import threading

    before = threading.active_count()
    with Watchdog(0, 0, tmp_path / "x") as dog:
        dog.expect("step 1")
        assert threading.active_count() == before
