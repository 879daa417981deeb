"""What the tests on a real SLURM cluster need of a machine: root, Linux namespaces, SLURM and munge.

``python -m tests.slurm.requirements`` installs the programs where it may (as root, with apt-get; no service is
started), and says in one line why the tests cannot run where they cannot.

Exit code: 0 when all is there, 69 (``EX_UNAVAILABLE``) when it cannot be had.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# program -> the package of Debian and Ubuntu that has it
PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "prlimit": "util-linux",
    "mount": "mount",
}
SERVICES_POLICY = Path("/usr/sbin/policy-rc.d")  # asked before a package's service is started: 101 says no
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL")
PROBE = "mount -t tmpfs tmpfs /dev/shm && ip link add bridge0 type bridge && ip link add v0 type veth peer name v1"


def why_not() -> str | None:
    """One line that says why no cluster can be started here, or None. What is missing is installed where it may be."""
    if not sys.platform.startswith("linux"):
        return f"they need Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "they make namespaces and mounts, which needs root"
    if missing_programs():
        problem = install(sorted({PROGRAMS[name] for name in missing_programs()}))
        if missing_programs():
            return f"{', '.join(missing_programs())} missing: {problem or 'the packages of this system have none'}"
    probe = subprocess.run(["unshare", *NAMESPACES, "sh", "-c", PROBE], capture_output=True, text=True)
    if probe.returncode:
        return f"namespaces, a bridge or a tmpfs cannot be made here (a privileged container can): {_last(probe)}"
    return None


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    """Where daemons are is not on everyone's PATH."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))


def install(packages: list[str]) -> str | None:
    """Why it did not work, or None."""
    if shutil.which("apt-get") is None:
        return f"there is no apt-get; the packages are called {', '.join(packages)} on Debian"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    print(f"installing {', '.join(packages)}", flush=True)
    with _no_service_starts():
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", "-q", *arguments], env=environment, capture_output=True, text=True)
    return f"apt-get {' '.join(arguments)} failed: {_last(done)}" if done.returncode else None


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    """A machine that has a policy already keeps its own."""
    if SERVICES_POLICY.exists():
        yield
        return
    SERVICES_POLICY.write_text("#!/bin/sh\nexit 101\n")
    SERVICES_POLICY.chmod(0o755)
    try:
        yield
    finally:
        SERVICES_POLICY.unlink()


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    return lines[-1]


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        print(f"the tests on a SLURM cluster cannot run here: {reason}")
        sys.exit(os.EX_UNAVAILABLE)
