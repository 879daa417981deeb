"""``python -m pretrain generate``: continue a prompt, greedily or sampled."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpointing.checkpoint import load_checkpoint
from pretrain.errors import UserError
from pretrain.recipe import Recipe
from pretrain.topology import Topology
from pretrain.training.setup import build_run


@torch.no_grad()
def generate_text(
    checkpoint: Path,
    recipe: Recipe,
    topology: Topology,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
) -> str:
    """The prompt and its continuation, up to the end of the document; a collective, the same on all ranks.

    Every token runs the whole context again: good for a look at a model, not for serving.

    Args:
        temperature: 0 takes the most likely token; else logits are divided by it and one is drawn.

    Raises:
        UserError: the prompt has no tokens.
    """
    run = build_run(recipe, topology)
    load_checkpoint(run.engine, checkpoint, run.objective.load_state_dict, topology, run.identity, recipe.seed)
    tokenizer = run.prepared.tokenizer
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt has no tokens: give some text with --prompt")
    torch.manual_seed(recipe.seed)
    run.engine.eval()
    for _ in range(max_new_tokens):
        context = torch.tensor([ids[-recipe.model.sequence_length :]], device=topology.device)
        logits = run.engine(context)[0]
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(0), 1)
        else:
            chosen = logits.argmax(0, keepdim=True)
        dist.broadcast(chosen, src=0)  # replicas may differ in the last bit
        if int(chosen) == tokenizer.eos_id:
            break
        ids.append(int(chosen))
    return tokenizer.decode(ids)
