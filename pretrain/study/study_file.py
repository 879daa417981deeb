"""What a study is: a base recipe, axes, and what follows from what; read from strict YAML.

    name: widths
    question: Does degeneration fade with width?
    base: quickstart_plain                # a recipe, by name or path
    output_root: runs/studies             # the study's folder is output_root/name
    set: {batch.train_steps: 300}         # for all runs, over the base
    axes:                                 # each run takes one point of every axis
      size:                               # named points; each says which recipe keys it sets
        xs: {model.hidden_size: 64}
        s: {model.hidden_size: 128}
      objective:
        plain: {objective.method: mle}
        agg: {objective.method: agg}
      alpha: {key: objective.alpha, values: [0.5, 1]}
      seed: [1, 2, 3]                     # values of the one recipe key that has this name
    follow:                               # what is computed for each run, see Follow
      tokens_per_parameter: 20
    exclude: [{size: s, seed: [2, 3]}]    # runs that are left out: all that match an entry
    evaluate: last                        # or all checkpoints that are kept

A key has one owner: ``set``, an axis and ``follow`` may not both say it. Overrides of the command line are part of set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pretrain.errors import RecipeError, UserError
from pretrain.recipe_io import build, flatten, load_recipe, override_value, read_mapping, recipe_to_dict
from pretrain.study.axes import AMOUNTS, OF_THE_STUDY, PLAIN_NAME, Axis, check_keys, read_axis, read_exclusion

SHIPPED = Path(__file__).parents[1] / "studies"


@dataclass(frozen=True, kw_only=True)
class LearningRateRule:
    """``width_power``: reference x (model.hidden_size / reference_width) ** power.

    The power -1 is what Adam's hidden matrices need for updates of one size at all widths (Yang et al. 2022,
    arXiv 2203.03466, table 3); here it is applied to all parameters.
    """

    rule: Literal["width_power"]
    reference: float
    reference_width: int
    power: float = -1.0


@dataclass(frozen=True, kw_only=True)
class WidthRule:
    """``depth_multiple``: model.hidden_size is multiple x model.num_layers, with as many heads of head_size as fit."""

    rule: Literal["depth_multiple"]
    multiple: int
    head_size: int


@dataclass(frozen=True, kw_only=True)
class Follow:
    """What follows from what, in this order.

    Attributes:
        width: model.hidden_size and model.num_attention_heads from model.num_layers.
        learning_rate: optimizer.learning_rate from model.hidden_size.
        tokens, tokens_per_parameter: batch.train_steps, rounded, from the tokens to train on: a number, or so many for
            each parameter, embeddings included (Hoffmann et al. 2022, arXiv 2203.15556: about 20).
        warmup_fraction: schedule.warmup_steps, rounded, as a share of batch.train_steps.
    """

    width: WidthRule | None = None
    learning_rate: LearningRateRule | None = None
    tokens: float | None = None
    tokens_per_parameter: float | None = None
    warmup_fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file that was checked.

    Attributes:
        changes: recipe keys over the base, for all runs.
        exclude: axis -> labels, an entry for each; a run is left out if all axes of an entry match.
        text: the file as it was given, and the overrides of the command line.
    """

    name: str
    question: str
    base: str
    output_root: str
    changes: dict[str, Any]
    axes: tuple[Axis, ...]
    follow: Follow
    exclude: tuple[dict[str, tuple[str | int | float, ...]], ...]
    evaluate: Literal["last", "all"]
    text: str

    @property
    def folder(self) -> Path:
        return Path(self.output_root).absolute() / self.name


@dataclass(frozen=True, kw_only=True)
class _File:
    """The keys of the file as they are written."""

    name: str
    question: str
    base: str
    axes: dict[str, Any]
    output_root: str = "runs/studies"
    set: dict[str, Any] = field(default_factory=dict)
    follow: Follow = field(default_factory=Follow)
    exclude: list[Any] = field(default_factory=list)
    evaluate: Literal["last", "all"] = "last"


def load_study(name_or_path: str, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study file; its runs are not looked at yet (:mod:`pretrain.study.grid`).

    Args:
        overrides: ``section.key=value`` strings, for all runs; ``name`` and ``output_root`` are the study's.

    Raises:
        RecipeError: with all problems of the file and the overrides in one message.
        UserError: no such study or base recipe, or not YAML.
    """
    path = find_study(name_or_path)
    tree = read_mapping(path)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} is not of the form section.key=value")
        value = override_value(override)
        if key in OF_THE_STUDY:
            tree[key] = value
        else:
            there = tree.get("set", {})
            tree["set"] = {**flatten(there), key: value} if isinstance(there, dict) else there
    beside = path.parent / str(tree.get("base"))
    if beside.is_file() and not Path(str(tree["base"])).is_file():
        tree["base"] = str(beside)
    problems: list[str] = []
    file = build(_File, tree, "", problems)
    if not isinstance(file, _File):
        raise RecipeError(problems, str(path))
    text = path.read_text(encoding="utf-8") + "".join(f"# override: {entry}\n" for entry in overrides)
    study = _checked(file, text, problems)
    if problems:
        raise RecipeError(problems, str(path))
    return study


def find_study(name_or_path: str) -> Path:
    """A path as it is, or the name of a shipped study."""
    for path in (Path(name_or_path), SHIPPED / f"{name_or_path}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(entry.stem for entry in SHIPPED.glob("*.yaml")))
    raise UserError(f"no study {name_or_path!r}: neither a file nor one of the shipped {names}")


def _checked(file: _File, text: str, problems: list[str]) -> Study:
    known = flatten(recipe_to_dict(load_recipe(file.base)))
    changes = flatten(file.set)
    if not PLAIN_NAME.fullmatch(file.name.replace("-", "_")):
        problems.append(f"name is {file.name!r}, must be a plain folder name: the study is written to output_root/name")
    check_keys(changes, known, "set", problems)
    axes = tuple(
        axis for name, entry in file.axes.items() if (axis := read_axis(str(name), entry, known, problems)) is not None
    )
    if not file.axes:
        problems.append("axes is empty: a study needs at least one axis with a point")
    _check_owners(changes, axes, file.follow, problems)
    _check_follow(file.follow, problems)
    by_name = {axis.name: axis for axis in axes}
    exclude = tuple(read_exclusion(i, entry, by_name, problems) for i, entry in enumerate(file.exclude))
    rest = {key: getattr(file, key) for key in ("name", "question", "base", "output_root", "follow", "evaluate")}
    return Study(changes=changes, axes=axes, exclude=exclude, text=text, **rest)


def _check_owners(changes: dict[str, Any], axes: Sequence[Axis], follow: Follow, problems: list[str]) -> None:
    """What is set for all runs, or by an axis, must not be set by another one, nor follow."""
    followed = {
        "follow.width": (follow.width, {"model.hidden_size", "model.num_attention_heads"}),
        "follow.learning_rate": (follow.learning_rate, {"optimizer.learning_rate"}),
        "follow.tokens": (follow.tokens, {"batch.train_steps", *AMOUNTS}),
        "follow.tokens_per_parameter": (follow.tokens_per_parameter, {"batch.train_steps", *AMOUNTS}),
        "follow.warmup_fraction": (follow.warmup_fraction, {"schedule.warmup_steps"}),
    }
    owners = [("set", set(changes)), *((f"axes.{axis.name}", axis.keys) for axis in axes)]
    owners += [(name, keys) for name, (rule, keys) in followed.items() if rule is not None]
    for place, (owner, keys) in enumerate(owners):
        for other, others in owners[:place]:
            problems += [
                f"{key} is set by {other} and by {owner}: one of them must go" for key in sorted(keys & others)
            ]
    amounts = {key for axis in axes for key in axis.keys if key in (*AMOUNTS, "batch.train_steps")}
    if len(amounts) > 1:
        problems.append(f"{' and '.join(sorted(amounts))} all say how long a run is: the axes may set one of them")


def _check_follow(follow: Follow, problems: list[str]) -> None:
    numbers: dict[str, float | None] = {"tokens": follow.tokens, "tokens_per_parameter": follow.tokens_per_parameter}
    if follow.width is not None:
        numbers |= {"width.multiple": follow.width.multiple, "width.head_size": follow.width.head_size}
    if follow.learning_rate is not None:
        rule = dataclasses.asdict(follow.learning_rate)
        numbers |= {f"learning_rate.{key}": rule[key] for key in ("reference", "reference_width")}
    problems += [
        f"follow.{key} is {value:g}, must be a finite number above 0"
        for key, value in numbers.items()
        if value is not None and not 0 < value < math.inf
    ]
    if follow.learning_rate is not None and not math.isfinite(follow.learning_rate.power):
        problems.append(f"follow.learning_rate.power is {follow.learning_rate.power}, must be a finite number")
    if follow.warmup_fraction is not None and not 0 <= follow.warmup_fraction < 1:
        problems.append(f"follow.warmup_fraction is {follow.warmup_fraction}, must be in [0, 1)")
