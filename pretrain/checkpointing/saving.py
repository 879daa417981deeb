"""Saving a checkpoint so that it exists whole or not at all, while training goes on.

    all ranks     DeepSpeed's files and this rank's state, into ``tmp_step_00000100_<random>/``, hashed and synced
    all ranks     tell each other what they wrote, or what failed
    first rank    MANIFEST.json, sync, rename to ``step_00000100``, sync, ``latest``, deletion of old ones
    all ranks     hear how that went

With ``checkpoint.background`` the files are serialized to host memory, and the rest happens in a thread with a process
group of its own. DeepSpeed 0.19 has a "decoupled" writer for this; it is not used, because it waits before the next
optimizer step, is silent when its process has died, and needs its compiled AIO to be fast.
"""

from __future__ import annotations

import secrets
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from pretrain.checkpointing.checkpoint import Progress, layout_of, random_state
from pretrain.checkpointing.files import CheckpointFiles
from pretrain.checkpointing.folder import UNFINISHED, checkpoint_name, delete_old, rank_file, remove, write_manifest
from pretrain.checkpointing.fragments import optimizer_order
from pretrain.checkpointing.portable import write_parameters
from pretrain.checkpointing.split import Split, parameter_splits
from pretrain.cluster.incarnation import leave_if_fenced
from pretrain.cluster.job import node_name
from pretrain.errors import CheckpointError
from pretrain.files import file_sha256, sync_folder, write_text
from pretrain.recipe import CheckpointRecipe
from pretrain.topology import TIMEOUT, Topology
from pretrain.versions import versions

VISIBLE_SECONDS = 60.0  # network file systems may show another node's file that much later


@dataclass(frozen=True)
class _Save:
    """One checkpoint on its way."""

    temporary: Path
    final: Path
    manifest: dict[str, Any]  # without files
    splits: dict[str, Split]  # of all parameters
    begin_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)


class CheckpointSaver:
    """Saves the checkpoints of one run, one at a time; all methods but ``seconds`` are collectives.

    A failure stops all ranks with one ``CheckpointError``: at once, or in the background at the latest in the next
    :meth:`save` or :meth:`wait`. Checkpoints saved before are untouched.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, topology: Topology, recipe: CheckpointRecipe) -> None:
        self._engine, self._topology, self._recipe = engine, topology, recipe
        self._files = CheckpointFiles(background=recipe.background)
        engine.checkpoint_engine = self._files
        # It would put scripts beside the checkpoints; python -m deepspeed.utils.zero_to_fp32 is the same.
        engine._copy_recovery_script = lambda _: None
        self._group: dist.ProcessGroup | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None
        self._seconds: list[dict[str, float]] = []  # of saves that were not told yet

    def save(
        self,
        folder: Path,
        progress: Progress,
        rank_state: dict[str, Any],
        identity: dict[str, Any],
        trained_on: dict[str, Any],
    ) -> None:
        """Save all ranks' state.

        Args:
            rank_state: what this rank needs beside the engine (token counts).
            identity: what a resumed run must share (data, tokenizer, recipe).
            trained_on: hardware, layout and versions of the training that led here, for evaluations.

        Raises:
            CheckpointError: this or the last one could not be written, naming path and cause.
        """
        begin = time.perf_counter()
        self.wait()
        temporary = self._make_temporary(folder, checkpoint_name(progress.step))
        self._files.begin()
        self._engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
        state = {"rank_state": rank_state, "random": random_state(self._topology.device)}
        self._files.save(state, str(temporary / rank_file(self._topology.rank)))
        manifest = {
            "step": progress.step,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "skipped_samples": progress.skipped_samples,
            "recent": progress.recent,
            "skips_in_a_row": progress.skips_in_a_row,
            "saved_at": time.time(),  # seconds since 1970
            "layout": layout_of(self._engine, self._topology),
            "identity": identity,
            "trained_on": trained_on,
            "versions": versions(),
        }
        splits = parameter_splits(self._engine.module, self._topology.tensor_parallel_size)
        pending = _Save(temporary, folder / checkpoint_name(progress.step), manifest, splits, begin)
        self._seconds.append(pending.seconds)
        if self._recipe.background:
            self._running = self._thread.submit(self._finish, pending)
        else:
            self._finish(pending)
        pending.seconds["checkpoint_blocked_seconds"] = time.perf_counter() - begin

    def wait(self) -> None:
        """Until what was saved is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def seconds(self) -> dict[str, float]:
        """How long the last save that is done blocked training, and took to be on disk; told once."""
        done = [seconds for seconds in self._seconds if len(seconds) == 2]
        self._seconds = [seconds for seconds in self._seconds if seconds not in done]
        return done[-1] if done else {}

    def _make_temporary(self, folder: Path, name: str) -> Path:
        """The folder to write into, of a name that no rank of a dying run can still be writing to."""
        error = None
        temporary: Path = self._from_first(folder / f"{UNFINISHED}{name}_{secrets.token_hex(4)}")
        if self._topology.is_first:
            try:
                temporary.mkdir(parents=True)
            except OSError as failure:
                error = f"{temporary}: {failure.strerror}"
        error = self._from_first(error)
        if error is not None:
            raise _failed(name, error)
        return temporary

    def _finish(self, save: _Save) -> None:
        self._files.write_pending()
        here = f"rank {self._topology.rank} on {node_name()}"
        reports = self._gather((self._files.written, self._files.error and f"{self._files.error} ({here})"))
        errors = [error for _, error in reports if error is not None]
        error = errors[0] if errors else None
        if self._topology.is_first and error is None:
            try:
                self._commit(save, {name: entry for written, _ in reports for name, entry in written.items()})
            except OSError as failure:
                error = f"{failure.filename or save.temporary}: {failure.strerror or failure}"
        error = self._from_first(error)
        if error is not None:
            if self._topology.is_first:
                shutil.rmtree(save.temporary, ignore_errors=True)
            raise _failed(save.final.name, error)
        save.seconds["checkpoint_disk_seconds"] = time.perf_counter() - save.begin_seconds

    def _commit(self, save: _Save, files: dict[str, dict[str, Any]]) -> None:
        """The first rank, when every rank's files are on disk."""
        for name, entry in files.items():
            _await(save.temporary / name, entry["bytes"])
        write_parameters(save.temporary, save.splits, optimizer_order(self._engine))
        for path in save.temporary.rglob("*"):  # also what DeepSpeed copies by itself: tensors offloaded to NVMe
            name = str(path.relative_to(save.temporary))
            if path.is_file() and name not in files:
                files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        run_folder = save.final.parent.parent
        leave_if_fenced(run_folder)
        write_manifest(save.temporary, {**save.manifest, "files": dict(sorted(files.items()))})
        leave_if_fenced(run_folder)  # hashing may have taken long
        if save.final.exists():  # damaged, or newer than the one the run went on from
            remove(save.final)
        save.temporary.rename(save.final)
        sync_folder(save.final.parent)
        write_text(save.final.parent / "latest", save.final.name + "\n")
        delete_old(save.final.parent, save.manifest["step"], self._recipe.keep_last, self._recipe.keep_every_steps)

    def _gather(self, own: Any) -> list[Any]:
        everyone = [None] * self._topology.world_size
        dist.all_gather_object(everyone, own, group=self._own_group())
        return everyone

    def _from_first(self, own: Any) -> Any:
        """The first rank's object, on all ranks."""
        holder = [own]
        dist.broadcast_object_list(holder, src=0, group=self._own_group())
        return holder[0]

    def _own_group(self) -> dist.ProcessGroup | None:
        """A group that only saving uses, so that its thread and training cannot take each other's messages."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        return self._group


def _await(path: Path, size: int) -> None:
    """
    Raises:
        OSError: a file that another rank has written does not show here.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (path.is_file() and path.stat().st_size == size):
        if time.monotonic() > deadline:
            raise OSError(
                None, "another rank wrote it, and the first rank does not see it: is the folder shared?", str(path)
            )
        time.sleep(0.1)


def _failed(name: str, error: str) -> CheckpointError:
    return CheckpointError(
        f"cannot save the checkpoint {name}: {error}. Checkpoints saved before are good: when that is put right, give "
        "the same command again, without --from-scratch or --resume-from"
    )
