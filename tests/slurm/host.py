"""A machine of the test cluster: its own network, host name, processes, mounts and /dev/shm, on this kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.slurm.requirements import NAMESPACES
from tests.slurm.waiting import wait_until

INIT = Path(__file__).with_name("host_init.py")


class Host:
    """Everything that runs on it dies with it, and it dies with this process, however this process ends.

    Args:
        etc: folder with the hosts' files ``hosts`` and ``resolv.conf``.
        log: folder for the output of its daemons.
        disk: a folder on which it mounts a small file system of its own.
        mounts_of: another host, whose mounts are the ones it starts with: that small file system becomes a shared one.
    """

    def __init__(
        self,
        name: str,
        etc: Path,
        log: Path,
        environment: Mapping[str, str],
        disk: Path | None = None,
        mounts_of: Host | None = None,
    ) -> None:
        self.name, self.environment, self._log = name, dict(environment), log
        self._daemons: list[subprocess.Popen[bytes]] = []
        inherit = ["nsenter", "--target", str(mounts_of.pid), "--mount"] if mounts_of else []
        init = [sys.executable, "-I", "-S", str(INIT), name, str(etc / "hosts"), str(etc / "resolv.conf")]
        with (log / f"{name}.log").open("ab") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *inherit, "unshare", *NAMESPACES, *init, str(disk or "")],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        self._process.stdout.close()
        if not ready:
            raise AssertionError(f"host {name} did not start: {(log / f'{name}.log').read_text()}")
        self.pid = _child_of(self._process.pid)  # of its process 1, as seen from here
        # Held open until the end, so that no other namespace gets its number.
        self._pid_namespace = os.open(f"/proc/{self.pid}/ns/pid", os.O_RDONLY)

    def command(self, *arguments: str, cwd: Path | str = "/") -> list[str]:
        """The command that runs a command on this host."""
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid")
        enter = ["nsenter", "--target", str(self.pid), *namespaces]
        return ["prlimit", "--core=0:0", *enter, "env", "--chdir", str(cwd), *arguments]  # ranks are killed: no cores

    def run(
        self, *arguments: str, cwd: Path | str = "/", seconds: float = 60.0, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """
        Raises:
            AssertionError: it failed, and ``check``.
        """
        done = subprocess.run(
            self.command(*arguments, cwd=cwd),
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0 or not check, f"{arguments} on {self.name}: {done.stdout}{done.stderr}"
        return done

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A daemon; its output goes to a log of its name."""
        with (self._log / f"{arguments[0]}-{self.name}.out").open("ab") as output:
            daemon = subprocess.Popen(
                self.command(*arguments),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        return daemon

    def ip(self, *lines: str) -> None:
        """Commands of ip(8) in its network; process ids in them are those seen from here."""
        command = ["nsenter", "--target", str(self.pid), "--net", "ip", "-batch", "-"]
        done = subprocess.run(command, env=self.environment, input="\n".join(lines), capture_output=True, text=True)
        assert done.returncode == 0, f"{lines}: {done.stderr}"

    def outside(self, path: Path) -> Path:
        """The name under which a path of this host can be read from here, its own mounts included."""
        return Path(f"/proc/{self.pid}/root{path}")

    def crash(self) -> None:
        """Power off: no process of it gets to do anything."""
        os.kill(self.pid, signal.SIGKILL)
        for process in (self._process, *self._daemons):
            process.wait(30)

    def processes(self) -> dict[int, str]:
        """All that run on it: their numbers as seen from here, and command lines. After :meth:`crash` there is none."""
        namespace, found = os.fstat(self._pid_namespace), dict[int, str]()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.path.samestat((process / "ns/pid").stat(), namespace):
                    line = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(process.name)] = line.decode(errors="replace")
            except OSError:  # it ended meanwhile
                continue
        return found

    def forget(self) -> None:
        """After the last look at :meth:`processes`."""
        os.close(self._pid_namespace)


def _child_of(parent: int) -> int:
    def find() -> int:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                return int(stat.parent.name)
        return 0

    return int(wait_until(find, 5.0, f"child of process {parent}"))
