"""Run folders as a training run and its evaluation leave them, with invented but likely numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pretrain.recipe import BatchRecipe, DataRecipe, ObjectiveRecipe, Recipe
from pretrain.recipe_io import recipe_to_dict

VOCAB, WIDTH, STEPS, TOKENS_PER_STEP = 4000, 64, 2000, 2048
# degeneration in [0, 1]; final perplexities; distinct rare tokens predicted
KINDS: dict[str, dict[str, Any]] = {
    "mle": {"cone": 0.85, "perplexity": (41.3, 2904.0, 29210.0, 98.2), "unique": (1012, 420, 34)},
    "agg": {"cone": 0.15, "perplexity": (43.9, 2101.0, 10312.0, 101.3), "unique": (1005, 655, 86)},
}


def write_run(root: Path, name: str, kind: str = "agg", seed: int = 0, **evaluation: Any) -> Path:
    """A complete run folder ``root/name``; keyword arguments replace entries of ``evaluation.json``."""
    folder = root / name
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed + (kind == "agg"))
    recipe = Recipe(
        name="run",
        data=DataRecipe(folder="data/wikitext-2"),
        objective=ObjectiveRecipe(method="agg" if kind == "agg" else "mle", alpha=0.012),
        batch=BatchRecipe(train_steps=STEPS),
    )
    tree = recipe_to_dict(recipe) | {"name": name}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    lines = [json.dumps(record) for record in _metrics(kind, random)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arrays = _arrays(kind, random)
    np.savez_compressed(folder / "evaluation.npz", **arrays)
    tree = _evaluation(name, kind, arrays) | evaluation
    (folder / "evaluation.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return folder


def _metrics(kind: str, random: np.random.Generator) -> list[dict[str, Any]]:
    cone, (frequent, medium, rare, total) = KINDS[kind]["cone"], KINDS[kind]["perplexity"]
    records = []
    for step in range(10, STEPS + 1, 10):
        progress = step / STEPS
        left = float(np.exp(-6 * progress)) - float(np.exp(-6))
        loss = np.log(total) + 3.6 * left + random.normal(0, 0.12)
        record: dict[str, Any] = {
            "step": step, "tokens": step * TOKENS_PER_STEP, "loss": float(loss),
            "learning_rate": 1e-3 * (1 - 0.9 * progress),
            "grad_norm": float(random.gamma(9, 0.1)), "tokens_per_second": 7000.0, "step_seconds": 0.29,
        }  # fmt: skip
        if step % 50 == 0:
            turned = 1 - np.exp(-5 * progress)
            record["isotropy"] = float(1 - 0.98 * cone * turned + random.normal(0, 0.004) * turned)
            record["isotropy_unit_norm"] = float(1 - cone * 0.8 * turned)
            record["mean_cosine"] = float(0.75 * cone * turned)
            record["mean_shift"] = float(0.8 * cone * turned)
        if step % 100 == 0:
            record["validation_loss"] = float(np.log(total) + 3.5 * left + 0.05)
            ends = {"frequent": frequent, "medium": medium, "rare": rare, "total": total}
            record["validation_perplexity"] = {
                group: float(end * np.exp((1.5 + 2 * (group == "rare")) * left)) for group, end in ends.items()
            }
        records.append(record)
    return records


def _arrays(kind: str, random: np.random.Generator) -> dict[str, Any]:
    cone = KINDS[kind]["cone"]
    counts = np.floor(3e5 / np.arange(1, VOCAB + 1) ** 1.25).astype(np.int64)
    counts[-400:] = 0
    random.shuffle(counts)
    rarity = 1 - np.log1p(counts) / np.log1p(counts.max())
    common = np.zeros(WIDTH)
    common[0] = 1
    stretch = np.linspace(1.4, 0.4, WIDTH) / 8
    rows = random.normal(size=(VOCAB, WIDTH)) * stretch * (1 - 0.8 * cone * rarity[:, None])
    rows += 1.6 * cone * (0.35 + rarity[:, None]) * common
    norms = np.linalg.norm(rows, axis=1)
    _, singular, right = np.linalg.svd(rows, full_matrices=False)
    projection = rows @ right[:2].T
    unit = rows / norms[:, None]
    cosines = (unit @ unit[:256].T)[256:]
    cosine_counts, edges = np.histogram(cosines, bins=100, range=(-1, 1))
    order = np.argsort(-counts, kind="stable")
    groups = np.full(VOCAB, 2, dtype=np.int8)
    groups[order[: VOCAB * 8 // 10]] = 1
    groups[order[: VOCAB * 3 // 10]] = 0
    return {
        "token_counts": counts, "groups": groups, "row_norms": norms, "singular_values": singular,
        "cosine_edges": edges, "cosine_counts": cosine_counts, "projection": projection * np.sign(projection.mean(0)),
    }  # fmt: skip


def _evaluation(name: str, kind: str, arrays: dict[str, Any]) -> dict[str, Any]:
    cone, unique = KINDS[kind]["cone"], KINDS[kind]["unique"]
    names = ("frequent", "medium", "rare", "total")
    singular = arrays["singular_values"]
    centres = (arrays["cosine_edges"][1:] + arrays["cosine_edges"][:-1]) / 2
    shape = {
        "isotropy": 1 - 0.98 * cone, "isotropy_unit_norm": 1 - 0.8 * cone,
        "mean_cosine": float(np.average(centres, weights=arrays["cosine_counts"])), "mean_shift": 0.8 * cone,
        "effective_rank": 60 - 40 * cone, "top_singular_share": float(singular[0] ** 2 / (singular**2).sum()),
        "mean_row_norm": float(arrays["row_norms"].mean()),
    }  # fmt: skip
    return {
        "format": 1, "run": name, "method": kind, "checkpoint_step": STEPS, "tokens": STEPS * TOKENS_PER_STEP,
        "split": "test", "perplexity": dict(zip(names, KINDS[kind]["perplexity"], strict=True)),
        "unique_tokens": dict(zip(names, (*unique, sum(unique)), strict=True)),
        "unique_targets": {"frequent": 1190, "medium": 1802, "rare": 314, "total": 3306},
        "target_tokens": {"frequent": 221_400, "medium": 20_120, "rare": 1_204, "total": 242_724},
        **shape, "seen_rows": {key: value * 0.97 for key, value in shape.items()},
        "word_similarity": {"MEN": {"spearman": 0.31 - 0.1 * cone, "pairs": 3000, "coverage": 0.82}},
        "parameters": 2_891_264, "parameters_without_embeddings": 793_344,
        "training": {
            "tokens_per_second": 7012.0 if kind == "mle" else 6941.0, "seconds": 1234.0, "world_size": 2,
            "tensor_model_parallel_size": 2, "data_parallel_size": 1, "sharding": "zero1", "precision": "fp32",
            "hardware": "2 cores", "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        },
    }  # fmt: skip
