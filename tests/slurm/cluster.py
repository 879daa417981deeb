"""A real SLURM cluster on one machine: slurmctld, munge and slurmd on hosts of their own. Needs root.

with Cluster(folder, nodes=2) as cluster:
    job = cluster.submit("--nodes=2", "slurm/train.sbatch", "quickstart_agg")
    cluster.wait_for(job, "COMPLETED", seconds=60)
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tests.slurm.configuration import CONTROLLER, write_configuration
from tests.slurm.host import Host
from tests.slurm.requirements import search_path
from tests.slurm.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.99.0"  # exists on the hosts only
FINAL = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


class Cluster:
    """
    Args:
        root: an empty folder for everything that the daemons write, with a short path (it has a socket).

    Attributes:
        disk: a folder that is a small file system of its own, shared by all hosts and not seen from here.
        site: an empty folder on the PYTHONPATH of all jobs, for what a node mounts there.
    """

    def __init__(self, root: Path, nodes: int) -> None:
        self.root, self.nodes = root, [f"node{i}" for i in range(1, nodes + 1)]
        self.disk, self.site = root / "disk", root / "site"
        self._hosts: dict[str, Host] = {}
        self._dead: list[Host] = []
        self._unplugged: set[str] = set()
        self._environment = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ} | {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), search_path())),
            "PYTHONPATH": f"{self.site}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
            "SLURM_CONF": str(root / "etc/slurm.conf"),
        }

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._crash_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._crash_all()
        leftovers = self.leftovers()
        for host in self._dead:
            host.forget()
        assert not leftovers, leftovers

    def leftovers(self) -> list[str]:
        """Processes of hosts, and mounts under the cluster's folder, that can be seen from here."""
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {self.root}" in line]
        return mounts + [
            process for host in (*self._hosts.values(), *self._dead) for process in host.processes().values()
        ]

    def _start(self) -> None:
        write_configuration(self.root, len(self.nodes), NETWORK)
        self.disk.mkdir()
        self.site.mkdir()
        self._hosts[CONTROLLER] = controller = self._new_host(CONTROLLER, disk=self.disk)
        controller.ip("link add br0 type bridge", f"addr add {NETWORK}.1/24 dev br0", "link set br0 up")
        socket = self.root / "munge.socket"
        files = [f"--{kind}-file={self.root}/munge.{kind}" for kind in ("key", "pid", "seed", "log")]
        controller.start("munged", "--foreground", "--force", f"--socket={socket}", *files)
        wait_until(socket.exists, 10, "munge", self._log_ends)
        controller.start("slurmctld", "-D")
        wait_until(lambda: "UP" in self.client("scontrol", "ping", check=False), 20, "slurmctld", self._log_ends)
        for node in self.nodes:
            self.boot(node)
        self.wait_for_idle()

    # -- jobs

    def client(self, *arguments: str, cwd: Path = ROOT, check: bool = True, **environment: str) -> str:
        """What a SLURM command, or another one, prints on the login host."""
        done = self._hosts[CONTROLLER].run(*arguments, cwd=cwd, check=check, **environment)
        return done.stdout + done.stderr if not check else done.stdout

    def submit(self, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
        """sbatch; the number of the job. Its output goes to :meth:`output` unless ``--output`` is given."""
        output = f"--output={self.root}/log/job-%j.out"
        done = self.client("sbatch", "--parsable", output, *arguments, cwd=cwd, **environment)
        return done.strip().split(";")[0]

    def jobs(self, job: str) -> list[dict[str, str]]:
        """The fields of ``scontrol show job``, of each of an array."""
        lines = self.client("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if line.strip()]

    def state(self, job: str) -> str:
        return self.jobs(job)[0]["JobState"]

    def exit_code(self, job: str) -> int:
        """Of the batch script; 128 + n for a signal."""
        code, signal = map(int, self.jobs(job)[0]["ExitCode"].split(":"))
        return 128 + signal if signal else code

    def hosts_of(self, job: str) -> list[str]:
        return self.client("scontrol", "show", "hostnames", self.jobs(job)[0]["NodeList"]).split()

    def output(self, job: str) -> str:
        path = Path(self.jobs(job)[0]["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, job: str, *states: str, seconds: float, restarts: int = 0) -> None:
        """Until the job, or each of an array, is in one of the states and was requeued so many times.

        Raises:
            AssertionError: it is not in time, or ended in another state; with the end of its output.
        """

        def reached() -> bool:
            fields, there = self.jobs(job), 0
            for one in fields:
                wanted = one["JobState"] in states and int(one["Restarts"]) >= restarts
                assert wanted or one["JobState"] not in FINAL, f"job {job} ended: {self._describe(job)}"
                there += wanted
            return there == len(fields)

        wait_until(reached, seconds, f"{' or '.join(states)} of job {job}", lambda: self._describe(job))

    def _describe(self, job: str) -> str:
        keys = ("JobId", "JobState", "Reason", "Restarts", "ExitCode", "NodeList")
        states = [" ".join(f"{key}={one.get(key)}" for key in keys) for one in self.jobs(job)]
        return "\n".join((*states, self.client("sinfo", "-N", "-l"), self.output(job)[-6000:]))

    # -- nodes

    def run(self, node: str, *arguments: str, check: bool = True, **environment: str) -> str:
        """What a command prints on a node."""
        return self._hosts[node].run(*arguments, check=check, **environment).stdout

    def processes(self, node: str, containing: str) -> list[int]:
        """Those on a node whose command line has that text, as numbers that this process can signal."""
        return [pid for pid, line in self._hosts[node].processes().items() if containing in line]

    def outside(self, path: Path) -> Path:
        """A path of the hosts, such as one on :attr:`disk`, as this process can read it."""
        return self._hosts[CONTROLLER].outside(path)

    def crash(self, node: str) -> None:
        host = self._hosts.pop(node)
        host.crash()
        self._dead.append(host)

    def boot(self, node: str) -> None:
        """A node that is new or crashed; slurmd registers soon after."""
        controller, index = self._hosts[CONTROLLER], self.nodes.index(node) + 1
        host = self._hosts[node] = self._new_host(node, mounts_of=controller)
        port = self._port(node)
        controller.ip(
            f"link add {port} type veth peer name eth0 netns {host.pid}",
            f"link set {port} master br0 up",
        )
        address = f"02:00:00:00:00:{10 + index:02x}"  # the same after a crash: others remember it
        host.ip(f"link set eth0 address {address} up", f"addr add {NETWORK}.{10 + index}/24 dev eth0")
        host.start("slurmd", "-D")

    def unplug(self, node: str) -> None:
        """Cut its cable: what runs on it lives on, alone."""
        self._hosts[CONTROLLER].ip(f"link set {self._port(node)} down")
        self._unplugged.add(node)

    def plug(self, node: str) -> None:
        self._hosts[CONTROLLER].ip(f"link set {self._port(node)} up")

    def wait_for_state(self, node: str, accept: Callable[[str], bool], seconds: float) -> None:
        """Until sinfo's word for the node, such as ``idle`` or ``down*``, is accepted."""
        wait_until(lambda: accept(self.node_states()[node]), seconds, f"state of {node}", self.node_states)

    def node_states(self) -> dict[str, str]:
        lines = self.client("sinfo", "--noheader", "--Node", "--partition=all", "--format=%N %T").splitlines()
        return {node: state for node, state in (line.split() for line in lines)}

    def wait_for_idle(self) -> None:
        wait_until(lambda: set(self.node_states().values()) == {"idle"}, 60, "idle nodes", self._log_ends)

    def settle(self) -> None:
        """As after the start: no jobs, every node there and idle."""
        self.client("scancel", "--user=root")
        for node in sorted(self._unplugged):  # old tasks may live on it, and SLURM takes a minute to see it again
            if node in self._hosts:
                self.crash(node)
        self._unplugged.clear()
        for node in self.nodes:
            if node not in self._hosts:
                self.boot(node)
        self.wait_for_idle()

    def _port(self, node: str) -> str:
        """The bridge's end of the cable of a node; another one after each boot, as the old one goes away late."""
        return f"{node}-{self._hosts[node].pid}"

    def _new_host(self, name: str, disk: Path | None = None, mounts_of: Host | None = None) -> Host:
        return Host(name, self.root / "etc", self.root / "log", self._environment, disk, mounts_of)

    def _crash_all(self) -> None:
        for name in list(self._hosts):
            self.crash(name)

    def _log_ends(self) -> str:
        logs = sorted((self.root / "log").iterdir())
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-500:]}" for path in logs)
