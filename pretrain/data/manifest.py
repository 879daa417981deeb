"""``manifest.json``: what is in a data folder, and from what it was made. It is written last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pretrain.errors import UserError
from pretrain.files import read_json, write_json
from pretrain.recipe import DataRecipe
from pretrain.recipe_io import recipe_to_dict

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

T = TypeVar("T")
_TYPES = {"int": int, "str": str}  # of fields; all others are objects


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """One split. Words are runs of non-blanks; text_bytes counts UTF-8; tokens include one eos per document."""

    documents: int
    tokens: int
    words: int
    text_bytes: int
    text_sha256: str  # over the documents, in order
    tokenizer_sha256: str
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared data folder.

    Attributes:
        corpus, tokenizer: the recipe sections it was made from, see :func:`inputs_of`.
        sources: what the corpus was when it was read: files with sizes and times, or versions.
        splits: train, valid and test.
        versions: of the packages that wrote it; for information, not part of ``sha256``.
    """

    corpus: dict[str, Any]
    tokenizer: dict[str, Any]
    sources: dict[str, Any]
    tokenizer_sha256: str
    vocab_size: int
    token_counts_sha256: str
    splits: dict[str, SplitManifest]
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def sha256(self) -> str:
        """One hash of what training reads: the tokenizer and the shards."""
        parts = [self.tokenizer_sha256, self.token_counts_sha256]
        for name in sorted(self.splits):
            parts += [name, self.splits[name].bin_sha256, self.splits[name].idx_sha256]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write ``folder/manifest.json`` atomically."""
        write_json(folder / MANIFEST_NAME, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder; None when it has none.

        Raises:
            UserError: it is damaged, or of another format version.
        """
        path = folder / MANIFEST_NAME
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            version = tree["format_version"]
            if version == FORMAT_VERSION:
                splits = {name: checked(SplitManifest, tree["splits"][name]) for name in ("train", "valid", "test")}
                manifest = checked(cls, {**tree, "splits": splits})
                _ = manifest.sha256  # of what can be hashed
                return manifest
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {folder} and prepare again") from error
        if type(version) is not int:
            raise UserError(f"{path} is damaged (format_version is {version!r}); delete {folder} and prepare again")
        raise UserError(
            f"{path} has format version {version}, this program reads version {FORMAT_VERSION}; "
            "prepare into another data.folder"
        )

    def check_inputs(self, data: DataRecipe) -> None:
        """Refuse data that were made from another corpus or tokenizer recipe.

        Raises:
            UserError: naming every key that differs, with both values.
        """
        wanted, made = inputs_of(data), {"corpus": self.corpus, "tokenizer": self.tokenizer}
        differences = [
            f"  - data.{section}.{key}: recipe {wanted[section].get(key)!r}, folder {made[section].get(key)!r}"
            for section in wanted
            for key in sorted({*wanted[section], *made[section]})
            if wanted[section].get(key) != made[section].get(key)
        ]
        if differences:
            raise UserError(
                f"{data.folder} was prepared from another recipe:\n" + "\n".join(differences) + "\n"
                "choose another data.folder, or delete this one and prepare again"
            )


def checked(kind: type[T], tree: Any) -> T:
    """A dataclass of what JSON holds.

    Raises:
        TypeError: fields are missing or unknown, or a value has another type.
    """
    made = kind(**tree)
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        value = getattr(made, field.name)
        if type(value) is not _TYPES.get(str(field.type), dict):
            raise TypeError(f"{field.name} is {str(value)[:40]!r}")
    return made


def read_record(kind: type[T], path: Path) -> T | None:
    """What an earlier process left to be used again; None: nothing, or it is damaged."""
    try:
        return checked(kind, read_json(path))
    except TypeError:
        return None


def inputs_of(data: DataRecipe) -> dict[str, dict[str, Any]]:
    """The keys of a recipe that decide what the prepared data are; how they are read is not among them."""
    corpus: dict[str, Any] = recipe_to_dict(data.corpus)
    del corpus["streaming"]
    tokenizer: dict[str, Any] = recipe_to_dict(data.tokenizer)
    return {
        "corpus": corpus,
        "tokenizer": {"model_file": data.tokenizer.model_file} if data.tokenizer.model_file else tokenizer,
    }
