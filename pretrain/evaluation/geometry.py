"""The shape of an embedding: isotropy, mean cosine, effective rank, and what the figures draw.

Letters: W [V, D] output embedding, w_k its row of id k, V_local the rows of this tensor-parallel rank, n the rows
that count, E [D, D] the unit eigenvectors of W^T W as columns.

All functions take this rank's rows and their shard. Rows that only pad the vocabulary never count, and are not
read. Sums are taken in fp64, so a number does not depend on the tensor-parallel degree beyond about 1e-12. Over the
ranks only vectors of D or V and D x D matrices are reduced, never W.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from agg import VocabShard

# Elements held in fp64 at a time: on a CPU 1 MiB, which stays in its cache.
CHUNK_ELEMENTS = {"cpu": 2**17, "cuda": 2**24}


@dataclass(frozen=True)
class Geometry:
    """How far an embedding has degenerated. No field has a unit.

    Attributes:
        isotropy: ``I(W) = min_a Z(a) / max_a Z(a)`` in (0, 1], ``Z(a) = sum_k exp(w_k . a)``, over the unit
            eigenvectors a of W^T W with both signs (Mu and Viswanath 2018, arXiv 1702.01417). 1: no direction is
            preferred. It falls with the scale of W.
        isotropy_unit_norm: the same after dividing W by its mean row norm.
        mean_cosine: mean cosine of all pairs of different rows. A row of zeros has cosine 0 with all others.
        mean_shift: norm of the mean row over the mean row norm, in [0, 1].
        effective_rank: ``exp(-sum_i p_i log p_i)``, ``p_i = s_i / sum_j s_j`` over the singular values s of W
            (Roy and Vetterli 2007, "The effective rank"), in [1, D].
        top_singular_share: ``s_1^2 / sum_i s_i^2``, the share of the strongest direction.
        mean_row_norm: mean of the Euclidean norms of the rows.
    """

    isotropy: float
    isotropy_unit_norm: float
    mean_cosine: float
    mean_shift: float
    effective_rank: float
    top_singular_share: float
    mean_row_norm: float


@dataclass(frozen=True)
class _Moments:
    """Sums over the rows of all ranks, in fp64."""

    rows: int
    norm_sum: float
    row_sum: torch.Tensor  # [D]
    unit_row_sum: torch.Tensor  # [D]
    unit_square_sum: float  # rows that are not zero
    second: torch.Tensor  # [D, D], W^T W


@torch.no_grad()
def measure_geometry(weight: torch.Tensor, shard: VocabShard, rows: torch.Tensor | None = None) -> Geometry:
    """All numbers of :class:`Geometry`.

    Args:
        weight: [V_local, D], any floating dtype.
        shard: which rows these are.
        rows: bool [V_local], the rows to look at, say the ids that occur in the training data; None: all.

    Raises:
        ValueError: fewer than two rows count, all of them are zero, one is not finite, or a shape is not as above.
    """
    moments = _moments(weight, shard, rows)
    mean_norm = moments.norm_sum / moments.rows
    if mean_norm == 0:
        raise ValueError("all rows of the embedding are zero: it has no geometry")
    eigenvalues, eigenvectors = _eigen(moments.second, shard)
    singular = eigenvalues.sqrt()
    share = singular / singular.sum()
    pairs = moments.rows * (moments.rows - 1)
    isotropy, isotropy_unit_norm = _isotropies(weight, shard, rows, eigenvectors, (1.0, 1.0 / mean_norm))
    return Geometry(
        isotropy=isotropy,
        isotropy_unit_norm=isotropy_unit_norm,
        mean_cosine=(float(moments.unit_row_sum.square().sum()) - moments.unit_square_sum) / pairs,
        mean_shift=float(moments.row_sum.norm()) / moments.norm_sum,
        effective_rank=float(torch.special.entr(share).sum().exp()),
        top_singular_share=float(eigenvalues[0] / eigenvalues.sum()),
        mean_row_norm=mean_norm,
    )


@torch.no_grad()
def singular_values(weight: torch.Tensor, shard: VocabShard, rows: torch.Tensor | None = None) -> torch.Tensor:
    """fp64 [D]: singular values of W, falling. Those below about 1e-8 of the first are rounding noise."""
    return _eigen(_moments(weight, shard, rows).second, shard)[0].sqrt()


@torch.no_grad()
def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """fp64 [V_local]: Euclidean norm of each row, those that only pad included."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
    return norms


@torch.no_grad()
def lookup_rows(weight: torch.Tensor, shard: VocabShard, ids: torch.Tensor) -> torch.Tensor:
    """fp64 [n, D]: the rows of these global ids int64 [n], on every rank; a reduction of n x D."""
    local, here = shard.to_local(ids.to(weight.device))
    found = torch.where(here[:, None], weight[local].double(), 0.0)
    return shard.all_reduce(found)


@torch.no_grad()
def cosines_to_mean(weight: torch.Tensor, shard: VocabShard, rows: torch.Tensor) -> torch.Tensor:
    """fp64 [V_local]: cosine of every real row with the mean of some; of rows that only pad, and of zeros, 0.

    Args:
        rows: bool [V_local], those of which the mean is taken.
    """
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for _, chunk in _row_chunks(weight, shard, rows):
        total += chunk.sum(0)
    direction = _unit(shard.all_reduce(total)[None])[0]
    cosines = torch.zeros(len(shard), dtype=torch.float64, device=weight.device)
    for ids, chunk in _row_chunks(weight, shard, None):
        cosines[ids - shard.start] = _unit(chunk) @ direction
    return cosines


@torch.no_grad()
def cosine_histogram(
    weight: torch.Tensor,
    shard: VocabShard,
    bins: int = 100,
    sampled_rows: int = 512,
    seed: int = 0,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distribution of the cosines between rows, from all rows against a fixed sample of them.

    The sample depends on the seed and on which rows count, not on the layout. Pairs of a row with itself are left
    out; a pair inside the sample is met twice, which leaves its weight in the distribution as it is.

    Returns:
        edges fp64 [bins + 1] from -1 to 1, and counts int64 [bins], which sum to sample x (n - 1).
    """
    counted = torch.zeros(shard.vocab_size, dtype=torch.int32, device=weight.device)
    counted[shard.start : shard.start + shard.real] = _counted_rows(weight, shard, rows).to(torch.int32)
    candidates = shard.all_reduce(counted).nonzero().squeeze(1)
    if len(candidates) < 2:
        raise ValueError(f"{len(candidates)} rows count, a pair needs two")
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    sample_ids = candidates[order[:sampled_rows].to(candidates.device)]
    sample = _unit(lookup_rows(weight, shard, sample_ids))
    counts = torch.zeros(bins, dtype=torch.int64, device=weight.device)
    for ids, chunk in _row_chunks(weight, shard, rows):
        cosines = _unit(chunk) @ sample.T
        bin_of = ((cosines + 1) * (bins / 2)).long().clamp_(0, bins - 1)
        counts += torch.bincount(bin_of[ids[:, None] != sample_ids], minlength=bins)
    return torch.linspace(-1, 1, bins + 1, dtype=torch.float64), shard.all_reduce(counts)


@torch.no_grad()
def principal_plane(weight: torch.Tensor, shard: VocabShard, rows: torch.Tensor | None = None) -> torch.Tensor:
    """fp64 [V_local, 2]: every real row on the two strongest directions of W; rows that only pad are 0.

    The directions are the eigenvectors of the *uncentred* W^T W. After centring, a narrow cone and a round cloud
    look the same, as the common part that makes the cone is what centring removes; without it the distance of
    the cloud from the origin is the degeneration, so the origin belongs into the figure. An eigenvector has no
    sign: each points to the side of the mean row.

    Args:
        rows: bool [V_local], the rows that choose the directions; all real rows are projected.
    """
    moments = _moments(weight, shard, rows)
    axes = _eigen(moments.second, shard)[1][:, :2]
    axes = torch.where(moments.row_sum @ axes < 0, -axes, axes)
    plane = torch.zeros(len(shard), 2, dtype=torch.float64, device=weight.device)
    for ids, chunk in _row_chunks(weight, shard, None):
        plane[ids - shard.start] = chunk @ axes
    return plane


def _counted_rows(weight: torch.Tensor, shard: VocabShard, rows: torch.Tensor | None) -> torch.Tensor:
    """bool [shard.real]: which of the real rows count."""
    if weight.ndim != 2 or len(weight) != len(shard):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the shard has {len(shard)} rows")
    if rows is None:
        return torch.ones(shard.real, dtype=torch.bool, device=weight.device)
    if rows.shape != (len(shard),) or rows.dtype != torch.bool:
        raise ValueError(f"rows must be bool [{len(shard)}], got {rows.dtype} {list(rows.shape)}")
    return rows[: shard.real].to(weight.device)


def _row_chunks(
    weight: torch.Tensor, shard: VocabShard, rows: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Global ids [c] and fp64 rows [c, D] of what counts here, a chunk at a time. It may be none."""
    local = _counted_rows(weight, shard, rows).nonzero().squeeze(1)
    chunk_rows = max(128, CHUNK_ELEMENTS.get(weight.device.type, 2**17) // weight.shape[1])
    for first in range(0, len(local), chunk_rows):
        part = local[first : first + chunk_rows]
        yield part + shard.start, weight[part].double()


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of norm 1; rows of zeros stay."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


def _moments(weight: torch.Tensor, shard: VocabShard, rows: torch.Tensor | None) -> _Moments:
    width = weight.shape[1]
    sums = torch.zeros(3 + 2 * width, dtype=torch.float64, device=weight.device)
    second = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    for _, chunk in _row_chunks(weight, shard, rows):
        norms = chunk.norm(dim=1)
        sums[0] += len(chunk)
        sums[1] += norms.sum()
        sums[2] += (norms > 0).sum()
        sums[3 : 3 + width] += chunk.sum(0)
        sums[3 + width :] += _unit(chunk).sum(0)
        second.addmm_(chunk.T, chunk)
    shard.all_reduce(sums)
    shard.all_reduce(second)
    if sums[0] < 2:
        raise ValueError(f"{int(sums[0])} rows count, the geometry needs two")
    if not sums[1].isfinite():  # on all ranks: of such a matrix the one that has it has no eigenvalues
        raise ValueError("the embedding has rows that are not finite: it has no geometry")
    return _Moments(
        rows=int(sums[0]),
        norm_sum=float(sums[1]),
        row_sum=sums[3 : 3 + width],
        unit_row_sum=sums[3 + width :],
        unit_square_sum=float(sums[2]),
        second=second,
    )


def _eigen(second: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [D], falling, and eigenvectors [D, D] as columns, the same bits on every rank.

    One rank decides: where eigenvalues are close, ranks of different hardware would choose different vectors, and
    a Z(a) summed over the ranks would be of no single a.
    """
    width = len(second)
    both = torch.zeros(width + 1, width, dtype=second.dtype, device=second.device)
    if shard.start == 0:
        values, vectors = torch.linalg.eigh(second)
        both[0], both[1:] = values.flip(0).clamp(min=0), vectors.flip(1)
    shard.all_reduce(both)
    return both[0], both[1:]


def _isotropies(
    weight: torch.Tensor,
    shard: VocabShard,
    rows: torch.Tensor | None,
    directions: torch.Tensor,
    scales: tuple[float, ...],
) -> list[float]:
    """``I(scale * W)`` for each scale, in log space: Z overflows where a row is longer than 709."""
    width = directions.shape[1]
    log_z = torch.full((len(scales), 2 * width), -torch.inf, dtype=torch.float64, device=weight.device)
    for _, chunk in _row_chunks(weight, shard, rows):
        along = chunk @ directions
        for i, scale in enumerate(scales):
            log_z[i] = torch.logaddexp(log_z[i], _log_sums_of_both_signs(scale * along))
    highest = shard.all_reduce(log_z.clone(), dist.ReduceOp.MAX)
    log_z = shard.all_reduce((log_z - highest).exp()).log() + highest
    return [float((one.min() - one.max()).exp()) for one in log_z]


def _log_sums_of_both_signs(values: torch.Tensor) -> torch.Tensor:
    """[2 D]: ``log sum_c exp`` of ``values`` [c, D] and of ``-values``; as plain sums unless those might overflow."""
    if values.numel() and values.abs().amax() > 300:
        return torch.cat([values.logsumexp(0), (-values).logsumexp(0)])
    powers = values.exp()
    return torch.cat([powers.sum(0), powers.reciprocal().sum(0)]).log()
