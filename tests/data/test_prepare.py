import dataclasses
import errno
import fcntl
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from pretrain.data import prepare as prepare_module
from pretrain.data import shards
from pretrain.data.corpus import SPLITS, documents
from pretrain.data.loader import training_dataset
from pretrain.data.prepare import prepare
from pretrain.data.prepared import PreparedData
from pretrain.errors import UserError
from pretrain.recipe import Recipe
from tests.data.helpers import corpus_recipe, text_recipe, tokenizer_recipe, write_lines

OUTPUTS = ("tokenizer.model", "token_counts.npy", *(f"{split}.{end}" for split in SPLITS for end in ("bin", "idx")))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def in_folder(recipe: Recipe, folder: Path, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, folder=str(folder), **changes))


def refusal(recipe: Recipe, action: Any = prepare) -> str:
    with pytest.raises(UserError) as caught:
        action(recipe)
    return str(caught.value)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK_TEXT_BYTES", 2_000)


def test_two_prepares_and_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    first = prepare(recipe)
    other = prepare(in_folder(recipe, tmp_path / "other", prepare_processes=2))
    assert contents(tmp_path / "data") == contents(tmp_path / "other")
    assert first == other and first.sha256 == other.sha256
    write_lines(tmp_path / "corpus.txt", seed=9)
    assert prepare(in_folder(recipe, tmp_path / "third")).sha256 != first.sha256


def test_shards_hold_the_documents(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    manifest = prepare(recipe)
    prepared = PreparedData.open(recipe)
    recount = np.zeros(prepared.vocab_size, dtype=np.int64)
    for split in SPLITS:
        texts = list(documents(recipe.data.corpus, split))
        shard = IndexedDataset(prepared.prefix(split))
        entry = manifest.splits[split]
        assert len(shard) == len(texts) == entry.documents
        for text, ids in zip(texts, shard, strict=True):
            assert ids[-1] == prepared.tokenizer.eos_id
            assert prepared.tokenizer.decode(ids[:-1]) == text
            if split == "train":
                np.add.at(recount, ids, 1)
        assert entry.words == sum(len(text.split()) for text in texts)
        assert entry.text_bytes == sum(len(text.encode()) for text in texts)
        assert entry.tokens == sum(len(ids) for ids in shard)
    assert prepared.token_counts.dtype == np.int64
    np.testing.assert_array_equal(prepared.token_counts, recount)
    assert prepared.train_tokens == recount.sum()


def test_counts_over_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text_recipe(tmp_path)
    prepare(recipe)
    expected = PreparedData.open(recipe).token_counts
    monkeypatch.setattr(shards, "_COUNT_BLOCK_TOKENS", 77)
    np.testing.assert_array_equal(shards.count_tokens(tmp_path / "data" / "train", len(expected)), expected)


def test_rerun_in_a_folder_that_is_read_only(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    first = prepare(recipe)
    (tmp_path / "data" / ".lock").unlink()
    (tmp_path / "data" / ".lock").mkdir()  # cannot be opened, whoever runs this
    assert prepare(recipe) == first
    (tmp_path / "data" / "manifest.json").unlink()
    assert "cannot be written" in refusal(recipe)


def test_rerun_does_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = text_recipe(tmp_path)
    first = prepare(recipe)
    before = {name: (tmp_path / "data" / name).stat().st_mtime_ns for name in (*OUTPUTS, "manifest.json")}
    capsys.readouterr()
    assert prepare(recipe) == first
    assert "is already prepared" in capsys.readouterr().out
    assert before == {name: (tmp_path / "data" / name).stat().st_mtime_ns for name in before}
    assert not (tmp_path / "data" / "partial").exists()


@pytest.mark.parametrize("failing_call", [1, 3, 12])
def test_interrupted_prepare_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int) -> None:
    recipe = text_recipe(tmp_path)
    expected = prepare(in_folder(recipe, tmp_path / "whole"))
    encoded: list[str] = []

    def builder(path: str, **options: Any) -> Any:
        encoded.append(Path(path).name)
        if len(encoded) == failing_call:
            raise KeyboardInterrupt
        return IndexedDatasetBuilder(path, **options)

    monkeypatch.setattr(shards, "IndexedDatasetBuilder", builder)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe)
    assert "is not prepared" in refusal(recipe, PreparedData.open)
    assert not list((tmp_path / "data").rglob("*.tmp"))
    assert prepare(recipe) == expected
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert len(encoded) == len(set(encoded)) + 1  # only what was interrupted is done again


def test_prepare_that_is_interrupted_while_it_hashes_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text_recipe(tmp_path)

    def interrupted(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "file_sha256", interrupted)
        prepare(recipe)
    assert len(list((tmp_path / "data" / "partial" / "train-chunks").glob("*.bin"))) > 1
    assert prepare(recipe) == prepare(in_folder(recipe, tmp_path / "whole"))


def test_unfinished_work_of_other_inputs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text_recipe(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "count_tokens", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(recipe)
    changed = tokenizer_recipe(recipe, vocab_size=300)
    assert prepare(changed) == prepare(in_folder(changed, tmp_path / "other"))


def test_other_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    prepare(recipe)
    changed = corpus_recipe(tokenizer_recipe(recipe, vocab_size=300), valid_fraction=0.2)
    for action in (prepare, PreparedData.open):
        message = refusal(changed, action)
        assert "data.tokenizer.vocab_size: recipe 300, folder 320" in message
        assert "data.corpus.valid_fraction: recipe 0.2, folder 0.1" in message
        assert "another data.folder" in message


def test_a_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    write_lines(tmp_path / "caf\udce9.txt")
    recipe = corpus_recipe(text_recipe(tmp_path), train=(f"{tmp_path}/caf*.txt",))
    manifest = prepare(recipe)
    assert manifest == prepare(recipe)
    assert manifest.sources["train"][0][0] == f"{tmp_path}/caf\\xe9.txt"


def test_changed_corpus_is_noticed_but_a_new_time_is_not(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    first = prepare(recipe)
    write_lines(tmp_path / "corpus.txt")
    assert prepare(recipe) == first
    write_lines(tmp_path / "corpus.txt", seed=5)
    assert "the text of train" in refusal(recipe)
    PreparedData.open(recipe)


@pytest.mark.parametrize("name", ["train.bin", "valid.idx", "test.bin"])
def test_truncated_shard_is_refused(tmp_path: Path, name: str) -> None:
    recipe = text_recipe(tmp_path)
    prepare(recipe)
    path = tmp_path / "data" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    message = refusal(recipe, PreparedData.open)
    assert f"{path} has {len(whole) - 2:,} bytes" in message and f"{len(whole):,} bytes;" in message
    path.unlink()
    assert f"{path} is missing" in refusal(recipe, PreparedData.open)


def test_other_tokenizer_is_refused(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    prepare(recipe)
    prepare(tokenizer_recipe(in_folder(recipe, tmp_path / "other"), vocab_size=300))
    (tmp_path / "data" / "tokenizer.model").write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
    assert "made with another tokenizer" in refusal(recipe, PreparedData.open)


def test_changed_counts_are_refused(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    prepare(recipe)
    np.save(tmp_path / "data" / "token_counts.npy", PreparedData.open(recipe).token_counts + 1)
    assert "token_counts.npy is missing or changed" in refusal(recipe, PreparedData.open)


def test_given_tokenizer_is_copied(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    given = prepare(recipe)
    model = str(tmp_path / "data" / "tokenizer.model")
    recipe = tokenizer_recipe(in_folder(recipe, tmp_path / "other"), model_file=model, vocab_size=9)
    assert prepare(recipe).sha256 == given.sha256
    assert PreparedData.open(recipe).vocab_size == 320
    Path(model).write_bytes(b"broken")
    assert "is not a SentencePiece model" in refusal(in_folder(recipe, tmp_path / "third"))


def test_corpus_errors_reach_the_user_through_prepare(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes(b"fine\n\xff\n")
    recipe = text_recipe(tmp_path)
    assert "is not UTF-8: byte 0xff at offset 5" in refusal(recipe)
    write_lines(tmp_path / "corpus.txt")
    assert "largest size that works" in refusal(tokenizer_recipe(recipe, vocab_size=5000))
    prepare(recipe)


def test_folder_locked_by_another_prepare(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is preparing" in refusal(recipe)
    prepare(recipe)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    recipe = text_recipe(tmp_path)

    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    prepare(recipe)
    prepared = PreparedData.open(recipe)
    assert len(training_dataset(prepared, recipe)) > 0
    data, words = tmp_path / "data", capfd.readouterr().err
    assert f"no lock on {data / '.lock'} (Function not implemented): see to it that nothing else is preparing" in words
    assert f"nothing else is indexing {data / 'index_cache'}" in words
    assert [path.name.count(".") for path in (data / "index_cache").iterdir() if path.is_dir()] == [0]


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(in_folder(text_recipe(tmp_path), tmp_path / "file" / "data"))


@pytest.mark.parametrize("train", [(), ("other", "train")])
def test_a_split_of_the_hub_in_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: [{"text": f"{split} {i}"} for i in range(99)])
    recipe = corpus_recipe(text_recipe(tmp_path), source="hub", hub_name="some/set", train=train, valid=("train",))
    recipe = tokenizer_recipe(recipe, vocab_size=280)
    assert "split 'train' of data.corpus.hub_name 'some/set' is both data.corpus.train and" in refusal(recipe)
    prepare(corpus_recipe(recipe, valid=("validation",)))


@pytest.mark.parametrize("processes", [1, 2])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    recipe = text_recipe(tmp_path, prepare_processes=processes)

    def full(self: Any, *args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(IndexedDatasetBuilder, "add_document", full)
        assert "is full" in refusal(recipe)
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert not list((tmp_path / "data").rglob("*.tmp"))
    prepare(recipe)


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.bin").write_text("mine")
    assert "holds train.bin but no manifest.json" in refusal(text_recipe(tmp_path))
    assert (tmp_path / "data" / "train.bin").read_text() == "mine"


def test_not_prepared_names_the_command(tmp_path: Path) -> None:
    assert "python -m pretrain prepare RECIPE" in refusal(text_recipe(tmp_path), PreparedData.open)


def test_damaged_or_newer_manifest(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    prepare(recipe)
    path = tmp_path / "data" / "manifest.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"format_version": 99}))
    assert "format version 99" in refusal(recipe, PreparedData.open)
    path.write_text(json.dumps(tree)[:100])
    assert "is damaged" in refusal(recipe, PreparedData.open)
