"""The file with facts of the site, as the scripts for jobs read it."""

from __future__ import annotations

import os
import subprocess

import pytest

from pretrain.cluster.job_script import ROOT

SCRIPTS = ("launch.sh", "prepare.sbatch", "study.sbatch")


def run(script: str, site: str) -> subprocess.CompletedProcess[str]:
    """Up to the first program that it starts, which says what it was given."""
    given = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "PRETRAIN_CLUSTER_ENV": site}
    given.pop("NOT_SET", None)
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / script), "x"], cwd=ROOT, env=given, capture_output=True, text=True
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_may_read_what_is_not_set(script, tmp_path):
    program, site = tmp_path / "python", tmp_path / "site.env"
    program.write_text(f'#!/bin/bash\necho "$FACT $*" >> {tmp_path}/said\nexit 9\n')
    program.chmod(0o755)
    site.write_text(f"export FACT=fact$NOT_SET\nPYTHON={program}\n")
    done = run(script, str(site))
    assert (done.returncode, done.stderr) == (9, "")
    assert (tmp_path / "said").read_text().startswith("fact -m pretrain")


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_that_is_named_and_not_there(script, tmp_path):
    done = run(script, f"{tmp_path}/none.env")
    assert (done.returncode, done.stderr) == (
        2, f"error: PRETRAIN_CLUSTER_ENV names {tmp_path}/none.env, which is not a file\n"
    )  # fmt: skip
