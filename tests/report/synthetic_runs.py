"""Run folders as a training run and its evaluation leave them, with invented but likely numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pretrain.recipe import BatchRecipe, DataRecipe, ObjectiveRecipe, Recipe
from pretrain.recipe_io import recipe_to_dict

VOCAB, WIDTH, STEPS, TOKENS_PER_STEP = 4000, 64, 2000, 2048
# degeneration in [0, 1]; final perplexities; distinct rare tokens predicted
KINDS: dict[str, dict[str, Any]] = {
    "mle": {"cone": 0.85, "perplexity": (41.3, 2904.0, 29210.0, 98.2), "unique": (1012, 420, 34),
            "objective": {"method": "mle"}},
    "agg": {"cone": 0.15, "perplexity": (43.9, 2101.0, 10312.0, 101.3), "unique": (1005, 655, 86),
            "objective": {"method": "agg", "alpha": 0.012}},
    "exclude": {"cone": 0.22, "perplexity": (41.9, 2254.0, 12040.0, 98.4), "unique": (1010, 633, 74),
                "objective": {"method": "agg", "alpha": 0.012, "never_seen": "exclude"}},
    "z_loss": {"cone": 0.84, "perplexity": (41.4, 2899.0, 28950.0, 98.1), "unique": (1011, 424, 35),
               "objective": {"method": "mle", "z_loss": 1e-4}},
}  # fmt: skip
SPREAD = 0.006  # of the logarithm of a perplexity over seeds; seed 0 is as KINDS says


def write_run(root: Path, name: str, kind: str = "agg", seed: int = 0, **evaluation: Any) -> Path:
    """A complete run folder ``root/name``; keyword arguments replace entries of ``evaluation.json``."""
    folder = root / name
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed + (kind == "agg"))
    recipe = Recipe(
        name="run",
        seed=seed,
        data=DataRecipe(folder="data/wikitext-2"),
        objective=ObjectiveRecipe(**KINDS[kind]["objective"]),
        batch=BatchRecipe(train_steps=STEPS),
    )
    tree = recipe_to_dict(recipe) | {"name": name}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    lines = [json.dumps(record) for record in _metrics(kind, random)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arrays = _arrays(kind, random)
    np.savez_compressed(folder / "evaluation.npz", **arrays)
    write_evaluation(folder, evaluation_tree(name, kind, seed, arrays) | evaluation)
    return folder


def write_seeds(root: Path, kind: str, seeds: Sequence[int], name: str = "", **evaluation: Any) -> list[Path]:
    """Runs ``root/NAME-seedS`` of one kind."""
    return [write_run(root, f"{name or kind}-seed{seed}", kind, seed, **evaluation) for seed in seeds]


def skip_step(folder: Path, step: int) -> None:
    """As if this logged step had not been trained on: its loss is apart, and its tokens never came."""

    def without(record: dict[str, Any]) -> None:
        record["tokens"] -= TOKENS_PER_STEP * (record["step"] >= step)
        if record["step"] == step:
            lost = {key: record.pop(key) for key in ("loss", "learning_rate", "grad_norm")}
            record["skipped"] = {"reason": "the loss is nan", "loss": None, "grad_norm": lost["grad_norm"]}

    change_records(folder, without)


def change_records(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Of a run's metrics, each in place."""
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_published_model(root: Path, name: str = "gpt2", *, arrays: bool = False) -> Path:
    """What the evaluation of a Hugging Face folder leaves: no recipe, no metrics, no method, another tokenizer."""
    source = write_run(root, name, "mle")
    tree = json.loads((source / "evaluation.json").read_text(encoding="utf-8"))
    for file in ("recipe.yaml", "metrics.jsonl", *(() if arrays else ("evaluation.npz",))):
        (source / file).unlink()
    groups = {"frequent": 150_000, "medium": 31_000, "rare": 4_000, "total": 185_000}
    absent: dict[str, None] = dict.fromkeys(("method", "seed", "checkpoint_step", "tokens", "training"))
    distinct = {"frequent": 900, "medium": 610, "rare": 52, "total": 1562}
    write_evaluation(source, tree | absent | {"target_tokens": groups, "unique_targets": distinct})
    return source


def write_evaluation(folder: Path, tree: dict[str, Any]) -> None:
    (folder / "evaluation.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")


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
            record["effective_rank"] = float(62 - 40 * cone * turned + random.normal(0, 0.3))
            record["top_singular_share"] = float(0.05 + 0.9 * cone * turned)
            record["seen_rows"] = {"isotropy": record["isotropy"] ** 0.9, "mean_cosine": record["mean_cosine"] * 0.9}
            record |= _by_frequency(kind, turned, random)
        if step % 100 == 0:
            record["validation_loss"] = float(np.log(total) + 3.5 * left + 0.05)
            ends = {"frequent": frequent, "medium": medium, "rare": rare, "total": total}
            record["validation_perplexity"] = {
                group: float(end * np.exp((1.5 + 2 * (group == "rare")) * left)) for group, end in ends.items()
            }
        records.append(record)
    return records


def _by_frequency(kind: str, turned: float, random: np.random.Generator) -> dict[str, Any]:
    """Norms of all, gates of what has them, by tenth of the vocabulary."""
    names = [*map(str, range(1, 11)), "never_seen"]
    rarity = np.linspace(0, 1, len(names))
    norms = 1 - 0.5 * rarity * (1 - KINDS[kind]["cone"]) * turned + random.normal(0, 0.01)
    record: dict[str, Any] = {
        "row_norm_by_decile": dict(zip(names, norms.tolist(), strict=True)),
        "loss_by_group": {"frequent": 3.8, "medium": 7.7, "rare": 9.4, "total": 4.6},
    }
    if KINDS[kind]["objective"]["method"] == "agg":
        g1, g2 = np.clip(1.6 - 2 * rarity, 0, 1), np.clip(1.9 - 1.9 * rarity, 0, 1)
        taken = float(0.3 + 0.1 * turned + random.normal(0, 0.005))
        record["g1_by_decile"] = dict(zip(names, g1.tolist(), strict=True))
        record["g2_by_decile"] = dict(zip(names, g2.tolist(), strict=True))
        record["gated_share"] = {"of_all": taken / 4, "of_rare": taken * 2}
        record["rare_fraction"] = 0.28 - 0.08 * turned
    return record


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


def evaluation_tree(name: str, kind: str, seed: int, arrays: dict[str, Any]) -> dict[str, Any]:
    """``evaluation.json``, with a seed other than 0 its numbers scatter a little."""
    random = np.random.default_rng(1000 + seed)
    scatter = 0.0 if seed == 0 else 1.0
    # What a seed does to all methods alike, and what it does to this one.
    own = np.random.default_rng([seed, list(KINDS).index(kind)])
    shift = scatter * (random.normal(0, 2 * SPREAD) + own.normal(0, SPREAD, 4))
    cone = KINDS[kind]["cone"] + scatter * own.normal(0, 0.004)
    perplexity = (np.array(KINDS[kind]["perplexity"]) * np.exp(shift)).tolist()
    unique = [count + round(scatter * own.normal(0, 2)) for count in KINDS[kind]["unique"]]
    names = ("frequent", "medium", "rare", "total")
    shape = _shape(cone, arrays)
    sliding = [0.94 * value for value in perplexity]
    words = {"MEN": {"spearman": 0.31 - 0.1 * cone, "interval": [0.28 - 0.1 * cone, 0.34 - 0.1 * cone], "pairs": 3000,
                     "coverage": 0.82}}  # fmt: skip
    return {
        "format": 4, "run": name, "method": KINDS[kind]["objective"]["method"], "seed": seed, "checkpoint_step": STEPS,
        "tokens": STEPS * TOKENS_PER_STEP,
        "split": "test", "perplexity": dict(zip(names, perplexity, strict=True)),
        "unique_tokens": dict(zip(names, (*unique, sum(unique)), strict=True)),
        "unique_targets": {"frequent": 1190, "medium": 1802, "rare": 314, "total": 3306},
        "target_tokens": {"frequent": 221_400, "medium": 20_120, "rare": 1_204, "total": 242_724},
        "sliding_window": {"window": 256, "stride": 56, "perplexity": dict(zip(names, sliding, strict=True)),
                           "unique_tokens": dict(zip(names, (*unique, sum(unique)), strict=True))},
        "bits_per_byte": {"non_overlapping": float(np.log2(perplexity[-1]) / 4.3),
                          "sliding_window": float(np.log2(sliding[-1]) / 4.3), "text_bytes": 1_204_811},
        **shape, "seen_rows": {key: value * 0.97 for key, value in shape.items()}, "word_similarity": words,
        "under_trained_tokens": _under_trained(cone), "generation": _generation(cone), "input_embedding": None,
        "parameters": 2_891_264, "parameters_without_embeddings": 793_344,
        "training": {
            "tokens_per_second": 7012.0 if kind == "mle" else 6941.0, "seconds": 1234.0, "world_size": 2,
            "tensor_model_parallel_size": 2, "data_parallel_size": 1, "sharding": "zero1", "precision": "fp32",
            "hardware": "2 cores", "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        },
    }  # fmt: skip


def _shape(cone: float, arrays: dict[str, Any]) -> dict[str, float]:
    singular = arrays["singular_values"]
    centres = (arrays["cosine_edges"][1:] + arrays["cosine_edges"][:-1]) / 2
    return {
        "isotropy": 1 - 0.98 * cone, "isotropy_unit_norm": 1 - 0.8 * cone,
        "mean_cosine": float(np.average(centres, weights=arrays["cosine_counts"])), "mean_shift": 0.8 * cone,
        "effective_rank": 60 - 40 * cone, "top_singular_share": float(singular[0] ** 2 / (singular**2).sum()),
        "mean_row_norm": float(arrays["row_norms"].mean()),
    }  # fmt: skip


def untied(cone: float, kind: str = "agg") -> dict[str, Any]:
    """An input embedding's entry."""
    shape = _shape(cone, _arrays(kind, np.random.default_rng(3)))
    words = {"MEN": {"spearman": 0.22, "interval": None, "pairs": 3000, "coverage": 0.82}}
    return shape | {"seen_rows": shape, "word_similarity": words, "under_trained_tokens": _under_trained(cone)}


def _under_trained(cone: float) -> dict[str, Any]:
    texts = ("\u2581Kazakh", "<0x0A>", " Solid", "\n\n", "\u2581zw\u00f6lf", "\u0430\u0431", "<b>", "}}", "\u2581%%",
             "@-@", "\u2581Ch\u00e2teau", "ization")  # fmt: skip
    tokens = [
        {"id": 3117 + 71 * i, "text": text, "count": i // 3, "cosine": 0.99 - 0.01 * i - 0.1 * (1 - cone)}
        for i, text in enumerate(texts)
    ]
    return {"reference": "never_seen", "reference_rows": 400, "tokens": tokens}


def _generation(cone: float) -> dict[str, Any]:
    def of(repeated: float, **more: float) -> dict[str, float]:
        distinct = {f"distinct_{n}": 1 - repeated ** (n / 2) * 0.9 for n in range(1, 5)}
        return {
            "repetition_4": repeated,
            **distinct,
            "unique_tokens": 900,
            "rare_share": 0.004 * (1 - repeated),
            **more,
        }

    examples = [
        {"prompt": f"The town of {town} lies", "greedy": " in the south of the" * 4,
         "sampled": " near a river that was called the Orne in older maps , and is known for its bells .",
         "human": " on a hill above the valley , and had 4,112 inhabitants in 1901 ."}
        for town in ("Alten", "Bourg", "Carrow")
    ]  # fmt: skip
    return {
        "prompts": 64, "prompt_tokens": 50, "new_tokens": 100, "greedy": of(0.55 + 0.3 * cone),
        "sampled": of(0.03 + 0.02 * cone, temperature=1.0, top_p=0.9), "human": of(0.02), "examples": examples,
    }  # fmt: skip
