"""What the model says by itself, greedily and sampled, and what people say there: repetition and variety.

Prompts come from the text in steady steps, and are followed by the people's words. All texts go on for the same number
of tokens, past the ends of documents, as people's do. Letters: B texts, M tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from pretrain.data.windows import TokenStream
from pretrain.evaluation.decoding import continue_ids
from pretrain.evaluation.group_names import GROUPS
from pretrain.evaluation.subject import Subject

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, EXAMPLES = 32, 32, 64, 3
TEMPERATURE, TOP_P, SEED = 1.0, 0.9, 0


def measure_generation(subject: Subject) -> dict[str, Any] | None:
    """Numbers of :func:`text_statistics` for each kind of text, and some of the texts; a collective, the same on all
    ranks. None where the text is shorter than one prompt and its continuation."""
    excerpts = _excerpts(subject.text)
    if not len(excerpts):
        return None
    prompts, human = excerpts.split([PROMPT_TOKENS, NEW_TOKENS], dim=1)
    sampling = {"temperature": TEMPERATURE, "top_p": TOP_P}
    kinds = {
        "greedy": _continued(subject, prompts),
        "sampled": _continued(subject, prompts, seed=SEED, **sampling),
        "human": human,
    }
    groups = subject.groups.cpu()
    found: dict[str, Any] = {name: text_statistics(ids, groups) for name, ids in kinds.items()}
    found["sampled"] |= sampling
    shown = range(0, len(prompts), max(1, len(prompts) // EXAMPLES))[:EXAMPLES]
    texts = {"prompt": prompts, **kinds}
    examples = [{name: subject.codec.decode(ids[i].tolist()) for name, ids in texts.items()} for i in shown]
    sizes = {"prompts": len(prompts), "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    return {**sizes, **found, "examples": examples}


def text_statistics(ids: torch.Tensor, groups: torch.Tensor) -> dict[str, Any]:
    """Of continuations int64 [B, M], without their prompts.

    repetition_4: share of the 4-grams that were in the same text before.
    distinct_n: different n-grams over all n-grams of all texts (Li et al. 2016, arXiv 1510.03055).
    unique_tokens: different ids. rare_share: share of the tokens that are in the rare group.

    Args:
        groups: int8 [V], see :func:`frequency_groups`.
    """
    texts = torch.arange(len(ids))
    quads = ids.unfold(1, 4, 1)
    of_text = torch.cat([texts.repeat_interleave(quads.shape[1])[:, None], quads.flatten(0, 1)], dim=1)
    rare = groups[ids] == GROUPS.index("rare")
    return {
        "repetition_4": 1 - _distinct_share(of_text),
        **{f"distinct_{n}": _distinct_share(ids.unfold(1, n, 1).flatten(0, 1)) for n in range(1, 5)},
        "unique_tokens": len(ids.unique()),
        "rare_share": float(rare.double().mean()),
    }


def _distinct_share(rows: torch.Tensor) -> float:
    return len(rows.unique(dim=0)) / len(rows)


def _excerpts(text: TokenStream) -> torch.Tensor:
    """int64 [n, prompt and continuation]: as many as fit side by side, 32 at most, in steady steps."""
    length = PROMPT_TOKENS + NEW_TOKENS
    count = min(PROMPTS, text.total // length)
    step = text.total // max(count, 1)
    rows = [text.read(i * step, length) for i in range(count)]
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.int64)


def _continued(subject: Subject, prompts: torch.Tensor, **options: Any) -> torch.Tensor:
    """int64 [B, new tokens] on the CPU."""
    return continue_ids(subject.model, prompts, NEW_TOKENS, subject.window, **options)[:, PROMPT_TOKENS:].cpu()
