"""One cluster for all tests; each test finds it idle and leaves it so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.requirements import why_not


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
