"""AGG with a Hugging Face causal model in a loop of your own: ``python -m pretrain.examples.huggingface``.

For ``Trainer`` see ``huggingface_trainer``. Any causal model whose logits are the product of its last hidden states and
the output embedding is used in the same way; :func:`check_logits` finds those that do more.

Letters: B sequences, S tokens of a sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from agg import AdaptiveGradientGating, VocabShard
from pretrain.examples.corpus import VOCAB_SIZE, zipf_batch


def small_gpt2() -> PreTrainedModel:
    """From a config, its output embedding tied."""
    torch.manual_seed(0)
    size = {"vocab_size": VOCAB_SIZE, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**size, **no_dropout, bos_token_id=0, eos_token_id=0))


def build_loss(vocab_size: int, data_parallel_group: dist.ProcessGroup | None = None) -> AdaptiveGradientGating:
    """``vocab_size`` is how many rows the output embedding has: ``model.config.vocab_size``."""
    shard = VocabShard(0, vocab_size, vocab_size)
    return AdaptiveGradientGating(shard, rare_fraction=0.3, window_steps=20, data_parallel_group=data_parallel_group)


@torch.no_grad()
def check_logits(model: PreTrainedModel, loss_of: AdaptiveGradientGating) -> None:
    """
    Raises:
        ValueError: the loss would be of other logits than those of the model: its head has a bias (Phi), or they are
            scaled (Granite, Cohere) or capped (Gemma 2).
    """
    head, training = model.get_output_embeddings(), model.training
    ids = torch.arange(min(8, model.config.vocab_size), device=head.weight.device)[None]
    model.eval()
    own = model(input_ids=ids).logits.float()
    logits = (model.base_model(input_ids=ids).last_hidden_state @ head.weight.T).float()
    model.train(training)
    if cap := loss_of.soft_cap:
        logits = cap * torch.tanh(logits / cap)
    if getattr(head, "bias", None) is not None or not torch.allclose(own, logits, rtol=0, atol=0.02 * own.std().item()):
        raise ValueError(
            f"the logits of {type(model).__name__} are not hidden states times output embedding: give a cap as the "
            "loss's soft_cap, multiply the hidden states by a scale, train without a bias"
        )


def summed_loss(
    loss_of: AdaptiveGradientGating, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """hidden [B, S, D], weight [V, D], labels [B, S]: as in ``model(labels=...)``, position i predicts label i + 1."""
    loss: torch.Tensor = loss_of(hidden[:, :-1].flatten(0, 1), weight, labels[:, 1:].flatten(), reduction="sum")
    return loss


def train(model: PreTrainedModel, steps: int = 30, micro_batches: int = 2) -> tuple[list[float], torch.Tensor]:
    """The loss of each step, and the output embedding [V, D] at the end."""
    loss_of = build_loss(model.config.vocab_size)
    check_logits(model, loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        labels = zipf_batch(step)
        targets = labels[:, 1:]
        loss_of.begin_step(targets)
        losses.append(0.0)
        for some in labels.chunk(micro_batches):
            hidden = model.base_model(input_ids=some.clamp(min=0)).last_hidden_state  # not model(): no logits
            weight = model.get_output_embeddings().weight  # lm_head.weight, tied or not
            loss = summed_loss(loss_of, hidden, weight, some) / (targets != -100).sum()
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:2}  loss {losses[-1]:.3f}  rare {loss_of.current_gates().rare.double().mean():.1%}")
    return losses, model.get_output_embeddings().weight.detach()


def main() -> None:
    train(small_gpt2())


if __name__ == "__main__":
    main()
