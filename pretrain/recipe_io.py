"""Strict YAML to :class:`~pretrain.recipe.Recipe`, dotted overrides, and the resolved copy saved with a run."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from pretrain.errors import RecipeError, UserError
from pretrain.recipe import Recipe

SHIPPED = Path(__file__).parent / "recipes"
MERGE = "tag:yaml.org,2002:merge"  # of the key <<, whose mapping fills in what is not given
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
NOT_IN_TENS = re.compile(r"[-+]?0[0-7_]+|.*:.*")  # 0777 is read as 511, 1:30 as 90


class _Strict(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that is given twice, of which YAML would take the last, and numbers that mean others than they say.

    It says where a date or number is none.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            found = super().construct_object(node, deep)
        except ValueError as error:
            said = f"{node.value!r} is no date or number: {error}"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from error
        if node.tag in NUMBERS and NOT_IN_TENS.fullmatch(node.value):
            said = f"{node.value} is {found} in YAML: write that, or quotes around it"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def find_recipe(name_or_path: str) -> Path:
    """A path as it is, or the name of a shipped recipe."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(entry.stem for entry in SHIPPED.glob("*.yaml"))
    raise UserError(f"no recipe {name_or_path!r}: neither a file nor one of the shipped {', '.join(names)}")


def text_as_given(recipe: str, overrides: Sequence[str]) -> str:
    """What a run remembers of its command."""
    return find_recipe(recipe).read_text(encoding="utf-8") + "".join(f"# override: {entry}\n" for entry in overrides)


def find_base(recipe: Path, base: str) -> Path:
    """The base that a recipe file names: a path relative to the file, or what :func:`find_recipe` takes."""
    beside = recipe.parent / base
    return beside if beside.is_file() else find_recipe(base)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, check.

    A file may say ``base: OTHER``, see :func:`find_base`; then it holds what differs from that recipe.

    Args:
        name_or_path: a YAML file, or the name of one in ``pretrain/recipes``.
        overrides: ``section.key=value`` strings; the value is read as YAML. Of a section, ``section={key: value}``, it
            is merged as with a base.

    Raises:
        RecipeError: with all problems of the file, of the overrides and across fields in one message.
        UserError: no such recipe, or not YAML.
    """
    path = find_recipe(name_or_path)
    tree = read_mapping(path)
    base = tree.pop("base", None)
    if base is not None:
        below = read_mapping(find_base(path, str(base)))
        if "base" in below:
            raise UserError(
                f"{path} has base {base}, which has a base itself: name {below['base']} or write the keys out"
            )
        tree = _over(below, tree)
    problems: list[str] = []
    for override in overrides:
        _apply_override(tree, override, problems)
    recipe = build(Recipe, tree, "", problems)
    if problems or not isinstance(recipe, Recipe):
        raise RecipeError(problems, str(path))
    recipe.check(str(path))
    return recipe


def read_mapping(path: Path) -> dict[Any, Any]:
    """The keys of a YAML file.

    Raises:
        UserError: it is not YAML, no mapping, or a key is given twice.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Strict)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, not a mapping of keys")
    return tree


def _over(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any]:
    """``below`` with the values of ``above``; sections are merged."""
    merged = dict(below)
    for key, value in above.items():
        there = below.get(key)
        merged[key] = _over(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return merged


def recipe_from_dict(tree: dict[str, Any], where: str) -> Recipe:
    """A recipe from its plain form, as :func:`recipe_to_dict` gives it."""
    problems: list[str] = []
    recipe = build(Recipe, tree, "", problems)
    if problems or not isinstance(recipe, Recipe):
        raise RecipeError(problems, where)
    recipe.check(where)
    return recipe


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """Plain dicts and lists, for YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value

    tree: dict[str, Any] = plain(dataclasses.asdict(recipe))
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level: ``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def override_value(override: str) -> Any:
    """What stands behind the first = of an override, read as YAML.

    Raises:
        UserError: it is not YAML.
    """
    try:
        return yaml.load(override.partition("=")[2], Loader=_Strict)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(
            f"override {override!r}: the value is not YAML: {why}; text that begins with * or looks like a "
            'date or number needs quotes, as in ["*.txt"]'
        ) from error


def _apply_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    key, equals, _ = override.partition("=")
    if not equals or not key:
        problems.append(f"override {override!r} is not of the form section.key=value")
        return
    try:
        value = override_value(override)
    except UserError as error:
        problems.append(str(error))
        return
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            problems.append(f"override {override!r}: {section!r} is a value, not a section")
            return
        node = child
    there = node.get(leaf)
    node[leaf] = _over(there, value) if isinstance(there, dict) and isinstance(value, dict) else value


def build(cls: type[Any], tree: Any, prefix: str, problems: list[str]) -> Any:
    """One dataclass from one mapping; what is wrong goes to ``problems``, then None is returned."""
    if not isinstance(tree, dict):
        problems.append(f"{prefix.rstrip('.') or 'the file'} must be a section of keys, not {tree!r}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}
    before = len(problems)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            hint = nearest(str(key), fields, prefix) or f"; known here: {', '.join(fields)}"
            problems.append(f"unknown key {prefix}{key}{hint}")
        else:
            values[key] = _convert(hints[key], value, prefix + str(key), problems)
    for name, entry in fields.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in values:
            problems.append(f"{prefix}{name} is missing")
    return cls(**values) if len(problems) == before else None


def nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    """The end of a message about a name that is not known; empty where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _convert(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """``value`` as the annotated type, or a problem. Nothing is guessed: a string is never a number."""
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key + ".", problems)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = (arg for arg in args if arg is not type(None))
        return _convert(inner, value, key, problems)
    if origin is Literal:
        if value in args:
            return value
        near = difflib.get_close_matches(str(value), [str(arg) for arg in args], n=1)
        problems.append(
            f"{key} is {value!r}, must be one of {', '.join(map(str, args))}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
        return None
    if origin in (dict, list):
        hint = origin
    if origin is tuple:
        return _convert_tuple(args, value, key, problems)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        problems.append(f"{key} is {value!r}, must be {_TYPE_NAMES[hint]}")
    return value


def _convert_tuple(args: tuple[Any, ...], value: Any, key: str, problems: list[str]) -> Any:
    if not isinstance(value, (list, tuple)):
        problems.append(f"{key} is {value!r}, must be a list")
        return None
    inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(inner) != len(value):
        problems.append(f"{key} has {len(value)} entries, must have {len(inner)}")
        return None
    return tuple(
        _convert(hint, entry, f"{key}[{i}]", problems) for i, (hint, entry) in enumerate(zip(inner, value, strict=True))
    )


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "a section of keys",
    list: "a list",
}
