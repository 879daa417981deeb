"""The runs of a study: one for each combination of points that is not excluded, as whole recipes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.model.size import model_size
from pretrain.recipe import Recipe
from pretrain.recipe_checks import problems_of
from pretrain.recipe_io import build, load_recipe, recipe_to_dict
from pretrain.run_folder import with_whole_paths
from pretrain.study.axes import AMOUNTS, TOKENS, TOKENS_PER_PARAMETER, Point
from pretrain.study.study_file import Study

OBJECTIVE_AXIS = "objective"  # its points name the methods that are compared
SECTIONS_OF_DATA = ("data.corpus.", "data.tokenizer.")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        labels: its place, axis -> point.
        method: what tables and figures call its objective.
    """

    name: str
    labels: dict[str, str | int | float]
    method: str
    recipe: Recipe


def cells_of(study: Study) -> tuple[list[Cell], dict[str, list[str]]]:
    """All runs that a recipe can be made for, in the order of the axes, and what is wrong with the others, by name.

    Raises:
        UserError: there is none, or two have the same name.
    """
    base = recipe_to_dict(load_recipe(study.base))
    cells: list[Cell] = []
    refused: dict[str, list[str]] = {}
    for points in itertools.product(*(axis.points for axis in study.axes)):
        labels = {axis.name: point.label for axis, point in zip(study.axes, points, strict=True)}
        if any(all(labels[axis] in wanted for axis, wanted in entry.items()) for entry in study.exclude):
            continue
        name, problems = "-".join(point.name for point in points), list[str]()
        if name in refused or any(cell.name == name for cell in cells):
            raise UserError(f"the study {study.name} has two runs {name}: give the points of its axes other names")
        recipe = _recipe(study, base, name, points, problems)
        if recipe is None or problems:
            refused[name] = problems
        else:
            method = str(labels.get(OBJECTIVE_AXIS, recipe.objective.method))
            cells.append(Cell(name, labels, method, recipe))
    if not cells and not refused:
        raise UserError(f"the study {study.name} has no runs: its exclude leaves none of its axes' combinations")
    return cells, refused


def _recipe(
    study: Study, base: dict[str, Any], name: str, points: Sequence[Point], problems: list[str]
) -> Recipe | None:
    changes = dict(study.changes)
    for point in points:
        changes |= point.changes
    amounts = {key: changes.pop(key) for key in AMOUNTS if key in changes}
    for point in points:
        of_data = any(key.startswith(SECTIONS_OF_DATA) for key in point.changes)
        if of_data and "data.folder" not in point.changes:  # one prepared folder for each corpus and tokenizer
            folder = changes.get("data.folder", base["data"]["folder"])
            changes["data.folder"] = f"{folder}-{point.name}"
    tree = _changed(base, changes | {"name": name, "output_root": str(study.folder)})
    recipe = build(Recipe, tree, "", problems)
    if not isinstance(recipe, Recipe):
        return None
    tree = with_whole_paths(recipe_to_dict(recipe))  # jobs run in another folder
    tree = _changed(tree, _followed(study, recipe, amounts, problems))
    recipe = build(Recipe, tree, "", problems)
    if not isinstance(recipe, Recipe):
        return None
    problems += problems_of(recipe)
    return recipe


def _followed(study: Study, recipe: Recipe, amounts: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The keys that follow; see :class:`~pretrain.study.study_file.Follow`."""
    follow, found = study.follow, dict[str, Any]()
    tree = recipe_to_dict(recipe)
    if follow.width is not None:
        width = follow.width.multiple * recipe.model.num_layers
        found |= {"model.hidden_size": width, "model.num_attention_heads": width // follow.width.head_size}
    if follow.learning_rate is not None:
        rule = follow.learning_rate
        width = found.get("model.hidden_size", recipe.model.hidden_size)
        if width > 0:
            try:
                found["optimizer.learning_rate"] = rule.reference * (width / rule.reference_width) ** rule.power
            except (OverflowError, ZeroDivisionError):
                problems.append(f"follow.learning_rate gives no number at width {width} with power {rule.power}")
    sized = build(Recipe, _changed(tree, found), "", problems)
    steps = _steps(study, sized, amounts, problems) if isinstance(sized, Recipe) else None
    if steps is not None:
        found["batch.train_steps"] = steps
    if follow.warmup_fraction is not None:
        found["schedule.warmup_steps"] = round(follow.warmup_fraction * (steps or recipe.batch.train_steps))
    return found


def _steps(study: Study, recipe: Recipe, amounts: dict[str, Any], problems: list[str]) -> int | None:
    """None where nothing says how many tokens, or the recipe is impossible anyway."""
    tokens = amounts.get(TOKENS, study.follow.tokens)
    multiple = amounts.get(TOKENS_PER_PARAMETER, study.follow.tokens_per_parameter)
    for key, value in amounts.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            problems.append(f"{key} is {value!r}, must be a finite number above 0")
            return None
    model = recipe.model
    counted = (model.num_layers, model.hidden_size, model.num_attention_heads, model.vocab_multiple_of)
    if min(*counted, recipe.tokens_per_step) < 1:
        return None
    if tokens is None and multiple is not None:
        tokens = multiple * model_size(model, vocab_size_of(recipe)).total
    return None if tokens is None else max(1, round(tokens / recipe.tokens_per_step))


def grouped(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of what is wrong, each thing once, with the runs that have it."""
    runs: dict[str, list[str]] = {}
    for name, found in problems.items():
        for problem in found:
            runs.setdefault(problem, []).append(name)
    return [f"  - {', '.join(names)}: {problem}" for problem, names in runs.items()]


def vocab_size_of(recipe: Recipe) -> int:
    """Of the tokenizer that is asked for, before the data are prepared.

    Raises:
        UserError: a tokenizer is given, and cannot be read.
    """
    given = recipe.data.tokenizer.model_file
    if not given:
        return recipe.data.tokenizer.vocab_size
    from pretrain.data.tokenizer import Tokenizer

    return Tokenizer.load(Path(given)).vocab_size


def _changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with dotted keys replaced; the keys are known to be there."""
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = copy
        for section in sections:
            node[section] = node = dict(node[section])
        node[leaf] = value
    return copy
