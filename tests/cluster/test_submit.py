"""``pretrain submit``: what it checks, shows, writes and hands over, and that it leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from pretrain.__main__ import main
from pretrain.checkpointing.folder import checkpoints_in, read_manifest, write_manifest
from pretrain.cluster import submit as module
from pretrain.cluster.job_script import ROOT, SITE_OPTIONS, seconds_of, site_environment
from pretrain.errors import UserError
from pretrain.recipe_io import load_recipe, recipe_to_dict
from pretrain.run_folder import RunFolder
from tests.cluster.fake_slurm import FakeSlurm, take_away
from tests.small_runs import change, train_on_ranks


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    for name in ("RANKS_PER_NODE", "PRETRAIN_CLUSTER_ENV", "SBATCH_PARTITION"):
        monkeypatch.delenv(name, raising=False)
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def home(prepared_recipe, tmp_path, monkeypatch):
    """A folder to submit from, with a recipe whose paths are relative to it."""
    folder = tmp_path / "my home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "data").symlink_to(prepared_recipe.data.folder)
    recipe = change(prepared_recipe, data={"folder": "data"}, output_root="out", name="it's")
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)), encoding="utf-8")
    return folder


def submit(*arguments: str) -> int:
    return main(["submit", "r.yaml", *arguments])


def refused(capfd, *arguments: str) -> str:
    capfd.readouterr()
    assert submit(*arguments) == 2
    out, err = capfd.readouterr()
    message = err[err.index("error: ") :]
    assert "Traceback" not in out + err and message.count("error: ") == 1
    return message


def test_submitted_and_recorded(home, slurm):
    assert submit("--nodes", "2", "--gpus-per-node", "2", "--time", "1-00:00:00", "seed=7") == 0
    folder = RunFolder(home / "out" / "it's")
    (script,) = slurm.scripts
    assert script == folder.job_script.read_text()
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {
        "--nodes=2", "--gpus-per-node=2", "--time=1-00:00:00", "--requeue", "--open-mode=append",
        "--signal=B:USR1@300", f'--output="{folder.logs}/slurm-%j.out"', '--job-name="it\'s"', "--exclusive",
    } == set(options)  # fmt: skip
    assert folder.logs.is_dir()  # or SLURM could not open the output
    (event,) = map(json.loads, folder.jobs_file.read_text().splitlines())
    assert event.pop("time").endswith("+00:00")
    assert event == {
        "event": "submit", "job_id": "101", "nodes": 2, "gpus_per_node": 2, "time_limit": "1-00:00:00"
    }  # fmt: skip
    assert folder.saved_recipe().seed == 7


def test_the_job_means_the_same_from_another_folder(home, slurm, tmp_path, monkeypatch):
    """Relative paths were of the folder that it was submitted from; the job runs in the repository."""
    assert submit("--nodes", "2", "data.corpus.train=[my text.txt]", "data.folder=data", "name=x y") == 2  # other data
    assert submit("--nodes", "2", "name=x y", "checkpoint.every_steps=3") == 0
    lines = slurm.scripts[0].splitlines()
    assert shlex.split(lines[-4]) == ["cd", str(ROOT)]
    assert lines[-3] == "export RANKS_PER_NODE=1"
    there = recipe_of_job(slurm, tmp_path, monkeypatch)
    assert there.name == "x y" and there.checkpoint.every_steps == 3
    assert Path(there.run_folder) == home / "out" / "x y"
    assert Path(there.data.folder) == home / "data"
    RunFolder(Path(there.run_folder)).check(there)  # the run that was claimed


def recipe_of_job(slurm, elsewhere, monkeypatch):
    """What the last job trains, read in another folder."""
    words = shlex.split(slurm.scripts[-1].splitlines()[-1])
    assert words[:4] == ["exec", "bash", "slurm/launch.sh", "train"] and len(words) == 5
    with monkeypatch.context() as there:
        there.chdir(elsewhere)
        return load_recipe(words[4])


def test_a_base_that_only_this_folder_leads_to(home, slurm, tmp_path, monkeypatch):
    (home / "recipes").mkdir()
    (home / "recipes" / "top.yaml").write_text("base: r.yaml\nseed: 3\n")
    assert main(["submit", "recipes/top.yaml"]) == 0
    assert recipe_of_job(slurm, tmp_path, monkeypatch).seed == 3


def test_the_job_trains_what_was_submitted(home, slurm, tmp_path, monkeypatch):
    """And not what the file says by the time that the job starts: the next experiment, or another name."""
    assert submit("checkpoint.every_steps=3") == 0
    given = (home / "r.yaml").read_text()
    (home / "r.yaml").write_text(given.replace("it's", "other").replace("seed: 1234", "seed: 9"))
    assert load_recipe("r.yaml").name == "other"
    recipe = recipe_of_job(slurm, tmp_path, monkeypatch)
    assert (recipe.name, recipe.seed, recipe.checkpoint.every_steps) == ("it's", 1234, 3)
    kept = RunFolder(home / "out" / "it's").job_recipe.read_text()
    assert all(f"# {line}" in kept for line in [*given.splitlines(), "# override: checkpoint.every_steps=3"])


def test_shown_and_nothing_else(home, slurm, capfd):
    before = set(home.rglob("*"))
    assert submit("--nodes", "2", "--ranks-per-node", "2", "parallel.tensor_model_parallel_size=2", "--dry-run") == 0
    shown = capfd.readouterr().out
    for words in (
        "2 node(s) x 2 rank(s) = world size 4: tensor-parallel 2 x data-parallel 2, zero1, fp32",
        "parameters: 42,880 (25,472 without embeddings), vocabulary 500",
        "memory per rank by formula: 2 GB on the device",
        "optimizer 133 kB, buckets 2 GB",
        "tokens a step: 256; 6 steps",
        "the partition's limit holds",
        "#SBATCH --nodes=2",
        "export RANKS_PER_NODE=2",
        "exec bash slurm/launch.sh train",
    ):
        assert words in shown
    assert set(home.rglob("*")) == before and slurm.scripts == []


def test_steps_that_fit(home, slurm, capfd):
    def line(*arguments: str) -> str:
        assert submit("--dry-run", "--time", "10", "batch.train_steps=20000", *arguments) == 0
        return next(line for line in capfd.readouterr().out.splitlines() if line.startswith("steps that fit"))

    assert "unknown until measured" in line()
    # 600 s less a quarter to save in; 256 tokens a step
    assert "at 2,560 tokens/s (as given): 4,500, " in line("--tokens-per-second", "2560")
    folder = RunFolder(home / "out" / "it's")
    folder.path.mkdir(parents=True)
    folder.claim(load_recipe("r.yaml", ["batch.train_steps=20000"]), "")
    records = [{"step": step, "tokens_per_second": 5120 if step > 1 else 1} for step in range(1, 30)]
    folder.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder.checkpoints / "step_00000500").mkdir(parents=True)
    assert "at 5,120 tokens/s (median of the last 20 records of this run): 9,000, " in line()
    assert "19,500 are left: 3 such job(s)" in line()
    assert "0, without start-up and saving; 19,500 are left: no number of such jobs" in line(
        "--tokens-per-second", "0.1"
    )


def test_works_without_slurm_where_it_only_shows(home, tmp_path, monkeypatch, capfd):
    take_away(monkeypatch, tmp_path / "bin")
    assert submit("--dry-run") == 0
    assert "submit on a login node" in refused(capfd)
    assert not (home / "out").exists()


def test_refused_by_sbatch(home, slurm, capfd):
    slurm.refuse("sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed\n")
    message = refused(capfd, "--nodes", "2", "--sbatch-option=--partition=nope")
    assert message == "error: sbatch refused: invalid partition specified: nope; Batch job submission failed\n"
    assert not (home / "out").exists()


def test_a_refusal_leaves_an_older_run_as_it_was(home, slurm, capfd):
    assert submit("--nodes", "2") == 0
    before = {path: path.read_bytes() for path in (home / "out").rglob("*") if path.is_file()}
    slurm.refuse("no\n")
    refused(capfd, "--nodes", "1", "seed=9")
    assert {path: path.read_bytes() for path in (home / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("state", ["PENDING", "COMPLETING"])
@pytest.mark.parametrize("job", ["101|101", "105|101"])  # itself, and a part of the array
def test_one_job_at_a_time(home, slurm, capfd, state, job):
    assert submit() == 0
    slurm.queue("7|7|RUNNING|1:00|node7|None", f"{job}|{state}|0:00||Resources")
    assert f"has a job, 101 ({state.lower()}): wait for it, or scancel 101" in refused(capfd)
    assert len(slurm.scripts) == 1
    slurm.queue(f"{job}|CANCELLED|0:00||None")
    assert submit() == 0 and len(slurm.scripts) == 2


def test_not_submitted_twice_when_squeue_is_silent(home, slurm, capfd):
    assert submit() == 0
    slurm.go_down()
    assert "squeue" in refused(capfd) and len(slurm.scripts) == 1


def test_two_at_once(home, slurm, capfd, monkeypatch):
    inner = []
    sbatch = module.sbatch

    def meanwhile(script: Path) -> str:
        inner.append(refused(capfd))
        return sbatch(script)

    monkeypatch.setattr(module, "sbatch", meanwhile)
    assert submit() == 0
    assert "another submit" in inner[0] and len(slurm.scripts) == 1


def test_a_job_that_cannot_be_recorded_is_named(home, slurm, capfd, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "record_event", full)
    assert "job 101 is submitted, but" in refused(capfd)
    assert (home / "out" / "it's" / "job.sbatch").exists()


def test_a_run_that_is_done(home, slurm, capfd, monkeypatch):
    monkeypatch.setattr(module, "is_done", lambda recipe, hashed: True)
    assert "is trained already: step 6 of" in refused(capfd)
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "3", "parallel.tensor_model_parallel_size=2"], "does not divide the 3 started ranks"),
        (["--nodes", "2", "parallel.data_parallel_size=4"], "needs 4 ranks, but 2 were started"),
        (["--nodes", "3"], "is not a multiple of batch.micro_batch_size x data-parallel size"),
        (["--time", "yesterday"], "--time is 'yesterday', must be minutes"),
        (["--time", "0"], "no time at all"),
        (["--tokens-per-second", "nan", "--time", "30"], "--tokens-per-second is nan, must be above 0 and below 1e+15"),
        (["--tokens-per-second=-5", "--time", "30"], "--tokens-per-second is -5.0, must be above 0 and below 1e+15"),
        (["--tokens-per-second=1e308", "--time", "30"], "--tokens-per-second is 1e+308, must be above 0 and below"),
        (["--array", "1-10"], "one at a time, as in 1-10%1"),
        (["--gpus-per-node", "1", "--ranks-per-node", "2"], "each rank needs a GPU of its own"),
        (["--sbatch-option=exclude"], "--sbatch-option is 'exclude', must be an option of sbatch"),
        (["data.folder=elsewhere"], "elsewhere is not prepared"),
        (["model.sequence_length=1000000"], "one sequence needs 1000001"),
        (["parallel.sharding=zero9"], "parallel.sharding is 'zero9'"),
        (["model.num_layers=0"], "model.num_layers is 0, must be at least 1"),
        (["output_root='a\"b'"], "no double quotes, backslashes or control characters: choose another output"),
        (['output_root="a\\nb"'], "no double quotes, backslashes or control characters: choose another output"),
    ],
)
def test_refused(home, slurm, capfd, arguments, words):
    assert words in refused(capfd, *arguments)
    assert slurm.scripts == [] and not (home / "out").exists()


def test_stop_file_and_another_run(home, slurm, capfd):
    folder = RunFolder(home / "out" / "it's")
    folder.claim(load_recipe("r.yaml"), "")
    folder.checkpoints.mkdir()
    assert "optimizer.learning_rate: there" in refused(capfd, "optimizer.learning_rate=1.0")
    folder.stop_file.touch()
    assert "asks this run to stop" in refused(capfd)
    assert slurm.scripts == []


def test_a_checkpoint_of_other_data(home, slurm, capfd):
    """Ranks on all nodes would only be told to go."""
    recipe = change(load_recipe("r.yaml"), batch={"train_steps": 2})
    train_on_ranks(recipe, 1, stop_at_step=1)
    (checkpoint,) = checkpoints_in(RunFolder(recipe.run_folder).checkpoints)
    manifest = read_manifest(checkpoint)
    manifest["identity"]["data_sha256"] = "0" * 64
    write_manifest(checkpoint, manifest)
    message = refused(capfd, "batch.train_steps=2")
    assert "step_00000001 is of another run (data_sha256: saved with 000" in message
    assert slurm.scripts == []


def test_facts_of_the_site(home, slurm, tmp_path, monkeypatch):
    site = tmp_path / "site.env"
    site.write_text("echo noise\nexport SBATCH_PARTITION=gpu SBATCH_ACCOUNT='my project'\nRANKS_PER_NODE=4\n")
    monkeypatch.setenv("PRETRAIN_CLUSTER_ENV", os.path.relpath(site))
    monkeypatch.setenv("SBATCH_PARTITION", "of the shell")  # stronger than the script: must not reach sbatch
    assert submit("--array", "1-3%1", "--sbatch-option=--partition=cpu", "--sbatch-option=--mem=0") == 0
    lines = slurm.scripts[0].splitlines()
    assert "#SBATCH --partition=gpu" in lines and '#SBATCH --account="my project"' in lines
    assert lines.index("#SBATCH --partition=cpu") > lines.index("#SBATCH --partition=gpu")  # the last one counts
    assert "#SBATCH --mem=0" in lines and "#SBATCH --array=1-3%1" in lines
    assert any(line.endswith('slurm-%A_%a.out"') for line in lines)
    assert "export RANKS_PER_NODE=4" in lines and f"export PRETRAIN_CLUSTER_ENV={site}" in lines
    assert "SBATCH_PARTITION" not in slurm.environment


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("false\n", "cannot be sourced by bash"),
        ("module load cuda\n", "module: command not found"),
        ("RANKS_PER_NODE=many\n", "RANKS_PER_NODE is 'many'"),
        (None, "which is not a file"),
    ],
)
def test_a_site_file_that_is_wrong(home, slurm, capfd, tmp_path, monkeypatch, text, words):
    site = tmp_path / "site.env"
    if text is not None:
        site.write_text(text)
    monkeypatch.setenv("PRETRAIN_CLUSTER_ENV", str(site))
    assert words in refused(capfd) and not (home / "out").exists()


def test_the_example_of_a_site(slurm, tmp_path, monkeypatch):
    """As it is it sets nothing; with the # taken away bash understands every line."""
    example = ROOT / "slurm" / "cluster.env.example"
    monkeypatch.setenv("PRETRAIN_CLUSTER_ENV", str(example))
    of_bash = {"_", "SHLVL", "PWD", "OLDPWD", "COLUMNS", "LINES"}
    assert {key: value for key, value in site_environment().items() if key not in of_bash} == {
        key: value for key, value in os.environ.items() if key not in of_bash
    }
    used = tmp_path / "cluster.env"
    used.write_text(re.sub(r"^#(?=\S|    )", "", example.read_text(), flags=re.MULTILINE))
    monkeypatch.setenv("PRETRAIN_CLUSTER_ENV", str(used))
    monkeypatch.setenv("USER", "me")
    site = site_environment()
    assert set(SITE_OPTIONS) | {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HF_HOME", "SRUN_OPTIONS"} <= site.keys()
    assert site["RANKS_PER_NODE"] == "8" and site["PYTHON"].endswith("python-in-container")
    monkeypatch.setenv("RANKS_PER_NODE", "2")  # what a job script says is stronger
    assert site_environment()["RANKS_PER_NODE"] == "2"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("1:30", 90), ("2:00:01", 7201), ("1-2", 93_600), ("1-2:30", 95_400), ("1-0:0:5", 86_405),
        ("UNLIMITED", None),
    ],
)  # fmt: skip
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1:2:3:4", "1-", "-1", "1.5", "0:00", "2-1:1:1:1"])
def test_no_times(text):
    with pytest.raises(UserError, match="--time is"):
        seconds_of(text)
