"""``python -m pretrain generate``: continue a prompt, greedily or sampled."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.checkpointing.checkpoint import load_checkpoint
from pretrain.checkpointing.identity import NOT_OF_WEIGHTS
from pretrain.errors import UserError
from pretrain.evaluation.decoding import continue_ids
from pretrain.evaluation.run_model import RunModel
from pretrain.recipe import Recipe
from pretrain.topology import Topology
from pretrain.training.setup import build_run


def generate_text(
    checkpoint: Path,
    recipe: Recipe,
    topology: Topology,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
) -> str:
    """The prompt and its continuation, up to the end of the document; a collective, the same on all ranks.

    Args:
        temperature: 0 takes the most likely token; else logits are divided by it and one is drawn.

    Raises:
        UserError: the prompt has no tokens.
    """
    run = build_run(recipe, topology)
    load_checkpoint(
        run.engine, checkpoint, run.objective.load_state_dict, topology, run.identity, recipe.seed, NOT_OF_WEIGHTS
    )
    tokenizer = run.prepared.tokenizer
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt has no tokens: give some text with --prompt")
    run.engine.eval()
    continued = continue_ids(
        RunModel(run),
        torch.tensor([ids]),
        max_new_tokens,
        recipe.model.sequence_length,
        temperature=temperature,
        seed=recipe.seed,
        stop_id=tokenizer.eos_id,
    )
    run.engine.destroy()  # see pretrain.training.loop.train
    return tokenizer.decode(continued[0].tolist())  # the end of the document has no text
