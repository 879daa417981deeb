"""Everything that ``evaluation.json`` and ``evaluation.npz`` say of a model, a run's or a published one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pretrain.console import say
from pretrain.evaluation.frequency_groups import GroupedPerplexity
from pretrain.evaluation.generation import measure_generation
from pretrain.evaluation.geometry import (
    cosine_histogram,
    measure_geometry,
    principal_plane,
    row_norms,
    singular_values,
)
from pretrain.evaluation.perplexity import sliding_stride
from pretrain.evaluation.subject import Embedding, Subject
from pretrain.evaluation.under_trained import under_trained_tokens
from pretrain.evaluation.word_similarity import word_similarity, words_in_text

COSINE_BINS = 200
Arrays = dict[str, npt.NDArray[Any]]


@torch.no_grad()
def measure(subject: Subject, similarity_files: Sequence[Path]) -> tuple[dict[str, Any], Arrays]:
    """The measures and the arrays; a collective, the same on all ranks."""
    if subject.show and subject.text.total <= subject.window:
        say(
            f"warning: {subject.text.name} has {subject.text.total:,} tokens, less than one window of "
            f"{subject.window:,} and the token after it: what follows rests on a part of a window"
        )
    with subject.model.output_embedding() as embedding:
        output, arrays = embedding_measures(subject, embedding, similarity_files), _arrays(subject, embedding)
    inputs = subject.model.input_embedding()
    untied = None
    if inputs is not None:
        with inputs as embedding:
            untied = embedding_measures(subject, embedding, similarity_files)
    stride = sliding_stride(subject.window)
    plain = subject.perplexity(label="perplexity")
    sliding = subject.perplexity(stride, label="perplexity, sliding window")
    found = {
        "perplexity": plain.perplexity(),
        "unique_tokens": plain.unique_tokens(),
        "unique_targets": plain.unique_targets(),
        "target_tokens": plain.target_tokens(),
        "sliding_window": {
            "window": subject.window,
            "stride": stride,
            "perplexity": sliding.perplexity(),
            "unique_tokens": sliding.unique_tokens(),
        },
        "bits_per_byte": {
            "non_overlapping": bits_per_byte(subject, plain),
            "sliding_window": bits_per_byte(subject, sliding),
            "text_bytes": subject.text_bytes,
        },
        **output,
        "input_embedding": untied,
        "generation": measure_generation(subject),
    }
    return found, arrays


def embedding_measures(subject: Subject, embedding: Embedding, similarity_files: Sequence[Path]) -> dict[str, Any]:
    """Of the input or the output embedding; collectives over the tensor-parallel ranks."""
    weight, shard = embedding
    counts = subject.token_counts
    seen = torch.zeros(len(shard), dtype=torch.bool)
    seen[: shard.real] = counts[shard.start : shard.start + shard.real] > 0
    return {
        **dataclasses.asdict(measure_geometry(weight, shard)),
        "seen_rows": dataclasses.asdict(measure_geometry(weight, shard, seen.to(weight.device))),
        "word_similarity": word_similarity(similarity_files, words_in_text(subject.codec), weight, shard, counts),
        "under_trained_tokens": under_trained_tokens(embedding, counts, subject.codec),
    }


def bits_per_byte(subject: Subject, grouped: GroupedPerplexity) -> float | None:
    """Bits that the predicted tokens cost over the bytes of text they stand for: what models of different vocabularies
    can be compared by.

    The bytes are those of the documents as they were before any tokenizer, UTF-8, less those of the first token, which
    is not predicted; a token that is a part of a character counts as one. Ends of documents cost bits and have no
    bytes. None where no text is left.
    """
    first = subject.codec.decode(subject.text.read(0, 1).tolist()).replace("\ufffd", "?")
    text_bytes = subject.text_bytes - len(first.encode("utf-8"))
    loss = grouped.mean_loss()["total"]
    if loss is None or text_bytes <= 0:
        return None
    return loss * grouped.target_tokens()["total"] / math.log(2) / text_bytes


def _arrays(subject: Subject, embedding: Embedding) -> Arrays:
    """What the figures draw of the output embedding."""
    weight, shard = embedding
    edges, histogram = cosine_histogram(weight, shard, COSINE_BINS)
    arrays = {
        "token_counts": subject.token_counts,
        "groups": subject.groups,
        "row_norms": _all_rows(embedding, row_norms(weight)),
        "singular_values": singular_values(weight, shard),
        "cosine_edges": edges,
        "cosine_counts": histogram,
        "projection": _all_rows(embedding, principal_plane(weight, shard)),
    }
    return {name: np.asarray(array.cpu()) for name, array in arrays.items()}


def _all_rows(embedding: Embedding, values: torch.Tensor) -> torch.Tensor:
    """[V_local, ...] of each tensor-parallel rank to [V, ...]; for numbers of a row, never for whole rows."""
    return embedding.shard.all_gather(values).flatten(0, 1)[: embedding.shard.vocab_size]
