"""What the README shows runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_agg_alone(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    check = (
        "import math, sys; assert math.isfinite(float(loss)) and loss_of.frequency.steps == 10\n"
        "assert loss_of.current_gates().rare.any()\n"
    )
    script = tmp_path / "example.py"
    script.write_text(example + check, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_agg_imports_torch_alone():
    """What it may use beside that (Triton, peers of the benchmark) is looked for only when it is needed."""
    script = (
        "import sys, torch; before = {name.split('.')[0] for name in sys.modules}\n"
        "import agg; more = {name.split('.')[0] for name in sys.modules} - before - sys.stdlib_module_names\n"
        "assert more == {'agg'}, more"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Nor what torch brings along by itself, in any of its files.
    library = [file for file in (ROOT / "agg").glob("*.py") if not file.name.startswith(("benchmark", "triton_"))]
    trees = [ast.walk(ast.parse(file.read_text(encoding="utf-8"))) for file in library]
    nodes = [node for tree in trees for node in tree]
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in named} - sys.stdlib_module_names == {"agg", "torch"}


def test_links_and_files_exist():
    for name in [*re.findall(r"\]\(([^)h][^)]*)\)", TEXT), "slurm/train.sbatch", "slurm/launch.sh", "CHANGELOG.md"]:
        assert (ROOT / name).exists(), name


def test_own_corpus_commands_are_accepted(tmp_path, monkeypatch):
    """The overrides of the README load, with the README's file names."""
    from pretrain.recipe_io import load_recipe

    block = TEXT[TEXT.index("## Your own corpus") : TEXT.index("Sources are")]
    overrides = [part.strip("'") for part in re.findall(r"'[^']+'|\S+=\S+", block.split("pretrain train")[0])]
    recipe = load_recipe("quickstart_agg", overrides)
    assert recipe.data.corpus.train == ("texts/*.txt",) and str(recipe.run_folder) == "runs/mine"
