"""Continuing texts, greedily or sampled: one forward pass of the whole context for each new token of all texts.

Good for looking at a model and for measuring it, not for serving. Letters: B texts, P tokens of a prompt, V unpadded
vocabulary.
"""

from __future__ import annotations

import torch

from pretrain.evaluation.subject import LanguageModel


@torch.no_grad()
def continue_ids(
    model: LanguageModel,
    prompts: torch.Tensor,
    new_tokens: int,
    window: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
) -> torch.Tensor:
    """int64 [B, P + new]: the prompts [B, P] and what the model says next; a collective, the same on all ranks.

    Args:
        window: the last so many tokens are seen.
        temperature: 0 takes the most likely token; else logits are divided by it and one is drawn.
        top_p: drawn from the fewest most likely tokens that have this probability together (nucleus sampling,
            Holtzman et al. 2020, arXiv 1904.09751); 1: from all.
        seed: of the draws, which depend on nothing else but the numbers of texts and tokens.
        stop_id: ends when all texts have just got it; None: never.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(prompts), new_tokens, generator=generator, dtype=torch.float64).to(model.device)
    ids = prompts.to(model.device)
    for step in range(new_tokens):
        logits = model.next_logits(ids[:, -window:])
        chosen = model.agree(choose(logits, draws[:, step], temperature, top_p))
        ids = torch.cat([ids, chosen[:, None]], dim=1)
        if stop_id is not None and bool((chosen == stop_id).all()):
            break
    return ids


def choose(logits: torch.Tensor, draws: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """int64 [B]: a token for each row of logits [B, V], by a number in [0, 1) each, fp64 [B]."""
    if temperature == 0:
        return logits.argmax(1)
    below = logits.double() - logits.amax(1, keepdim=True)  # first: a small temperature would make them infinite
    falling, ids = (below / temperature).softmax(1).sort(stable=True, dim=1, descending=True)
    before = falling.cumsum(1) - falling
    falling = torch.where(before < top_p, falling, 0.0)  # always the first
    reached = falling.cumsum(1)
    place = (reached <= draws[:, None] * reached[:, -1:]).sum(1, keepdim=True)
    last = (falling > 0).sum(1, keepdim=True) - 1
    chosen: torch.Tensor = ids.gather(1, torch.minimum(place, last))[:, 0]
    return chosen
