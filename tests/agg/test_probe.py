"""A probe sees what the gates take: against the dense gradient of the logits, on 1, 2 and 4 tensor-parallel ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from agg import LossProbe, VocabShard, gated_linear_cross_entropy, kernels
from tests.agg.problems import Problem, make_problem
from tests.distributed import run_ranks


def dense_share(problem: Problem) -> tuple[float, float]:
    """The two ratios as they are written, with G of shape [T, V]."""
    vocab, gates, valid = problem.vocab_size, problem.gates, problem.target != -100
    target = problem.target[valid]
    e = torch.softmax(problem.hidden[valid] @ problem.weight[:vocab].T, 1)
    e -= F.one_hot(target, vocab)
    g = torch.where(gates.rare[target][:, None], gates.g2[:vocab], gates.g1[:vocab]).double()
    g.scatter_(1, target[:, None], 1)
    pushes = e.abs().scatter(1, target[:, None], 0)[:, gates.rare[:vocab]]
    taken = ((1 - g) * e.abs()).sum()
    return float(taken / e.abs().sum()), float(taken / pushes.sum())


def probed(problem: Problem, shard: VocabShard, probe: LossProbe | None, **options: Any) -> list[torch.Tensor]:
    """Two micro-batches of one step, watched: the summed loss and dW."""
    weight, gates = problem.local(shard)
    weight = weight.clone().requires_grad_()
    options = {"reduction": "sum", "chunk_tokens": 7, **options}
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 40), slice(40, None)):
        hidden, target = problem.hidden[part], problem.target[part]
        total = total + gated_linear_cross_entropy(hidden, weight, target, gates, shard, probe=probe, **options).sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    return [total.detach(), weight.grad]


def share(problem: Problem, shard: VocabShard, **options: Any) -> tuple[float, float]:
    probe = LossProbe()
    probed(problem, shard, probe, **options)
    found = probe.gated_share(shard, None)
    assert found is not None and found.of_rare is not None
    return found.of_all, found.of_rare


def share_of_rank(rank: int, world_size: int, multiple_of: int) -> tuple[float, float]:
    problem = make_problem()
    group = dist.group.WORLD if world_size > 1 else None
    shard = VocabShard.of_rank(problem.vocab_size, rank, world_size, group, multiple_of)
    more = world_size * len(shard) - len(problem.weight)  # rows that only pad
    names = ("rare", "g1", "g2")
    gates = dataclasses.replace(
        problem.gates, **{name: F.pad(getattr(problem.gates, name), (0, more)) for name in names}
    )
    return share(dataclasses.replace(problem, weight=F.pad(problem.weight, (0, 0, 0, more)), gates=gates), shard)


@pytest.mark.parametrize(("world_size", "multiple_of"), [(1, 128), (2, 128), (4, 128), (4, 1024)])
def test_equals_the_dense_gradient_on_every_layout(world_size: int, multiple_of: int) -> None:
    """Padded to 1024, the last ranks hold nothing but padding."""
    of_all, of_rare = dense_share(make_problem())
    assert 0.01 < of_all < 0.5 and 0.05 < of_rare < 0.95
    for found in run_ranks(share_of_rank, world_size, multiple_of):
        assert found == pytest.approx((of_all, of_rare), rel=1e-12)


def test_where_ignored_positions_stay_in_their_chunks() -> None:
    """As on a GPU; what is there may be NaN."""
    problem = make_problem(ignored=0.3)
    expected = dense_share(problem)
    problem.hidden[problem.target == -100] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "values_are_at_hand", lambda tensor: False)
        assert share(problem, problem.shard(0, 1)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"label_smoothing": 0.1}, {"z_loss": 0.1}])
def test_neither_reduction_nor_what_is_added_to_the_loss_matters(options: dict[str, Any]) -> None:
    problem = make_problem()
    assert share(problem, problem.shard(0, 1), **options) == pytest.approx(dense_share(problem), rel=1e-12)


def test_backward_of_single_losses_is_not_counted_again() -> None:
    problem, probe = make_problem(), LossProbe()
    probed(problem, problem.shard(0, 1), probe, reduction="none")
    assert len(probe.token_losses) == 2


def test_single_losses_that_are_weighed_in_place_stay_as_they_were_measured() -> None:
    problem, probe = make_problem(), LossProbe()
    hidden = problem.hidden.clone().requires_grad_()
    given = (hidden, problem.weight, problem.target, problem.gates, problem.shard(0, 1))
    losses = gated_linear_cross_entropy(*given, reduction="none", probe=probe)
    before = losses.detach().clone()
    losses.mul_(0.5)
    ((_, measured),) = probe.token_losses
    assert torch.equal(measured, before) and not measured.requires_grad


def test_of_capped_logits() -> None:
    problem = make_problem()
    capped = 2 * torch.tanh(problem.hidden @ problem.weight.T / 2)
    as_they_are = torch.eye(len(problem.weight), dtype=torch.float64)
    expected = dense_share(dataclasses.replace(problem, hidden=capped, weight=as_they_are))
    assert share(problem, problem.shard(0, 1), soft_cap=2.0) == pytest.approx(expected, rel=1e-12)


def test_probing_changes_no_bit_of_loss_or_gradient() -> None:
    problem, probe = make_problem(), LossProbe()
    shard = problem.shard(0, 1)
    watched, alone = probed(problem, shard, probe), probed(problem, shard, None)
    assert all(torch.equal(one, other) for one, other in zip(watched, alone, strict=True))
    assert torch.equal(torch.cat([target for target, _ in probe.token_losses]), problem.target)
    logits = problem.hidden @ problem.weight[: problem.vocab_size].T
    losses = torch.cat([losses for _, losses in probe.token_losses])
    torch.testing.assert_close(losses, F.cross_entropy(logits, problem.target, reduction="none"), rtol=0, atol=1e-12)


def test_nothing_to_share() -> None:
    problem = make_problem()
    shard, ignored = problem.shard(0, 1), torch.full_like(problem.target, -100)
    probe = LossProbe()
    probed(dataclasses.replace(problem, target=ignored), shard, probe)
    assert probe.gated_share(shard, None) is None
    gated_linear_cross_entropy(problem.hidden, problem.weight, problem.target, None, shard, probe=probe)
    assert probe.gated_share(shard, None) is None and len(probe.token_losses) == 3
