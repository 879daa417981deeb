"""What is measured: a language model, which may be a run's or a published one, and the text it is measured on.

Letters: B texts, L window, V unpadded vocabulary, V_local rows of this tensor-parallel rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from agg import VocabShard
from pretrain.data.windows import EvaluationWindows, TokenStream
from pretrain.evaluation.frequency_groups import GroupedPerplexity, frequency_groups
from pretrain.evaluation.perplexity import measure_perplexity


class Embedding(NamedTuple):
    """weight: [V_local, D], the rows of ``shard``."""

    weight: torch.Tensor
    shard: VocabShard


class LanguageModel(Protocol):
    """All methods are called on all ranks alike, without gradients; ids are int64."""

    device: torch.device

    def token_losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :data:`pretrain.evaluation.perplexity.TokenLosses`."""

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, S] to the logits [B, V] of what follows."""

    def agree(self, chosen: torch.Tensor) -> torch.Tensor:
        """What the first rank chose: replicas of a model may differ in the last bit."""

    def output_embedding(self) -> AbstractContextManager[Embedding]:
        """The rows that make logits."""

    def input_embedding(self) -> AbstractContextManager[Embedding] | None:
        """The rows that tokens become; None: they are the same."""


class Codec(Protocol):
    """Text and ids."""

    @property
    def unk_id(self) -> int | None:
        """What stands for text that the vocabulary cannot write; None or -1: there is none."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""

    def piece(self, token_id: int) -> str:
        """How the tokenizer writes an id."""


@dataclass(frozen=True)
class Subject:
    """A model and a text, and how ranks share them.

    Attributes:
        text: the split that is predicted.
        text_bytes: of its documents, in UTF-8.
        token_counts: int64 [V] on the CPU, occurrences in the training text.
        window: tokens that the model sees at a time.
        show: draw bars.
    """

    model: LanguageModel
    codec: Codec
    text: TokenStream
    text_bytes: int
    token_counts: torch.Tensor
    window: int
    micro_batch_size: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    data_parallel_group: dist.ProcessGroup | None = None
    show: bool = False

    @property
    def groups(self) -> torch.Tensor:
        """int8 [V] on the model's device, see :func:`frequency_groups`."""
        return frequency_groups(self.token_counts).to(self.model.device)

    def perplexity(self, stride: int | None = None, limit: int = 0, label: str = "") -> GroupedPerplexity:
        """Over windows that do not overlap, or slide on by ``stride``; see :class:`EvaluationWindows`."""
        windows = EvaluationWindows(
            self.text,
            self.window,
            stride,
            micro_batch_size=self.micro_batch_size,
            data_parallel_rank=self.data_parallel_rank,
            data_parallel_size=self.data_parallel_size,
            limit=limit,
        )
        return measure_perplexity(
            self.model.token_losses, windows, self.groups, self.data_parallel_group, label if self.show else ""
        )


def token_text(codec: Codec, token_id: int) -> str:
    """What an id looks like to a reader: its text, or where it has none of its own how the tokenizer writes it."""
    text = codec.decode([token_id])
    return codec.piece(token_id) if not text or "\ufffd" in text else text
