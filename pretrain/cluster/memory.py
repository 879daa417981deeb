"""Memory of one rank by formula, so that a layout can be judged before a node is asked for.

Letters: N parameters of a tensor-parallel rank, d data-parallel ranks, t tensor-parallel ranks, T tokens of a
micro-batch, h hidden size, k width of the keys, f of the feed-forward, e bytes of an element (2 in bf16, 4 in fp32).

Counted is what exists at once at the worst moment, the turn from the last forward pass of a step to its backward pass:
weights, gradients of earlier micro-batches, optimizer state, what backward needs, and the loss. Not counted: the
device's context, workspaces of libraries, and fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from agg.linear_cross_entropy import default_chunk_tokens
from agg.vocab_shard import padded_vocab_size
from pretrain.model.size import model_size
from pretrain.place import data_parallel_size_of
from pretrain.recipe import Recipe
from pretrain.training.deepspeed_config import deepspeed_config, zero_stage


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on the device of one rank, by what they are for, and in the memory of its host."""

    weights: int  # under ZeRO 3 with those that are gathered
    gradients: int
    optimizer: int  # float32 weights beside bf16 or split ones, and Adam's two moments
    buckets: int  # in which DeepSpeed collects gradients before it reduces them
    activations: int
    loss: int  # a chunk of logits, and the sums of dW and dH
    token_counts: int
    host: int  # offloaded state and the window of counts: not on the device

    @property
    def total(self) -> int:
        """On the device."""
        return sum(getattr(self, part.name) for part in fields(self) if part.name != "host")


def memory_per_rank(
    recipe: Recipe, world_size: int, vocab_size: int | None = None, steps_per_epoch: int | None = None
) -> RankMemory:
    """What a rank of this recipe needs in a world of so many.

    Args:
        vocab_size: of the prepared tokenizer; None: what the recipe asks for.
        steps_per_epoch: the window of counts where the recipe gives none; None: all steps of the run.

    Raises:
        UserError, RecipeError: the recipe does not fit the world, or its sharding file is wrong.
    """
    ranks = data_parallel_size_of(recipe, world_size)
    vocab_size = vocab_size or recipe.data.tokenizer.vocab_size
    rows = padded_vocab_size(vocab_size, recipe.model.vocab_multiple_of) // recipe.parallel.tensor_model_parallel_size
    state = _state(recipe, ranks, parameters_of_rank(recipe, vocab_size), rows * recipe.model.hidden_size)
    counts, window = _token_counts(recipe, ranks, rows, steps_per_epoch)
    host = state.pop("host") + window
    return RankMemory(
        **state, activations=_activations(recipe), loss=_loss(recipe, rows), token_counts=counts, host=host
    )


def parameters_of_rank(recipe: Recipe, vocab_size: int) -> int:
    """N: matrices and the biases of their rows are split; norms, positions and the biases after a sum are not."""
    model, split = recipe.model, recipe.parallel.tensor_model_parallel_size
    norms = (2 * model.num_layers + 1) * model.hidden_size
    on_all = norms
    if model.style == "gpt2":
        biases = 2 * model.num_layers * model.hidden_size
        on_all = 2 * norms + biases + model.sequence_length * model.hidden_size
    return on_all + (model_size(model, vocab_size).total - on_all) // split


def _state(recipe: Recipe, ranks: int, parameters: int, largest: int) -> dict[str, int]:
    """Weights, gradients and optimizer (ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054), as DeepSpeed 0.19 holds them.

    Args:
        parameters: N. largest: elements of the largest parameter.
    """
    config = deepspeed_config(recipe, ranks)
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    width = _width(recipe)
    whole, part = width * parameters, -(-parameters // ranks)  # bytes; elements of this rank
    if stage == 0:
        adam = (8 if width == 4 else 12) * parameters
        return {"weights": whole, "gradients": whole, "optimizer": adam, "buckets": 0, "host": 0}
    bucket = width * int(zero.get("reduce_bucket_size", 5e8)) * (2 if zero.get("overlap_comm") else 1)
    state = {"weights": whole, "gradients": 4 * part, "optimizer": 12 * part, "buckets": bucket, "host": 0}
    if stage == 1 and width == 2:  # sums the whole gradient in float32, and reduces it where it is
        state |= {"gradients": 4 * parameters + whole, "buckets": 0}
    elif stage == 1:
        state["gradients"] = whole
    elif stage == 3:
        live = width * min(parameters, int(zero.get("stage3_max_live_parameters", 1e9)))
        own = "host" if _is_offloaded(zero, "offload_param") else "weights"
        state["weights"] = 0 if ranks == 1 and own == "weights" else live  # a part that is the whole serves as it is
        state[own] += width * part
    if _is_offloaded(zero, "offload_optimizer"):
        state["host"] += state["optimizer"] + 8 * part  # the gradient, and its sum over micro-batches
        state |= {"optimizer": 0, "gradients": 0}
        if stage < 3:  # the weights on their way back, and one parameter's gradient on its way there
            state["host"] += width * (part + largest)
            state["buckets"] += width * largest
    return state


def _is_offloaded(zero: dict[str, Any], what: str) -> bool:
    return bool((zero.get(what) or {}).get("device", "none") != "none")


def _activations(recipe: Recipe) -> int:
    """What backward needs of the layers: Korthikanti et al. 2022 (arXiv 2205.05198), section 4, tensor parallelism.

    Their T h (10 + 24 / t) bytes of a GPT layer, less the attention scores, which flash attention keeps as one
    logarithm a head, and less the masks where there is no dropout: 4 h + (4 h + 2 f) / t elements. SwiGLU keeps
    3 f more, RoPE the turned queries and keys. With recomputation each layer keeps its input, and one is whole.
    """
    model, split = recipe.model, recipe.parallel.tensor_model_parallel_size
    tokens, width, hidden = recipe.batch.micro_batch_size * model.sequence_length, _width(recipe), model.hidden_size
    keys = hidden // model.num_attention_heads * model.query_groups
    of_heads = hidden + 2 * keys + hidden  # queries, keys, values and their result
    of_rank = of_heads + 2 * model.ffn_size if model.style == "gpt2" else of_heads + hidden + keys + 5 * model.ffn_size
    mask = hidden if model.hidden_dropout else 0  # a byte each
    layer = width * (4 * hidden + of_rank // split) + 4 * model.num_attention_heads // split + 2 * mask
    ends = 2 * width * hidden + mask  # of the final norm, and dropout of the embedding
    if model.activation_checkpointing == "full":
        return tokens * (model.num_layers * width * hidden + layer + ends)
    return tokens * (model.num_layers * layer + ends)


def _loss(recipe: Recipe, rows: int) -> int:
    """See :mod:`agg.sweep`: sums in float32, beside them first a chunk of logits, then in bf16 what is handed on."""
    tokens, width = recipe.batch.micro_batch_size * recipe.model.sequence_length, _width(recipe)
    device = "cpu" if recipe.device == "cpu" else "cuda"
    logits = width * default_chunk_tokens(rows, tokens, device) * rows
    gradients = (rows + tokens) * recipe.model.hidden_size
    if width == 4:
        return 4 * gradients + logits
    if device == "cpu":  # where softmax takes and gives float32 beside them
        logits *= 5
    return 4 * gradients + max(logits, 2 * gradients)


def _token_counts(recipe: Recipe, ranks: int, rows: int, steps_per_epoch: int | None) -> tuple[int, int]:
    """Of agg: on the device as ``agg/PERFORMANCE.md`` has it; on the host this rank's share of the window."""
    objective, steps = recipe.objective, recipe.batch.train_steps
    if objective.method == "mle":
        return 0, 0
    on_device = 20 * rows + 14 * rows * recipe.parallel.tensor_model_parallel_size
    if objective.window == "exponential":
        return on_device + 8 * rows, 0
    window = min(objective.window_steps or steps_per_epoch or steps, steps)
    return on_device, -(-window // ranks) * 8 * min(rows, recipe.tokens_per_step)


def _width(recipe: Recipe) -> int:
    return 2 if recipe.precision == "bf16" else 4
