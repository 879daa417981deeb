"""Corpus -> tokenizer -> shards -> token counts -> manifest, in one folder, for :mod:`pretrain.data.prepared` to open.

What is finished is kept in ``FOLDER/partial`` until the manifest is written, so an interrupted prepare continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.console import bar, say
from pretrain.data import embedded
from pretrain.data.corpus import SPLITS, Split, documents, source_files
from pretrain.data.manifest import MANIFEST_NAME, Manifest, SplitManifest, inputs_of, read_record
from pretrain.data.prepared import COUNTS_NAME, TOKENIZER_NAME, PreparedData, shard_paths
from pretrain.data.shards import count_tokens, update_text_hash, write_split
from pretrain.data.tokenizer import Tokenizer, train_tokenizer, training_lines
from pretrain.data.workers import workers
from pretrain.errors import UserError
from pretrain.files import file_sha256, folder_lock, read_json, replacing, write_bytes, write_json
from pretrain.recipe import DataRecipe, Recipe

PROVENANCE_NAME = "provenance.json"
TOKENIZER_SEED = 0  # not recipe.seed: runs that differ in their seed share one folder
_PACKAGES = ("torch", "sentencepiece", "megatron-core", "datasets", "numpy")


def prepare(recipe: Recipe) -> Manifest:
    """Fill ``recipe.data.folder``; nothing to do when it already holds the same. Continues after an interruption.

    Raises:
        UserError: the folder cannot be written, the disk is full, another process prepares it, it holds other
            data, or the corpus or the tokenizer cannot be used.
    """
    data = recipe.data
    folder = Path(data.folder)
    with _explained_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            manifest = Manifest.read(folder)
            if manifest is None:  # otherwise nothing is written: the folder may be read-only
                way_out = "wait until it ends, or choose another data.folder"
                stack.enter_context(folder_lock(folder, "preparing", way_out))
                manifest = Manifest.read(folder)
            if manifest is not None:
                manifest.check_inputs(data)
                _check_sources_unchanged(manifest, data)
                PreparedData.open(recipe)
                say(f"{folder} is already prepared: {_summary(manifest)}")
                return manifest
            manifest = _Preparation(data, folder).run()
            say(f"{folder} is prepared: {_summary(manifest)}")
            return manifest


@dataclasses.dataclass(frozen=True)
class _TokenizerRecord:
    sha256: str
    train_documents: int


class _Preparation:
    """The steps of one prepare; each leaves a record in ``partial`` when it is done."""

    def __init__(self, data: DataRecipe, folder: Path) -> None:
        self.data, self.folder, self.partial = data, folder, folder / "partial"

    def run(self) -> Manifest:
        sources = _sources(self.data)
        self._begin(sources)
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove_temporaries)  # after the workers have ended: one may be stopped while it writes
            pool = None
            if self.data.prepare_processes > 1:
                pool = stack.enter_context(workers(self.data.prepare_processes))
            if self.data.corpus.source == "embedded":
                corpus = embedded.collect(self.data.prepare_processes, show=True)
                write_json(self.folder / PROVENANCE_NAME, corpus.provenance)
            tokenizer, train_documents = self._tokenizer()
            splits: dict[str, SplitManifest] = {split: self._split(split, train_documents, pool) for split in SPLITS}
        counts = count_tokens(self.folder / "train", tokenizer.vocab_size)
        with replacing(self.folder / COUNTS_NAME) as temporary, temporary.open("wb") as file:
            np.save(file, counts)
        inputs = inputs_of(self.data)
        manifest = Manifest(
            corpus=inputs["corpus"],
            tokenizer=inputs["tokenizer"],
            sources=sources,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            token_counts_sha256=file_sha256(self.folder / COUNTS_NAME),
            splits=splits,
            versions=_versions(),
        )
        manifest.write(self.folder)
        shutil.rmtree(self.partial)
        return manifest

    def _begin(self, sources: dict[str, Any]) -> None:
        """Keep the finished steps of an interrupted prepare, if it had the same inputs."""
        record = self.partial / "inputs.json"
        inputs = json.loads(json.dumps({**inputs_of(self.data), "sources": sources}))
        if read_json(record) == inputs:
            say(f"continuing the interrupted preparation of {self.folder}")
            return
        if self.partial.exists():
            say(f"starting over: the unfinished preparation in {self.folder} had other inputs")
            shutil.rmtree(self.partial)
        else:
            self._refuse_foreign_files()
        self.partial.mkdir()
        write_json(record, inputs)

    def _remove_temporaries(self) -> None:
        for path in [*self.folder.glob("*.[0-9]*.tmp"), *self.partial.rglob("*.tmp")]:
            path.unlink(missing_ok=True)

    def _refuse_foreign_files(self) -> None:
        names = [TOKENIZER_NAME, COUNTS_NAME, *(path.name for split in SPLITS for path in shard_paths(Path(split)))]
        present = [name for name in names if (self.folder / name).exists()]
        if present:
            raise UserError(
                f"{self.folder} holds {', '.join(present)} but no {MANIFEST_NAME} that tells what they are; "
                "choose another data.folder, or delete these files"
            )

    def _tokenizer(self) -> tuple[Tokenizer, int]:
        """The tokenizer, and how many documents train has."""
        path, record = self.folder / TOKENIZER_NAME, self.partial / "tokenizer.json"
        done = read_record(_TokenizerRecord, record)
        if done is not None and path.exists() and file_sha256(path) == done.sha256:
            return Tokenizer.load(path), done.train_documents
        count = 0

        def counted() -> Iterator[str]:
            nonlocal count
            with bar(None, "collecting train", "documents") as progress:
                for text in documents(self.data.corpus, "train"):
                    count += 1
                    progress.update()
                    yield text

        recipe = self.data.tokenizer
        if recipe.model_file:
            Tokenizer.load(recipe.model_file)
            write_bytes(path, Path(recipe.model_file).read_bytes())
            for _ in counted():
                pass
        else:
            say(f"training a {recipe.model_type} tokenizer with {recipe.vocab_size} pieces")
            train_tokenizer(training_lines(counted()), recipe, path, TOKENIZER_SEED)
        tokenizer = Tokenizer.load(path)
        write_json(record, dataclasses.asdict(_TokenizerRecord(tokenizer.sha256, count)))
        return tokenizer, count

    def _split(self, split: Split, train_documents: int, pool: ProcessPoolExecutor | None) -> SplitManifest:
        record, prefix = self.partial / f"{split}.json", self.folder / split
        done = read_record(SplitManifest, record)
        sizes = [path.stat().st_size if path.exists() else -1 for path in shard_paths(prefix)]
        if done is not None and sizes == [done.bin_bytes, done.idx_bytes]:
            return done
        total = train_documents if split == "train" else None
        with bar(total, f"tokenizing {split}", "documents") as progress:
            texts = documents(self.data.corpus, split)
            tokenizer_path = self.folder / TOKENIZER_NAME
            entry = write_split(prefix, texts, tokenizer_path, self.partial / f"{split}-chunks", pool, progress)
        write_json(record, dataclasses.asdict(entry))
        return entry


def _sources(data: DataRecipe) -> dict[str, Any]:
    """What tells cheaply whether the corpus is still the same: file sizes and times, or versions."""
    sources: dict[str, Any] = {
        split: [[_name(path), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]
        for split, paths in source_files(data.corpus).items()
    }
    if data.corpus.source == "embedded":
        sources = {"python": platform.python_version(), "torch": importlib.metadata.version("torch")}
    if data.tokenizer.model_file:
        sources["tokenizer"] = Tokenizer.load(data.tokenizer.model_file).sha256
    return sources


def _name(path: Path) -> str:
    """As JSON can hold it, also where the bytes of the name are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _check_sources_unchanged(manifest: Manifest, data: DataRecipe) -> None:
    """Refuse to call a folder up to date when its corpus has changed. Only a doubt makes it read the corpus again."""
    sources = json.loads(json.dumps(_sources(data)))
    if sources == manifest.sources:
        return
    changed = [] if sources.get("tokenizer") == manifest.sources.get("tokenizer") else ["the given tokenizer"]
    for split in SPLITS:
        text_hash = hashlib.sha256()
        for text in documents(data.corpus, split):
            update_text_hash(text_hash, text)
        if text_hash.hexdigest() != manifest.splits[split].text_sha256:
            changed.append(f"the text of {split}")
    if changed:
        raise UserError(
            f"{data.folder} was prepared before its inputs changed: {', '.join(changed)} differs now; "
            "choose another data.folder, or delete this one and prepare again"
        )


@contextlib.contextmanager
def _explained_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of data.folder {folder} is full; free some space and run prepare again, it continues"
            ) from error
        raise UserError(f"data.folder {folder} cannot be written: {error}; choose another data.folder") from error


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def _summary(manifest: Manifest) -> str:
    splits = (f"{name} {entry.tokens:,} tokens" for name, entry in manifest.splits.items())
    return f"vocabulary {manifest.vocab_size:,}, " + ", ".join(splits)
