"""The JSON handed to DeepSpeed: how to shard from a file, everything else from the recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.errors import RecipeError, UserError
from pretrain.recipe import Recipe
from pretrain.recipe_io import nearest

POLICY_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "fp16", "optimizer", "scheduler", "zero_optimization", "zero_allow_untested_optimizer", "data_types",
    "zero_force_ds_cpu_optimizer", "communication_data_type", "steps_per_print", "wall_clock_breakdown", "comms_logger",
    "flops_profiler", "aio", "activation_checkpointing", "prescale_gradients", "gradient_predivide_factor",
    "checkpoint", "dump_state", "memory_breakdown",
)  # fmt: skip
SWITCHES = (
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "prescale_gradients",
    "dump_state", "memory_breakdown",
)  # fmt: skip
COMMUNICATION_TYPES = ("fp32", "bf16", "fp16")  # as DeepSpeed writes them
SECTIONS = ("bf16", "comms_logger", "data_types", "flops_profiler", "aio", "activation_checkpointing", "checkpoint")
OF_THE_RECIPE = ("optimizer", "scheduler", "fp16")  # a file must not set them
SHIPPED = Path(__file__).resolve().parents[2] / "deepspeed_configs"


def deepspeed_config(recipe: Recipe, data_parallel_size: int) -> dict[str, Any]:
    """The sharding policy that the recipe names, with every value that the recipe owns filled in.

    Raises:
        UserError: no such file, or not JSON.
        RecipeError: keys or values that DeepSpeed does not take, or a value in the file that differs from the recipe,
            named with both sides.
    """
    path = find_policy(recipe.parallel.sharding)
    try:
        policy = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once_each)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(policy, dict):
        raise UserError(f"{path} holds {type(policy).__name__}, not an object")
    batch = recipe.batch
    owned: dict[str, Any] = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.global_batch_size // (batch.micro_batch_size * data_parallel_size),
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "bf16": {"enabled": recipe.precision == "bf16"},
    }
    problems = _policy_problems(policy, str(path))
    if problems:
        raise RecipeError(problems, f"the sharding of {recipe.name}")
    merged = _fill(policy, owned, "", str(path), problems)
    for forbidden in OF_THE_RECIPE:
        if forbidden in policy:
            problems.append(f"{path} sets {forbidden!r}, which the recipe owns; remove it there")
    if problems:
        raise RecipeError(problems, f"the recipe {recipe.name} with {path.name}")
    # Without ZeRO, DeepSpeed accumulates bf16 gradients in bf16 only.
    accumulate = "bf16" if recipe.precision == "bf16" and zero_stage(merged) == 0 else "fp32"
    types = merged.setdefault("data_types", {})
    if types.get("grad_accum_dtype") is None:
        types["grad_accum_dtype"] = accumulate
    problems = [f"{path} has {words}" for words in _mix_problems(merged, recipe.precision)]
    if problems:
        raise RecipeError(problems, f"the sharding of {recipe.name}")
    merged.setdefault("zero_force_ds_cpu_optimizer", False)  # offloaded or not, the optimizer is torch's AdamW
    if zero_stage(merged) == 0:
        merged["gradient_clipping"] = 0.0  # see pretrain.training.engine.UpdateGuard
    merged.setdefault("steps_per_print", 2**31)  # what is printed is ours
    return merged


def find_policy(name_or_path: str) -> Path:
    """A path as it is, or the name of a file in ``deepspeed_configs``."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name_or_path}.json"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(entry.stem for entry in SHIPPED.glob("*.json")))
    raise UserError(f"parallel.sharding is {name_or_path!r}: neither a file nor one of the shipped {names}")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the JSON; of a key that is given twice json would take the last, and DeepSpeed refuses it."""
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{', '.join(map(repr, twice))} given twice")
    return dict(pairs)


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _policy_problems(policy: dict[str, Any], path: str) -> list[str]:
    """What DeepSpeed would not take, or would ignore, and what would keep us from refusing a step."""
    problems = []
    known = [key for key in POLICY_KEYS if key not in OF_THE_RECIPE]
    for key in policy:
        if key not in POLICY_KEYS:
            hint = nearest(key, POLICY_KEYS) or f"; known here: {', '.join(known)}"
            problems.append(f"{path} has {key!r}, which is no key of such a file here{hint}")
    zero = policy.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        problems.append(f"{path} has zero_optimization {zero!r}, must be an object with stage 0, 1, 2 or 3")
        return problems
    for section in SECTIONS:
        if not isinstance(policy.get(section, {}), dict):
            problems.append(f"{path} has {section} {policy[section]!r}, must be an object")
    problems += [f"{path} has {words}" for words in _plain_problems(policy)]
    for section, key in (("zero_optimization", "compute_grad_norm"), ("bf16", "check_grad_overflow")):
        if isinstance(policy.get(section), dict) and policy[section].get(key) is False:
            problems.append(f"{path} turns {section}.{key} off, without which no step could be refused; remove it")
    return problems or _section_problems(policy, path)


def _plain_problems(policy: dict[str, Any]) -> Iterator[str]:
    """Of values that are no section; DeepSpeed does not check most of them, or only when all ranks run.

    What is "auto" is refused where values are filled in; null is as if it were not there.
    """
    from deepspeed.runtime.config import DtypeEnum

    policy = {key: value for key, value in policy.items() if value != "auto" and value is not None}
    for key in SWITCHES:
        if not isinstance(policy.get(key, False), bool):
            yield f"{key} = {policy[key]!r}, must be true or false"
    given = policy.get("communication_data_type", COMMUNICATION_TYPES[0])
    if str(given).lower() not in COMMUNICATION_TYPES:
        yield f"communication_data_type = {given!r}, must be one of {', '.join(COMMUNICATION_TYPES)}"
    types, checkpoint = policy.get("data_types"), policy.get("checkpoint")
    if isinstance(types, dict) and types.get("grad_accum_dtype") is not None:
        try:
            DtypeEnum(types["grad_accum_dtype"])
        except ValueError:
            yield f"data_types.grad_accum_dtype = {types['grad_accum_dtype']!r}, which DeepSpeed does not know"
    for key in ("load_universal", "use_node_local_storage"):
        if isinstance(checkpoint, dict) and checkpoint.get(key):
            yield f"checkpoint.{key}, with which checkpoints of this project could not be loaded; remove it"
    for key, least in (("steps_per_print", 1), ("gradient_predivide_factor", 1e-6)):
        value = policy.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            yield f"{key} = {value!r}, must be a number of at least {least}"


def _mix_problems(config: dict[str, Any], precision: str) -> Iterator[str]:
    """What DeepSpeed takes each for itself, but not together: it says so with a traceback when all ranks run, or, of
    ``elastic_checkpoint``, when the run is to go on."""
    from deepspeed.runtime.config import DtypeEnum

    zero, stage = config.get("zero_optimization", {}), zero_stage(config)
    if zero.get("elastic_checkpoint"):
        yield "zero_optimization.elastic_checkpoint, with which a run could not go on; remove it"
    granularity = "stage3_module_granularity_threshold"
    if stage == 3 and (zero.get(granularity) or zero.get(granularity.removeprefix("stage3_"))):
        yield f"zero_optimization.{granularity}, with which the output head has no weights; remove it"
    if stage in (2, 3) and zero.get("reduce_scatter", True):
        for key, usual in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
            if config.get(key) not in (None, usual):
                yield f"{key} = {config[key]}, which ZeRO {stage} takes only without zero_optimization.reduce_scatter"
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer"):
        yield "zero_force_ds_cpu_optimizer = True, but the optimizer is torch's AdamW; remove it"
    if offload.get("ratio", 1) != 1:
        yield f"zero_optimization.offload_optimizer.ratio = {offload['ratio']}, must be 1 with torch's AdamW"
    kind = config["data_types"]["grad_accum_dtype"]
    if stage == 0 and DtypeEnum(kind) is not DtypeEnum(precision):
        yield f"data_types.grad_accum_dtype = {kind!r}; without ZeRO, DeepSpeed takes only the recipe's {precision}"
    low = [key for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states") if config["bf16"].get(key)]
    if len(low) == 1:
        yield f"bf16.{low[0]} alone; DeepSpeed takes bf16_master_weights_and_grads and bf16_optimizer_states together"


def _section_problems(policy: dict[str, Any], path: str) -> list[str]:
    """What DeepSpeed's own classes say about the sections that it has classes for."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    problems = []
    for section, cls in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("bf16", DeepSpeedBF16Config),
        ("comms_logger", CommsLoggerConfig),
    ):
        try:
            cls(**policy.get(section, {}))
        except ValidationError as error:
            known = [name for key, field in cls.model_fields.items() for name in (key, field.alias) if name]
            problems += [f"{path} has {_in_words(section, entry, known)}" for entry in error.errors()]
        except AssertionError as error:  # an old key together with the new one
            problems.append(f"{path} has {section}: {error}")
    return problems


def _in_words(section: str, entry: Any, known: list[str]) -> str:
    """One of pydantic's errors."""
    key = ".".join([section, *map(str, entry["loc"])])
    if entry["type"] == "extra_forbidden":
        hint = nearest(key.removeprefix(f"{section}."), known, f"{section}.")
        return f"{key}, which DeepSpeed does not know{hint}"
    return f"{key} = {entry['input']!r}: {entry['msg']}" if entry["loc"] else f"{key}: {entry['msg']}"


def _fill(given: dict[str, Any], owned: dict[str, Any], prefix: str, path: str, problems: list[str]) -> dict[str, Any]:
    """``given`` with ``owned`` values in the place of "auto" or nothing; differences go to ``problems``."""
    merged = dict(given)
    for key, value in owned.items():
        there = given.get(key, "auto")
        if isinstance(value, dict):
            merged[key] = _fill({} if there == "auto" else there, value, f"{prefix}{key}.", path, problems)
        elif there == "auto" or there == value:
            merged[key] = value
        else:
            problems.append(f'{path} has {prefix}{key} = {there}, the recipe says {value}; put "auto" in the file')
    for key, value in given.items():
        if value == "auto" and key not in owned:
            problems.append(f"{path} has {prefix}{key} = auto, but the recipe does not own that value")
        elif isinstance(value, dict) and key not in owned:
            _fill(value, {}, f"{prefix}{key}.", path, problems)
    return merged
