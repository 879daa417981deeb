"""The launcher of this machine's ranks: they meet whatever else the machine does, and it speaks for them all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.training.processes import ROOT, with_a_compiler, write_recipe

RANK = """
import errno, os, socket, time
from pretrain import place, topology
here = place.place_from_environment()
try:
    socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"])), backlog=1).close()
    print("the port was free")
except OSError as error:
    print("the port is kept:", error.errno == errno.EADDRINUSE)
time.sleep(0 if here.rank else 2)  # the others come first
store = topology._connect_to_store(here, 30.0)
store.set(str(here.rank), "here")
store.wait(["0", "1"])
store.set(f"done {here.rank}", "")
if here.rank == 0:
    store.wait(["done 1"])
print("met", place.LISTENING_SOCKET in os.environ)
"""
LIGHT = """
import sys
from pretrain.commands import check_run
from pretrain.quiet import quiet_third_party
from pretrain.recipe_io import load_recipe
from pretrain.run_folder import RunFolder
quiet_third_party()
recipe = load_recipe(sys.argv[1])
check_run(recipe, 2, RunFolder(recipe.run_folder), [])
print("megatron.core" in sys.modules)
import pretrain.training.loop
print("megatron.core" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
"""
LAUNCH = """
import subprocess, sys
from pathlib import Path
from pretrain import launch
real = subprocess.Popen
launch.subprocess.Popen = lambda command, **options: real([sys.executable, "-c", {code!r}], **options)
sys.exit(launch.run_local_ranks([], 2, Path({logs!r})))
"""


def launch(code, logs):
    """Two ranks that run ``code`` instead of a command."""
    return subprocess.run(
        [sys.executable, "-c", LAUNCH.format(code=code, logs=str(logs))],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_nobody_takes_the_port_before_rank_0_listens(tmp_path):
    done = launch(RANK, tmp_path)
    words = "the port is kept: True\nmet False\n"
    assert (done.returncode, done.stdout) == (0, words), done.stderr
    assert (tmp_path / "rank_00001.log").read_text() == words


@pytest.mark.parametrize(("first", "second", "common"), [(75, 75, 75), (0, 0, 0), (75, 7, 7), (7, 75, 7)])
def test_the_launcher_gives_the_common_exit_code(tmp_path, first, second, common):
    """Ranks that leave a second apart are waited for."""
    code = f"import os, sys, time; r = int(os.environ['RANK']); time.sleep(r); sys.exit([{first}, {second}][r])"
    assert launch(code, tmp_path).returncode == common


def test_a_rank_that_fails_ends_the_others(tmp_path):
    """Rank 0 would sleep on."""
    done = launch("import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(600)", tmp_path)
    assert done.returncode == 7 and "rank 1 ended with exit code 7" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["train", "nowhere.yaml"],
        ["prepare", "quickstart_plain", "model.num_layerz=3"],
        ["generate", "nowhere", "--prompt", "a"],
        ["evaluate", "nowhere"],
        ["report", "nowhere"],
    ],
    ids=lambda command: command[0],
)
def test_what_is_wrong_with_a_command_is_said_before_torch_is_imported(command):
    code = f"import sys; from pretrain.__main__ import main; print(main({command!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 False\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["study", "quick", "--dry-run"],
        ["submit", "quickstart_plain", "data.folder=nowhere", "--gpus-per-node", "2", "--dry-run"],
    ],
    ids=lambda command: command[0],
)
def test_what_plans_without_ranks_is_quiet_too(command):
    """It imports DeepSpeed, which judges the sharding, and would say which accelerator it found."""
    unknown = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}  # tests have set it
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", *command],
        cwd=ROOT, env=unknown, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert said.startswith(("quick: ", f"error: {ROOT}/nowhere is not prepared")) and "WARNING" not in said, said


def test_a_launcher_and_its_ranks_import_no_more_than_they_use(prepared_recipe, tmp_path):
    """Who checks a run before its ranks start does not wait for megatron-core, and they do not for the compiler."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, write_recipe(prepared_recipe, tmp_path)],
        cwd=ROOT, env=with_a_compiler(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True", "False"], done.stdout + done.stderr
