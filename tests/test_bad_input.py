"""What a user can get wrong: one clear message, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.__main__ import main
from pretrain.errors import CheckpointError, DamagedCheckpoint, PreflightError, RecipeError, UserError
from pretrain.recipe import Recipe
from pretrain.recipe_io import recipe_to_dict
from tests.small_runs import change


@pytest.fixture
def write_recipe(prepared_recipe: Recipe, tmp_path: Path):
    """A recipe file from the small recipe, with sections changed, and its output under tmp_path."""

    def write(**sections: object) -> str:
        recipe = change(prepared_recipe, output_root=str(tmp_path / "runs"), **sections)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_to_dict(recipe)), encoding="utf-8")
        return str(path)

    return write


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message that the command ends with."""
    capfd.readouterr()
    assert main(list(arguments)) == 2
    out, err = capfd.readouterr()
    message = err[err.index("error: ") :]
    assert "Traceback" not in out + err and message.count("error: ") == 1
    return message


def test_misspelt_key(write_recipe, capfd, tmp_path):
    message = refused(capfd, "train", write_recipe(), "optimizer.learnin_rate=1e-3")
    assert "unknown key optimizer.learnin_rate; did you mean optimizer.learning_rate?" in message
    assert not (tmp_path / "runs").exists()


def test_all_mistakes_at_once(write_recipe, capfd):
    message = refused(
        capfd, "train", write_recipe(), "model.stile=gpt2", "batch.train_steps=many", "precision=fp17", "nonsense"
    )
    assert "4 problems" in message
    for part in ("did you mean model.style", "batch.train_steps is 'many'", "precision is 'fp17'", "'nonsense' is not"):
        assert part in message


@pytest.mark.parametrize(
    ("rank", "error", "says"),
    [
        ((0, 0), RecipeError(["x is 0"]), "error: the recipe has 1 problem:\n  - x is 0\n"),
        ((3, 1), RecipeError(["x is 0"]), ""),  # the first rank of its node says it
        ((2, 0), RecipeError(["x is 0"]), "rank 2 on n1: error: the recipe has 1 problem:\n  - x is 0\n"),
        ((2, 0), CheckpointError("of another run"), "rank 2 on n1: error: of another run\n"),
        ((3, 1), DamagedCheckpoint(Path("a"), ["b"]), "rank 3 on n1: error: a is damaged: b\n"),
        ((3, 1), UserError("rank 3 on n1 is alone"), "error: rank 3 on n1 is alone\n"),
        ((2, 0), PreflightError("n1 is empty"), ""),  # all ranks agreed on it
        ((0, 0), PreflightError("n1 is empty"), "error: n1 is empty\n"),
    ],
)
def test_who_says_what_is_wrong(monkeypatch, capfd, rank, error, says):
    def fail(options):
        raise error

    monkeypatch.setattr("pretrain.commands.prepare", fail)
    monkeypatch.setattr("pretrain.__main__.FOR_ANOTHER_TO_SAY", 0.0)
    for name, value in {"RANK": rank[0], "LOCAL_RANK": rank[1], "SLURMD_NODENAME": "n1"}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["prepare", "quickstart"]) == 2
    assert capfd.readouterr().err == says


def test_one_of_two_ranks_says_what_is_wrong(write_recipe, tmp_path):
    """Both find it by themselves, and torchrun ends them as soon as one has."""
    script = tmp_path / "late_first_rank.py"
    script.write_text(
        "import os, sys, time; from pretrain.__main__ import main\n"
        "if os.environ['RANK'] == '0': time.sleep(3)\n"
        "sys.exit(main())\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), "train",
         write_recipe(), "batch.train_steps=many"],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
    assert "\nerror: " in "\n" + done.stderr and "batch.train_steps is 'many'" in done.stderr


def test_values_out_of_range_all_at_once(write_recipe, capfd):
    message = refused(
        capfd, "train", write_recipe(), "objective.alpha=0", "model.num_layers=0", "schedule.warmup_steps=600",
        "optimizer.learning_rate=-1", "name=a/b",
    )  # fmt: skip
    for part in ("objective.alpha is 0", "model.num_layers is 0", "warmup_steps (600)", "learning_rate is -1", "'a/b'"):
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["parallel.tensor_model_parallel_size=3"], "model.num_attention_heads (4) is not divisible by"),
        (["model.num_query_groups=3"], "model.num_attention_heads (4) is not divisible by model.num_query_groups (3)"),
        (["model.hidden_size=30"], "model.hidden_size (30) is not divisible by model.num_attention_heads (4)"),
        (["batch.global_batch_size=7"], "batch.global_batch_size (7) is not a multiple of batch.micro_batch_size"),
        (["parallel.data_parallel_size=3"], "(2 x 3 = 6)"),
    ],
)
def test_what_does_not_divide(write_recipe, capfd, tmp_path, overrides, part):
    assert part in refused(capfd, "train", write_recipe(), *overrides)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("name=2024-13-45", "'2024-13-45' is no date or number: month must be in 1..12"),
        ("seed=0x_", "'0x_' is no date or number"),
        ("seed=0777", "0777 is 511 in YAML: write that, or quotes around it"),
        ("checkpoint.every_steps=1:30", "1:30 is 90 in YAML"),
        ("data.corpus.train=[*.txt]", 'begins with * or looks like a date or number needs quotes, as in ["*.txt"]'),
        ("name=\udcff", "the value is not YAML: unacceptable character"),
        ('name=["a", {b: 1}', "the value is not YAML: expected"),
    ],
)
def test_override_that_is_not_yaml(write_recipe, capfd, tmp_path, override, part):
    message = refused(capfd, "train", write_recipe(), override)
    assert part in message and f"override {override!r}: the value is not YAML" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\tb", "a\\", "a\x1b[31m"])
def test_name_that_breaks_a_line_of_a_job_script(write_recipe, capfd, name):
    message = refused(capfd, "train", write_recipe(), f"name={json.dumps(name)}")
    assert f"name is {name!r}, must have no double quotes, backslashes or control characters" in message


@pytest.mark.parametrize("key", ["output_root", "data.folder"])
def test_null_characters_in_paths(write_recipe, capfd, key):
    assert f"{key} is 'a\\x00b', but no path has" in refused(capfd, "train", write_recipe(), f'{key}="a\\0b"')


def test_name_that_is_too_long(write_recipe, capfd, tmp_path):
    message = refused(capfd, "train", write_recipe(), f"name={'a' * 300}")
    assert "name has 300 bytes, must have at most 255" in message
    assert not (tmp_path / "runs").exists()
    assert "error: cannot use aaa" in (message := refused(capfd, "train", "a" * 300))
    assert "File name too long" in message


@pytest.mark.parametrize("minutes", ["1e300", "525601"])
def test_time_limit_beyond_all_clocks(write_recipe, capfd, tmp_path, minutes):
    message = refused(capfd, "train", write_recipe(), f"hang_timeout_minutes={minutes}")
    assert f"hang_timeout_minutes is {float(minutes):g}, must be at most 525,600" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("temperature", ["nan", "inf", "-1"])
def test_temperature_that_is_none(capfd, tmp_path, temperature):
    message = refused(capfd, "generate", str(tmp_path), "--prompt", "x", f"--temperature={temperature}")
    assert f"--temperature is {float(temperature)}, must be 0 or a finite number above it" in message


def test_prompt_that_is_not_utf8(capfd, tmp_path):
    message = refused(capfd, "generate", str(tmp_path), "--prompt", "x\udcff")
    assert "--prompt 'x\\udcff' is not UTF-8" in message


def test_two_ways_to_say_what_is_rare(write_recipe, capfd):
    message = refused(capfd, "train", write_recipe(), "objective.rare_fraction=0.3")
    assert "objective.alpha and objective.rare_fraction both say what is rare" in message


def test_contradiction_with_the_deepspeed_file(write_recipe, capfd, tmp_path):
    policy = tmp_path / "mine.json"
    policy.write_text(
        json.dumps({"gradient_clipping": 0.5, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}})
    )
    message = refused(capfd, "train", write_recipe(), f"parallel.sharding={policy}")
    assert f"{policy} has gradient_clipping = 0.5, the recipe says 1.0" in message
    assert "bf16.enabled = True, the recipe says False" in message


@pytest.mark.parametrize(
    ("content", "part"),
    [('{"zero_optimization": ', "is not JSON"), ('{"optimizer": {}}', "'optimizer', which the recipe owns"),
     ('{"wall_clock_breakdown": "auto"}', "the recipe does not own that value"),
     ('{"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}', "reduce_bucket_size = auto"),
     ('{"zero_optimizatoin": {"stage": 1}}', "did you mean zero_optimization?"),
     ('{"bananas": 5}', "'bananas', which is no key of such a file here; known here: train_batch_size"),
     ('{"zero_optimization": {"overlap_com": true}}', "did you mean zero_optimization.overlap_comm?"),
     ('{"zero_optimization": {"reduce_bucket_size": "big"}}', "zero_optimization.reduce_bucket_size = 'big'"),
     ('{"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}}', "offload_param.devise, which DeepS"),
     ('{"zero_optimization": {"cpu_offload": true, "offload_optimizer": {"device": "cpu"}}}', "'cpu_offload'"),
     ('{"zero_optimization": {"bananas": 1}}', "has zero_optimization.bananas, which DeepSpeed does not know\n"),
     ('{"bf16": {"enabld": false}}', "did you mean bf16.enabled?"),
     ('{"comms_logger": {"verbos": true}}', "did you mean comms_logger.verbose?"),
     ('{"data_types": "fp32"}', "data_types 'fp32', must be an object"),
     ('{"flops_profiler": 5}', "flops_profiler 5, must be an object"),
     ('{"zero_optimization": {"stage": "two"}}', "must be an object with stage 0, 1, 2 or 3"),
     ('{"bf16": true}', "bf16 True, must be an object"),
     ('{"checkpoint": "fast"}', "checkpoint 'fast', must be an object"),
     ('{"checkpoint": {"load_universal": true}}', "checkpoint.load_universal, with which checkpoints of this project"),
     ('{"prescale_gradients": "yes"}', "prescale_gradients = 'yes', must be true or false"),
     ('{"communication_data_type": "fp8"}', "communication_data_type = 'fp8', must be one of fp32, bf16, fp16"),
     ('{"data_types": {"grad_accum_dtype": 32}}', "grad_accum_dtype = 32, which DeepSpeed does not know"),
     ('{"steps_per_print": 0}', "steps_per_print = 0, must be a number of at least 1"),
     ('{"gradient_predivide_factor": "a"}', "gradient_predivide_factor = 'a', must be a number of at least"),
     ('{"zero_optimization": {"stage": 1, "stage": 2}}', "is not JSON: 'stage' given twice"),
     ('{"zero_optimization": {"stage": 1, "elastic_checkpoint": true}}', "with which a run could not go on; remove it"),
     ('{"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 9}}', "output head has no weights"),
     ('{"zero_optimization": {"stage": 2}, "prescale_gradients": true}', "prescale_gradients = True, which ZeRO 2"),
     ('{"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2}', "factor = 2, which ZeRO 3 takes only"),
     ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},"zero_force_ds_cpu_optimizer": true}',
      "zero_force_ds_cpu_optimizer = True, but the optimizer is torch's AdamW"),
     ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}', "ratio = 0.5, must"),
     ('{"data_types": {"grad_accum_dtype": "bf16"}}', "without ZeRO, DeepSpeed takes only the recipe's fp32"),
     ('{"bf16": {"bf16_optimizer_states": true}}', "bf16.bf16_optimizer_states alone")],
)  # fmt: skip
def test_deepspeed_file(write_recipe, capfd, tmp_path, content, part):
    policy = tmp_path / "mine.json"
    policy.write_text(content)
    assert part in refused(capfd, "train", write_recipe(), f"parallel.sharding={policy}")
    assert not (tmp_path / "runs").exists()
    assert "neither a file nor one of the shipped" in refused(capfd, "train", write_recipe(), "parallel.sharding=zero9")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (None, "no file"),
        (b"", "no text"),
        (b"good line\nbad \xff line\n", "UTF-8"),
    ],
)
def test_corpus(write_recipe, capfd, tmp_path, make, part):
    text = tmp_path / "corpus.txt"
    if make is not None:
        text.write_bytes(make)
    folder = tmp_path / "data"
    message = refused(capfd, "prepare", write_recipe(), f"data.corpus.train=[{text}]", f"data.folder={folder}")
    assert part in message and str(text) in message
    assert not (folder / "manifest.json").exists() and not list(folder.glob("train.*"))


def test_vocabulary_larger_than_the_corpus_supports(write_recipe, capfd, tmp_path):
    message = refused(
        capfd, "prepare", write_recipe(), "data.tokenizer.vocab_size=50000", f"data.folder={tmp_path / 'data'}"
    )
    assert "50000" in message.replace(",", "")
    assert not (tmp_path / "data" / "tokenizer.model").exists()


def test_not_prepared_yet(write_recipe, capfd, tmp_path):
    message = refused(capfd, "train", write_recipe(), f"data.folder={tmp_path / 'none'}")
    assert "python -m pretrain prepare" in message
    assert not (tmp_path / "runs").exists()


def test_too_little_text_for_one_sequence(write_recipe, capfd, tmp_path):
    message = refused(capfd, "train", write_recipe(), "model.sequence_length=1000000")
    assert "one sequence needs 1000001" in message and "give more text or shorten the sequences" in message
    assert not (tmp_path / "runs").exists()


def test_truncated_shard(write_recipe, capfd, tmp_path, prepared_recipe):
    folder = tmp_path / "copy"
    shutil.copytree(prepared_recipe.data.folder, folder)
    shard = folder / "train.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    message = refused(capfd, "train", write_recipe(), f"data.folder={folder}")
    assert "train.bin" in message and "bytes" in message


def test_shards_of_another_tokenizer(write_recipe, capfd, tmp_path, prepared_recipe):
    folder, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(prepared_recipe.data.folder, folder)
    assert main(["prepare", write_recipe(), "data.tokenizer.vocab_size=400", f"data.folder={other}"]) == 0
    shutil.copy(other / "tokenizer.model", folder)
    assert "another tokenizer" in refused(capfd, "train", write_recipe(), f"data.folder={folder}")


def test_run_folder_holds_another_run(write_recipe, capfd, tmp_path):
    recipe = write_recipe(batch={"train_steps": 1})
    assert main(["train", recipe]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    message = refused(capfd, "train", recipe, "optimizer.learning_rate=0.5")
    assert "already holds another run" in message and "optimizer.learning_rate: there 0.003, asked for 0.5" in message
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert main(["train", recipe]) == 0  # the same recipe: done already
    assert "trained already" in capfd.readouterr().out


def test_run_folder_is_not_a_run(write_recipe, capfd, tmp_path):
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "thesis.tex").touch()
    assert "is not empty and not a run" in refused(capfd, "train", write_recipe())


def test_unwritable_folder(write_recipe, capfd, tmp_path):
    """A file where a folder should be stops even root."""
    (tmp_path / "file").touch()
    assert "cannot create the folder" in refused(capfd, "train", write_recipe(), f"output_root={tmp_path / 'file'}")
    message = refused(capfd, "prepare", write_recipe(), f"data.folder={tmp_path / 'file' / 'data'}")
    assert str(tmp_path / "file" / "data") in message


def test_recipe_that_is_not_one(capfd, tmp_path):
    assert "no recipe 'gpt5'" in refused(capfd, "train", "gpt5")
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    assert "not a mapping" in refused(capfd, "train", str(path))
    path.write_text("a: [")
    assert "is not YAML" in refused(capfd, "train", str(path))
    path.write_text("name: " + "[" * 2000)
    assert "is not YAML: maximum recursion depth" in refused(capfd, "train", str(path))
    path.write_text("name: a\nseed: 0x_\n")
    message = refused(capfd, "train", str(path))
    assert "'0x_' is no date or number" in message and "line 2" in message


@pytest.mark.parametrize("verb", [["evaluate"], ["generate", "--prompt", "x"], ["report"]])
def test_folder_that_is_not_a_run(capfd, tmp_path, verb):
    message = refused(capfd, verb[0], str(tmp_path / "nothing"), *verb[1:])
    assert str(tmp_path / "nothing") in message
