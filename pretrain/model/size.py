"""Parameters, floating-point operations and memory by formula, without building the model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from agg.vocab_shard import padded_vocab_size
from pretrain.recipe import ModelRecipe

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets (without sparsity); None: not looked up.
PEAK_BF16_FLOPS = {
    "H200 NVL": None,  # slower than what follows
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": None,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters; rows that only pad the vocabulary are counted, as they are stored."""

    input_embedding: int
    output_embedding: int  # 0 when tied
    positions: int
    layers: int

    @property
    def total(self) -> int:
        return self.input_embedding + self.output_embedding + self.positions + self.layers

    @property
    def without_embeddings(self) -> int:
        return self.layers


def model_size(model: ModelRecipe, vocab_size: int) -> ModelSize:
    """Parameters of the whole model, all ranks together."""
    width, ffn = model.hidden_size, model.ffn_size
    head_size = width // model.num_attention_heads
    qkv_out = width + 2 * model.query_groups * head_size
    norm = width if model.style == "llama" else 2 * width
    if model.style == "llama":
        layer = width * qkv_out + width * width + 3 * width * ffn + 2 * norm
    else:
        layer = (width + 1) * qkv_out + (width + 1) * width + (width + 1) * ffn + (ffn + 1) * width + 2 * norm
    embedding = padded_vocab_size(vocab_size, model.vocab_multiple_of) * width
    return ModelSize(
        input_embedding=embedding,
        output_embedding=0 if model.tied else embedding,
        positions=0 if model.style == "llama" else model.sequence_length * width,
        layers=model.num_layers * layer + norm,
    )


def training_flops_per_token(model: ModelRecipe, vocab_size: int) -> float:
    """Forward and backward: 6 per parameter that is multiplied, plus attention (PaLM, arXiv 2204.02311, appendix B).

    Activation checkpointing repeats work and is not counted, so the utilisation is of the model, not the hardware.
    """
    size = model_size(model, vocab_size)
    multiplied = size.layers + size.input_embedding  # the output projection has this many
    return 6.0 * multiplied + 12.0 * model.num_layers * model.hidden_size * model.sequence_length


def checkpoint_bytes(model: ModelRecipe, vocab_size: int, precision: str) -> int:
    """One checkpoint, all ranks' files together: the weights as they compute, and fp32 weights and both moments of
    Adam. ZeRO 0 and 3 write a copy less; token counts and random states come on top."""
    weights = 4 if precision == "fp32" else 2
    return (weights + 12) * model_size(model, vocab_size).total


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of the device in FLOP/s; None where it is not known."""
    known = PEAK_BF16_FLOPS.items()
    return next((peak for name, peak in known if re.search(rf"\b{name}\b", device_name)), None)
