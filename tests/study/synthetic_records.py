"""Records of a study as its runner writes them, with invented numbers that follow known laws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
SIZES = {"xs": 2e5, "s": 8e5, "m": 3.2e6, "l": 12.8e6}
WIDTHS = {"xs": 64, "s": 128, "m": 192, "l": 256}
# per method: what it adds to the rare loss and to the total loss; isotropy, its slope per doubling; mean shift
METHODS = {
    "plain": (0.0, 0.0, 0.45, -0.030, 0.50),
    "agg10": (-0.6, 0.01, 0.75, -0.012, 0.20),
    "agg30": (-1.1, 0.03, 0.88, 0.0, 0.08),
}
LIMIT, EXPONENT = 3.1, 0.22  # of the plain total loss


def study_records(
    sizes: Sequence[str] = tuple(SIZES),
    methods: Sequence[str] = ("plain", "agg10", "agg30"),
    seeds: int = 3,
    noise: float = 1.0,
    **replaced: Any,
) -> Rows:
    """One row a run; keyword arguments replace entries of all of them."""  # fmt: skip
    random = np.random.default_rng(0)
    rows = []
    for size in sizes:
        for seed in range(1, seeds + 1):
            of_seed = random.normal(0, noise)  # the same data for all methods: pairs differ less than seeds do
            for method in methods:
                rows.append(_row(size, method, seed, of_seed, noise * random.normal(0, 1, 8)) | replaced)
    return rows


def _row(size: str, method: str, seed: int, of_seed: float, noise: Any) -> dict[str, Any]:
    scale = SIZES[size]
    doublings = float(np.log2(scale / SIZES["xs"]))
    rare, total, isotropy, slope, shift = METHODS[method]
    loss = LIMIT + 1.6 * 2 ** (-EXPONENT * doublings) + total + 0.008 * of_seed + 0.003 * noise[0]
    rare_loss = 8.5 + 1.9 * 2 ** (-0.15 * doublings) + rare * (1 - 0.04 * doublings) + 0.03 * of_seed + 0.02 * noise[1]
    shape = float(isotropy + slope * doublings + 0.01 * noise[2])
    run = f"{size}_{method}_{seed}"
    return {
        "format": 1, "study": "ladder", "run": run, "state": "done", "method": method, "seed": seed, "step": 1000,
        "planned_tokens": 2_048_000, "consumed_tokens": 2_048_000, "parameters": int(scale + 8192 * WIDTHS[size]),
        "parameters_without_embeddings": int(scale), "vocab_size": 8192,
        "flops": 6.0 * (scale + 8192 * WIDTHS[size]) * 2_048_000,
        "axis.size": size, "axis.objective": method, "axis.seed": seed,
        "measure.perplexity.total": float(np.exp(loss)),
        "measure.perplexity.frequent": float(np.exp(loss - 0.9 + 0.002 * noise[3])),
        "measure.perplexity.medium": float(np.exp(loss + 2.9 + 0.01 * noise[4])),
        "measure.perplexity.rare": float(np.exp(rare_loss)),
        "measure.isotropy": shape, "measure.seen_rows.isotropy": shape * 0.97,
        "measure.mean_shift": float(shift + 0.012 * doublings * (shift > 0.1) + 0.008 * noise[5]),
        "measure.mean_cosine": float(shift**2),
        "measure.effective_rank": float(WIDTHS[size] * (0.9 - shift / 3 + 0.01 * noise[7])),
        "measure.unique_tokens.rare": float(round(30 - 60 * rare + 6 * doublings + 2 * noise[6])),
        "hardware": "a processor of 2 cores", "commit": "0123456789abcdef", "version.torch": "2.13.0",
        "version.pretrain": "0.6.0", "recipe_sha256": hashlib.sha256(run.encode()).hexdigest(),
    }  # fmt: skip


def write_spectra(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """What is read of each row's run: ``evaluation.npz``, whose first singular value stands out as the mean shift says,
    and that it has a recipe."""
    for row in rows:
        width = WIDTHS[row["axis.size"]]
        values = np.linspace(1.0, 0.35, width)
        values[0] = 1 + 4 * row["measure.mean_shift"]
        (folder / row["run"]).mkdir(parents=True)
        np.savez(folder / row["run"] / "evaluation.npz", singular_values=values)
        (folder / row["run"] / "recipe.yaml").touch()


def two_sizes(**options: Any) -> Rows:
    """Too few to fit, so quick."""
    return study_records(sizes=("xs", "l"), methods=("plain", "agg30"), **options)


def without(rows: Rows, column: str) -> Rows:
    return [{key: value for key, value in row.items() if key != column} for row in rows]
