"""``python -m pretrain evaluate``: a checkpoint of a run to ``evaluation.json`` and ``evaluation.npz``."""

from __future__ import annotations

import dataclasses
import io
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretrain import __version__
from pretrain.checkpointing.checkpoint import load_checkpoint
from pretrain.console import say
from pretrain.evaluation.frequency_groups import frequency_groups
from pretrain.evaluation.geometry import (
    cosine_histogram,
    measure_geometry,
    principal_plane,
    row_norms,
    singular_values,
)
from pretrain.evaluation.word_similarity import word_similarity
from pretrain.files import make_folder, without_infinities, write_bytes, write_json
from pretrain.model.size import model_size
from pretrain.recipe import Recipe
from pretrain.run_folder import EVALUATION_FORMAT, RunFolder
from pretrain.topology import Topology
from pretrain.training.engine import whole_output_embedding
from pretrain.training.metrics import read_metrics
from pretrain.training.setup import Run, build_run
from pretrain.training.validation import measure_perplexity

COSINE_BINS = 200


def evaluate_run(folder: RunFolder, recipe: Recipe, topology: Topology, checkpoint: Path) -> None:
    """Measure the test split and the output embedding; a collective."""
    run = build_run(recipe, topology)
    run.progress = load_checkpoint(
        run.engine, checkpoint, run.objective.load_state_dict, topology, run.identity, recipe.seed
    )
    grouped = measure_perplexity(run.engine, run.prepared, recipe, topology, "test", show=topology.is_first)
    with whole_output_embedding(run.engine) as weight:
        geometry, arrays = _embedding_measures(run, weight)
        similarity = word_similarity(
            [Path(name) for name in recipe.reporting.word_similarity],
            run.prepared.tokenizer.encode,
            weight,
            run.shard,
            torch.from_numpy(run.prepared.token_counts),
        )
    if not topology.is_first:
        return
    evaluation = {
        "format": EVALUATION_FORMAT,
        "run": recipe.name,
        "method": recipe.objective.method,
        "checkpoint_step": run.progress.step,
        "tokens": run.progress.consumed_tokens,
        "split": "test",
        "perplexity": grouped.perplexity(),
        "unique_tokens": grouped.unique_tokens(),
        "unique_targets": grouped.unique_targets(),
        "target_tokens": grouped.target_tokens(),
        **geometry,
        "word_similarity": similarity,
        "parameters": model_size(recipe.model, run.prepared.vocab_size).total,
        "parameters_without_embeddings": model_size(recipe.model, run.prepared.vocab_size).without_embeddings,
        "training": _training_facts(run, folder),
    }
    file, arrays_file = folder.evaluation_files(checkpoint)
    make_folder(file.parent)
    write_bytes(arrays_file, _as_npz(arrays))
    write_json(file, without_infinities(evaluation))
    say(
        f"{recipe.name}: step {run.progress.step:,}, test perplexity {grouped.perplexity()['total'] or math.nan:,.1f}, "
        f"isotropy {geometry['isotropy']:.3f}, mean cosine {geometry['mean_cosine']:.3f} in {file}"
    )


def _embedding_measures(run: Run, weight: torch.Tensor) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Numbers and arrays of the output embedding; collectives over the tensor-parallel ranks."""
    shard, counts = run.shard, torch.from_numpy(run.prepared.token_counts)
    seen = torch.zeros(len(shard), dtype=torch.bool)
    seen[: shard.real] = counts[shard.start : shard.start + shard.real] > 0
    seen = seen.to(weight.device)
    geometry: dict[str, Any] = dataclasses.asdict(measure_geometry(weight, shard))
    geometry["seen_rows"] = dataclasses.asdict(measure_geometry(weight, shard, seen))
    edges, histogram = cosine_histogram(weight, shard, COSINE_BINS)
    arrays = {
        "token_counts": counts,
        "groups": frequency_groups(counts),
        "row_norms": _all_rows(run, row_norms(weight)),
        "singular_values": singular_values(weight, shard),
        "cosine_edges": edges,
        "cosine_counts": histogram,
        "projection": _all_rows(run, principal_plane(weight, shard)),
    }
    return geometry, {name: array.cpu().numpy() for name, array in arrays.items()}


def _all_rows(run: Run, values: torch.Tensor) -> torch.Tensor:
    """[V_local, ...] of each tensor-parallel rank to [V, ...]; for numbers of a row, never for whole rows."""
    parts = [torch.empty_like(values) for _ in range(run.topology.tensor_parallel_size)]
    dist.all_gather(parts, values.contiguous(), group=run.topology.tensor_parallel_group)
    return torch.cat(parts)[: run.shard.vocab_size]


def _training_facts(run: Run, folder: RunFolder) -> dict[str, Any]:
    """How the run was trained, from its records and this machine."""
    records = read_metrics(folder.metrics_file)
    rates = [record["tokens_per_second"] for record in records]
    seconds, last_step = 0.0, 0
    for record in records:
        seconds += record["step_seconds"] * (record["step"] - last_step)
        last_step = record["step"]
    device = run.topology.device
    return {
        "tokens_per_second": float(np.median(rates)) if rates else None,
        "seconds": seconds,
        "world_size": run.topology.world_size,
        "tensor_model_parallel_size": run.topology.tensor_parallel_size,
        "data_parallel_size": run.topology.data_parallel_size,
        "sharding": run.recipe.parallel.sharding,
        "precision": run.recipe.precision,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "versions": {"pretrain": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


def _as_npz(arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
