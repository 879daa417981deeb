"""Process 1 of a host: gives it its name and its own /dev/shm, then takes the exit codes of orphans until it is killed.

Arguments: name, file for /etc/hosts, file for /etc/resolv.conf, folder for its small disk or nothing.
Runs in new namespaces, with ``python -I -S``: it imports what starts quickly.
"""

import os
import signal
import socket
import subprocess
import sys


def main(name: str, hosts: str, resolv: str, disk: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    socket.sethostname(name)
    mount("--bind", hosts, "/etc/hosts")
    real = os.path.realpath("/etc/resolv.conf")
    if os.path.exists(real):
        mount("--bind", resolv, real)
    mount("-t", "tmpfs", "-o", "mode=1777", f"shm-{name}", "/dev/shm")
    if disk:
        mount("-t", "tmpfs", "-o", "size=64m", "disk", disk)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    print("ready", flush=True)
    while True:
        signal.sigwait([signal.SIGCHLD])
        reap()


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def reap() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return


main(*sys.argv[1:])
