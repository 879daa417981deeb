"""``python -m pretrain prepare RECIPE --verify``: whether the files of a prepared folder are still what was written."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from pretrain.console import bar, bytes_in_words, say
from pretrain.data.prepared import PreparedData, shard_paths
from pretrain.errors import UserError
from pretrain.files import file_sha256
from pretrain.recipe_io import load_recipe


def verify(options: argparse.Namespace) -> None:
    """Read all of it and compare hashes; without the corpus, which may have stayed elsewhere.

    Raises:
        UserError: the folder cannot be used, or naming every shard that is not what was written.
    """
    prepared = PreparedData.open(load_recipe(options.recipe, options.overrides))
    shards = list(_shards(prepared))
    total = sum(path.stat().st_size for path, _ in shards)
    bad = []
    with bar(total, "reading", "bytes") as progress:
        for path, sha256 in shards:
            if not _is(path, sha256):
                bad.append(str(path))
            progress.update(path.stat().st_size)
    if bad:
        raise UserError(
            f"{', '.join(bad)} is not what was written: copy each again, or delete {prepared.folder} and prepare again"
        )
    say(f"{prepared.folder}: {len(shards)} shard files, {bytes_in_words(total)}, the tokenizer and counts, all valid")


def _is(path: Path, sha256: str) -> bool:
    try:
        return file_sha256(path) == sha256
    except OSError:  # of a disk that fails
        return False


def _shards(prepared: PreparedData) -> Iterator[tuple[Path, str]]:
    for split, entry in prepared.manifest.splits.items():
        yield from zip(shard_paths(prepared.folder / split), (entry.bin_sha256, entry.idx_sha256), strict=True)
