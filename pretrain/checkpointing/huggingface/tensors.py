"""Our parameters as the tensors of Hugging Face's GPT-2 and Llama, and back.

Letters: V vocabulary, padded here and not there; D hidden size, N query heads, K key/value groups, H head size,
F feed-forward size, S sequence length.

megatron-core keeps the rows of queries, keys and values together by group, ``[K, N / K + 2, H]``; the others keep all
queries, then all keys, then all values. Its RoPE turns the same halves of a head, so no row moves for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from agg.vocab_shard import padded_vocab_size
from pretrain.recipe import ModelRecipe

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class TensorMap:
    """One parameter of ours and the tensors that it is there.

    Attributes:
        ours, shape: the megatron-core name, and the shape of the whole parameter, over all tensor-parallel ranks.
        theirs: names in the order of ``export``'s answer and ``restore``'s argument.
        export: the whole parameter to their tensors; these may share its memory.
        restore: the reverse. A vocabulary comes back without the rows that only pad it.
    """

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    export: Callable[[torch.Tensor], Tensors]
    restore: Callable[[Tensors], torch.Tensor]

    @property
    def their_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in self.export(torch.empty(self.shape, device="meta"))]


def tensor_maps(model: ModelRecipe, vocab_size: int) -> list[TensorMap]:
    """Every parameter of the model once, in the order of the forward pass.

    Args:
        vocab_size: without padding.
    """
    return list(_llama(model, vocab_size) if model.style == "llama" else _gpt2(model, vocab_size))


def _gpt2(model: ModelRecipe, vocab_size: int) -> Iterator[TensorMap]:
    width, ffn = model.hidden_size, model.ffn_size
    qkv = _QueryKeyValue(model)
    yield _vocabulary(model, vocab_size, "embedding.word_embeddings.weight", "transformer.wte.weight")
    positions = (model.sequence_length, width)
    yield _same("embedding.position_embeddings.weight", positions, "transformer.wpe.weight")
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"transformer.h.{i}."
        yield from _norm(ours + "input_layernorm", width, theirs + "ln_1")
        yield TensorMap(
            ours + "self_attention.linear_qkv.weight",
            (qkv.rows, width),
            (theirs + "attn.c_attn.weight",),
            lambda tensor: [torch.cat(qkv.split_for_every_head(tensor)).T],
            lambda tensors: qkv.join(tensors[0].T.chunk(3)),
        )
        yield TensorMap(
            ours + "self_attention.linear_qkv.bias",
            (qkv.rows,),
            (theirs + "attn.c_attn.bias",),
            lambda tensor: [torch.cat(qkv.split_for_every_head(tensor))],
            lambda tensors: qkv.join(tensors[0].chunk(3)),
        )
        yield from _conv1d(ours + "self_attention.linear_proj", width, width, theirs + "attn.c_proj")
        yield from _norm(ours + "pre_mlp_layernorm", width, theirs + "ln_2")
        yield from _conv1d(ours + "mlp.linear_fc1", ffn, width, theirs + "mlp.c_fc")
        yield from _conv1d(ours + "mlp.linear_fc2", width, ffn, theirs + "mlp.c_proj")
    yield from _norm("decoder.final_layernorm", width, "transformer.ln_f")
    if not model.tied:
        yield _vocabulary(model, vocab_size, "output_layer.weight", "lm_head.weight")


def _llama(model: ModelRecipe, vocab_size: int) -> Iterator[TensorMap]:
    width, ffn = model.hidden_size, model.ffn_size
    qkv = _QueryKeyValue(model)
    yield _vocabulary(model, vocab_size, "embedding.word_embeddings.weight", "model.embed_tokens.weight")
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        yield _same(ours + "input_layernorm.weight", (width,), theirs + "input_layernorm.weight")
        yield TensorMap(
            ours + "self_attention.linear_qkv.weight",
            (qkv.rows, width),
            tuple(f"{theirs}self_attn.{letter}_proj.weight" for letter in "qkv"),
            qkv.split,
            qkv.join,
        )
        projection = (width, width)
        yield _same(ours + "self_attention.linear_proj.weight", projection, theirs + "self_attn.o_proj.weight")
        yield _same(ours + "pre_mlp_layernorm.weight", (width,), theirs + "post_attention_layernorm.weight")
        yield TensorMap(
            ours + "mlp.linear_fc1.weight",
            (2 * ffn, width),
            (theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"),
            lambda tensor: tensor.chunk(2),
            lambda tensors: torch.cat(list(tensors)),
        )
        yield _same(ours + "mlp.linear_fc2.weight", (width, ffn), theirs + "mlp.down_proj.weight")
    yield _same("decoder.final_layernorm.weight", (width,), "model.norm.weight")
    if not model.tied:
        yield _vocabulary(model, vocab_size, "output_layer.weight", "lm_head.weight")


def _same(ours: str, shape: tuple[int, ...], theirs: str) -> TensorMap:
    return TensorMap(ours, shape, (theirs,), lambda tensor: [tensor], lambda tensors: tensors[0])


def _norm(ours: str, width: int, theirs: str) -> Iterator[TensorMap]:
    for part in ("weight", "bias"):
        yield _same(f"{ours}.{part}", (width,), f"{theirs}.{part}")


def _conv1d(ours: str, rows: int, columns: int, theirs: str) -> Iterator[TensorMap]:
    """GPT-2 there keeps its matrices as [in, out]."""
    weight = f"{ours}.weight"
    yield TensorMap(
        weight, (rows, columns), (f"{theirs}.weight",), lambda tensor: [tensor.T], lambda tensors: tensors[0].T
    )
    yield _same(f"{ours}.bias", (rows,), f"{theirs}.bias")


def _vocabulary(model: ModelRecipe, vocab_size: int, ours: str, theirs: str) -> TensorMap:
    shape = (padded_vocab_size(vocab_size, model.vocab_multiple_of), model.hidden_size)
    return TensorMap(ours, shape, (theirs,), lambda tensor: [tensor[:vocab_size]], lambda tensors: tensors[0])


class _QueryKeyValue:
    """The rows of queries, keys and values, of a matrix [rows, D] or a bias [rows]."""

    def __init__(self, model: ModelRecipe) -> None:
        self.groups = model.query_groups
        self.heads_per_group = model.num_attention_heads // self.groups
        self.head_size = model.hidden_size // model.num_attention_heads
        self.rows = (self.heads_per_group + 2) * self.groups * self.head_size

    def split(self, fused: torch.Tensor) -> list[torch.Tensor]:
        """[K * (N / K + 2) * H, ...] to queries [N * H, ...], keys and values [K * H, ...]."""
        grouped = fused.unflatten(0, (self.groups, self.heads_per_group + 2, self.head_size))
        return [part.flatten(0, 2) for part in grouped.split([self.heads_per_group, 1, 1], dim=1)]

    def split_for_every_head(self, fused: torch.Tensor) -> list[torch.Tensor]:
        """The same with keys and values [N * H, ...]: GPT-2 there knows no groups, so each head gets a copy."""
        query, *others = self.split(fused)
        return [query, *(self._repeated(other) for other in others)]

    def join(self, parts: Tensors) -> torch.Tensor:
        """The reverse of :meth:`split`."""
        heads = (self.heads_per_group, 1, 1)
        grouped = [
            part.unflatten(0, (self.groups, count, self.head_size)) for part, count in zip(parts, heads, strict=True)
        ]
        return torch.cat(grouped, dim=1).flatten(0, 2)

    def _repeated(self, of_groups: torch.Tensor) -> torch.Tensor:
        by_group = of_groups.unflatten(0, (self.groups, self.head_size))
        return torch.repeat_interleave(by_group, self.heads_per_group, dim=0).flatten(0, 1)
