"""``config.json`` of Hugging Face's GPT-2 and Llama: writing it, and whether one is the model of a recipe."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.data.tokenizer import Tokenizer
from pretrain.recipe import ModelRecipe

# What decides the function and shapes of tensors do not show: their key -> ours; None: we have no choice there.
_DECISIVE = {
    "gpt2": {
        "n_layer": "model.num_layers",
        "n_head": "model.num_attention_heads",
        "tie_word_embeddings": "model.tied_embeddings",
        "layer_norm_epsilon": "model.norm_epsilon",
        "activation_function": None,
        "scale_attn_weights": None,
        "scale_attn_by_inverse_layer_idx": None,
    },
    "llama": {
        "num_hidden_layers": "model.num_layers",
        "num_attention_heads": "model.num_attention_heads",
        "num_key_value_heads": "model.num_query_groups",
        "tie_word_embeddings": "model.tied_embeddings",
        "rms_norm_eps": "model.norm_epsilon",
        "rope_theta": "model.rope_base",
        "rope_type": None,
        "hidden_act": None,
        "attention_bias": None,
        "mlp_bias": None,
    },
}
_ROPE = ("rope_scaling", "rope_parameters")
# What transformers takes for a key that is not in the file.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    "llama": {
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_type": "default",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    },
}


def model_config(model: ModelRecipe, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """The content of ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM" if model.style == "llama" else "GPT2LMHeadModel"],
        "model_type": model.style,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": tokenizer.vocab_size,
        **special_ids(tokenizer),
        **_architecture(model),
    }


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """A text begins after the end of another, as in OpenAI's GPT-2: our training never sees a bos token."""
    ids = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    return ids if tokenizer.pad_id < 0 else ids | {"pad_token_id": tokenizer.pad_id}


def config_problems(config: dict[str, Any], model: ModelRecipe) -> list[str]:
    """What keeps the model of a ``config.json`` from being the recipe's, beyond the shapes of its tensors."""
    style = model.style
    if config.get("model_type") != style:
        return [f"model_type is {config.get('model_type')!r} there, model.style is {style!r}"]
    odd = [key for key in _ROPE if not isinstance(config.get(key), dict | None)]
    if odd:
        return [f"{key} is {config[key]!r} there, and must be an object" for key in odd]
    there, here = _with_defaults(config, style), _with_defaults(_architecture(model), style)
    problems = [
        f"{key} is {there.get(key)!r} there, "
        + (f"{ours} is {here[key]!r}" if ours else f"our {style} models have {here[key]!r}")
        for key, ours in _DECISIVE[style].items()
        if there.get(key) != here[key]
    ]
    if style == "gpt2" and model.query_groups != model.num_attention_heads:
        problems.append(
            f"GPT-2 there has keys and values for each head, model.num_query_groups is {model.num_query_groups}"
        )
    if model.logit_soft_cap:
        problems.append(f"no logits are capped there, model.logit_soft_cap is {model.logit_soft_cap}")
    return problems


def _architecture(model: ModelRecipe) -> dict[str, Any]:
    if model.style == "llama":
        return {
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.query_groups,
            "head_dim": model.hidden_size // model.num_attention_heads,
            "max_position_embeddings": model.sequence_length,
            "tie_word_embeddings": model.tied,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_epsilon,
            "rope_theta": float(model.rope_base),  # where transformers 4 and other readers look
            "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rope_base)},  # transformers 5
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": model.attention_dropout,
            "initializer_range": model.init_std,
        }
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.sequence_length,
        "tie_word_embeddings": model.tied,
        "activation_function": "gelu",  # the exact one; OpenAI's GPT-2 has gelu_new, an approximation by tanh
        "layer_norm_epsilon": model.norm_epsilon,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_std,
    }


def _with_defaults(config: dict[str, Any], style: str) -> dict[str, Any]:
    """Every decisive key with the value that transformers takes, wherever it stands in the file."""
    config = {key: value for key, value in config.items() if value is not None}
    rope = {key: value for part in _ROPE for key, value in config.get(part, {}).items()}
    if "type" in rope:  # its name in old files
        rope.setdefault("rope_type", rope["type"])
    whole = _DEFAULTS[style] | config | rope
    if style == "llama":
        whole.setdefault("num_key_value_heads", whole.get("num_attention_heads"))
    return whole
