"""``python -m pretrain prepare RECIPE --verify``: whether the files of a prepared folder are still what was written."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from pretrain.console import bar, bytes_in_words, say
from pretrain.data.manifest import Manifest
from pretrain.data.prepared import PreparedData, shard_paths
from pretrain.errors import UserError
from pretrain.files import hash_problem
from pretrain.recipe_io import load_recipe


def verify(options: argparse.Namespace) -> None:
    """Read all of it and compare hashes; without the corpus, which may have stayed elsewhere.

    Raises:
        UserError: the folder cannot be used, or naming every shard that is not what was written.
    """
    prepared = PreparedData.open(load_recipe(options.recipe, options.overrides))
    shards = list(_shards(prepared.manifest))
    total = sum(size for _, size, _ in shards)
    problems = []
    with bar(total, "reading", "bytes") as progress:
        for name, size, sha256 in shards:
            problems.append(hash_problem(prepared.folder, name, sha256))
            progress.update(size)
    if found := [problem for problem in problems if problem]:
        raise UserError(
            f"{prepared.folder}: {'; '.join(found)}; copy these files again, or delete the folder and prepare again"
        )
    say(f"{prepared.folder}: {len(shards)} shard files, {bytes_in_words(total)}, the tokenizer and counts, all valid")


def _shards(manifest: Manifest) -> Iterator[tuple[str, int, str]]:
    """Name, bytes and SHA-256 of each file."""
    for split, entry in manifest.splits.items():
        data, index = (path.name for path in shard_paths(Path(split)))
        yield data, entry.bin_bytes, entry.bin_sha256
        yield index, entry.idx_bytes, entry.idx_sha256
