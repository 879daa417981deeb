import hashlib
import subprocess
import sys

import pytest

from pretrain.data import embedded
from pretrain.data.embedded import EmbeddedCorpus, docstrings_of_source, split_of_module


@pytest.fixture(scope="session")
def corpus() -> EmbeddedCorpus:
    return embedded.collect(2)


def test_size_and_split_shares(corpus: EmbeddedCorpus) -> None:
    words = {split: corpus.provenance["splits"][split]["words"] for split in embedded.SPLITS}
    assert words == {split: sum(len(text.split()) for text in texts) for split, texts in corpus.documents.items()}
    total = sum(words.values())
    assert total > 900_000
    for split in ("valid", "test"):
        assert 0.03 < words[split] / total < 0.08
        assert max(len(text.split()) for text in corpus.documents[split]) < 0.15 * words[split]


def test_splits_share_no_document(corpus: EmbeddedCorpus) -> None:
    texts = [text for split in embedded.SPLITS for text in corpus.documents[split]]
    assert len(set(texts)) == len(texts)
    assert all(text.strip() for text in texts)


def test_provenance_names_versions_and_hashes(corpus: EmbeddedCorpus) -> None:
    assert corpus.provenance["python"] == ".".join(map(str, sys.version_info[:3]))
    test_hash = hashlib.sha256("\0".join(corpus.documents["test"]).encode()).hexdigest()
    assert corpus.provenance["splits"]["test"]["sha256"] == test_hash


def test_order_does_not_depend_on_the_hash_seed() -> None:
    program = "from pretrain.data.embedded import _sources; print(sorted(_sources())[::97])"
    command = [sys.executable, "-c", program]
    environments = [{"PYTHONHASHSEED": seed, "PYTHONPATH": "."} for seed in ("1", "2")]
    outputs = [subprocess.run(command, env=env, capture_output=True, check=True).stdout for env in environments]
    assert outputs[0] == outputs[1] and len(outputs[0]) > 1000


def test_repeats_are_kept_once_at_the_first_module() -> None:
    modules = [(f"module{i}", [f"text {i}", "the same text"]) for i in range(200)]
    built = embedded._build(iter(modules))
    texts = [text for split in embedded.SPLITS for text in built.documents[split]]
    assert sum("the same text" in text for text in texts) == 1


def test_docstrings_come_in_source_order_with_add_docstr() -> None:
    source = b'''"""Module."""
class A:
    """Class."""
    def f(self):
        """Method."""
add_docstr(torch.abs, r"""
abs(input) -> Tensor and a text that is long enough to be one
""")
def g():
    "Function."
def h(): "unpaired \\ud800"
'''
    long = "abs(input) -> Tensor and a text that is long enough to be one"
    assert docstrings_of_source(source) == ["Module.", "Class.", "Method.", long, "Function."]
    assert docstrings_of_source(b"def f[T](: pass") == []


def test_large_modules_are_train() -> None:
    held_out = next(name for name in map(str, range(1000)) if split_of_module(name, 10) == "valid")
    assert split_of_module(held_out, embedded.LARGEST_HELD_OUT_WORDS + 1) == "train"
