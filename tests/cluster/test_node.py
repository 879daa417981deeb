"""What the ranks of a node inherit from its launcher."""

from __future__ import annotations

import subprocess
import sys

from pretrain.cluster.job import rendezvous_port
from pretrain.cluster.job_script import ROOT

CODE = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from pretrain.cluster import node
node.ask = lambda command: "node1"
node.torchrun.main = lambda arguments: print(resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard) != (256, hard))
node.main(["evaluate", "run"])
"""


def test_as_many_files_as_the_site_allows() -> None:
    given = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node1",
        "PRETRAIN_INCARNATION": "7.0",
    }
    given |= {"RANKS_PER_NODE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_port_that_no_connection_takes() -> None:
    ports = [
        rendezvous_port({"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restarts)})
        for job in (1, 11_999, 4_294_967_295)
        for restarts in range(8)
    ]
    assert min(ports) >= 20_000 and max(ports) < 32_768
    assert len(set(ports)) == len(ports)
