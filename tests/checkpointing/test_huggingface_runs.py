"""``checkpoint export`` of a run, and runs that start with such a folder (``model.init_from``)."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.__main__ import main
from pretrain.checkpointing.folder import checkpoints_in, step_of
from pretrain.commands import check_run
from pretrain.data.loader import TrainingBatches, training_dataset
from pretrain.data.prepared import PreparedData
from pretrain.errors import UserError
from pretrain.recipe_io import recipe_to_dict
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks
from tests.small_runs import change, read_metrics, train_on_ranks
from tests.training.processes import write_recipe


@pytest.fixture(scope="module")
def trained(prepared_recipe, tmp_path_factory):
    """A run on two tensor-parallel ranks, and what ``checkpoint export`` made of it."""
    root = tmp_path_factory.mktemp("trained")
    recipe = change(
        prepared_recipe,
        output_root=str(root),
        model={"style": "llama", "num_attention_heads": 8, "num_query_groups": 4, "rope_base": 500},
        parallel={"tensor_model_parallel_size": 2},
        checkpoint={"every_steps": 3},
    )
    train_on_ranks(recipe, 2)
    assert main(["checkpoint", "export", str(recipe.run_folder), "--output", str(root / "out")]) == 0
    return recipe, root / "out"


def generate(rank, world_size, recipe, checkpoint):
    from pretrain.evaluation.generate import generate_text
    from pretrain.topology import connect

    return generate_text(checkpoint, recipe, connect(recipe), "abc de", 20, 0.0)


def test_text_of_a_run_is_the_text_of_its_export(trained):
    recipe, folder = trained
    ours = run_ranks(generate, 2, recipe, RunFolder(recipe.run_folder).checkpoints / "step_00000006")[0]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("abc de", return_tensors="pt")
    theirs = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(theirs[0], skip_special_tokens=True) == ours and len(ours) > len("abc de")


def test_export_of_an_earlier_step(trained, tmp_path, capfd):
    recipe, folder = trained
    run, latest = str(recipe.run_folder), load_file(folder / "model.safetensors")
    assert main(["checkpoint", "export", run, "--output", str(tmp_path / "3"), "--step", "3"]) == 0
    assert "step_00000003: 21 tensors" in capfd.readouterr().out
    earlier = load_file(tmp_path / "3" / "model.safetensors")
    assert earlier.keys() == latest.keys() and all(not torch.equal(earlier[name], latest[name]) for name in latest)
    assert main(["checkpoint", "export", run, "--output", str(tmp_path / "5"), "--step", "5"]) == 2
    assert "has no checkpoint of step 5; there are: 3, 6" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("tensor_parallel", "world_size", "stage", "precision"),
    [(1, 1, 0, "fp32"), (2, 2, 1, "fp32"), (2, 4, 3, "fp32"), (1, 2, 2, "fp32"), (2, 2, 3, "bf16")],
)
def test_a_run_starts_with_the_weights(trained, tmp_path, tensor_parallel, world_size, stage, precision):
    """Its first loss is the one that transformers gives for the same batch."""
    source, folder = trained
    recipe = change(
        source,
        output_root=str(tmp_path),
        precision=precision,
        model={"init_from": str(folder)},
        parallel={"tensor_model_parallel_size": tensor_parallel, "sharding": f"zero{stage}"},
        batch={"train_steps": 2},
    )
    first = train_on_ranks(recipe, world_size)[0]
    dataset = training_dataset(PreparedData.open(recipe), recipe)
    batches = TrainingBatches(
        dataset, micro_batch_size=8, global_batch_size=8, data_parallel_rank=0, data_parallel_size=1
    )
    ((inputs, targets),) = next(iter(batches))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 2e-3)
    assert abs(expected - read_metrics(source)[0]["loss"]) > 0.1  # what a run without these weights starts with


def test_a_resumed_run_needs_the_folder_no_more(trained, tmp_path):
    source, folder = trained
    copy = shutil.copytree(folder, tmp_path / "moved")
    recipe = change(source, output_root=str(tmp_path), model={"init_from": str(copy)}, batch={"train_steps": 4})
    whole = train_on_ranks(change(recipe, name="whole"), 2)
    train_on_ranks(recipe, 2, stop_at_step=2)
    shutil.rmtree(copy)
    run = RunFolder(recipe.run_folder)
    check_run(recipe, 2, run, checkpoints_in(run.checkpoints))  # as train does before it starts ranks
    train_on_ranks(recipe, 2, stop_at_step=3)
    without = change(recipe, model={"init_from": ""})
    assert [record["loss"] for record in train_on_ranks(without, 2)] == [record["loss"] for record in whole]
    (change_made,) = run.changes_file.read_text().splitlines()
    assert f"model.init_from: there '{copy}', asked for ''" in change_made


def test_a_run_that_cannot_start_again_is_not_set_aside(trained, tmp_path, capfd):
    source, folder = trained
    copy = shutil.copytree(folder, tmp_path / "weights")
    recipe = change(source, output_root=str(tmp_path), model={"init_from": str(copy)}, batch={"train_steps": 2})
    train_on_ranks(recipe, 2)
    (copy / "model.safetensors").unlink()
    assert main(["train", write_recipe(recipe, tmp_path), "--from-scratch"]) == 2
    assert "weights" in capfd.readouterr().err
    run = RunFolder(recipe.run_folder)
    assert [step_of(path) for path in checkpoints_in(run.checkpoints)] == [2]
    assert not (run.path / "aside").exists()


def test_train_refuses_before_anything_is_written(trained, tmp_path, capfd):
    source, folder = trained
    recipe = change(source, output_root=str(tmp_path / "runs"), model={"init_from": str(folder), "hidden_size": 64})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)), encoding="utf-8")
    assert main(["train", str(path)]) == 2
    message = capfd.readouterr().err
    assert "model.embed_tokens.weight has shape (500, 32), the recipe makes it (500, 64)" in message
    assert "Traceback" not in message and not (tmp_path / "runs").exists()


def test_a_run_that_is_older_than_the_key_goes_on(prepared_recipe, tmp_path):
    recipe = change(prepared_recipe, output_root=str(tmp_path))
    folder = RunFolder(recipe.run_folder)
    folder.claim(recipe, "")
    folder.metrics_file.touch()
    tree = yaml.safe_load(folder.recipe_file.read_text())
    del tree["model"]["init_from"]
    folder.recipe_file.write_text(yaml.safe_dump(tree))
    folder.claim(recipe, "")
    with pytest.raises(UserError, match="model.init_from: there '', asked for"):
        folder.claim(change(recipe, model={"init_from": "elsewhere"}), "")
