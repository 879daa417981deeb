"""What is impossible in a recipe: values, and combinations of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.recipe import CorpusRecipe, ObjectiveRecipe, Recipe, SpikesRecipe

MOST_NAME_BYTES = 255  # of file systems
MOST_HANG_MINUTES = 525_600  # a year; clocks that count nanoseconds in 64 bits end at 292


def problems_of(recipe: Recipe) -> list[str]:
    """A line for each; empty if the recipe can be run."""
    return [
        *_range_problems(recipe),
        *_name_problems(recipe),
        *_corpus_problems(recipe.data.corpus),
        *_objective_problems(recipe.objective),
        *_peer_problems(recipe),
        *_model_problems(recipe),
        *_schedule_problems(recipe),
        *_spikes_problems(recipe.spikes),
    ]


def batch_problems(recipe: Recipe, data_parallel_size: int) -> list[str]:
    """What forbids cutting the global batch into micro-batches over this many data-parallel ranks."""
    batch = recipe.batch
    per_pass = batch.micro_batch_size * data_parallel_size
    if batch.global_batch_size % per_pass == 0:
        return []
    return [
        f"batch.global_batch_size ({batch.global_batch_size}) is not a multiple of batch.micro_batch_size x "
        f"data-parallel size ({batch.micro_batch_size} x {data_parallel_size} = {per_pass})"
    ]


def _range_problems(recipe: Recipe) -> list[str]:
    model, objective, batch = recipe.model, recipe.objective, recipe.batch
    optimizer, parallel, reporting = recipe.optimizer, recipe.parallel, recipe.reporting
    at_least_one = {
        "data.prepare_processes": recipe.data.prepare_processes,
        "data.tokenizer.training_sentences": recipe.data.tokenizer.training_sentences,
        "data.tokenizer.vocab_size": recipe.data.tokenizer.vocab_size,
        "model.num_layers": model.num_layers,
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.sequence_length": model.sequence_length,
        "model.vocab_multiple_of": model.vocab_multiple_of,
        "model.rope_base": model.rope_base,
        "objective.reference_batch_tokens": objective.reference_batch_tokens,
        "objective.window_steps": objective.window_steps,
        "batch.micro_batch_size": batch.micro_batch_size,
        "batch.global_batch_size": batch.global_batch_size,
        "batch.train_steps": batch.train_steps,
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "parallel.data_parallel_size": parallel.data_parallel_size,
        "checkpoint.keep_last": recipe.checkpoint.keep_last,
        "reporting.log_every_steps": reporting.log_every_steps,
        "spikes.window_steps": recipe.spikes.window_steps,
        "spikes.max_in_a_row": recipe.spikes.max_in_a_row,
    }
    not_negative = {
        "schedule.warmup_steps": recipe.schedule.warmup_steps,
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.gradient_clipping": optimizer.gradient_clipping,
        "checkpoint.every_steps": recipe.checkpoint.every_steps,
        "checkpoint.keep_every_steps": recipe.checkpoint.keep_every_steps,
        "reporting.geometry_every_steps": reporting.geometry_every_steps,
        "reporting.validate_every_steps": reporting.validate_every_steps,
        "reporting.validation_sequences": reporting.validation_sequences,
        "hang_timeout_minutes": recipe.hang_timeout_minutes,
    }
    positive = {
        "objective.alpha": objective.alpha,
        "objective.rare_fraction": objective.rare_fraction,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.epsilon": optimizer.epsilon,
        "model.init_std": model.init_std,
        "model.norm_epsilon": model.norm_epsilon,
    }
    numbers = {**at_least_one, **not_negative, **positive}
    below_one = {
        "model.hidden_dropout": model.hidden_dropout,
        "model.attention_dropout": model.attention_dropout,
        "objective.label_smoothing": objective.label_smoothing,
        "optimizer.betas[0]": optimizer.betas[0],
        "optimizer.betas[1]": optimizer.betas[1],
    }
    problems = [
        f"{key} is {value}, must be at least 1"
        for key, value in at_least_one.items()
        if value is not None and value < 1
    ]
    problems += [f"{key} is {value}, must not be negative" for key, value in not_negative.items() if not value >= 0]
    problems += [
        f"{key} is {value}, must be above 0" for key, value in positive.items() if value is not None and not value > 0
    ]
    problems += [f"{key} is {value}, must be finite" for key, value in numbers.items() if value == math.inf]
    if MOST_HANG_MINUTES < recipe.hang_timeout_minutes < math.inf:
        problems.append(
            f"hang_timeout_minutes is {recipe.hang_timeout_minutes:g}, must be at most {MOST_HANG_MINUTES:,}; 0: off"
        )
    problems += [f"{key} is {value}, must be in [0, 1)" for key, value in below_one.items() if not 0 <= value < 1]
    return problems


def _name_problems(recipe: Recipe) -> list[str]:
    problems = []
    if not 0 <= recipe.seed < 2**32:
        problems.append(f"seed is {recipe.seed}, must be at least 0 and below 2**32")
    if not recipe.name or "/" in recipe.name or recipe.name in (".", ".."):
        problems.append(f"name is {recipe.name!r}, must be a plain folder name: the run is written to output_root/name")
    if (size := len(recipe.name.encode(errors="surrogatepass"))) > MOST_NAME_BYTES:
        problems.append(f"name has {size} bytes, must have at most {MOST_NAME_BYTES}: it is the name of a folder")
    if not recipe.name.isprintable() or '"' in recipe.name or "\\" in recipe.name:  # would end a line of a job script
        problems.append(f"name is {recipe.name!r}, must have no double quotes, backslashes or control characters")
    for key, path in (("output_root", recipe.output_root), ("data.folder", recipe.data.folder)):
        if "\0" in path:
            problems.append(f"{key} is {path!r}, but no path has a null character")
    if not recipe.data.folder:
        problems.append("data.folder is empty: name the folder for the tokenizer and the shards")
    return problems


def _objective_problems(objective: ObjectiveRecipe) -> list[str]:
    problems = []
    if objective.alpha is not None and objective.rare_fraction is not None:
        problems.append("objective.alpha and objective.rare_fraction both say what is rare: give one of them")
    if objective.rare_fraction is not None and objective.rare_fraction >= 1:
        problems.append(f"objective.rare_fraction is {objective.rare_fraction}, must be below 1")
    return problems


def _peer_problems(recipe: Recipe) -> list[str]:
    """Of what may be added to the objective, and of how rare rows are treated."""
    objective, cap = recipe.objective, recipe.model.logit_soft_cap
    factors = {
        "objective.z_loss": objective.z_loss,
        "objective.cosine_penalty": objective.cosine_penalty,
        "objective.mean_penalty": objective.mean_penalty,
        "model.logit_soft_cap": cap,
    }
    problems = [
        f"{key} is {value}, must be 0 (off) or above, and finite"
        for key, value in factors.items()
        if not 0 <= value < math.inf
    ]
    if cap and objective.label_smoothing:
        problems.append("model.logit_soft_cap and objective.label_smoothing do not go together: give one of them")
    step, after = objective.switch_step, objective.rare_rows_after
    if (step is None) != (after is None):
        problems.append("objective.switch_step and objective.rare_rows_after belong together: give both or neither")
    steps = recipe.batch.train_steps
    if step is not None and not 1 < step <= steps:
        problems.append(f"objective.switch_step is {step}, must be above 1 and at most batch.train_steps ({steps})")
    treatments = {objective.rare_rows} | ({after} if after is not None else set())
    if objective.method == "mle" and (treatments != {"gate"} or objective.gates != "both"):
        problems.append(
            "objective.rare_rows, rare_rows_after and gates need objective.method agg, which tells the rare"
        )
    if objective.gates != "both" and not treatments & {"gate", "block"}:
        problems.append(f"objective.gates is {objective.gates}, but objective.rare_rows never gates or blocks")
    if objective.center_rows and "freeze" in treatments:
        problems.append("objective.center_rows would move the rows that objective.rare_rows freezes: give one of them")
    return problems


def _corpus_problems(corpus: CorpusRecipe) -> list[str]:
    problems = []
    if corpus.source == "hub":
        if not corpus.hub_name:
            problems.append("data.corpus.source is hub, but data.corpus.hub_name is empty")
    elif corpus.source != "embedded" and not corpus.train:
        problems.append(f"data.corpus.source is {corpus.source}, but data.corpus.train names no files")
    for key, value in (("valid_fraction", corpus.valid_fraction), ("test_fraction", corpus.test_fraction)):
        if not 0 < value < 0.5:
            problems.append(f"data.corpus.{key} is {value}, must be above 0 and below 0.5")
    return problems


def _model_problems(recipe: Recipe) -> list[str]:
    model, degree = recipe.model, recipe.parallel.tensor_model_parallel_size
    if min(model.num_attention_heads, model.query_groups, degree) < 1:
        return []
    divisions = [
        ("model.hidden_size", model.hidden_size, "model.num_attention_heads", model.num_attention_heads),
        ("model.num_attention_heads", model.num_attention_heads, "model.num_query_groups", model.query_groups),
        ("model.num_attention_heads", model.num_attention_heads, "parallel.tensor_model_parallel_size", degree),
        ("model.num_query_groups", model.query_groups, "parallel.tensor_model_parallel_size", degree),
        ("model.ffn_hidden_size", model.ffn_size, "parallel.tensor_model_parallel_size", degree),
        ("model.vocab_multiple_of", model.vocab_multiple_of, "parallel.tensor_model_parallel_size", degree),
    ]
    problems = [
        f"{key} ({value}) is not divisible by {by_key} ({by})" for key, value, by_key, by in divisions if value % by
    ]
    if (
        recipe.parallel.data_parallel_size
        and min(recipe.batch.micro_batch_size, recipe.parallel.data_parallel_size) > 0
    ):
        problems += batch_problems(recipe, recipe.parallel.data_parallel_size)
    head_size, rest = divmod(model.hidden_size, model.num_attention_heads)
    if model.style == "llama" and rest == 0 and head_size % 2:
        problems.append("model.hidden_size / model.num_attention_heads must be even: RoPE turns pairs")
    return problems


def _spikes_problems(spikes: SpikesRecipe) -> list[str]:
    factors = {"loss_factor": spikes.loss_factor, "grad_norm_factor": spikes.grad_norm_factor}
    return [
        f"spikes.{key} is {factor}, must be 0 (off) or above 1 and finite"
        for key, factor in factors.items()
        if factor != 0 and not 1 < factor < math.inf
    ]


def _schedule_problems(recipe: Recipe) -> list[str]:
    schedule, steps = recipe.schedule, recipe.batch.train_steps
    problems = []
    if schedule.kind in ("cosine", "warmup_stable_decay") and schedule.warmup_steps >= steps:
        problems.append(
            f"schedule.warmup_steps ({schedule.warmup_steps}) leaves nothing of batch.train_steps ({steps})"
        )
    if schedule.kind == "inverse_sqrt" and schedule.warmup_steps < 1:
        problems.append(
            "schedule.kind inverse_sqrt falls from the end of the warm-up: schedule.warmup_steps must be at least 1"
        )
    if schedule.kind == "warmup_stable_decay" and schedule.decay_steps is None:
        problems.append("schedule.kind warmup_stable_decay needs schedule.decay_steps")
    if schedule.decay_steps is not None and not 1 <= schedule.decay_steps <= steps:
        problems.append(
            f"schedule.decay_steps is {schedule.decay_steps}, must be between 1 and batch.train_steps ({steps})"
        )
    if not 0 <= schedule.min_learning_rate_ratio <= 1:
        problems.append(f"schedule.min_learning_rate_ratio is {schedule.min_learning_rate_ratio}, must be in [0, 1]")
    return problems
