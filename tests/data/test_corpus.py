import bz2
import dataclasses
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.corpus import SPLITS, documents, split_of_text
from pretrain.errors import UserError
from pretrain.recipe import CorpusRecipe
from tests.data.helpers import lines, write_lines


def text_corpus(path: Path, **changes: Any) -> CorpusRecipe:
    return dataclasses.replace(CorpusRecipe(source="text", train=(str(path),)), **changes)


def problem(corpus: CorpusRecipe, split: Any = "train") -> str:
    with pytest.raises(UserError) as caught:
        list(documents(corpus, split))
    return str(caught.value)


def test_hash_splits_are_disjoint_and_complete(tmp_path: Path) -> None:
    corpus = text_corpus(write_lines(tmp_path / "a.txt", 3000), valid_fraction=0.1, test_fraction=0.2)
    found = {split: list(documents(corpus, split)) for split in SPLITS}
    assert sorted(text for texts in found.values() for text in texts) == sorted(lines(3000))
    assert not set(found["train"]) & set(found["valid"])
    assert not (set(found["train"]) | set(found["valid"])) & set(found["test"])
    assert 0.08 < len(found["valid"]) / 3000 < 0.12
    assert 0.17 < len(found["test"]) / 3000 < 0.23


def test_files_of_a_split_are_taken_whole(tmp_path: Path) -> None:
    train, valid = write_lines(tmp_path / "a.txt"), write_lines(tmp_path / "b.txt", 20, seed=1)
    corpus = text_corpus(train, valid=(str(valid),), test_fraction=0.1)
    assert list(documents(corpus, "valid")) == lines(20, seed=1)
    assert len(list(documents(corpus, "train"))) + len(list(documents(corpus, "test"))) == 400


@pytest.mark.parametrize(
    ("per", "expected"),
    [
        ("line", ["one", "two  ", "three"]),
        ("paragraph", ["one\ntwo  ", "three"]),
        ("file", ["one\r\ntwo  \n\n \nthree"]),
    ],
)
def test_document_per(tmp_path: Path, per: Any, expected: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo  \n\n \nthree")
    valid, test = write_lines(tmp_path / "valid.txt"), write_lines(tmp_path / "test.txt")
    corpus = text_corpus(path, document_per=per, valid=(str(valid),), test=(str(test),))
    assert list(documents(corpus, "train")) == expected


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_tables(tmp_path: Path, source: Any) -> None:
    texts = lines(50)
    paths = [write_table(tmp_path / f"{i}.{source}", [{"body": text, "n": 1} for text in texts[i::2]]) for i in (0, 1)]
    corpus = CorpusRecipe(source=source, train=(str(tmp_path / f"*.{source}"),), text_column="body")
    held_out = dataclasses.replace(corpus, valid_fraction=0.2, test_fraction=0.2)
    found = [text for split in SPLITS for text in documents(held_out, split)]
    assert sorted(found) == sorted(texts)
    message = problem(dataclasses.replace(corpus, text_column="text"))
    assert str(paths[0]) in message and "no column 'text'" in message and "'body', 'n'" in message
    assert "row 1" in problem(dataclasses.replace(corpus, text_column="n"))


@pytest.mark.parametrize("opened", [open, gzip.open])
def test_json_lines_whose_other_columns_differ(tmp_path: Path, opened: Any) -> None:
    """After as much as HF datasets would take the types from."""
    rows = [{"text": f"{i} " * (1 << 19), "meta": None, "id": i} for i in range(12)]
    rows += [{"text": "2024-01-01", "meta": {"a": [1]}, "more": 1}, {"meta": "of no text"}, {"text": None}]
    rows += [{"text": float("nan")}, {"text": "a\u2028b", "id": "z"}]
    with opened(tmp_path / "a.jsonl", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\r\n\n" for row in rows)
    corpus = CorpusRecipe(source="jsonl", train=(str(tmp_path / "a.jsonl"),), valid_fraction=1e-9, test_fraction=1e-9)
    assert list(documents(corpus, "train")) == [*(row["text"] for row in rows[:13]), "a\u2028b"]


@pytest.mark.parametrize("module", [bz2, gzip, lzma])
def test_compressed_json_lines(tmp_path: Path, module: Any) -> None:
    path = write_table(tmp_path / "a.jsonl", [{"text": text} for text in lines(20)])
    path.write_bytes(module.compress(path.read_bytes()))
    corpus = CorpusRecipe(source="jsonl", train=(str(path),), valid_fraction=1e-9, test_fraction=1e-9)
    assert list(documents(corpus, "train")) == lines(20)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} cannot be read" in problem(corpus)


@pytest.mark.parametrize("content", ['[{"text": "one"}, {"text": "two"}]', '{\n"text": "one"\n}\n{\n"text": "two"\n}'])
def test_json_that_is_not_one_object_a_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    corpus = CorpusRecipe(source="jsonl", train=(str(tmp_path / "a.jsonl"),), valid_fraction=1e-9, test_fraction=1e-9)
    assert list(documents(corpus, "train")) == ["one", "two"]


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_a_table_whose_name_looks_like_a_glob(tmp_path: Path, name: Any) -> None:
    write_table(tmp_path / f"part1.{name}", [{"text": "of part1"}])
    write_table(tmp_path / f"part[1].{name}", [{"text": "of part[1]"}])
    corpus = CorpusRecipe(source=name, train=(f"{tmp_path}/*",), valid_fraction=1e-9, test_fraction=1e-9)
    assert list(documents(corpus, "train")) == ["of part1", "of part[1]"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 3, column 10: Unterminated string"),
        ("[1]", "line 3 is list, not an object"),
        ('{"text": "half \\ud83d"}', "row 2: column 'text' holds half of a surrogate pair (\\ud83d)"),
        ('{"text": "caf\udce9"}', "is not UTF-8: byte 0xe9 at offset 31"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(f'{{"text": "fine"}}\n\n{line}\n'.encode(errors="surrogateescape"))
    assert message in problem(CorpusRecipe(source="jsonl", train=(str(tmp_path / "a.jsonl"),)))


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    assert f"{path} cannot be read as JSON lines" in problem(CorpusRecipe(source="jsonl", train=(str(path),)))


def test_glob_without_files(tmp_path: Path) -> None:
    message = problem(text_corpus(tmp_path / "*.nothing"))
    assert "data.corpus.train" in message and "*.nothing' matches no file" in message


def test_a_plain_name_with_brackets(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "[2024] a.txt")
    assert list(documents(text_corpus(path, valid_fraction=1e-9, test_fraction=1e-9), "train")) == lines(400)
    (tmp_path / "2 a.txt").write_text("of the glob")
    assert list(documents(text_corpus(path, valid_fraction=1e-9, test_fraction=1e-9), "train")) == ["of the glob"]


def test_file_in_two_splits(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt")
    assert "both data.corpus.train and data.corpus.valid" in problem(text_corpus(path, valid=(str(path),)))


def test_parquet_without_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert f"{path} has no text; take it out" in problem(CorpusRecipe(source="parquet", train=(str(path),)))


@pytest.mark.parametrize("content", [b"", b"\n  \n\n"])
def test_file_without_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert f"{tmp_path / 'a.txt'} has no text" in problem(text_corpus(tmp_path / "a.txt"))


def test_not_utf8_names_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 3 + b"caf\xe9 noir\n")
    message = problem(text_corpus(tmp_path / "a.txt"))
    assert f"{tmp_path / 'a.txt'} is not UTF-8: byte 0xe9 at offset 18" in message


def test_split_that_ends_up_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(text for text in lines(50) if split_of_text(text, CorpusRecipe()) != "valid"))
    message = problem(text_corpus(path), "valid")
    assert "the valid split has no document" in message and "data.corpus.valid_fraction = 0.05" in message


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = problem(CorpusRecipe(source="hub", hub_name="some/set"))
    assert "data set 'some/set'" in message and "Couldn't reach" in message and "jsonl, parquet or text" in message


def test_hub_splits_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows(name: str, config: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        return iter([{"text": f"{split} {i}"} for i in range(40)] + [{"text": " "}])

    monkeypatch.setattr(datasets, "load_dataset", rows)
    corpus = CorpusRecipe(source="hub", hub_name="some/set", valid=("validation",), test_fraction=0.2)
    assert list(documents(corpus, "valid")) == [f"validation {i}" for i in range(40)]
    taken = [*documents(corpus, "train"), *documents(corpus, "test")]
    assert sorted(taken) == sorted(f"train {i}" for i in range(40))
