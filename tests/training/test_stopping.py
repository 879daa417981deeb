"""A run that is asked to stop saves, says so by its exit code, and goes on as if it had never stopped."""

from __future__ import annotations

import os
import signal
import time
from itertools import islice

import pytest

from pretrain.__main__ import main
from pretrain.run_folder import RunFolder
from pretrain.training.stopping import EXIT_STOPPED, StopSignals
from tests.distributed import run_ranks
from tests.small_runs import change, read_metrics, train_on_ranks
from tests.training.processes import end_of, hanging_script, ranks_of, start, wait_until, write_recipe

STEPS = 80


def long_recipe(prepared_recipe, tmp_path, **sections):
    return change(
        prepared_recipe,
        output_root=str(tmp_path),
        batch={"train_steps": STEPS},
        model={"hidden_dropout": 0.1},
        parallel={"data_parallel_size": 2},
        reporting={"geometry_every_steps": 0, "validate_every_steps": 0},
        **sections,
    )


def without_speed(records):
    return [{k: v for k, v in record.items() if k not in ("tokens_per_second", "step_seconds")} for record in records]


def to_one_rank(process):
    os.kill(ranks_of(process)[1], signal.SIGUSR1)


def ctrl_c(process):
    """The terminal gives it to the launcher and to every rank; the launcher relays it as well."""
    os.killpg(process.pid, signal.SIGINT)


def test_stopped_twice_and_resumed_is_undisturbed(prepared_recipe, tmp_path):
    """Real processes; their records are those of a run that was never stopped."""
    recipe = long_recipe(prepared_recipe, tmp_path)
    expected = without_speed(train_on_ranks(change(recipe, output_root=str(tmp_path / "whole")), 2))
    path, folder = write_recipe(recipe, tmp_path), RunFolder(recipe.run_folder)
    for stop, begin in ((to_one_rank, 3), (ctrl_c, STEPS // 2)):
        process = start("train", path)
        wait_until(lambda: folder.metrics_file.exists() and len(read_metrics(recipe)) > begin, process)  # noqa: B023
        stop(process)
        code, text = end_of(process)
        assert code == EXIT_STOPPED == 75, text
        steps = len(read_metrics(recipe))
        assert begin < steps < STEPS
        assert f"step {steps:,} saved in {folder.checkpoints}; stopped as asked, the same command goes on" in text
        assert (folder.checkpoints / "latest").read_text() == f"step_{steps:08d}\n"
    code, text = end_of(start("train", path))
    assert code == 0, text
    assert without_speed(read_metrics(recipe)) == expected


def test_stopped_while_it_starts(prepared_recipe, tmp_path):
    """Ranks that Python is still starting get the signal later, but get it."""
    recipe = long_recipe(prepared_recipe, tmp_path)
    process = start("train", write_recipe(recipe, tmp_path))
    wait_until(lambda: len(ranks_of(process)) == 2, process)
    process.send_signal(signal.SIGUSR1)
    code, text = end_of(process)
    assert code == EXIT_STOPPED and "nothing trained yet; stopped as asked" in text
    folder = RunFolder(recipe.run_folder)
    assert not folder.checkpoints.exists() and folder.metrics_file.read_text() == ""


def test_a_second_signal_leaves_at_once(prepared_recipe, tmp_path):
    """Even when a rank hangs, and the other waits for it in a collective."""
    recipe = long_recipe(prepared_recipe, tmp_path, hang_timeout_minutes=0.0)
    process = start("train", write_recipe(recipe, tmp_path), script=hanging_script(tmp_path))
    folder = RunFolder(recipe.run_folder)
    wait_until(lambda: folder.metrics_file.exists() and len(read_metrics(recipe)) == 2, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, text = end_of(process)  # without that signal the hang has no end
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM again: leaves at once, nothing is saved" in text
    assert not folder.checkpoints.exists()


def interrupted(rank, world_size, recipe, what):
    """Rank 1 gets a signal while all save, or evaluate; or somebody makes the file while they save."""
    import pretrain.training.loop as loop
    import pretrain.training.measures as measures
    from pretrain.topology import connect

    name, where = ("save", loop) if what in ("save", "file") else (what, measures)
    real = getattr(where, name)

    def with_stop(*arguments, **options):
        if rank == 1 and what == "file":
            RunFolder(recipe.run_folder).stop_file.touch()
        elif rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return real(*arguments, **options)

    setattr(where, name, with_stop)
    with StopSignals() as signals:
        return loop.train(recipe, connect(recipe), None, signals).step


@pytest.mark.parametrize("what", ["save", "subject_of_run", "file"])
def test_stopped_while_it_saves_or_evaluates_or_by_a_file(prepared_recipe, tmp_path, what, capsys):
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        checkpoint={"every_steps": 2},
        reporting={"validate_every_steps": 2},
        parallel={"data_parallel_size": 2},
    )
    folder = RunFolder(recipe.run_folder)
    folder.claim(recipe, "")
    assert run_ranks(interrupted, 2, recipe, what) == [2, 2]
    assert [path.name for path in folder.checkpoints.glob("step_*")] == ["step_00000002"]
    assert [record["step"] for record in read_metrics(recipe)] == [1, 2]
    if what == "file":
        assert main(["train", write_recipe(recipe, tmp_path)]) == 2
        assert f"{folder.stop_file} asks this run to stop: delete it to go on" in capsys.readouterr().err


def each_asks_once(rank, world_size, recipe):
    from pretrain.data.loader import TrainingBatches, training_dataset
    from pretrain.topology import connect
    from pretrain.training.loop import train_step
    from pretrain.training.setup import build_run

    run = build_run(recipe, connect(recipe))
    batches = TrainingBatches(
        training_dataset(run.prepared, recipe),
        micro_batch_size=2,
        global_batch_size=8,
        data_parallel_rank=run.topology.data_parallel_rank,
        data_parallel_size=run.topology.data_parallel_size,
    )
    return [train_step(run, batch, step == rank).stop for step, batch in enumerate(islice(batches, world_size + 1))]


@pytest.mark.parametrize(("tensor_parallel", "world_size"), [(1, 2), (2, 4)])
def test_any_rank_stops_all(prepared_recipe, tensor_parallel, world_size):
    """Also one that is not in the data-parallel group of the others."""
    recipe = change(
        prepared_recipe,
        parallel={"data_parallel_size": 2, "tensor_model_parallel_size": tensor_parallel},
    )
    assert run_ranks(each_asks_once, world_size, recipe) == [[True] * world_size + [False]] * world_size


def test_signals_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while signals.requested is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert signals.requested == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)  # within the second: a launcher's copy of the same request
        time.sleep(0.1)
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
