"""AGG on a megatron-core GPTModel with a tensor-parallel vocabulary.

``torchrun --standalone --nproc-per-node 2 -m pretrain.examples.megatron_core``

In Megatron-LM: return ``GatedGPTModel`` from ``model_provider``. Before ``forward_backward_func`` draw all
micro-batches of the step, set labels to -100 where the loss mask is 0, give them to ``begin_step``, and hand on
``iter(batches)``. Let ``loss_func`` return the sum and how many labels it is over, with
``--calculate-per-token-loss``. Here a plain loop stands for its schedules and optimizer, which need a GPU. With context
parallelism the group of the counts is ``parallel_state.get_data_parallel_group(with_context_parallel=True)``. With
pipeline parallelism only the last stage has the loss, and only it calls ``begin_step``. Megatron-LM's checkpoints do
not hold the counts: call ``save_counts`` after each, and ``load_counts`` after it has loaded one, with the folder of
that iteration; else each start begins with an empty window, in which nearly everything is rare.

Letters: B sequences, S tokens of a sequence, D hidden size, V_padded rows of the whole output embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from agg import AdaptiveGradientGating, VocabShard
from pretrain.examples.corpus import VOCAB_SIZE, zipf_batch
from pretrain.examples.counts import remove_older_parts
from pretrain.model.attention import ScaledDotProductAttention

PADDED_VOCAB_SIZE = 1024  # Megatron-LM: args.padded_vocab_size


class GatedGPTModel(GPTModel):  # type: ignore[misc]
    """Given labels, -100 where nothing is to be learnt, it returns their summed loss; never logits."""

    def __init__(self, loss_of: AdaptiveGradientGating, **arguments: Any) -> None:
        super().__init__(**arguments)
        object.__setattr__(self, "loss_of", loss_of)  # no submodule: checkpoints keep the names they have
        if self.post_process:
            self.output_layer.forward = lambda hidden, **_: (hidden, None)  # its weight stays, its matmul goes

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """int64 [B, S], and what the output layer passed on: hidden states [S, B, D]."""
        hidden = logits
        if self.config.sequence_parallel:  # the loss gives every rank the whole gradient: nothing to add up
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        self.loss_of.train(self.training)
        loss: torch.Tensor = self.loss_of(hidden.flatten(0, 1), weight, labels.t().flatten(), reduction="sum")
        return loss


def build(tied: bool = False, **options: Any) -> GatedGPTModel:
    """The model of this rank, on the CPU; its vocabulary shard and groups are those of ``parallel_state``."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rows = PADDED_VOCAB_SIZE // ranks
    loss_of = AdaptiveGradientGating(
        VocabShard(rank * rows, (rank + 1) * rows, VOCAB_SIZE, parallel_state.get_tensor_model_parallel_group()),
        rare_fraction=0.3,
        window_steps=20,
        data_parallel_group=parallel_state.get_data_parallel_group(),
    )
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ranks,
        params_dtype=torch.get_default_dtype(),
        use_cpu_initialization=True,
        **options,
    )
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention  # its own needs a GPU
    torch.manual_seed(0)  # with use_cpu_initialization the same weights on any number of ranks
    return GatedGPTModel(
        loss_of,
        config=config,
        transformer_layer_spec=spec,
        vocab_size=PADDED_VOCAB_SIZE,
        max_sequence_length=64,
        share_embeddings_and_output_weights=tied,
    )


def save_counts(loss_of: AdaptiveGradientGating, folder: Path) -> None:
    """Each rank that has the loss saves its part."""
    torch.save(loss_of.get_extra_state(), folder / f"token_counts_{dist.get_rank()}.pt")
    remove_older_parts(folder, dist.get_world_size())


def load_counts(loss_of: AdaptiveGradientGating, folder: Path) -> None:
    """From any number of data-parallel and tensor-parallel ranks."""
    loss_of.set_extra_state(torch.load(part) for part in sorted(folder.glob("token_counts_*.pt")))


def train(steps: int = 30, micro_batches: int = 2, tied: bool = False) -> tuple[list[float], torch.Tensor]:
    """The loss of each step over all ranks, and the output embedding [V_padded, D] at the end."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    group = parallel_state.get_data_parallel_group()
    model = build(tied)
    shard = model.loss_of.shard
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        batch = zipf_batch(step)[rank::ranks]  # tensor-parallel ranks take the same
        tokens, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
        model.loss_of.begin_step(targets)
        valid, total = (targets != -100).sum(), torch.zeros(())
        dist.all_reduce(valid, group=group)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        for part in torch.arange(len(tokens)).chunk(micro_batches):
            loss = model(tokens[part], positions[part], None, labels=targets[part]) / valid
            loss.backward()
            total += loss.detach()
        for parameter in model.parameters():  # Megatron-LM: finalize_model_grads
            dist.all_reduce(parameter.grad, group=group)
        dist.all_reduce(total, group=group)
        losses.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
        rare = model.loss_of.current_gates().rare_ids.sum() / VOCAB_SIZE  # of all shards
        if dist.get_rank() == 0 and (step % 5 == 0 or step == steps - 1):
            print(f"step {step:2}  loss {losses[-1]:.3f}  rare {rare:.1%}")
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return losses, shard.all_gather(weight.detach()).flatten(0, 1)


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
