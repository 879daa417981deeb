"""Tokens that training hardly reached, and generated text, as the page shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pretrain.evaluation.evaluation_file import look_up
from pretrain.report.formatting import absent, fixed, grouped, negative
from pretrain.report.methods import Method

MOST_TOKENS = 10  # of a table; evaluation.json has more
REFERENCES = {"never_seen": "ids that never occur in training", "least_seen": "ids that occur least in training"}


def under_trained(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Of the first seed of each method that has them: the first :data:`MOST_TOKENS`, for output and input embedding."""
    found = []
    for i, method in enumerate(methods):
        for where, path in (("", ()), ("input embedding", ("input_embedding",))):
            table = look_up(method.first.evaluation, (*path, "under_trained_tokens"))
            tokens = look_up(table, ("tokens",))
            if not tokens:
                continue
            rows = [
                {"id": token["id"], "text": visible(str(token["text"])), "count": absent(token["count"], grouped),
                 "cosine": negative(absent(token["cosine"], fixed))}
                for token in tokens[:MOST_TOKENS]
            ]  # fmt: skip
            rows_of = REFERENCES.get(table.get("reference"), "reference rows")
            title = ", ".join([method.name, *_seed(method), *([where] if where else [])])
            found.append(
                {"place": i, "title": title, "rows": rows, "all": len(tokens),
                 "reference": f"the mean of {grouped(table.get('reference_rows') or 0)} {rows_of}"}
            )  # fmt: skip
    return found


def examples(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """By prompt: the human text, and what the first seed of each method makes of it."""
    found: dict[str, dict[str, Any]] = {}
    for i, method in enumerate(methods):
        for example in look_up(method.first.evaluation, ("generation", "examples")) or []:
            prompt = str(example["prompt"])
            shown = found.setdefault(prompt, {"prompt": prompt, "human": str(example["human"]), "texts": []})
            name = ", ".join([method.name, *_seed(method)])
            shown["texts"] += [
                {"place": i, "name": name, "how": how, "text": str(example[key])}
                for key, how in (("greedy", "most likely token"), ("sampled", "sampled"))
            ]
    return list(found.values())


def how_generated(methods: Sequence[Method]) -> str:
    """How many prompts, how long, and how tokens were drawn, of the first method that has any."""
    for method in methods:
        facts = method.first.evaluation["generation"]
        if facts:
            drawn = facts.get("sampled") or {}
            how = ", ".join(f"{key.replace('_', '-')} {drawn[key]}" for key in ("temperature", "top_p") if key in drawn)
            prompts, length, new = (
                absent(facts.get(key), grouped) for key in ("prompts", "prompt_tokens", "new_tokens")
            )
            said = f"{prompts} prompts of {length} tokens from the evaluated split, continued by {new} tokens"
            return f"{said}; sampled with {how}" if how else said
    return ""


def visible(text: str) -> str:
    """A token's text with what cannot be seen written out."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    return shown.replace(" ", "\u2423") or "(empty)"


def _seed(method: Method) -> list[str]:
    return [f"seed {method.first.seed}"] if len(method.records) > 1 else []
