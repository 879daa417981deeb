"""Which run of a study a job of the array is."""

from __future__ import annotations

import subprocess

import pytest
import yaml

from pretrain.cluster.job_script import ROOT
from pretrain.cluster.study_line import main
from pretrain.recipe_io import recipe_to_dict
from tests.small_runs import change


@pytest.fixture
def study(prepared_recipe, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(recipe_to_dict(change(prepared_recipe, output_root="out"))))
    file = tmp_path / "study.txt"
    file.write_text(f"# a study\n\n{recipe} name=one\n   # no run\n   \n{recipe} 'name=two words' seed=3")
    return file


def test_lines_that_count(study, capsys):
    assert main([str(study), "1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["out/one", f"{study.parent}/r.yaml", "name=one"]
    assert main([str(study), "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "out/two words",
        f"{study.parent}/r.yaml",
        "name=two words",
        "seed=3",
    ]


@pytest.mark.parametrize(
    ("file", "index", "words"),
    [
        ("study.txt", "0", "has 2 run(s), and this is job 0 of the array: --array=1-2"),
        ("study.txt", "3", "has 2 run(s), and this is job 3 of the array"),
        ("study.txt", "", "SLURM_ARRAY_TASK_ID is not set: submit with sbatch --array"),
        ("none.txt", "1", "cannot read the study"),
        ("bad.txt", "1", "No closing quotation"),
        ("bad.txt", "2", "unknown key nme; did you mean name?"),
    ],
)
def test_refused(study, capsys, file, index, words):
    (study.parent / "bad.txt").write_text(f"x 'y\n{study.parent}/r.yaml nme=1\n")
    assert main([str(study.parent / file), index]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message


@pytest.mark.parametrize("name", ["prepare", "train", "evaluate", "study"])
def test_job_scripts_say_where_they_belong(tmp_path, name):
    """Submitted from another folder than the repository, where their paths lead nowhere."""
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / f"{name}.sbatch"), "x"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.endswith("is not the root of the repository: submit from there\n")


def test_prepare_needs_no_launcher(tmp_path):
    """The Python of the site, with all arguments as they were given."""
    program, site = tmp_path / "python", tmp_path / "site.env"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$PWD" "$@"\n')
    program.chmod(0o755)
    site.write_text(f"PYTHON={program}\n")
    done = subprocess.run(
        ["bash", "slurm/prepare.sbatch", "r.yaml", "name=two words"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PRETRAIN_CLUSTER_ENV": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [str(ROOT), "-m", "pretrain", "prepare", "r.yaml", "name=two words"]
