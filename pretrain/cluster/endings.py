"""What every rank and node of a job leaves behind, and what it says about how the job ended.

In the folder of the job's logs: ``rank_00003.json`` of each rank, written when it starts and again when it ends, and
``node_NAME.json`` of each node on which a rank failed, for those that were killed and could say nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.cluster.job import node_name

LOGS = "PRETRAIN_JOB_LOGS"
# What a rank says that fails only because another one has gone.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "NCCL communicator was aborted",
    "remote process exited",
    "failed to recv",
)
TERMINATED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGUSR1  # what does not listen to it ends by it
STOPPED = os.EX_TEMPFAIL  # training.stopping.EXIT_STOPPED, which is in a module that imports torch

RECORD_BYTES, REASON_CHARACTERS = 4096, 900  # of 4 bytes at most

_facts: dict[str, Any] = {}


def log_folder() -> Path | None:
    """Where this rank's log and records go; None outside a job, and in a process that is not a rank."""
    return Path(os.environ[LOGS]) if LOGS in os.environ and "RANK" in os.environ else None


def begin_rank() -> None:
    """In a job: what this rank prints goes to its own log, and the record of its start is written."""
    folder = log_folder()
    if folder is None or _facts:
        return
    rank = int(os.environ["RANK"])
    with (folder / f"rank_{rank:05d}.log").open("ab") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    _facts.update(rank=rank, host=node_name(), pid=os.getpid(), began=time.time())
    _write(folder / f"rank_{rank:05d}.json")


def note(**facts: Any) -> None:
    """Something that belongs into the record of how this rank ended."""
    _facts.update(facts)


def note_end(code: int, reason: str = "", *, common: bool = False) -> None:
    """How this rank ends; the first word counts. Never fails.

    Args:
        common: all ranks found the same, and the reason names ranks and nodes itself.
    """
    folder = log_folder()
    if folder is None or "code" in _facts:
        return
    _facts.update(code=code, reason=reason.strip(), common=common, ended=time.time())
    with contextlib.suppress(OSError):
        _write(folder / f"rank_{int(os.environ['RANK']):05d}.json")


def _write(path: Path) -> None:
    """In place and always of one size: what was written at the start has room for the end, on a full disk too."""
    text = json.dumps(_facts | {"reason": _facts.get("reason", "")[:REASON_CHARACTERS]}, indent=2, ensure_ascii=False)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, text.encode().ljust(RECORD_BYTES), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Attributes:
        code: what the job exits with: 0, 75 (continue me), or what broke it.
        reason: one line, with rank and node.
        stopped_by: why it stopped as asked: names of signals, ``STOP`` for the file.
        lost_node: it stopped because a node does not answer, and nothing else is known to be wrong.
    """

    code: int
    reason: str
    stopped_by: frozenset[str] = frozenset()
    lost_node: bool = False


def how_it_ended(folder: Path, world_size: int, launcher_code: int) -> Ending:
    """Read what ranks and nodes left behind.

    Args:
        launcher_code: srun's exit code, for a job of which no rank said anything.
    """
    ranks = {record["rank"]: record for record in _records(folder, "rank_*.json") if "rank" in record}
    codes = {rank: record.get("code") for rank, record in ranks.items()}
    if launcher_code == 0 and len(codes) == world_size and set(codes.values()) <= {0, STOPPED}:
        if STOPPED not in codes.values():
            return Ending(0, "")
        causes = frozenset(cause for record in ranks.values() for cause in record.get("stopped_by", ()))
        return Ending(STOPPED, f"stopped as asked ({', '.join(sorted(causes)) or 'a signal'}) and saved", causes)
    failures = _failures(folder, ranks)
    if launcher_code == INTERRUPTED and all(map(_is_by_signal, failures)):
        return Ending(STOPPED, "interrupted (SIGUSR1)", frozenset({"SIGUSR1"}))
    silent = sorted(rank for rank in range(world_size) if codes.get(rank) is None)
    lost = _silent_nodes(folder, ranks)
    if lost and all(map(_is_consequence, failures)):
        return Ending(STOPPED, f"contact lost with {', '.join(lost[:4])}{', ...' * (len(lost) > 4)}", lost_node=True)
    if not failures:
        if not ranks:
            words = "".join(f"; {words}" for words in _last_words_of_nodes(folder))
            return Ending(launcher_code or 1, f"no rank started; srun ended with {launcher_code}{words}")
        said = f"{_name(silent, ranks)} said nothing" if silent else "no rank said why"
        return Ending(launcher_code or 1, f"srun ended with {launcher_code}, and {said}")
    first = min(failures, key=lambda failure: (_is_consequence(failure), failure["ended"]))
    code = first["code"] if first["code"] > 0 else 128 - first["code"]
    reason = " ".join(first["reason"].split()) or f"exit code {code}"  # one line of a list of problems
    if not first.get("common"):
        reason = f"{first['who']}: {reason}"
    others = [rank for rank in silent if rank != first.get("rank")]
    if code == os.EX_SOFTWARE and others:
        reason += f"; {_name(others, ranks)} said nothing"
    return Ending(code, reason)


def _silent_nodes(folder: Path, ranks: dict[int, dict[str, Any]]) -> list[str]:
    """Nodes that said nothing of their end, while another one did."""
    told = {node["host"] for node in _records(folder, "node_*.json")}
    told |= {record["host"] for record in ranks.values() if "code" in record}
    return sorted({record["host"] for record in ranks.values()} - told) if told else []


def _failures(folder: Path, ranks: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """One record of each rank that failed, its own, or that of its node if it was killed; and of nodes that failed."""
    failures = {
        rank: record for rank, record in ranks.items() if record.get("code") not in (None, 0, STOPPED, TERMINATED)
    }
    nodes = []
    for node in _records(folder, "node_*.json"):
        if "reason" in node:
            nodes.append(node | {"who": node["host"]})
        for failure in node.get("failures", ()):
            rank = failure["rank"]
            if ranks.get(rank, {}).get("code") is None:
                failures[rank] = failure | {"host": node["host"], "reason": _in_words(failure["code"])}
    ranks_that_failed = [record | {"who": f"rank {rank} on {record['host']}"} for rank, record in failures.items()]
    return ranks_that_failed + nodes


def _last_words_of_nodes(folder: Path) -> list[str]:
    """What the launchers of nodes said before they ended, of those that said anything; not what SLURM says to all."""
    said = []
    for path in sorted(folder.glob("node_*.log")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        own = [line.strip() for line in lines if line.strip() and not line.startswith(("srun:", "slurmstepd"))]
        if own:
            said.append(f"{path.stem.removeprefix('node_')}: {own[-1]}")
    return said[:4]


def _in_words(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and without a word"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _is_consequence(failure: dict[str, Any]) -> bool:
    return any(words in failure["reason"] for words in LOST_PEER) or failure["code"] == -signal.SIGTERM


def _is_by_signal(failure: dict[str, Any]) -> bool:
    """By the one before the time limit, or because a launcher or another rank had gone by it."""
    return failure["code"] in (-signal.SIGUSR1, INTERRUPTED, TERMINATED) or _is_consequence(failure)


def _name(ranks: list[int], records: dict[int, dict[str, Any]]) -> str:
    """A few of these ranks, with their nodes."""
    named = [f"{rank} ({records[rank]['host']})" if rank in records else str(rank) for rank in ranks[:4]]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(named)}{', ...' if len(ranks) > 4 else ''}"


def _records(folder: Path, pattern: str) -> list[dict[str, Any]]:
    records = []
    for path in sorted(folder.glob(pattern)):
        with contextlib.suppress(OSError, ValueError):
            records.append(json.loads(path.read_text(encoding="utf-8")))
    return records
