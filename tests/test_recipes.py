"""Every shipped recipe loads, is consistent, and says what its name says; recipes survive a round trip."""

from __future__ import annotations

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

from pretrain.__main__ import parse
from pretrain.errors import RecipeError, UserError
from pretrain.model.size import model_size
from pretrain.place import data_parallel_size_of
from pretrain.recipe import Recipe
from pretrain.recipe_io import SHIPPED, flatten, load_recipe, recipe_from_dict, recipe_to_dict
from pretrain.training import deepspeed_config as policies
from tests.small_runs import change

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def test_all_named_recipes_are_here():
    assert set(NAMES) >= {
        "quickstart_plain", "quickstart_agg", "wikitext2_mle", "wikitext2_agg", "gpt2_small_agg",
        "gpt2_medium_wikitext103_mle", "gpt2_medium_wikitext103_agg", "llama_1b3_agg",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_is_whole(name):
    recipe = load_recipe(name)
    size = data_parallel_size_of(recipe, recipe.local_world_size)
    config = policies.deepspeed_config(recipe, size)
    assert (
        config["train_batch_size"]
        == config["train_micro_batch_size_per_gpu"] * size * (config["gradient_accumulation_steps"])
    )
    assert recipe_from_dict(recipe_to_dict(recipe), name) == recipe


@pytest.mark.parametrize(
    ("gated", "plain"),
    [
        ("quickstart_agg", "quickstart_plain"),
        ("wikitext2_agg", "wikitext2_mle"),
        ("gpt2_medium_wikitext103_agg", "gpt2_medium_wikitext103_mle"),
    ],
)
def test_pairs_differ_in_the_objective_only(gated, plain):
    one, other = load_recipe(gated), load_recipe(plain)
    assert one.objective.method == "agg" and other.objective.method == "mle"
    assert dataclasses.replace(one, name="", objective=other.objective) == dataclasses.replace(other, name="")


def test_peers_and_ablations_differ_from_the_quick_start_in_one_thing():
    seen = set()
    for name in (name for name in NAMES if name.startswith(("peer_", "ablation_"))):
        recipe = load_recipe(name)
        base = load_recipe("quickstart_agg" if name.startswith("ablation_") else "quickstart_plain")
        flat, below = flatten(recipe_to_dict(recipe)), flatten(recipe_to_dict(base))
        changed = {key: value for key, value in flat.items() if value != below[key] and key != "name"}
        assert flat["name"] != below["name"] and len({key.split(".")[0] for key in changed}) == 1
        seen |= changed.keys()
    assert seen == {
        "objective.z_loss", "objective.cosine_penalty", "objective.mean_penalty", "objective.center_rows",
        "objective.gates", "objective.rare_rows", "objective.rare_rows_after", "objective.switch_step",
        "optimizer.couple_embeddings", "model.logit_soft_cap", "model.tied_embeddings",
    }  # fmt: skip


def test_a_base_is_merged_key_by_key_and_has_none_itself(tmp_path):
    base, top, far = (tmp_path / f"{name}.yaml" for name in ("base", "top", "far"))
    base.write_text("name: a\ndata: {folder: d, tokenizer: {vocab_size: 300}}\nbatch: {train_steps: 3}\n")
    top.write_text(
        f"base: {base}\nname: b\ndata: {{tokenizer: {{model_type: unigram}}}}\nspikes: {{on_outlier: stop}}\n"
    )
    recipe = load_recipe(str(top), ["batch.train_steps=4"])
    tokenizer = recipe.data.tokenizer
    assert (recipe.name, recipe.data.folder, recipe.batch.train_steps) == ("b", "d", 4)
    assert (tokenizer.vocab_size, tokenizer.model_type, recipe.spikes.on_outlier) == (300, "unigram", "stop")
    far.write_text(f"base: {top}\nname: c\n")
    with pytest.raises(UserError, match="which has a base itself"):
        load_recipe(str(far))
    top.write_text("base: base.yaml\nname: b\n")
    assert load_recipe(str(top)).data.folder == "d"
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "top.yaml").write_text("base: ../base.yaml\nname: b\n")
    assert load_recipe(str(tmp_path / "deeper" / "top.yaml")).data.folder == "d"
    far.write_text("base: nowhere\nname: c\n")
    with pytest.raises(UserError, match="no recipe 'nowhere'"):
        load_recipe(str(far))


def test_a_section_as_an_override_leaves_its_other_keys():
    optimizer = load_recipe("gpt2_medium_wikitext103_agg", ["optimizer={learning_rate: 3e-4}"]).optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (3e-4, (0.9, 0.98), 0.01)


def test_yaml_merge_keys(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("name: x\ndata: {folder: d}\noptimizer: {<<: {learning_rate: 0.5, epsilon: 1}, epsilon: 1e-9}\n")
    optimizer = load_recipe(str(path)).optimizer
    assert (optimizer.learning_rate, optimizer.epsilon) == (0.5, 1e-9)
    path.write_text("name: x\ndata: {folder: d}\noptimizer: {<<: {epsilon: 1}, epsilon: 2, epsilon: 3}\n")
    with pytest.raises(UserError, match="key 'epsilon' is given twice"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.z_loss=-1"], "objective.z_loss is -1"),
        (["objective.cosine_penalty=.inf"], "objective.cosine_penalty is inf"),
        (["objective.mean_penalty=.nan"], "objective.mean_penalty is nan"),
        (["model.logit_soft_cap=-30"], "model.logit_soft_cap is -30"),
        (["model.logit_soft_cap=30", "objective.label_smoothing=0.1"], "do not go together"),
        (["objective.switch_step=3"], "switch_step and objective.rare_rows_after belong together"),
        (["objective.rare_rows_after=train"], "switch_step and objective.rare_rows_after belong together"),
        (["objective.switch_step=401", "objective.rare_rows_after=train"], "at most batch.train_steps \\(400\\)"),
        (["objective.method=mle", "objective.gates=g1"], "need objective.method agg"),
        (["objective.method=mle", "objective.rare_rows=freeze"], "need objective.method agg"),
        (["objective.gates=g1", "objective.rare_rows=freeze"], "never gates or blocks"),
        (["objective.center_rows=true", "objective.rare_rows=freeze"], "would move the rows"),
    ],
)
def test_impossible_peers_and_treatments(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart_agg", overrides)


def test_the_papers_setting():
    recipe = load_recipe("gpt2_medium_wikitext103_agg")
    assert recipe.tokens_per_step == recipe.objective.reference_batch_tokens == 32_768
    assert (recipe.model.num_layers, recipe.model.hidden_size, recipe.model.num_attention_heads) == (24, 1024, 16)
    assert recipe.objective.alpha == 0.03 and recipe.batch.train_steps == 50_000
    assert recipe.model.tied and recipe.model.hidden_dropout == recipe.model.attention_dropout == 0.1
    optimizer, schedule = recipe.optimizer, recipe.schedule
    assert (optimizer.betas, optimizer.learning_rate) == ((0.9, 0.98), 7e-4)
    assert (optimizer.weight_decay, optimizer.gradient_clipping) == (0.01, 0.0)
    assert (schedule.kind, schedule.warmup_steps) == ("inverse_sqrt", 4000)


def test_the_1b3_is_one():
    recipe = load_recipe("llama_1b3_agg")
    assert model_size(recipe.model, 32_000).total == pytest.approx(1.3e9, rel=0.05)
    parallel = recipe.parallel
    assert (parallel.tensor_model_parallel_size, parallel.data_parallel_size, parallel.sharding) == (8, 2, "zero1")


@pytest.mark.parametrize("name", sorted(path.stem for path in policies.SHIPPED.glob("*.json")))
def test_every_sharding_file_takes_the_recipes_values(name, prepared_recipe):
    recipe = change(prepared_recipe, parallel={"sharding": name}, precision="bf16")
    config = policies.deepspeed_config(recipe, 1)
    assert config["bf16"] == {"enabled": True} and config["gradient_accumulation_steps"] == 4
    assert str(policies.zero_stage(config)) in name
    assert config["gradient_clipping"] == (0.0 if policies.zero_stage(config) == 0 else 1.0)


def test_no_key_of_a_recipe_is_unread():
    """Each field is read somewhere other than where it is declared and range-checked."""
    folder = Path(policies.__file__).parents[1]
    sources = [path for path in folder.rglob("*.py") if path.name not in ("recipe.py", "recipe_io.py")]
    read = {
        node.attr
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    # read through properties of the recipe: effective_alpha, run_folder, tied, ffn_size, query_groups, local_world_size
    through_properties = {"alpha", "output_root", "tied_embeddings", "ffn_hidden_size", "num_query_groups"}

    def fields(cls: type) -> set[str]:
        hints = typing.get_type_hints(cls)
        nested = [fields(hint) if dataclasses.is_dataclass(hint) else {name} for name, hint in hints.items()]
        return set().union(*nested)

    assert len(fields(Recipe)) > 50 and fields(Recipe) - read - through_properties == set()


def test_numbers_in_scientific_notation_and_nothing_else_becomes_a_number():
    assert load_recipe("quickstart_agg", ["optimizer.learning_rate=1e-3"]).optimizer.learning_rate == 1e-3
    with pytest.raises(RecipeError, match="learning_rate is 'fast', must be a number"):
        load_recipe("quickstart_agg", ["optimizer.learning_rate=fast"])
    with pytest.raises(RecipeError, match="learning_rate is inf, must be finite"):
        load_recipe("quickstart_agg", ["optimizer.learning_rate=.inf"])
    with pytest.raises(RecipeError, match="learning_rate is inf, must be finite"):
        load_recipe("quickstart_agg", [f"optimizer.learning_rate={10**400}"])
    with pytest.raises(RecipeError, match="seed is -1"):
        load_recipe("quickstart_agg", ["seed=-1"])
    with pytest.raises(RecipeError, match="train_steps is True"):
        load_recipe("quickstart_agg", ["batch.train_steps=true"])


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("name: x\ndata: {folder: d}\nbatch: {train_steps: 3}\nbatch: {micro_batch_size: 2}\n")
    with pytest.raises(UserError, match="key 'batch' is given twice"):
        load_recipe(str(path))


def test_overrides_may_stand_behind_options(capsys):
    options = parse(["train", "quickstart_agg", "name=a", "--stop-at-step", "3", "batch.train_steps=9"])
    assert options.overrides == ["name=a", "batch.train_steps=9"] and options.stop_at_step == 3
    for words in (["train", "quickstart_agg", "--stop-at-step", "3", "--no-such"], ["report", "runs/a", "--bad"]):
        with pytest.raises(SystemExit) as stopped:
            parse(words)
        assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err
