"""The same run on any layout: losses agree with the single process to the error of the reduction order."""

from __future__ import annotations

import pytest

from tests.small_runs import change, train_on_ranks


def losses(records):
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def alone(prepared_recipe, tmp_path_factory):
    """Records of one process, by (style, method)."""
    made = {}

    def run(style: str, method: str):
        if (style, method) not in made:
            recipe = change(
                prepared_recipe,
                output_root=str(tmp_path_factory.mktemp("alone")),
                model={"style": style, "num_query_groups": 4},
                objective={"method": method},
            )
            made[style, method] = train_on_ranks(recipe, 1)
        return made[style, method]

    return run


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize(("tensor_parallel", "world_size"), [(1, 2), (2, 2), (1, 4), (4, 4), (2, 4)])
def test_tensor_and_data_parallel(prepared_recipe, alone, tmp_path, style, tensor_parallel, world_size):
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        model={"style": style, "num_query_groups": 4},
        parallel={"tensor_model_parallel_size": tensor_parallel},
    )
    records = train_on_ranks(recipe, world_size)
    expected = alone(style, "agg")
    for mine, other in zip(records, expected, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert mine["rare_fraction"] == other["rare_fraction"]
        assert mine["tokens"] == other["tokens"]
    for key in ("isotropy", "mean_cosine", "mean_shift"):
        assert records[-1][key] == pytest.approx(expected[-1][key], abs=1e-4)
    for group in ("frequent", "medium", "total"):  # too little text for a rare target
        value = expected[-1]["validation_perplexity"][group]
        assert records[-1]["validation_perplexity"][group] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_zero_stages(prepared_recipe, alone, tmp_path, stage, tensor_parallel):
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        model={"num_query_groups": 4},
        parallel={"tensor_model_parallel_size": tensor_parallel, "sharding": f"zero{stage}"},
    )
    records, expected = train_on_ranks(recipe, 2), alone("gpt2", "agg")
    for mine, other in zip(records, expected, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_gating_changes_the_run(alone):
    """The tests above would pass without gates if the gates did nothing."""
    gated, plain = losses(alone("gpt2", "agg")), losses(alone("gpt2", "mle"))
    assert gated[0] == plain[0] and abs(gated[-1] - plain[-1]) > 1e-3
    assert 0.05 < alone("gpt2", "agg")[-1]["rare_fraction"] < 0.95
    assert "rare_fraction" not in alone("gpt2", "mle")[-1]


@pytest.mark.parametrize(("stage", "tensor_parallel"), [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (3, 2)])
def test_bf16_follows_fp32(prepared_recipe, alone, tmp_path, stage, tensor_parallel):
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        precision="bf16",
        model={"num_query_groups": 4},
        parallel={"sharding": f"zero{stage}", "tensor_model_parallel_size": tensor_parallel},
    )
    records, expected = train_on_ranks(recipe, 2), alone("gpt2", "agg")
    assert losses(records) == pytest.approx(losses(expected), abs=0.03)
    assert [r["grad_norm"] for r in records] == pytest.approx([r["grad_norm"] for r in expected], rel=0.05)


@pytest.mark.parametrize("sharding", ["zero2_offload", "zero3_offload"])
def test_offload(prepared_recipe, alone, tmp_path, sharding):
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        model={"num_query_groups": 4},
        batch={"train_steps": 6},
        parallel={"sharding": sharding},
    )
    assert losses(train_on_ranks(recipe, 2)) == pytest.approx(losses(alone("gpt2", "agg")), abs=2e-5)


def test_rare_fraction_and_fading_window_resume_and_agree(prepared_recipe, tmp_path):
    recipe = change(prepared_recipe, objective={"alpha": None, "rare_fraction": 0.3, "window": "exponential"})
    one = train_on_ranks(change(recipe, output_root=str(tmp_path / "1")), 1)
    two = change(recipe, output_root=str(tmp_path / "2"), parallel={"tensor_model_parallel_size": 2})
    train_on_ranks(two, 2, stop_at_step=3)
    records = train_on_ranks(two, 2)
    assert losses(records) == pytest.approx(losses(one), abs=2e-5)
    assert [r["rare_fraction"] for r in records] == [r["rare_fraction"] for r in one]
    assert one[-1]["rare_fraction"] > 0.2


def test_smoothing_and_excluded_ids_on_tensor_parallel_ranks(prepared_recipe, tmp_path):
    recipe = change(prepared_recipe, objective={"label_smoothing": 0.1, "never_seen": "exclude"})
    one = train_on_ranks(change(recipe, output_root=str(tmp_path / "1")), 1)
    two = change(recipe, output_root=str(tmp_path / "2"), parallel={"tensor_model_parallel_size": 2})
    records = train_on_ranks(two, 2)
    assert losses(records) == pytest.approx(losses(one), abs=2e-5)
    assert [r["rare_fraction"] for r in records] == [r["rare_fraction"] for r in one]


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_micro_batches(prepared_recipe, alone, tmp_path, micro_batch_size):
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        model={"num_query_groups": 4},
        batch={"micro_batch_size": micro_batch_size},
    )
    assert losses(train_on_ranks(recipe, 1)) == pytest.approx(losses(alone("gpt2", "agg")), abs=2e-5)


def test_a_file_of_ones_own_that_only_says_where_to_offload(prepared_recipe, alone, tmp_path):
    """DeepSpeed would take its own Adam only, unless it is told otherwise."""
    policy = tmp_path / "mine.json"
    policy.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        model={"num_query_groups": 4},
        parallel={"sharding": str(policy)},
    )
    assert losses(train_on_ranks(recipe, 1)) == pytest.approx(losses(alone("gpt2", "agg")), abs=2e-5)
