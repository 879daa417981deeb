"""What ``make test-slurm`` says where no cluster can be started. Needs no SLURM, and belongs to the fast tests."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.slurm import requirements
from tests.slurm.cluster import ROOT

APT_GET = """#!/bin/sh
echo "$*: policy says $({policy}; echo $?)" >> {folder}/calls
[ "$2" = update ] && exit {code}
for name in {programs}; do printf '#!/bin/sh\\nexit 0\\n' > {folder}/$name; chmod +x {folder}/$name; done
"""


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine on which root finds nothing but a shell and, once it is put there, an apt-get."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(requirements, "search_path", lambda: str(tmp_path))
    monkeypatch.setattr(requirements, "SERVICES_POLICY", tmp_path / "policy-rc.d")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "chmod").symlink_to("/bin/chmod")
    return tmp_path


def apt_get(folder, programs, code=0):
    text = APT_GET.format(folder=folder, policy=folder / "policy-rc.d", programs=" ".join(programs), code=code)
    (folder / "apt-get").write_text(text)
    (folder / "apt-get").chmod(0o755)


def test_not_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert requirements.why_not() == "they make namespaces and mounts, which needs root"


def test_no_packages_to_be_had(bare):
    assert requirements.why_not() == (
        "slurmctld, slurmd, sbatch, munged, ip, unshare, nsenter, setpriv, prlimit, mount missing: there is no "
        "apt-get; the packages are called iproute2, mount, munge, slurm-client, slurmctld, slurmd, util-linux on Debian"
    )


def test_what_is_missing_is_installed_and_no_service_started(bare):
    for name in ("ip", "mount", "unshare", "nsenter", "setpriv", "prlimit"):
        (bare / name).symlink_to("/bin/true")
    apt_get(bare, ["slurmctld", "slurmd", "sbatch", "munged"], code=100)  # a mirror that cannot be reached is no matter
    assert requirements.why_not() is None
    assert (bare / "calls").read_text().splitlines() == [
        "-q update: policy says 101",
        "-q install -y --no-install-recommends munge slurm-client slurmctld slurmd: policy says 101",
    ]
    assert not (bare / "policy-rc.d").exists()


def test_a_package_that_does_not_come(bare):
    apt_get(bare, ["slurmctld"])
    assert requirements.why_not() == (
        "slurmd, sbatch, munged, ip, unshare, nsenter, setpriv, prlimit, mount missing: the packages of this system "
        "have none"
    )


def test_no_right_to_make_namespaces(bare):
    for name in requirements.PROGRAMS:
        (bare / name).symlink_to("/bin/true")
    (bare / "unshare").unlink()
    (bare / "unshare").write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2; exit 1\n")
    (bare / "unshare").chmod(0o755)
    assert requirements.why_not() == (
        "namespaces, a bridge or a tmpfs cannot be made here (a privileged container can): unshare failed: Operation "
        "not permitted"
    )


def test_the_command():
    """In a process of its own, which finds no SLURM and no apt-get, or is not root."""
    command = [sys.executable, "-m", "tests.slurm.requirements"]
    environment = os.environ | {"PATH": "/nonexistent"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == os.EX_UNAVAILABLE and done.stderr == ""
    assert done.stdout.startswith("the tests on a SLURM cluster cannot run here: ") and done.stdout.count("\n") == 1
