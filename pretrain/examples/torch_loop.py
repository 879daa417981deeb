"""AGG in a plain torch loop with gradient accumulation: ``python -m pretrain.examples.torch_loop``.

Letters: B sequences, S tokens of a sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from agg import AdaptiveGradientGating, VocabShard
from pretrain.examples.corpus import VOCAB_SIZE, zipf_batch


class SmallModel(nn.Module):
    """In place of your model: all AGG needs is its hidden states and its output embedding."""

    def __init__(self, hidden_size: int = 64, layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, hidden_size)
        self.positions = nn.Embedding(64, hidden_size)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size, 4, 4 * hidden_size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.output = nn.Linear(hidden_size, VOCAB_SIZE, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.output.weight, std=0.02)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [B, S] to hidden states [B, S, D]. Logits are never made."""
        length = tokens.shape[1]
        hidden = self.embedding(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=hidden.device, dtype=hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        normed: torch.Tensor = self.norm(hidden)
        return normed


def train(steps: int = 30, micro_batches: int = 2, tied: bool = False) -> tuple[list[float], torch.Tensor]:
    """The loss of each step, and the output embedding [V, D] at the end."""
    torch.manual_seed(0)
    model = SmallModel(tied=tied)
    loss_of = AdaptiveGradientGating(VocabShard(0, VOCAB_SIZE, VOCAB_SIZE), rare_fraction=0.3, window_steps=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        batch = zipf_batch(step)
        tokens, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
        loss_of.begin_step(targets)  # once an optimizer step: all its targets, before its first micro-batch
        valid = (targets != -100).sum()
        losses.append(0.0)
        for some, theirs in zip(tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            hidden = model(some)
            # A sum over the valid targets of the whole step, so that each counts the same in any micro-batch.
            loss = loss_of(hidden.flatten(0, 1), model.output.weight, theirs.flatten(), reduction="sum") / valid
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:2}  loss {losses[-1]:.3f}  rare {loss_of.current_gates().rare.double().mean():.1%}")
    return losses, model.output.weight.detach()


def main() -> None:
    train()


if __name__ == "__main__":
    main()
