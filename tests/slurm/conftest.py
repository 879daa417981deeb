"""One cluster for all tests; each test finds it idle and leaves it so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.requirements import why_not
from tests.slurm.runs import TWO_NODES, Runs


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Eight nodes. Its end asserts that no process and no mount of it is left."""
    reason = why_not()
    assert reason is None, reason
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=8) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    yield running_cluster
    running_cluster.settle()


@pytest.fixture(scope="session")
def all_runs(running_cluster: Cluster, corpus_file: Path) -> Runs:
    """Where trainings go, with a prepared corpus."""
    runs = Runs(running_cluster, running_cluster.root / "runs", corpus_file)
    runs.prepare()
    return runs


@pytest.fixture
def runs(all_runs: Runs, cluster: Cluster) -> Runs:
    """The same; after the test the cluster is idle."""
    return all_runs


@pytest.fixture(scope="session")
def calm(all_runs: Runs) -> str:
    """The name of an undisturbed run on two nodes with two ranks each."""
    job = all_runs.train("calm", *TWO_NODES)
    all_runs.cluster.wait_for(job, "COMPLETED", seconds=180)
    return "calm"
