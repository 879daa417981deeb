"""Opening a folder that :mod:`pretrain.data.prepare` has filled, and what its sizes say.

Without megatron-core, which takes seconds to import: what only looks before ranks start does not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.manifest import Manifest
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.files import file_sha256
from pretrain.recipe import Recipe

TOKENIZER_NAME = "tokenizer.model"
COUNTS_NAME = "token_counts.npy"


@dataclass(frozen=True)
class PreparedData:
    """A checked data folder.

    Attributes:
        token_counts: int64 [vocab_size], how often each id is a token of the train split.
    """

    folder: Path
    tokenizer: Tokenizer
    manifest: Manifest
    token_counts: np.ndarray

    @classmethod
    def open(cls, recipe: Recipe) -> PreparedData:
        """Open ``recipe.data.folder``. Sizes are checked, the hashes of the large files are not.

        Raises:
            UserError: not prepared, prepared from another recipe, or files that are missing, truncated or changed.
        """
        folder = Path(recipe.data.folder)
        manifest = Manifest.read(folder)
        if manifest is None:
            raise UserError(f"{folder} is not prepared; run: python -m pretrain prepare RECIPE")
        manifest.check_inputs(recipe.data)
        for split, entry in manifest.splits.items():
            for path, size in zip(shard_paths(folder / split), (entry.bin_bytes, entry.idx_bytes), strict=True):
                _check_size(path, size)
        tokenizer = Tokenizer.load(folder / TOKENIZER_NAME)
        made_with = {manifest.tokenizer_sha256, *(entry.tokenizer_sha256 for entry in manifest.splits.values())}
        if made_with != {tokenizer.sha256}:
            raise UserError(
                f"the shards in {folder} were made with another tokenizer than {folder / TOKENIZER_NAME}; "
                "put the right file back, or delete the folder and prepare again"
            )
        counts_path = folder / COUNTS_NAME
        if not counts_path.is_file() or file_sha256(counts_path) != manifest.token_counts_sha256:
            raise UserError(f"{counts_path} is missing or changed; delete {folder} and prepare again")
        return cls(folder, tokenizer, manifest, np.load(counts_path))

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer, not padded."""
        return self.manifest.vocab_size

    @property
    def train_tokens(self) -> int:
        """Tokens of the train split."""
        return self.manifest.splits["train"].tokens

    @property
    def sha256(self) -> str:
        """One hash of the tokenizer and the shards."""
        return self.manifest.sha256

    def prefix(self, split: str) -> str:
        """The path of a split's shard without ``.bin`` or ``.idx``."""
        return str(self.folder / split)


def shard_paths(prefix: Path) -> tuple[Path, Path]:
    """The data and the index file of a shard."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def steps_per_epoch(prepared: PreparedData, recipe: Recipe) -> int:
    """Optimizer steps that see about every train token once; at least 1."""
    return max(1, -(-prepared.train_tokens // recipe.tokens_per_step))


def check_length(prepared: PreparedData, recipe: Recipe) -> None:
    """
    Raises:
        UserError: the train split is shorter than one sequence.
    """
    length = recipe.model.sequence_length
    if prepared.train_tokens < length + 1:
        raise UserError(
            f"the train split of {prepared.folder} has {prepared.train_tokens} tokens, one sequence needs {length + 1} "
            f"(model.sequence_length {length} and one more); give more text or shorten the sequences"
        )


def _check_size(path: Path, size: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual != size:
        found = "is missing" if actual is None else f"has {actual:,} bytes"
        raise UserError(
            f"{path} {found}, the manifest says {size:,} bytes; copy the file again, or delete {path.parent} and "
            "prepare again"
        )
