"""Documents of a corpus, one split at a time, in a fixed order.

Text files and JSON lines are read here, with strict UTF-8. Parquet, the hub, and JSON that is not one object a line
go through HF ``datasets``.
A split without files of its own is taken from train by a hash of each document's text, so a document
and its exact copies are always in one split.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import json
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pretrain.data import embedded
from pretrain.errors import UserError
from pretrain.recipe import CorpusRecipe

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUILDERS = {"jsonl": ("json", "JSON lines"), "parquet": ("parquet", "Parquet")}
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}  # by first bytes
_ROWS_WITHOUT_COLUMN = 1000  # after so many first rows without it, the column is taken for a wrong name


def documents(corpus: CorpusRecipe, split: Split) -> Iterator[str]:
    """Texts of a split. A document without any text is left out.

    Raises:
        UserError: no such file or column, a file without text or not in UTF-8, an unreachable data set, or a split
            that has no document.
    """
    if corpus.source == "embedded":
        yield from embedded.collect().documents[split]
        return
    count = 0
    for text in _candidates(corpus, split):
        if (_names(corpus, split) and split != "train") or split_of_text(text, corpus) == split:
            count += 1
            yield text
    if not count:
        raise UserError(_empty_split(corpus, split))


def split_of_text(text: str, corpus: CorpusRecipe) -> Split:
    """Where a document of the train files belongs: to train, or to a split that has no files of its own."""
    share = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64
    valid_share = 0.0 if corpus.valid else corpus.valid_fraction
    test_share = 0.0 if corpus.test else corpus.test_fraction
    if share < valid_share:
        return "valid"
    return "test" if share < valid_share + test_share else "train"


def source_files(corpus: CorpusRecipe) -> dict[Split, list[Path]]:
    """The files behind each split, sorted; nothing for sources that are not files.

    Raises:
        UserError: a glob matches no file, or one file, or one split of the hub, is in two splits.
    """
    if corpus.source == "hub":
        owners: dict[str, str] = {}
        for split in SPLITS:
            for name in _names(corpus, split) or (("train",) if split == "train" else ()):
                if owners.setdefault(name, split) != split:
                    raise UserError(
                        f"split {name!r} of data.corpus.hub_name {corpus.hub_name!r} is both data.corpus."
                        f"{owners[name]} and data.corpus.{split}; name different ones, or leave {split} out: it is "
                        "taken from train then"
                    )
    if corpus.source in ("embedded", "hub"):
        return {}
    files = {split: _matches(getattr(corpus, split), split) for split in SPLITS if getattr(corpus, split)}
    owner: dict[Path, str] = {}
    for split, paths in files.items():
        for path in paths:
            if owner.setdefault(path.resolve(), split) != split:
                raise UserError(
                    f"{path} is matched by both data.corpus.{owner[path.resolve()]} and data.corpus.{split}; "
                    "change the globs so that each file is in one split"
                )
    return files


def _names(corpus: CorpusRecipe, split: Split) -> tuple[str, ...]:
    names: tuple[str, ...] = getattr(corpus, split)
    return names


def _candidates(corpus: CorpusRecipe, split: Split) -> Iterator[str]:
    """Texts of the split's own files, or of train where it has none."""
    origin: Split = split if _names(corpus, split) else "train"
    if corpus.source == "hub":
        for name in _names(corpus, origin) or ("train",):
            yield from _hub_texts(corpus, name)
        return
    for path in source_files(corpus)[origin]:
        found = False
        for text in _file_texts(corpus, path):
            if text.strip():
                found = True
                yield text
        if not found:
            raise UserError(f"{path} has no text; take it out of data.corpus.{origin}")


def _matches(patterns: tuple[str, ...], split: str) -> list[Path]:
    paths: set[Path] = set()
    for pattern in patterns:
        names = glob.glob(pattern, recursive=True) or [pattern]  # a plain name may hold [brackets]
        matched = {Path(name) for name in names if Path(name).is_file()}
        if not matched:
            raise UserError(
                f"data.corpus.{split}: {pattern!r} matches no file (looked from {Path.cwd()}); correct the glob, "
                "or run the command in the folder it is relative to"
            )
        paths |= matched
    return sorted(paths)


def _file_texts(corpus: CorpusRecipe, path: Path) -> Iterator[str]:
    if corpus.source != "text":
        yield from _table_texts(corpus, path)
    elif corpus.document_per == "file":
        yield "".join(_lines(path))
    elif corpus.document_per == "line":
        yield from (line.rstrip("\r\n") for line in _lines(path))
    else:
        yield from _paragraphs(path)


def _lines(path: Path, opener: Callable[..., Any] = open) -> Iterator[str]:
    """Lines with their ends, decoded one by one so that a bad byte is named with its offset in the file."""
    offset = 0
    try:
        with opener(path, "rb") as file:
            for line in file:
                skipped = len(_BYTE_ORDER_MARK) if offset == 0 and line.startswith(_BYTE_ORDER_MARK) else 0
                yield line[skipped:].decode("utf-8")
                offset += len(line)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + skipped + error.start}; "
            "convert the file, for example with iconv"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(path):
        if line.strip():
            lines.append(line.rstrip("\r\n"))
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def _table_texts(corpus: CorpusRecipe, path: Path) -> Iterator[str]:
    """Texts of a JSON lines or Parquet file, streamed so that no copy lands in a cache."""
    builder, kind = _BUILDERS[corpus.source]
    if path.stat().st_size == 0:
        return
    try:
        rows = _json_rows(path) if corpus.source == "jsonl" else None
        if corpus.source == "parquet" and not _parquet_rows(path):
            return  # as some writers leave them, and HF datasets refuses them
        if rows is None:
            name = glob.escape(str(path))  # what it takes for a pattern would be another file
            rows = _quiet_datasets().load_dataset(builder, data_files=name, split="train", streaming=True)
        yield from _column(rows, corpus.text_column, str(path))
    except UserError:
        raise
    except Exception as error:  # whatever the reader of the format raises
        raise UserError(f"{path} cannot be read as {kind}: {_first_line(error)}") from error


def _parquet_rows(path: Path) -> int:
    from pyarrow import parquet

    rows: int = parquet.read_metadata(path).num_rows
    return rows


def _json_rows(path: Path) -> Iterator[dict[str, Any]] | None:
    """Rows of JSON lines; None if the first line is not an object.

    ``datasets`` takes the types of all columns from the first 10 MB, and refuses a file whose metadata differ later.
    """
    with path.open("rb") as file:
        start = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open)
    try:
        with opener(path, "rb") as file:
            first = next((line for line in file if line.strip()), b"")
        if not isinstance(json.loads(first.removeprefix(_BYTE_ORDER_MARK)), dict):
            return None
    except ValueError:
        return None
    return (_json_row(number, line) for number, line in enumerate(_lines(path, opener), start=1) if line.strip())


def _json_row(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is {type(row).__name__}, not an object")
    return row


def _hub_texts(corpus: CorpusRecipe, split_name: str) -> Iterator[str]:
    named = f"data set {corpus.hub_name!r}" + (f" ({corpus.hub_config})" if corpus.hub_config else "")
    try:
        rows = _quiet_datasets().load_dataset(
            corpus.hub_name, corpus.hub_config or None, split=split_name, streaming=corpus.streaming
        )
        yield from (text for text in _column(rows, corpus.text_column, named) if text.strip())
    except UserError:
        raise
    except Exception as error:  # network, authentication, unknown names: all end here
        raise UserError(
            f"{named}, split {split_name!r}, cannot be read: {_first_line(error)}; check data.corpus.hub_name, "
            "hub_config and the network, or download its files elsewhere and use data.corpus.source jsonl, parquet "
            "or text"
        ) from error


def _column(rows: Any, column: str, where: str) -> Iterator[str]:
    """Texts of the rows that have one; null, NaN and rows without the column are passed over."""
    found, others = False, dict[str, None]()
    for number, row in enumerate(rows, start=1):
        if column not in row:
            others |= dict.fromkeys(row)
            if not found and number >= _ROWS_WITHOUT_COLUMN:
                break
            continue
        found, value = True, row[column]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if not isinstance(value, str):
            raise UserError(
                f"{where}, row {number}: column {column!r} holds {type(value).__name__}, not text; "
                "set data.corpus.text_column to a column of texts"
            )
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}, row {number}: column {column!r} holds half of a surrogate pair "
                f"(\\u{ord(value[error.start]):04x}), which is no character; correct the text"
            ) from error
        yield value
    if others and not found:
        raise UserError(
            f"{where} has no column {column!r}; it has {', '.join(map(repr, others))}: set data.corpus.text_column"
        )


def _quiet_datasets() -> Any:
    import datasets  # takes a second or two, and only these sources need it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _empty_split(corpus: CorpusRecipe, split: Split) -> str:
    if split == "train":
        return "the train split has no document: data.corpus.train has too little text to share with valid and test"
    if _names(corpus, split):
        return f"the {split} split has no document: data.corpus.{split} has no text"
    fraction = getattr(corpus, f"{split}_fraction")
    return (
        f"the {split} split has no document: no train document fell into data.corpus.{split}_fraction = {fraction}; "
        f"raise it, give more and shorter documents, or name files in data.corpus.{split}"
    )
