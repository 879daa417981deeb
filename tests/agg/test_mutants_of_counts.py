"""The tests of counts, gates and gradients can fail: under each mutant the ordinary test that is named does.

See :mod:`tests.agg.test_mutants` for those of the loss on fixed gates.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial

import pytest
import torch
import torch.distributed as dist

import agg.sweep
from agg import DecayedTokenFrequency, LossProbe, TokenFrequency, VocabShard, alpha_of_rare_fraction
from agg.step_counts import StepCounts
from agg.sweep import Sweep
from tests.agg import (
    test_accumulation,
    test_any_gates,
    test_frequency,
    test_gating,
    test_linear_cross_entropy,
    test_logit_options,
    test_probe,
)
from tests.agg.test_mutants import targets_left_in
from tests.invariance import (
    test_agg_counts,
    test_agg_layouts,
    test_agg_resharding,
    test_agg_split_loss,
    test_agg_zero3,
)

init_counts = StepCounts.__init__
load_state_dict = StepCounts.load_state_dict
sweep_run = Sweep.run
row_factors = agg.sweep.row_factors
softmax_over_shards_ = agg.sweep.softmax_over_shards_
soft_cap_ = agg.sweep.soft_cap_
add_pushes = LossProbe.add_pushes
gated_share = LossProbe.gated_share


def window_off_by(more: int):
    def init(self, shard, window_steps, data_parallel_group=None):
        init_counts(self, shard, window_steps + more, data_parallel_group)

    return init


def last_part_without(key: str):
    def load(self, states):
        parts = [states] if isinstance(states, dict) else list(states)
        if len(parts) > 1 and key in parts[-1]:
            parts[-1] = parts[-1] | {key: torch.zeros_like(parts[-1][key])}
        load_state_dict(self, parts)

    return load


def parts_without_totals(self, states):
    """Of all: that one part has others than the rest is refused."""
    parts = [states] if isinstance(states, dict) else list(states)
    load_state_dict(self, [part | {"totals": torch.zeros_like(part["totals"])} for part in parts])


def place_off_by(more: int):
    def alpha(appearances, rare_fraction, **options):
        return alpha_of_rare_fraction(appearances, rare_fraction + more / len(appearances), **options)

    return alpha


def alpha_of_this_shard(appearances, rare_fraction, *, shard, excluded_ids, **options):
    alone = VocabShard(0, len(shard), shard.real)
    excluded = [id_ - shard.start for id_ in excluded_ids]
    return alpha_of_rare_fraction(appearances, rare_fraction, shard=alone, excluded_ids=excluded, **options)


def smoothing_over_the_shard(self):
    self._smoothing_per_id = self.job.label_smoothing / self.job.shard.real
    return sweep_run(self)


def ungated_smoothing(self):
    """Gives back what the gates took from eps / V; the target's own entry is exempt in any case."""
    sums, job, real = sweep_run(self), self.job, self.job.shard.real
    gate = torch.where(job.target_is_rare()[:, None], job.gates.g2, job.gates.g1)[:, :real].to(self.hidden.dtype)
    gate[job.valid(), job.target[job.valid()]] = 1
    taken = (1 - gate) * job.valid()[:, None] * job.label_smoothing / job.shard.vocab_size
    weight = sums.weight * sums.weight_factor[:, None]
    weight[:real] -= taken.T @ self.hidden
    return dataclasses.replace(sums, weight=weight, weight_factor=None)


def undivided_by_a_closed_gate(gates, dtype):
    """Factors of rows for g1 > 0 alone: where g1 is 0, the positions whose target is rare lose g2 as well."""
    g1, g2 = gates.g1.to(dtype), gates.g2.to(dtype)
    return torch.where(g1 > 0, g2 / g1, 1.0), g1


def no_factors(gates, dtype):
    return (torch.ones_like(gates.g1, dtype=agg.sweep.sum_dtype(dtype)),) * 2


def no_factors_on_ranks(gates, dtype):
    """So that the answer of one process stays right."""
    return (no_factors if dist.is_initialized() else row_factors)(gates, dtype)


def a_tenth_more_loss(*arguments):
    p, terms = softmax_over_shards_(*arguments), arguments[-1]
    terms[0] += 0.1 * terms[1] * (terms[0] != 0)  # of the log of the norm; not where ignored
    return p


def no_z_loss(self):
    self.job = dataclasses.replace(self.job, z_loss=0.0)
    return sweep_run(self)


def no_slope(logits, cap):
    return torch.ones_like(soft_cap_(logits, cap))


def zeroed_hidden_grad(self):
    sums = sweep_run(self)
    sums.hidden.zero_()
    return sums


def probe_with(name: str, change):
    """What a probe is told of a chunk, with one thing changed."""

    def add(self, *arguments):
        told = inspect.signature(add_pushes).bind(self, *arguments)
        told.arguments[name] = change(told.arguments[name])
        add_pushes(*told.args)

    return add


def gates_swapped(columns):
    return columns[:, [0, 2, 1]]


def share_of_this_rank(self, shard, data_parallel_group):
    return gated_share(self, VocabShard(0, len(shard), len(shard)), data_parallel_group)


counts_over_k_steps = partial(test_frequency.test_counts_the_last_k_steps, 3)
fades = test_frequency.test_exponential_window_fades
undoes = test_frequency.test_undo_takes_back_exactly_one_step
reshards = partial(test_agg_resharding.test_counts_continue_on_another_layout, (2, 2), (4, 1))
reshards_after_undo = partial(test_agg_resharding.test_after_a_step_was_taken_back, (2, 2), (4, 1), 6)
counts_on_ranks = partial(test_agg_counts.test_counts_and_gates, 2, 2)
asked_fraction = partial(test_gating.test_rare_fraction_is_what_is_asked_for, 0.25, 1)
formula = partial(test_linear_cross_entropy.test_equals_the_papers_formula, "sum", 0.1, True, 7)
split_formula = partial(test_agg_split_loss.test_fp64, 2, {"reduction": "sum", "label_smoothing": 0.1})
split_fp32 = partial(
    test_agg_split_loss.test_error_within_that_of_the_plain_formula, 2, torch.float32, {"label_smoothing": 0.1}
)
many_chunks = partial(test_accumulation.test_the_error_does_not_grow_with_the_number_of_chunks, "sum")
split_bf16 = partial(
    test_agg_split_loss.test_error_within_that_of_the_plain_formula, 2, torch.bfloat16, {"chunk_tokens": 31}
)
split_strided = partial(test_agg_split_loss.test_inputs_that_are_not_contiguous, test_agg_split_loss.strided)
fp32, bf16 = (
    partial(test_linear_cross_entropy.test_error_within_that_of_the_plain_formula, dtype, True)
    for dtype in (torch.float32, torch.bfloat16)
)
layout_fp32 = partial(test_agg_layouts.test_a_step_on_every_layout, 2, 2, (1, 1), torch.float32)
zero3 = partial(test_agg_zero3.test_gradients_equal_those_of_one_process, 2)
penalised = partial(test_logit_options.test_equals_autograd, {"z_loss": 0.03}, True, "sum", 7)
penalised_fp32 = partial(test_logit_options.test_error_within_that_of_dense_logits, torch.float32, {"z_loss": 1e-3})
penalised_on_ranks = partial(test_logit_options.test_split_vocabulary, 2, {"z_loss": 0.03})
capped = partial(test_logit_options.test_equals_autograd, {"soft_cap": 2.0}, True, "sum", 7)
capped_fp32 = partial(test_logit_options.test_error_within_that_of_dense_logits, torch.float32, {"soft_cap": 30.0})
capped_on_ranks = partial(test_logit_options.test_split_vocabulary, 2, {"soft_cap": 2.0})
probed, probed_on_ranks = (
    partial(test_probe.test_equals_the_dense_gradient_on_every_layout, ranks, 128) for ranks in (1, 2)
)
probed_as_on_a_gpu = test_probe.test_where_ignored_positions_stay_in_their_chunks
any_gates = test_any_gates.test_all_values_of_both_gates
any_gates_fp32 = partial(test_any_gates.test_any_gates_in_other_dtypes, torch.float32)

MUTANTS = {
    "what leaves is not subtracted": (
        TokenFrequency,
        "_outgoing",
        lambda self, histogram: histogram,
        counts_over_k_steps,
    ),
    "what leaves is not subtracted, ranks": (TokenFrequency, "_outgoing", lambda self, x: x, counts_on_ranks),
    "window a step too long": (StepCounts, "__init__", window_off_by(1), counts_over_k_steps),
    "window a step too short": (StepCounts, "__init__", window_off_by(-1), counts_over_k_steps),
    "fades too slowly": (StepCounts, "__init__", window_off_by(1), fades),
    "undo does nothing": (TokenFrequency, "undo_update", lambda self: None, undoes),
    "undo does nothing, fading": (DecayedTokenFrequency, "undo_update", lambda self: None, fades),
    "undo does nothing, ranks": (TokenFrequency, "undo_update", lambda self: None, reshards_after_undo),
    "undo does nothing, fading, ranks": (DecayedTokenFrequency, "undo_update", lambda self: None, reshards_after_undo),
    "totals forgotten": (StepCounts, "load_state_dict", parts_without_totals, reshards),
    "slots of a part forgotten": (StepCounts, "load_state_dict", last_part_without("counts"), reshards),
    "alpha of the next id": (test_gating, "alpha_of_rare_fraction", place_off_by(1), asked_fraction),
    "alpha of the id before": (test_gating, "alpha_of_rare_fraction", place_off_by(-1), asked_fraction),
    "alpha of this shard": (test_agg_counts, "alpha_of_rare_fraction", alpha_of_this_shard, counts_on_ranks),
    "smoothing over the shard": (Sweep, "run", smoothing_over_the_shard, split_formula),
    "smoothing over the shard, fp32": (Sweep, "run", smoothing_over_the_shard, split_fp32),
    "smoothing not gated": (Sweep, "run", ungated_smoothing, formula),
    "g1 of 0 closes g2": (agg.sweep, "row_factors", undivided_by_a_closed_gate, any_gates),
    "g1 of 0 closes g2, fp32": (agg.sweep, "row_factors", undivided_by_a_closed_gate, any_gates_fp32),
    "sums in bf16": (agg.sweep, "sum_dtype", lambda dtype: dtype, partial(many_chunks, True)),
    "sums in bf16, not gated": (agg.sweep, "sum_dtype", lambda dtype: dtype, partial(many_chunks, False)),
    **{
        f"not gated, {name}": (agg.sweep, "row_factors", no_factors_on_ranks if name == "ZeRO 3" else no_factors, test)
        for name, test in {
            "fp32": fp32,
            "bf16": bf16,
            "ranks, bf16": split_bf16,
            "ranks, strided": split_strided,
            "layout, fp32": layout_fp32,
            "ZeRO 3": zero3,
        }.items()
    },
    **{
        f"more loss, {name}": (agg.sweep, "softmax_over_shards_", a_tenth_more_loss, test)
        for name, test in {
            "fp64": formula,
            "fp32": fp32,
            "bf16": bf16,
            "ranks": split_formula,
            "layout, fp32": layout_fp32,
            "z-loss": penalised,
        }.items()
    },
    **{
        f"no z-loss, {name}": (Sweep, "run", no_z_loss, test)
        for name, test in {"fp64": penalised, "fp32": penalised_fp32, "ranks": penalised_on_ranks}.items()
    },
    **{
        f"no slope of the cap, {name}": (agg.sweep, "soft_cap_", no_slope, test)
        for name, test in {"fp64": capped, "fp32": capped_fp32, "ranks": capped_on_ranks}.items()
    },
    "probe counts the pull of targets": (agg.sweep.kernels, "softmax_rows_", targets_left_in, probed),
    "probe takes g1 for g2": (LossProbe, "add_pushes", probe_with("columns", gates_swapped), probed),
    "no target is rare to the probe": (LossProbe, "add_pushes", probe_with("is_rare", torch.zeros_like), probed),
    "probe forgets other shards": (LossProbe, "add_pushes", probe_with("factor", torch.ones_like), probed_on_ranks),
    "probe of this rank alone": (LossProbe, "gated_share", share_of_this_rank, probed_on_ranks),
    "probe sees ignored": (LossProbe, "add_pushes", probe_with("valid", torch.ones_like), probed_as_on_a_gpu),
    "zeroed dH": (Sweep, "run", zeroed_hidden_grad, formula),
    "zeroed dH, ranks": (Sweep, "run", zeroed_hidden_grad, split_formula),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(monkeypatch, name):
    owner, attribute, replacement, ordinary_test = MUTANTS[name]
    ordinary_test()
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError) as error:
        ordinary_test()
    assert "Traceback" not in str(error.value)  # of a rank that broke
