"""What was run, a text for each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.evaluation.evaluation_file import look_up
from pretrain.report.formatting import ABSENT, TIMES, absent, compact, duration, grouped
from pretrain.report.methods import Method, settings_that_differ
from pretrain.report.run_records import RunRecord


@dataclass(frozen=True)
class Fact:
    """One text a method; ``common``: the same for all."""

    label: str
    texts: list[str]

    @property
    def common(self) -> bool:
        return len(set(self.texts)) == 1


def facts(methods: Sequence[Method]) -> list[Fact]:
    """Rows that say nothing for any method are left out."""
    columns = [_of_method(method, methods[0]) for method in methods]
    rows = [Fact(label, [column[label] for column in columns]) for label in columns[0]]
    return [row for row in rows if any(text != ABSENT for text in row.texts)]


def _of_method(method: Method, first: Method) -> dict[str, str]:
    """Of several runs, what any of them has, once."""
    of_runs = [_of_run(record) for record in method.records]
    texts = {label: "; ".join(dict.fromkeys(facts[label] for facts in of_runs)) for label in of_runs[0]}
    differing = settings_that_differ(method, first) if first.first.recipe else {}
    texts["other than the first"] = ", ".join(f"{key}: {value}" for key, value in differing.items()) or ABSENT
    return texts


def _of_run(record: RunRecord) -> dict[str, str]:
    evaluation, training = record.evaluation, record.evaluation["training"] or {}
    versions = training.get("versions") or {}
    layout = ABSENT
    if training.get("world_size") is not None:
        layout = (
            f"{training['world_size']} ranks: tensor parallel {training.get('tensor_model_parallel_size', '?')} "
            f"{TIMES} data parallel {training.get('data_parallel_size', '?')}, {training.get('sharding', '?')}, "
            f"{training.get('precision', '?')}"
        )
    return {
        "method": _method(record),
        **_data_and_model(record),
        "parameters": f"{absent(evaluation['parameters'], compact)}, "
        f"{absent(evaluation['parameters_without_embeddings'], compact)} without embeddings",
        "trained on": _trained_on(record),
        "layout": layout,
        "hardware": str(training.get("hardware") or ABSENT),
        "time": absent(training.get("seconds"), duration),
        "seed": absent(record.seed, str),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or ABSENT,
        "folder": str(record.folder),
    }


def _data_and_model(record: RunRecord) -> dict[str, str]:
    def recipe(*path: str) -> Any:
        return look_up(record.recipe, path)

    found = {"corpus": ABSENT, "model": ABSENT, "vocabulary": ABSENT}
    if record.recipe:
        source = recipe("data", "corpus", "source") or "unknown source"
        found["corpus"] = f"{recipe('data', 'folder') or ABSENT} ({source})"
        found["model"] = (
            f"{recipe('model', 'style') or 'model'}, {recipe('model', 'num_layers')} layers {TIMES} "
            f"{recipe('model', 'hidden_size')}, {recipe('model', 'num_attention_heads')} heads, "
            f"sequences of {recipe('model', 'sequence_length')}"
        )
    counts = record.arrays.get("token_counts")
    if counts is not None:
        never = grouped((counts == 0).sum())
        found["vocabulary"] = f"{grouped(len(counts))} ids, {never} of them never seen in training"
    return found


def _trained_on(record: RunRecord) -> str:
    tokens, step = record.evaluation["tokens"], record.evaluation["checkpoint_step"]
    if tokens is None or step is None:
        return ABSENT
    batch, length = (
        look_up(record.recipe, path) for path in (("batch", "global_batch_size"), ("model", "sequence_length"))
    )
    per_step = (batch or 0) * (length or 0)
    return f"{compact(tokens)} tokens, {grouped(step)} steps" + (f" of {grouped(per_step)}" if per_step else "")


def _method(record: RunRecord) -> str:
    if record.evaluation["method"] is None:
        return "a model from elsewhere (Hugging Face folder)"
    name = str(record.evaluation["method"])
    objective = look_up(record.recipe, ("objective",))
    if not isinstance(objective, dict):
        objective = {}
    beside = _beside(record, objective)
    what = {
        "mle": "cross-entropy (mle)" if beside else "plain cross-entropy (mle)",
        "agg": f"adaptive gradient gating (agg): {_gating(objective)}" if objective else name,
    }.get(name, name)
    return what + (f"; with {', '.join(beside)}" if beside else "")


def _gating(objective: dict[str, Any]) -> str:
    window, fraction = objective.get("window_steps"), objective.get("rare_fraction")
    counted = "one epoch" if window is None else f"{window} steps"
    rows, switch = objective.get("rare_rows") or "gate", objective.get("switch_step")
    parts = [
        f"alpha {objective.get('alpha') or 0.03}" if fraction is None else f"rare fraction {fraction}",
        f"counted over {counted}" + (", fading exponentially" if objective.get("window") == "exponential" else ""),
        f"never-seen ids: {objective.get('never_seen')}",
    ]
    if objective.get("gates") in ("g1", "g2"):
        parts.append(f"gate {objective['gates']} alone")
    if switch is not None:
        parts.append(f"rare rows: {rows}, from step {grouped(switch)} {objective.get('rare_rows_after')}")
    elif rows != "gate":
        parts.append(f"rare rows: {rows}")
    return ", ".join(parts)


def _beside(record: RunRecord, objective: dict[str, Any]) -> list[str]:
    """What the recipe has beside the cross-entropy and the gates: what others do against degeneration."""
    numbers = {
        "label smoothing": objective.get("label_smoothing"),
        "z-loss": objective.get("z_loss"),
        "cosine penalty": objective.get("cosine_penalty"),
        "penalty of the mean row": objective.get("mean_penalty"),
        "logits soft-capped at": look_up(record.recipe, ("model", "logit_soft_cap")),
    }
    return [
        *(f"{name} {value}" for name, value in numbers.items() if value),
        *(["rows centred after each update"] if objective.get("center_rows") else []),
        *(["coupled Adam"] if look_up(record.recipe, ("optimizer", "couple_embeddings")) else []),
    ]
