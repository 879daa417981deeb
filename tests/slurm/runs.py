"""Small real trainings on the test cluster: the quick start's recipe scaled down, and what must hold of its end."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from pretrain.cluster.job import read_events
from pretrain.files import make_folder
from pretrain.recipe_io import load_recipe
from pretrain.run_folder import RunFolder
from tests.faults.harness import exact, same_state
from tests.slurm.cluster import FINAL, Cluster
from tests.slurm.waiting import wait_until
from tests.small_runs import read_metrics

RECIPE = "quickstart_agg"
STEPS = 60
SCALED_DOWN = (
    "data.corpus.source=text",
    "data.tokenizer.vocab_size=500",
    "data.prepare_processes=1",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.sequence_length=32",
    "batch.micro_batch_size=2",
    "batch.global_batch_size=8",
    f"batch.train_steps={STEPS}",
    "schedule.warmup_steps=4",
    "objective.alpha=20.0",
    "parallel.data_parallel_size=2",
    "checkpoint.every_steps=10",
    "checkpoint.keep_last=100",
    "reporting.log_every_steps=1",
    "reporting.geometry_every_steps=0",
    "reporting.validate_every_steps=0",
    "reporting.tensorboard=false",
)
MID_RUN = 12  # a step after the first checkpoint and before the second
RANK = "-m pretrain train"  # what only ranks have on their command lines
TWO_NODES = ("--nodes=2", "--gpus-per-node=2", "--time=30")  # 4 ranks: tensor-parallel 2 x data-parallel 2
ONE_RANK_A_NODE = (("--nodes=2", "--gpus-per-node=1", "--time=30"), ("parallel.data_parallel_size=1",))


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


class Runs:
    """Trainings on a cluster with one prepared corpus.

    Args:
        root: a shared folder for their run folders.
    """

    def __init__(self, cluster: Cluster, root: Path, corpus_file: Path) -> None:
        self.cluster, self.root = cluster, root
        make_folder(root)
        self._data = (f"data.folder={root / 'data'}", f"data.corpus.train=[{corpus_file}]")

    def prepare(self) -> None:
        from pretrain.data.prepare import prepare

        prepare(load_recipe(RECIPE, self.overrides("none")))

    def overrides(self, name: str, *more: str) -> list[str]:
        return [*SCALED_DOWN, *self._data, f"name={name}", f"output_root={self.root}", *more]

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.root / name)

    def train(self, name: str, *options: str, overrides: tuple[str, ...] = (), **environment: str) -> str:
        """``sbatch OPTIONS slurm/train.sbatch``; the number of the job."""
        arguments = ("slurm/train.sbatch", RECIPE, *self.overrides(name, *overrides))
        return self.cluster.submit(*options, *arguments, **environment)

    def records(self, name: str, root: Path | None = None) -> int:
        """So many lines of metrics are there."""
        file = RunFolder((root or self.root) / name).metrics_file
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return read_metrics(self.folder(name).saved_recipe())

    def wait_for_step(self, name: str, job: str, step: int, root: Path | None = None) -> None:
        """
        Args:
            root: where the run is, if it is elsewhere.
        """

        looks = itertools.count()

        def reached() -> bool:
            done = self.records(name, root) >= step
            assert done or next(looks) % 50 or self.cluster.state(job) not in FINAL, self.cluster.output(job)
            return done

        # Soon after the step: a run must not be over before it is disturbed.
        what = f"step {step} of {name}"
        wait_until(reached, 120, what, lambda: self.cluster.output(job), every=0.02)

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        return [one for one in read_events(self.folder(name).jobs_file) if one["event"] == event]

    def assert_same(self, name: str, other: str) -> None:
        """Equal bit for bit: every record's numbers, and all that the last checkpoints hold."""
        recipes = [self.folder(one).saved_recipe() for one in (name, other)]
        assert exact(recipes[0]) == exact(recipes[1])
        steps = recipes[0].batch.train_steps
        assert len(exact(recipes[0])) == steps and same_state(*recipes, steps) == []
