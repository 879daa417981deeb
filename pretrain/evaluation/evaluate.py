"""``python -m pretrain evaluate``: a checkpoint of a run to ``evaluation.json`` and ``evaluation.npz``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpointing.checkpoint import load_checkpoint
from pretrain.checkpointing.folder import read_manifest, step_of
from pretrain.checkpointing.identity import NOT_OF_WEIGHTS
from pretrain.checkpointing.trained_on import trained_on_of
from pretrain.console import say
from pretrain.data.corpus import Split
from pretrain.evaluation.measures import Arrays, measure
from pretrain.evaluation.run_model import subject_of_run
from pretrain.files import json_bytes, make_folder, replacing, without_infinities
from pretrain.model.size import model_size
from pretrain.recipe import Recipe
from pretrain.run_folder import EVALUATION_FORMAT, RunFolder
from pretrain.topology import Topology
from pretrain.training.metrics import read_metrics
from pretrain.training.setup import build_run

SPLIT: Split = "test"


def evaluate_run(folder: RunFolder, recipe: Recipe, topology: Topology, checkpoint: Path) -> None:
    """Measure one checkpoint on the test split; a collective."""
    # Before hours of measuring, not after them; on all ranks, so that they end alike.
    make_folder(folder.evaluation_files(checkpoint)[0].parent)
    facts = _training_facts(folder, checkpoint)
    run = build_run(recipe, topology)
    run.progress = load_checkpoint(
        run.engine, checkpoint, run.objective.load_state_dict, topology, run.identity, recipe.seed, NOT_OF_WEIGHTS
    )
    run.engine.eval()
    subject = subject_of_run(run, SPLIT, show=True)
    found, arrays = measure(subject, [Path(name) for name in recipe.reporting.word_similarity])
    run.engine.destroy()  # see pretrain.training.loop.train
    if not topology.is_first:
        return
    size = model_size(recipe.model, run.prepared.vocab_size)
    evaluation = {
        "format": EVALUATION_FORMAT,
        "run": recipe.name,
        "method": recipe.objective.method,
        "seed": recipe.seed,
        "checkpoint_step": run.progress.step,
        "tokens": run.progress.consumed_tokens,
        "split": SPLIT,
        **found,
        "parameters": size.total,
        "parameters_without_embeddings": size.without_embeddings,
        "training": facts,
    }
    write_evaluation(evaluation, arrays, *folder.evaluation_files(checkpoint))


def write_evaluation(evaluation: dict[str, Any], arrays: Arrays, file: Path, arrays_file: Path) -> None:
    """Both files, neither where one cannot be written, and a line for the terminal."""
    make_folder(file.parent)
    with replacing(file) as new_file, replacing(arrays_file) as new_arrays:  # the arrays get their name first
        new_file.write_bytes(json_bytes(without_infinities(evaluation)))
        with new_arrays.open("wb") as stored:
            np.savez_compressed(stored, allow_pickle=False, **arrays)
    step = evaluation["checkpoint_step"]
    say(
        f"{evaluation['run']}:{'' if step is None else f' step {step:,},'} {evaluation['split']} perplexity "
        f"{evaluation['perplexity']['total'] or math.nan:,.1f}, isotropy {evaluation['isotropy']:.3f}, "
        f"mean cosine {evaluation['mean_cosine']:.3f} in {file}"
    )


def _training_facts(folder: RunFolder, checkpoint: Path) -> dict[str, Any]:
    """How the run was trained up to the checkpoint, from its records, and where that was saved."""
    records = [record for record in read_metrics(folder.metrics_file) if record["step"] <= step_of(checkpoint)]
    rates = [record["tokens_per_second"] for record in records]
    seconds, last_step = 0.0, 0
    for record in records:
        seconds += record["step_seconds"] * (record["step"] - last_step)
        last_step = record["step"]
    return {
        "tokens_per_second": float(np.median(rates)) if rates else None,
        "seconds": seconds,
        **trained_on_of(read_manifest(checkpoint)),
    }
