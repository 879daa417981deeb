"""What a study file may say, and what is refused, with every problem in one message."""

from __future__ import annotations

import pytest

from pretrain.__main__ import main
from pretrain.errors import RecipeError, UserError
from pretrain.study.study_file import SHIPPED, load_study
from tests.study.studies import OBJECTIVES, SIZES, write_study


@pytest.fixture
def write(prepared_recipe, tmp_path):
    return lambda **keys: write_study(tmp_path, prepared_recipe, **keys)


def test_the_three_forms_of_an_axis(write):
    values = {"key": "optimizer.weight_decay", "values": ["1e-1", 0]}
    study = load_study(write(axes={"size": SIZES, "alpha": [0.5, 1], "decay": values, "tokens": [512]}))
    points = {axis.name: [(point.name, point.label, point.changes) for point in axis.points] for axis in study.axes}
    assert points["size"][0] == ("xs", "xs", {"model.hidden_size": 16})
    assert points["alpha"] == [("alpha0.5", 0.5, {"objective.alpha": 0.5}), ("alpha1", 1, {"objective.alpha": 1})]
    assert points["decay"][0] == ("decay0.1", 0.1, {"optimizer.weight_decay": 0.1})
    assert points["tokens"] == [("tokens512", 512, {"tokens": 512})]


def test_points_may_be_sections_and_overrides_are_for_all(write, tmp_path):
    study = load_study(
        write(axes={"size": {"s": {"model": {"hidden_size": 8, "num_layers": 1}}}}, set={"seed": 3}),
        ["seed=4", "optimizer.weight_decay=0", "name=other", f"output_root={tmp_path}/x"],
    )
    assert study.axes[0].points[0].changes == {"model.hidden_size": 8, "model.num_layers": 1}
    assert study.changes == {"seed": 4, "optimizer.weight_decay": 0}
    assert study.folder == tmp_path / "x" / "other" and "# override: seed=4" in study.text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"axis": {}}, "unknown key axis; did you mean axes?"),
        ({"axes": {}}, "axes is empty"),
        ({"axes": {"seed": []}}, "axes.seed is empty: an axis needs at least one point"),
        ({"axes": {"size": {}}}, "axes.size is empty"),
        ({"axes": {"seeds": [1]}}, "axes.seeds is a list of values, but no recipe key has this name; did you mean"),
        ({"axes": {"window_steps": [1]}}, "may be objective.window_steps or spikes.window_steps: write {key: "),
        ({"axes": {"s": {"x": {"model.hiden_size": 8}}}}, "axes.s.x: unknown key model.hiden_size; did you mean "),
        ({"axes": {"a": {"key": "objective.alfa", "values": [1]}}}, "unknown key objective.alfa; did you mean obj"),
        ({"axes": {"seed": 3}}, "axes.seed is 3, must be named points, a list of values, or"),
        ({"axes": {"seed": [1, 1]}}, "axes.seed: 'seed1' is there twice"),
        ({"axes": {"a": {"x/y": {}}}}, "axes.a: 'x/y' cannot be part of a folder's name"),
        ({"axes": {"a": {"recipes": {}}}}, "axes.a: 'recipes' cannot be part"),
        ({"axes": {"n": {"x": {"name": "x"}}}}, "axes.n.x: name is the study's own"),
        ({"axes": {"a": {"x": {"seed": 1}}, "seed": [2]}}, "seed is set by axes.a and by axes.seed: one of them"),
        ({"set": {"seed": 1}}, "seed is set by set and by axes.seed: one of them must go"),
        ({"set": {"seeed": 1}}, "set: unknown key seeed; did you mean seed?"),
        ({"axes": {"tokens": [9], "train_steps": [9]}}, "batch.train_steps and tokens all say how long a run is"),
        ({"follow": {"tokens": 9, "tokens_per_parameter": 2}}, "is set by follow.tokens and by follow.tokens_per_par"),
        ({"follow": {"tokens_per_parameter": float("inf")}}, "tokens_per_parameter is inf, must be a finite number"),
        ({"axes": {"alpha": [1, 1.0]}}, "axes.alpha: 'alpha1' and 'alpha1.0' are the same: leave one out"),
        ({"axes": {"seed": [1]}, "exclude": [{"seed": []}]}, "exclude[0]: seed is an empty list"),
        ({"follow": {"tokens": -9}}, "follow.tokens is -9, must be a finite number above 0"),
        ({"follow": {"warmup_fraction": 1}}, "follow.warmup_fraction is 1.0, must be in [0, 1)"),
        ({"follow": {"learning_rate": {"rule": "width_pwer"}}}, "learning_rate.rule is 'width_pwer', must be one of"),
        ({"follow": {"width": {"rule": "depth_multiple", "multiple": 4, "head_size": 2}}}, "axes.size and by follow"),
        ({"exclude": ["s"]}, "exclude[0] is 's', must name axes and their points"),
        ({"exclude": [{"sise": "s"}]}, "exclude[0]: unknown axis sise; did you mean size?"),
        ({"exclude": [{"size": "m"}]}, "exclude[0]: axis size has no point m; it has xs, s"),
        ({"evaluate": "lst"}, "evaluate is 'lst', must be one of last, all; did you mean last?"),
        ({"name": "a/b"}, "name is 'a/b', must be a plain folder name"),
        ({"base": "quikstart"}, "no recipe 'quikstart': neither a file nor one of the shipped"),
    ],
)  # fmt: skip
def test_refused(write, capfd, keys, words):
    assert main(["study", write(**keys), "--dry-run"]) == 2
    message = capfd.readouterr().err
    assert words in message and message.count("error: ") == 1


def test_all_problems_at_once(write):
    with pytest.raises(RecipeError, match="3 problems") as error:
        load_study(write(axes={"sed": [1], "size": {"x": {"model.hiden_size": 8}}}, exclude=[{"color": 1}]))
    assert "there are: size" in str(error.value)


def test_unknown_study_and_overrides(write):
    with pytest.raises(UserError, match="no study 'slow'.* shipped .*quick"):
        load_study("slow")
    with pytest.raises(UserError, match="override 'seed=0x_': the value is not YAML: '0x_' is no date or number"):
        load_study("quick", ["seed=0x_"])
    with pytest.raises(UserError, match="override 'seed' is not of the form"):
        load_study(write(), ["seed"])
    with pytest.raises(RecipeError, match="set: unknown key model.hiden_size; did you mean model.hidden_size"):
        load_study(write(), ["model.hiden_size=3"])


def test_shipped_studies_are_there():
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {"quick", "wikitext2_ladder", "paper"}
    quick, ladder, paper = (load_study(name) for name in ("quick", "wikitext2_ladder", "paper"))
    assert [len(axis.points) for axis in quick.axes] == [2, 2, 2]
    assert [len(axis.points) for axis in ladder.axes] == [4, 4, 3]
    fractions = [point.changes.get("objective.rare_fraction") for point in ladder.axes[1].points]
    assert fractions == [None, 0.1, 0.3, 0.5] and len(OBJECTIVES) == 2
    assert [point.name for point in paper.axes[0].points] == ["small", "medium", "large", "xl"]
