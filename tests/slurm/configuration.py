"""slurm.conf and its companions for a cluster on one machine: no systemd, no cgroups, no database, short waits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.slurm.requirements import search_path

CONTROLLER = "slurmctl"
CPUS_PER_NODE = 16  # may be more than there are: config_overrides
GPUS_PER_NODE = 8  # for the scheduler only: device files that are /dev/null

# cred_expire is also the wait before a requeued job starts again (120 s if not said). ReturnToService=2: a node that
# boots again serves again. MinJobAge: finished jobs can be looked at. KillWait: from SIGTERM to SIGKILL.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost={controller}({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
MpiDefault=none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=5
ReturnToService=2
JobRequeue=1
MinJobAge=86400
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=pair Nodes={pair} MaxTime=INFINITE State=UP
"""


def write_configuration(root: Path, nodes: int, network: str) -> None:
    """All files under ``root`` that the daemons and the hosts read, for ``node1`` ... of one /24 ``network``."""
    for folder in ("etc", "log", "state", "gpus", *(f"spool/node{i}" for i in range(1, nodes + 1))):
        (root / folder).mkdir(parents=True)
    addresses = {f"node{i}": f"{network}.{10 + i}" for i in range(1, nodes + 1)}
    has = f"CPUs={CPUS_PER_NODE} RealMemory=8000 Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
    lines = [f"NodeName={name} NodeAddr={address} {has}" for name, address in addresses.items()]
    text = SLURM_CONF.format(
        root=root, network=network, controller=CONTROLLER, nodes="\n".join(lines), pair=",".join([*addresses][:2])
    )
    (root / "etc/slurm.conf").write_text(text)
    for index in range(GPUS_PER_NODE):
        (root / f"gpus/nvidia{index}").symlink_to("/dev/null")
    files = f"{root}/gpus/nvidia[0-{GPUS_PER_NODE - 1}]"
    (root / "etc/gres.conf").write_text(f"AutoDetect=off\nName=gpu Flags=nvidia_gpu_env File={files}\n")
    (root / "etc/cgroup.conf").write_text(f"CgroupPlugin={_cgroup_plugin()}\n")
    hosts = ["127.0.0.1 localhost", "::1 ip6-localhost", f"{network}.1 {CONTROLLER}"]
    hosts += [f"{address} {name}\n::ffff:{address} {name}.v4" for name, address in addresses.items()]
    (root / "etc/hosts").write_text("\n".join(hosts) + "\n")
    # No name server: unknown names fail at once.
    (root / "etc/resolv.conf").write_text("options timeout:1 attempts:1\n")
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)


def slurm_version() -> str:
    """Such as 22.05.8."""
    command = [shutil.which("slurmd", path=search_path()) or "slurmd", "-V"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def _cgroup_plugin() -> str:
    """slurmd loads one though nothing uses it, and finding out which one fails where there is no systemd.

    It can be disabled since 24.05. Before, the plugin of version 1 loads everywhere and stays idle.
    """
    year, month = map(int, re.findall(r"\d+", slurm_version())[:2])
    return "disabled" if (year, month) >= (24, 5) else "cgroup/v1"
