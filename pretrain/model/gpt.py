"""megatron-core's GPTModel from a recipe.

Letters: B micro-batch, S sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from agg import VocabShard
from pretrain.model.attention import RotaryPositions, ScaledDotProductAttention
from pretrain.model.output_head import OutputHead
from pretrain.recipe import ModelRecipe


class CausalLanguageModel(GPTModel):  # type: ignore[misc]
    """GPTModel whose output goes through :class:`OutputHead` instead of full logits."""

    def __init__(self, shard: VocabShard, logit_soft_cap: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.output_head = OutputHead(shard, logit_soft_cap)
        if self.position_embedding_type == "rope":
            self.rotary_pos_emb = RotaryPositions(
                kv_channels=self.config.kv_channels,
                rotary_percent=1.0,
                rotary_base=self.rotary_base,
                use_cpu_initialization=True,
            )

    @property
    def output_embedding(self) -> torch.nn.Parameter:
        """[V_local, D]: tied or not, the rows that make logits."""
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        assert isinstance(weight, torch.nn.Parameter)
        return weight

    @property
    def input_embedding(self) -> torch.nn.Parameter:
        """[V_local, D]: the rows that tokens become."""
        weight = self.embedding.word_embeddings.weight
        assert isinstance(weight, torch.nn.Parameter)
        return weight

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None, per_token: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            tokens: int64 [B, S]. targets: int64 [B, S], -100 where nothing is to be learnt.

        Returns:
            See :meth:`OutputHead.forward`, with T = B * S; without targets the logits [B, V] of the last position.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden: torch.Tensor = super().forward(tokens, positions, None)  # [B, S, D]
        if targets is None:
            answer = self.output_head(hidden[:, -1], self.output_embedding, None)
        else:
            answer = self.output_head(hidden.flatten(0, 1), self.output_embedding, targets.flatten(), per_token)
        assert isinstance(answer, (torch.Tensor, tuple))
        return answer

    def _postprocess(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states.transpose(0, 1).contiguous()  # [S, B, D] to [B, S, D]


class CheckpointedLayer(TransformerLayer):  # type: ignore[misc]
    """Keeps its input only, and runs forward again in backward."""

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, *arguments, **options)
        return checkpoint(super().forward, hidden_states, *arguments, use_reentrant=False, **options)


def transformer_config(model: ModelRecipe, tensor_model_parallel_size: int) -> TransformerConfig:
    """The recipe in megatron-core's terms. Fusions that need CUDA extensions or a compiler are off."""
    llama = model.style == "llama"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm" if llama else "LayerNorm",
        gated_linear_unit=llama,
        activation_func=F.silu if llama else F.gelu,
        add_bias_linear=not llama,
        init_method_std=model.init_std,
        tensor_model_parallel_size=tensor_model_parallel_size,
        use_cpu_initialization=True,  # one seed, one set of weights, whatever the layout
        params_dtype=torch.float32,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def build_model(model: ModelRecipe, shard: VocabShard, padded_vocab_size: int, seed: int) -> CausalLanguageModel:
    """The model on the CPU in float32, its weights drawn from ``seed`` alone.

    Needs megatron-core's groups (see :mod:`pretrain.topology`).
    """
    torch.manual_seed(seed)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm" if model.style == "llama" else "LayerNorm")
    spec.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention
    if model.activation_checkpointing == "full":
        spec = ModuleSpec(module=CheckpointedLayer, submodules=spec.submodules)
    return CausalLanguageModel(
        shard,
        model.logit_soft_cap,
        config=transformer_config(model, shard.world_size),
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size,
        max_sequence_length=model.sequence_length,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="rope" if model.style == "llama" else "learned_absolute",
        rotary_base=model.rope_base,
    )
