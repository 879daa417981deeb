"""Core attention through torch's scaled_dot_product_attention, and RoPE that also runs without a GPU.

Letters: S sequence, B micro-batch, N heads of this rank, K key/value groups of this rank, H head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F


class ScaledDotProductAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention for megatron-core's ``SelfAttention``; picks flash attention where the device has it."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise NotImplementedError(f"only causal attention, not {attn_mask_type}")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.tensor_parallel_rank = pg_collection.tp.rank() if pg_collection is not None else 0

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """query [S, B, N, H], key and value [S, B, K, H] to [S, B, N * H]."""
        length, batch, heads, head_size = query.shape
        dropout = self.dropout if self.training else 0.0
        with _ranks_drop_differently(self.tensor_parallel_rank) if dropout else contextlib.nullcontext():
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                dropout_p=dropout,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=key.shape[2] != heads,
            )
        return context.permute(2, 0, 1, 3).reshape(length, batch, heads * head_size)


@contextlib.contextmanager
def _ranks_drop_differently(tensor_parallel_rank: int) -> Iterator[None]:
    """Random numbers that differ between tensor-parallel ranks, which hold different heads.

    The stream starts from a draw of the shared one, so it needs no state of its own: it is saved with the CPU state
    and repeats under activation checkpointing.
    """
    draw = int(torch.randint(2**62, (), device="cpu"))
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(draw + tensor_parallel_rank)
        yield


class RotaryPositions(RotaryEmbedding):  # type: ignore[misc]
    """megatron-core's RoPE; its own ``get_emb`` moves a buffer to a GPU even when there is none."""

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        if torch.cuda.is_initialized():
            moved: torch.Tensor = super().get_emb(max_seq_len, offset)
            return moved
        angles = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
