"""Geometry of a sharded embedding against the dense formulas, on 1, 2 and 4 tensor-parallel ranks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from agg import VocabShard
from pretrain.evaluation.geometry import (
    Geometry,
    cosine_histogram,
    lookup_rows,
    measure_geometry,
    principal_plane,
    row_norms,
    singular_values,
)
from tests.distributed import caught, run_ranks

VOCAB, WIDTH = 507, 24


def embedding(vocab_size: int = VOCAB) -> torch.Tensor:
    """fp32 [V, D], neither round nor flat, with a common part."""
    generator = torch.Generator().manual_seed(3)
    stretch = torch.linspace(0.2, 1.5, WIDTH)
    return torch.randn(vocab_size, WIDTH, generator=generator) * stretch + 0.3 * torch.randn(WIDTH, generator=generator)


def seen_rows() -> torch.Tensor:
    return torch.arange(VOCAB) % 3 != 0


def shard_of(
    whole: torch.Tensor, rank: int, world_size: int, multiple_of: int = 128
) -> tuple[torch.Tensor, VocabShard]:
    """This rank's rows; those that only pad are huge, so that reading one changes every number."""
    group = dist.group.WORLD if world_size > 1 else None
    shard = VocabShard.of_rank(len(whole), rank, world_size, group, multiple_of)
    rows = torch.full((len(shard), whole.shape[1]), 1e30)
    rows[: shard.real] = whole[shard.start : shard.start + shard.real]
    return rows, shard


def dense_geometry(whole: torch.Tensor) -> Geometry:
    """The formulas as they are written, with the n x n matrix of cosines and without logarithms."""
    w = whole.double()
    norms = w.norm(dim=1)
    _, singular, right = torch.linalg.svd(w, full_matrices=False)
    directions = torch.cat([right, -right]).T

    def isotropy(matrix: torch.Tensor) -> float:
        z = (matrix @ directions).exp().sum(0)
        return float(z.min() / z.max())

    unit = w / norms[:, None]
    different = ~torch.eye(len(w), dtype=torch.bool)
    share = singular / singular.sum()
    return Geometry(
        isotropy=isotropy(w),
        isotropy_unit_norm=isotropy(w / norms.mean()),
        mean_cosine=float((unit @ unit.T)[different].mean()),
        mean_shift=float(w.mean(0).norm() / norms.mean()),
        effective_rank=math.exp(-float((share * share.log()).sum())),
        top_singular_share=float(singular[0] ** 2 / (singular**2).sum()),
        mean_row_norm=float(norms.mean()),
    )


def assert_same(found: Geometry, expected: Geometry, relative: float = 1e-9) -> None:
    for name, value in dataclasses.asdict(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=relative, abs=1e-12), name


def measure_all(rank: int, world_size: int, multiple_of: int = 128) -> dict[str, Any]:
    weight, shard = shard_of(embedding(), rank, world_size, multiple_of)
    torch.manual_seed(rank + world_size)  # no number may depend on the global generator
    seen = torch.ones(len(shard), dtype=torch.bool)  # padding rows claim to be seen
    seen[: shard.real] = seen_rows()[shard.start : shard.start + shard.real]
    return {
        "all": measure_geometry(weight, shard),
        "seen": measure_geometry(weight, shard, seen),
        "singular": singular_values(weight, shard).numpy(),
        "histogram": [part.numpy() for part in cosine_histogram(weight, shard, bins=40, sampled_rows=100, seed=5)],
        "plane": principal_plane(weight, shard).numpy(),
        "rows": lookup_rows(weight, shard, torch.tensor([506, 0, 300])).numpy(),
    }


@pytest.mark.parametrize(("world_size", "multiple_of"), [(1, 128), (2, 128), (4, 128), (2, 1024), (4, 1024)])
def test_equals_the_dense_formulas_on_every_layout(world_size: int, multiple_of: int) -> None:
    """Padded to 1024, the last ranks hold nothing but padding."""
    outcomes = run_ranks(measure_all, world_size, multiple_of)
    whole = embedding()
    one = measure_all(0, 1)
    for outcome in outcomes:
        assert_same(outcome["all"], dense_geometry(whole))
        assert_same(outcome["seen"], dense_geometry(whole[seen_rows()]))
        expected = torch.linalg.svdvals(whole.double())
        torch.testing.assert_close(torch.from_numpy(outcome["singular"]), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.from_numpy(outcome["rows"]), whole[[506, 0, 300]].double())
        for found, alone in zip(outcome["histogram"], one["histogram"], strict=True):
            assert (found == alone).all()
    plane = torch.cat([torch.from_numpy(outcome["plane"]) for outcome in outcomes])
    torch.testing.assert_close(plane[:VOCAB], torch.from_numpy(one["plane"])[:VOCAB], rtol=1e-9, atol=1e-9)
    assert (plane[VOCAB:] == 0).all()


def test_all_ranks_agree_to_the_last_bit() -> None:
    outcomes = run_ranks(measure_all, 4)
    assert len({outcome["all"] for outcome in outcomes}) == 1


def test_rotation_of_the_space_changes_nothing() -> None:
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)).double()).Q
    shard = VocabShard(0, VOCAB, VOCAB)
    weight = embedding().double()
    assert_same(measure_geometry(weight @ rotation, shard), measure_geometry(weight, shard))
    torch.testing.assert_close(principal_plane(weight @ rotation, shard), principal_plane(weight, shard))


def test_isotropy_falls_with_scale_but_not_at_unit_norm() -> None:
    shard = VocabShard(0, VOCAB, VOCAB)
    small, large = measure_geometry(embedding(), shard), measure_geometry(embedding() * 3, shard)
    assert large.isotropy < small.isotropy / 10
    assert large.isotropy_unit_norm == pytest.approx(small.isotropy_unit_norm, rel=1e-6)
    assert large.mean_cosine == pytest.approx(small.mean_cosine, rel=1e-6)


def test_long_rows_do_not_overflow() -> None:
    geometry = measure_geometry(embedding() * 1000, VocabShard(0, VOCAB, VOCAB))
    assert all(math.isfinite(value) for value in dataclasses.asdict(geometry).values())


def test_a_round_cloud_and_a_narrow_cone() -> None:
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(4000, 32, generator=generator) * 0.02
    shard = VocabShard(0, 4000, 4000)
    round_one = measure_geometry(cloud, shard)
    assert round_one.isotropy > 0.98
    assert abs(round_one.mean_cosine) < 0.002
    assert round_one.effective_rank > 31.5
    cone = measure_geometry(cloud + 0.5, shard)
    assert cone.mean_cosine > 0.99
    assert cone.mean_shift > 0.99
    assert cone.isotropy < 0.01
    assert cone.top_singular_share > 0.99
    assert cone.effective_rank < round_one.effective_rank
    assert (principal_plane(cloud + 0.5, shard)[:, 0] > 0).all()


def test_the_histogram_is_the_distribution_of_the_cosines() -> None:
    weight, shard = shard_of(embedding(), 0, 1)
    edges, counts = cosine_histogram(weight, shard, bins=20, sampled_rows=VOCAB)
    unit = torch.nn.functional.normalize(embedding().double(), dim=1)
    cosines = (unit @ unit.T)[~torch.eye(VOCAB, dtype=torch.bool)]
    assert int(counts.sum()) == VOCAB * (VOCAB - 1)
    expected = torch.histogram(cosines, edges).hist
    assert (counts - expected).abs().max() <= 2  # a cosine on an edge
    sampled = cosine_histogram(weight, shard, bins=20, sampled_rows=64)[1]
    assert int(sampled.sum()) == 64 * (VOCAB - 1)


def test_a_row_of_zeros_is_a_row() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert measure_geometry(weight, VocabShard(0, 3, 3)).mean_cosine == pytest.approx(1 / 3)


def test_bf16_is_measured_as_it_is() -> None:
    weight, shard = embedding().bfloat16(), VocabShard(0, VOCAB, VOCAB)
    assert_same(measure_geometry(weight, shard), dense_geometry(weight))
    torch.testing.assert_close(row_norms(weight), weight.double().norm(dim=1))


def test_what_has_no_geometry_is_refused() -> None:
    shard = VocabShard(0, 8, 8)
    with pytest.raises(ValueError, match="0 rows count"):
        measure_geometry(torch.ones(8, 4), shard, torch.zeros(8, dtype=torch.bool))
    with pytest.raises(ValueError, match="all rows of the embedding are zero"):
        measure_geometry(torch.zeros(8, 4), shard)
    with pytest.raises(ValueError, match=r"weight has shape \(7, 4\)"):
        measure_geometry(torch.ones(7, 4), shard)
    with pytest.raises(ValueError, match="rows must be bool"):
        measure_geometry(torch.ones(8, 4), shard, torch.ones(8))


def of_a_bad_row(rank: int, world_size: int, value: float) -> str:
    whole = embedding()
    whole[400, 3] = value  # on the last rank
    weight, shard = shard_of(whole, rank, world_size)
    return caught(lambda: measure_geometry(weight, shard))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_refused_on_all_ranks(value: float) -> None:
    """LAPACK refuses them where the eigenvalues are found, on one rank, while the others would wait for it."""
    expected = ["ValueError: the embedding has rows that are not finite: it has no geometry"] * 2
    assert run_ranks(of_a_bad_row, 2, value) == expected
