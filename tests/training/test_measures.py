"""What is measured while training: against dense numbers of the same step, and the same on any layout."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from pretrain.evaluation.frequency_groups import GroupedPerplexity, frequency_groups
from pretrain.evaluation.group_names import GROUPS
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks
from tests.evaluation.test_geometry import dense_geometry
from tests.small_runs import change, on_ranks, read_metrics, train_on_ranks

NEVER = 40  # ids that are said to occur nowhere in the train shards
OBJECTIVE = {"alpha": 0.6, "reference_batch_tokens": 128}  # after 512 tokens: once or twice a target is rare, too


def ungathered(parameters: Any, enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    assert not enabled, "the embedding was brought together"
    return contextlib.nullcontext()


def measured_step(rank: int, world_size: int, recipe: Recipe) -> dict[str, Any]:
    """One plain step and one that is measured: its record, and what dense numbers are made of."""
    from pretrain.data.loader import TrainingBatches, training_dataset
    from pretrain.topology import connect
    from pretrain.training.engine import whole_output_embedding
    from pretrain.training.loop import train_step
    from pretrain.training.measures import Measures
    from pretrain.training.setup import build_run

    topology = connect(recipe)
    run = build_run(recipe, topology)
    run.prepared.token_counts[-NEVER:] = 0
    measures, batch = Measures(run), recipe.batch
    replica = topology.data_parallel_rank, topology.data_parallel_size
    steps = iter(
        TrainingBatches(
            training_dataset(run.prepared, recipe),
            micro_batch_size=batch.micro_batch_size,
            global_batch_size=batch.global_batch_size,
            data_parallel_rank=replica[0],
            data_parallel_size=replica[1],
            consumed_samples=0,
        )
    )
    measures.begin_step(1, 9)
    assert run.objective.probe is None
    train_step(run, next(steps))
    micro_batches = list(next(steps))
    with torch.no_grad():
        losses = [run.engine(*pair, per_token=True)[0] for pair in micro_batches]
    measures.begin_step(3, 9)
    done = train_step(run, micro_batches)
    with mock.patch("deepspeed.zero.GatheredParameters", ungathered):
        record = measures.record(3, 9, trained=True)
    found = {
        "loss": done.loss,
        "record": record,
        "skipped": measures.record(3, 9, trained=False),
    }
    gates, real = run.objective.gates(), run.shard.real
    with whole_output_embedding(run.engine) as weight:
        found |= {
            "weight": weight[:real].numpy(),
            "place": (topology.data_parallel_rank, topology.tensor_parallel_rank),
        }
    return found | {
        "g1": gates.g1[:real].double().numpy(),
        "g2": gates.g2[:real].double().numpy(),
        "rare": gates.rare[:real].numpy(),
        "counts": np.array(run.prepared.token_counts),
        "losses": torch.cat(losses).numpy(),
        "targets": torch.cat([targets.flatten() for _, targets in micro_batches]).numpy(),
    }


@pytest.fixture(scope="module")
def alone(prepared_recipe, tmp_path_factory):
    recipe = on_ranks(
        change(prepared_recipe, output_root=str(tmp_path_factory.mktemp("alone")), objective=OBJECTIVE), 1
    )
    return run_ranks(measured_step, 1, recipe)[0]


def by_decile(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Means over tenths of the ids that occur, sorted, and over the others."""
    order = np.argsort(-counts, kind="stable")
    seen = order[: (counts > 0).sum()]
    place = 10 * np.arange(len(seen)) // len(seen)
    tenths = {str(i + 1): float(values[seen[place == i]].mean()) for i in range(10)}
    return tenths | {"never_seen": float(values[counts == 0].mean())}


def test_numbers_are_the_dense_ones(alone):
    record, weight, counts = alone["record"], torch.from_numpy(alone["weight"]), alone["counts"]
    assert (counts == 0).sum() >= NEVER
    expected = {**vars(dense_geometry(weight)), "seen": vars(dense_geometry(weight[torch.from_numpy(counts > 0)]))}
    seen = expected.pop("seen")
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert record["seen_rows"] == pytest.approx(seen, rel=1e-9)
    assert record["seen_rows"]["mean_cosine"] != record["mean_cosine"]
    norms = weight.double().norm(dim=1).numpy()
    assert record["row_norm_by_decile"] == pytest.approx(by_decile(norms, counts), rel=1e-9)
    for gate in ("g1", "g2"):
        assert record[f"{gate}_by_decile"] == pytest.approx(by_decile(alone[gate], counts), rel=1e-9)
    assert record["g2_by_decile"] != record["g1_by_decile"]
    assert record["g1_by_decile"]["10"] < 0.5 < record["g1_by_decile"]["1"]
    assert record["rare_fraction"] == alone["rare"].mean()


def test_losses_by_group_are_those_of_the_same_step(alone):
    record, groups = alone["record"], frequency_groups(torch.from_numpy(alone["counts"])).numpy()[alone["targets"]]
    for i, name in enumerate(GROUPS):
        members = alone["losses"][groups == i].astype(np.float64)
        assert record["loss_by_group"][name] == (pytest.approx(members.mean(), rel=1e-6) if len(members) else None)
    assert record["loss_by_group"]["total"] == pytest.approx(alone["loss"], rel=1e-6)
    assert 0 < record["gated_share"]["of_all"] < record["gated_share"]["of_rare"] < 1


def test_a_step_that_was_not_trained_on_has_no_gradient(alone):
    missing = set(alone["record"]) - set(alone["skipped"])
    assert missing == {"rare_fraction", "loss_by_group", "gated_share", "g1_by_decile", "g2_by_decile"}


@pytest.mark.parametrize(
    ("tensor_parallel", "world_size", "stage"), [(1, 2, 1), (2, 2, 1), (1, 4, 3), (4, 4, 1), (2, 4, 3)]
)
def test_any_layout_measures_the_same(prepared_recipe, alone, tmp_path, tensor_parallel, world_size, stage):
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        objective=OBJECTIVE,
        parallel={"tensor_model_parallel_size": tensor_parallel, "sharding": f"zero{stage}"},
    )
    outcomes = run_ranks(measured_step, world_size, on_ranks(recipe, world_size))
    for outcome in outcomes:
        assert flat(outcome["record"]) == flat(outcomes[0]["record"])  # to the last bit
    record, counts = outcomes[0]["record"], alone["counts"]
    assert flat(record) == pytest.approx(flat(alone["record"]), rel=1e-3, abs=1e-5)
    shards = {outcome["place"]: outcome["weight"] for outcome in outcomes}
    weight = torch.from_numpy(np.concatenate([shards[0, rank] for rank in range(tensor_parallel)]))
    dense = vars(dense_geometry(weight))
    assert {name: record[name] for name in dense} == pytest.approx(dense, rel=1e-9)
    seen = vars(dense_geometry(weight[torch.from_numpy(counts > 0)]))
    assert record["seen_rows"] == pytest.approx(seen, rel=1e-9)
    norms = weight.double().norm(dim=1).numpy()
    assert record["row_norm_by_decile"] == pytest.approx(by_decile(norms, counts), rel=1e-9)


def flat(record: dict[str, Any]) -> dict[str, float | None]:
    parts = {name: value if isinstance(value, dict) else {"": value} for name, value in record.items()}
    return {f"{name}/{part}": number for name, part_of in parts.items() for part, number in part_of.items()}


def test_measuring_changes_no_bit_of_the_run(prepared_recipe, tmp_path):
    """With dropout, so that a number drawn while measuring would show."""
    recipe = change(prepared_recipe, model={"hidden_dropout": 0.1}, reporting={"validate_every_steps": 0})
    runs = {}
    for every in (0, 1):
        run = change(recipe, output_root=str(tmp_path / str(every)), reporting={"geometry_every_steps": every})
        records = train_on_ranks(run, 2)
        assert ("effective_rank" in records[-2]) == bool(every)
        file = RunFolder(run.run_folder).checkpoints / "step_00000006" / "mp_rank_00_model_states.pt"
        runs[every] = [(r["loss"], r["grad_norm"]) for r in read_metrics(run)], torch.load(file, weights_only=False)
    (one, weights), (other, other_weights) = runs[0], runs[1]
    assert one == other
    for name, value in weights["module"].items():
        assert value is None or torch.equal(value, other_weights["module"][name]), name


def test_plain_training_has_losses_but_no_gates(prepared_recipe, tmp_path):
    last = train_on_ranks(change(prepared_recipe, output_root=str(tmp_path), objective={"method": "mle"}), 1)[-1]
    assert last["loss_by_group"]["total"] == pytest.approx(last["loss"], rel=1e-6)
    assert "row_norm_by_decile" in last and not {"gated_share", "g1_by_decile", "rare_fraction"} & set(last)


def test_a_validation_loss_is_finite_where_its_perplexity_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.training import measures

    grouped = GroupedPerplexity(frequency_groups(torch.arange(9)))
    grouped.update(torch.full((4,), 800.0), torch.arange(4))
    monkeypatch.setattr(measures, "subject_of_run", lambda *_: SimpleNamespace(perplexity=lambda limit: grouped))
    of_run = object.__new__(measures.Measures)
    of_run._run, of_run._reporting = mock.MagicMock(), mock.MagicMock()
    record = of_run._validation()
    assert (record["validation_perplexity"]["total"], record["validation_loss"]) == (math.inf, 800.0)
