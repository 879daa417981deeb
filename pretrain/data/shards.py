"""Documents to megatron-core's indexed shards, in chunks that survive an interruption.

A chunk is a run of documents. It is named by its position and by a hash of its documents and tokenizer, so a chunk
that was finished before an interruption is used again only for the very same text. Chunks are joined in order:
the shard does not depend on how many processes wrote them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pretrain.data.manifest import SplitManifest, read_record
from pretrain.data.prepared import shard_paths
from pretrain.data.tokenizer import Tokenizer
from pretrain.files import file_sha256, replacing, write_json

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

CHUNK_TEXT_BYTES = 1 << 20
_COUNT_BLOCK_TOKENS = 1 << 24


@dataclass(frozen=True)
class Chunk:
    """A finished run of documents: ``PREFIX.bin`` and ``PREFIX.idx``."""

    prefix: str
    documents: int
    tokens: int
    words: int
    text_bytes: int
    bin_bytes: int


def write_split(
    prefix: Path,
    texts: Iterable[str],
    tokenizer_path: Path,
    chunk_folder: Path,
    pool: ProcessPoolExecutor | None,
    progress: tqdm[Any],
) -> SplitManifest:
    """Tokenize documents, an eos after each, to ``PREFIX.bin`` and ``PREFIX.idx``.

    Args:
        texts: the documents, in order.
        chunk_folder: where chunks are kept until the shard is whole; it is removed then.
        pool: None: work in this process.
        progress: counts documents.
    """
    tokenizer = Tokenizer.load(tokenizer_path)
    chunk_folder.mkdir(parents=True, exist_ok=True)
    text_hash = hashlib.sha256()
    sha256 = tokenizer.sha256
    tasks = (
        (number, documents, _digest(documents, sha256, text_hash), chunk_folder, tokenizer_path, sha256)
        for number, documents in enumerate(_in_chunks(texts))
    )
    chunks = []
    for chunk in _in_order(pool, tasks):
        chunks.append(chunk)
        progress.update(chunk.documents)
    _join(prefix, [chunk.prefix for chunk in chunks], tokenizer.vocab_size)
    bin_path, idx_path = shard_paths(prefix)
    manifest = SplitManifest(
        documents=sum(chunk.documents for chunk in chunks),
        tokens=sum(chunk.tokens for chunk in chunks),
        words=sum(chunk.words for chunk in chunks),
        text_bytes=sum(chunk.text_bytes for chunk in chunks),
        text_sha256=text_hash.hexdigest(),
        tokenizer_sha256=tokenizer.sha256,
        bin_bytes=bin_path.stat().st_size,
        bin_sha256=file_sha256(bin_path),
        idx_bytes=idx_path.stat().st_size,
        idx_sha256=file_sha256(idx_path),
    )
    shutil.rmtree(chunk_folder)  # last: to hash a large shard takes minutes, in which this process may be ended
    return manifest


def update_text_hash(text_hash: Any, text: str) -> None:
    """Add one document to a hash of documents; lengths keep ["ab", "c"] and ["a", "bc"] apart."""
    encoded = text.encode("utf-8")
    text_hash.update(len(encoded).to_bytes(8, "little"))
    text_hash.update(encoded)


def count_tokens(prefix: Path, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: how often each id is in a shard."""
    dataset = IndexedDataset(str(prefix))
    total, itemsize = int(dataset.sequence_lengths.sum(dtype=np.int64)), DType.size(dataset.index.dtype)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, total, _COUNT_BLOCK_TOKENS):
        size = min(_COUNT_BLOCK_TOKENS, total - start)
        block = dataset.bin_reader.read(dtype=dataset.index.dtype, count=size, offset=start * itemsize)
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def encode_chunk(
    number: int, documents: list[str], digest: str, folder: Path, tokenizer_path: Path, tokenizer_sha256: str
) -> Chunk:
    """Tokenize one run of documents, or find that it was done before."""
    prefix = folder / f"{number:08d}-{digest[:16]}"
    bin_path, idx_path = shard_paths(prefix)
    record = folder / f"{prefix.name}.json"
    done = read_record(Chunk, record)
    if done is not None and bin_path.is_file() and bin_path.stat().st_size == done.bin_bytes and idx_path.is_file():
        return dataclasses.replace(done, prefix=str(prefix))  # the folder may have another name now
    tokenizer = _tokenizer(tokenizer_path, tokenizer_sha256)
    with replacing(bin_path) as new_bin, replacing(idx_path) as new_idx:
        builder = IndexedDatasetBuilder(str(new_bin), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        try:
            tokens = 0
            for text in documents:
                ids = [*tokenizer.encode(text), tokenizer.eos_id]
                builder.add_document(ids, [len(ids)])
                tokens += len(ids)
            builder.finalize(str(new_idx))
        finally:
            builder.data_file.close()
    chunk = Chunk(
        prefix=str(prefix),
        documents=len(documents),
        tokens=tokens,
        words=sum(len(text.split()) for text in documents),
        text_bytes=sum(len(text.encode("utf-8")) for text in documents),
        bin_bytes=bin_path.stat().st_size,
    )
    write_json(record, dataclasses.asdict(chunk))
    return chunk


_loaded: dict[str, Tokenizer] = {}  # of this process, by hash: a path may get another tokenizer


def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    if sha256 not in _loaded:
        _loaded.clear()
        _loaded[sha256] = Tokenizer.load(path)
    return _loaded[sha256]


def _in_chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_TEXT_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _digest(documents: list[str], tokenizer_sha256: str, text_hash: Any) -> str:
    """Names a chunk; adds its documents to the hash of the split on the way."""
    chunk_hash = hashlib.sha256(tokenizer_sha256.encode())
    for text in documents:
        update_text_hash(text_hash, text)
        update_text_hash(chunk_hash, text)
    return chunk_hash.hexdigest()


def _in_order(pool: ProcessPoolExecutor | None, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Chunk]:
    """Chunks in the order of their tasks, with few tasks in memory: ``pool.map`` would read the whole corpus ahead."""
    if pool is None:
        for task in tasks:
            yield encode_chunk(*task)
        return
    ahead = 2 * pool._max_workers  # type: ignore[attr-defined]
    pending: deque[Future[Chunk]] = deque()
    for task in tasks:
        pending.append(pool.submit(encode_chunk, *task))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _join(prefix: Path, chunk_prefixes: list[str], vocab_size: int) -> None:
    bin_path, idx_path = shard_paths(prefix)
    with replacing(idx_path) as new_idx, replacing(bin_path) as new_bin:
        builder = IndexedDatasetBuilder(str(new_bin), dtype=DType.optimal_dtype(vocab_size))
        try:
            for chunk_prefix in chunk_prefixes:
                _append(builder, Path(chunk_prefix))
            builder.finalize(str(new_idx))
        finally:
            builder.data_file.close()


def _append(builder: Any, chunk_prefix: Path) -> None:
    """What ``builder.add_index`` does, without the garbage collection that costs 0.2 s at each of its calls."""
    index = IndexedDataset(str(chunk_prefix)).index
    before = len(builder.sequence_lengths)
    builder.sequence_lengths.extend(index.sequence_lengths.tolist())
    builder.document_indices.extend((before + index.document_indices[1:]).tolist())
    with shard_paths(chunk_prefix)[0].open("rb") as file:
        shutil.copyfileobj(file, builder.data_file)
