"""Coupled, centered and frozen rows on every ZeRO stage and layout, against dense formulas on one process."""

from __future__ import annotations

import pytest
import torch

from pretrain.training.row_updates import RowUpdates
from tests.distributed import run_ranks
from tests.small_runs import change, train_on_ranks

STEPS, THAWS = 6, 4
# 506 rows of 36: on 4 data-parallel ranks pieces begin in the middle of rows, and on 2 of a split vocabulary too.
ROWS, WIDTH = 506, 36
MODEL = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_layers": 1, "vocab_multiple_of": 22}
FEATURES = {
    "plain": {"objective": {"method": "mle"}},
    "coupled": {"objective": {"method": "mle"}, "optimizer": {"couple_embeddings": True}},
    "centered": {"objective": {"method": "mle", "center_rows": True}},
    "frozen": {"objective": {"rare_rows": "freeze", "switch_step": THAWS, "rare_rows_after": "train"}},
}
LAYOUTS = [(1, 1, 0), (1, 4, 1), (1, 4, 2), (1, 4, 3), (2, 1, 0), (2, 2, 0), (2, 2, 1), (2, 2, 3)]  # tensor, data, ZeRO
SHORT = [(1, 4, 2), (2, 2, 1), (2, 2, 3)]  # the others are long tests


def variant(recipe, feature: str, layout=(1, 1, 0), model=MODEL, **sections):
    tensor_parallel, data_parallel, stage = layout
    recipe = change(
        recipe,
        model=model,
        batch={"train_steps": STEPS},
        parallel={
            "tensor_model_parallel_size": tensor_parallel,
            "data_parallel_size": data_parallel,
            "sharding": f"zero{stage}",
        },
    )
    for changes in (FEATURES[feature], sections):
        recipe = change(recipe, **changes)
    recipe.check()
    return recipe


def train_rows(rank: int, world_size: int, recipe, amend=None):
    """Losses, gradient norms, and this rank's real rows of the output embedding before training and after each step."""
    from pretrain.data.loader import TrainingBatches, training_dataset
    from pretrain.topology import connect
    from pretrain.training.engine import whole_output_embedding
    from pretrain.training.loop import train_step
    from pretrain.training.setup import build_run

    run = build_run(recipe, connect(recipe))
    if amend is not None:
        amend(run)
    batches = TrainingBatches(
        training_dataset(run.prepared, recipe),
        micro_batch_size=recipe.batch.micro_batch_size,
        global_batch_size=recipe.batch.global_batch_size,
        data_parallel_rank=run.topology.data_parallel_rank,
        data_parallel_size=run.topology.data_parallel_size,
        consumed_samples=0,
    )
    rows, rare, results = [], [], []

    def note():
        with whole_output_embedding(run.engine) as weight:
            rows.append(weight[: run.shard.real].float().clone())

    note()
    for _, batch in zip(range(recipe.batch.train_steps), batches, strict=False):
        results.append(train_step(run, batch))
        note()
        if recipe.objective.method == "agg":
            rare.append(run.objective.module.current_gates().rare[: run.shard.real].clone())
    return [r.loss for r in results], [r.grad_norm for r in results], run.shard.start, torch.stack(rows), rare


def whole(ranks):
    """Losses, gradient norms and rows [steps + 1, V, D] of a run; replicas must agree."""
    shards = {}
    for losses, norms, start, rows, _ in ranks:
        assert losses == ranks[0][0] and norms == ranks[0][1]
        assert torch.equal(shards.setdefault(start, rows), rows)
    return ranks[0][0], ranks[0][1], torch.cat([shards[start] for start in sorted(shards)], dim=1)


def dense_coupled_adam(run):
    """Replace the embedding's update by Coupled Adam as it is written down, in fp64, with moments of its own."""
    weight, optimizer = run.engine.module.output_embedding, run.engine.basic_optimizer
    first, second = (torch.zeros(weight.shape, dtype=torch.float64) for _ in range(2))
    steps, kept = [], []

    def before(*_):
        kept[:] = [weight.detach().double(), weight.grad.double()]

    def after(*_):
        (old, grad), (group,) = kept, [g for g in optimizer.param_groups if any(p is weight for p in g["params"])]
        (beta1, beta2), rate = group["betas"], group["lr"]
        steps.append(1)
        first.mul_(beta1).add_((1 - beta1) * grad)
        second.mul_(beta2).add_((1 - beta2) * grad**2)
        corrected = second / (1 - beta2 ** len(steps))
        shared = corrected[: run.shard.vocab_size].mean(0)
        step = first / (1 - beta1 ** len(steps)) / (shared.sqrt() + group["eps"])
        with torch.no_grad():
            weight.copy_(old - rate * group["weight_decay"] * old - rate * step)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def dense_centering(run):
    weight = run.engine.module.output_embedding

    def after(*_):
        with torch.no_grad():
            weight[: run.shard.real] -= weight[: run.shard.real].double().mean(0)

    run.engine.basic_optimizer.register_step_post_hook(after)


def dense_freezing(run):
    """The rare rows of each step before the thaw are put back, and have no gradient."""
    weight, optimizer = run.engine.module.output_embedding, run.engine.basic_optimizer
    kept, steps = [], []
    begin_step = run.objective.begin_step

    def counted(targets, step):
        steps.append(step)
        begin_step(targets, step)

    run.objective.begin_step = counted
    weight.register_hook(lambda grad: grad * (1 - frozen()[:, None].float()))

    def frozen():
        rare = run.objective.module.current_gates().rare
        return rare if steps[-1] < THAWS else torch.zeros_like(rare)

    def before(*_):
        kept[:] = [weight.detach().clone()]

    def after(*_):
        with torch.no_grad():
            weight[frozen()] = kept[0][frozen()]

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


DENSE = {"coupled": dense_coupled_adam, "centered": dense_centering, "frozen": dense_freezing}


@pytest.fixture(scope="module")
def dense(prepared_recipe):
    """The run on one process without ZeRO, amended by a dense formula and not by RowUpdates; made once for each."""
    made = {}

    def run(feature: str):
        if feature not in made:
            recipe = variant(prepared_recipe, "plain" if feature != "frozen" else "frozen")
            if feature == "frozen":
                recipe = change(recipe, objective={"rare_rows": "train", "switch_step": None, "rare_rows_after": None})
            made[feature] = whole(run_ranks(train_rows, 1, recipe, DENSE.get(feature)))
        return made[feature]

    return run


@pytest.mark.parametrize(
    "layout", [one if one in SHORT else pytest.param(one, marks=pytest.mark.long) for one in LAYOUTS], ids=str
)
@pytest.mark.parametrize("feature", DENSE)
def test_equals_the_dense_formula(prepared_recipe, dense, feature, layout):
    losses, norms, rows = whole(run_ranks(train_rows, layout[0] * layout[1], variant(prepared_recipe, feature, layout)))
    expected_losses, expected_norms, expected_rows = dense(feature)
    assert losses == pytest.approx(expected_losses, abs=2e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    moved = (expected_rows[-1] - expected_rows[0]).norm()
    assert (rows - expected_rows).norm(dim=(1, 2)).max() < 1e-3 * moved


@pytest.mark.parametrize("feature", DENSE)
def test_four_tensor_parallel_ranks(prepared_recipe, feature):
    model = {**MODEL, "num_attention_heads": 4, "vocab_multiple_of": 4}
    one = whole(run_ranks(train_rows, 1, variant(prepared_recipe, feature, (1, 1, 0), model)))
    four = whole(run_ranks(train_rows, 4, variant(prepared_recipe, feature, (4, 1, 1), model)))
    assert four[0] == pytest.approx(one[0], abs=2e-5)
    assert (four[2] - one[2]).norm(dim=(1, 2)).max() < 1e-3 * (one[2][-1] - one[2][0]).norm()


@pytest.mark.parametrize("feature", DENSE)
def test_each_feature_matters(dense, feature):
    """By far more than the tolerance above."""
    plain, amended = dense("plain"), dense(feature)
    moved = (plain[2][-1] - plain[2][0]).norm()
    assert (amended[2][-1] - plain[2][-1]).norm() > 0.05 * moved
    assert abs(amended[0][-1] - plain[0][-1]) > 2e-4


def test_pieces_begin_in_the_middle_of_rows(prepared_recipe):
    """Otherwise the layouts above would not see a wrong column."""
    starts = run_ranks(piece_starts, 4, variant(prepared_recipe, "coupled", (1, 4, 3)))
    assert sum(start % WIDTH != 0 for start in starts) == 2


def piece_starts(rank: int, world_size: int, recipe):
    from pretrain.topology import connect
    from pretrain.training import setup

    made = []

    class Seen(RowUpdates):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            made.append(self._pieces)

    setup.RowUpdates = Seen
    setup.build_run(recipe, connect(recipe))
    return made[0][0].start


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_rows_do_not_move_until_they_thaw(prepared_recipe, tied):
    """Bit for bit, whatever momentum and weight decay say; the others do."""
    recipe = variant(prepared_recipe, "frozen", (1, 2, 2))
    recipe = change(recipe, model={"tied_embeddings": tied})
    (_, _, _, rows, rare), *_ = run_ranks(train_rows, 2, recipe)
    for step in range(1, STEPS + 1):
        moved, marked = (rows[step] != rows[step - 1]).any(1), rare[step - 1]
        assert marked.any() and not marked.all()
        assert moved[~marked].all()
        assert moved[marked].all() if step >= THAWS else not moved[marked].any()


def test_centered_in_bf16(prepared_recipe):
    """It is the float32 weights that are centered: what is left of the mean is the rounding of the bf16 ones."""

    def mean_shift(feature: str, layout: tuple[int, int, int]) -> float:
        rows = whole(run_ranks(train_rows, 2, variant(prepared_recipe, feature, layout, precision="bf16")))[2][-1]
        return (rows.mean(0).norm() / rows.norm(dim=1).mean()).item()

    assert mean_shift("plain", (1, 2, 1)) > 0.02
    for layout in ((1, 2, 1), (2, 1, 0), (1, 2, 3)):
        assert mean_shift("centered", layout) < 1e-3


@pytest.mark.parametrize(("feature", "sharding"), [("coupled", "zero2_offload"), ("centered", "zero3_offload")])
def test_offloaded_optimizer(prepared_recipe, dense, feature, sharding):
    recipe = change(variant(prepared_recipe, feature, (1, 2, 2)), parallel={"sharding": sharding})
    losses, _, rows = whole(run_ranks(train_rows, 2, recipe))
    expected_losses, _, expected_rows = dense(feature)
    assert losses == pytest.approx(expected_losses, abs=2e-5)
    assert (rows - expected_rows).norm() < 1e-3 * (expected_rows - expected_rows[0]).norm()


@pytest.mark.parametrize(("tensor_parallel", "stage", "precision"), [(1, 0, "fp32"), (1, 1, "bf16"), (2, 3, "fp32")])
def test_coupled_halves_equal_the_whole(prepared_recipe, tmp_path, tensor_parallel, stage, precision):
    """Bit for bit: Adam's state is all there is."""
    layout = (tensor_parallel, 2 // tensor_parallel, stage)
    recipe = variant(prepared_recipe, "coupled", layout, precision=precision)
    expected = train_on_ranks(change(recipe, output_root=str(tmp_path / "whole")), 2)
    halves = change(recipe, output_root=str(tmp_path / "halves"))
    train_on_ranks(halves, 2, stop_at_step=3)
    got = train_on_ranks(halves, 2)
    for key in ("loss", "grad_norm", "isotropy"):
        assert [record.get(key) for record in got] == [record.get(key) for record in expected]


def test_coupled_and_frozen_go_on_on_another_layout(prepared_recipe, dense, tmp_path):
    for feature in ("coupled", "frozen"):
        recipe = variant(prepared_recipe, feature, (1, 2, 1), output_root=str(tmp_path / feature))
        train_on_ranks(recipe, 2, stop_at_step=3)
        elsewhere = change(recipe, parallel={"tensor_model_parallel_size": 2, "sharding": "zero3"})
        records = train_on_ranks(elsewhere, 2)
        assert [record["loss"] for record in records] == pytest.approx(dense(feature)[0], abs=2e-5)
