"""The examples of AGG in other trainers run as their first lines say, and train what one process trains."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.nn import functional as F

from agg import AdaptiveGradientGating, VocabShard
from pretrain.examples import fsdp, megatron_core, torch_loop
from pretrain.examples.corpus import VOCAB_SIZE, zipf_batch
from tests.distributed import run_ranks
from tests.training.processes import with_a_compiler

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
EXAMPLES = ("torch_loop", "fsdp", "megatron_core", "huggingface", "huggingface_trainer")


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same(one, other, tolerance=1e-9):
    """Whether the losses of all steps and the final output embedding agree."""
    losses, weight = one
    others, other_weight = other
    return (
        len(losses) == len(others)
        and torch.allclose(torch.tensor(losses), torch.tensor(others), atol=tolerance, rtol=0)
        and torch.allclose(weight, other_weight, atol=tolerance, rtol=0)
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_command_runs(name):
    """The last command of its docstring, as a user would give it: the loss falls, and some tokens are rare."""
    document = (ROOT / f"pretrain/examples/{name}.py").read_text(encoding="utf-8").split('"""')[1]
    *_, (launcher, arguments) = re.findall(r"``(python|torchrun) (.*)``", document)
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[launcher]
    done = subprocess.run(
        [sys.executable, *module, *arguments.split()],
        cwd=ROOT, env=with_a_compiler(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(number) for number in re.findall(r"(?<!_)loss\W+([\d.]+)", done.stdout)]
    shares = [float(number) for number in re.findall(r"rare\D+([\d.]+)", done.stdout)]
    assert len(losses) >= 6 and losses[-1] < losses[0] - 1
    assert all(share > 0 for share in shares)


def test_each_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in EXAMPLES if f"-m pretrain.examples.{name}`" not in text] == []


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_torch_loop_equals_whole_batches(micro_batches):
    """Without begin_step: one call a step, which counts by itself."""
    torch.manual_seed(0)
    model, losses = torch_loop.SmallModel(), []
    shard = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE)
    loss_of = AdaptiveGradientGating(shard, rare_fraction=0.3, window_steps=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        batch = zipf_batch(step)
        hidden = model(batch[:, :-1].clamp(min=0)).flatten(0, 1)
        loss = loss_of(hidden, model.output.weight, batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert same(torch_loop.train(STEPS, micro_batches), (losses, model.output.weight))


def test_torch_loop_gates():
    """With every gate 1 the output embedding comes out differently."""
    gated, patch = torch_loop.train(STEPS), pytest.MonkeyPatch()
    with patch.context() as changed:
        changed.setattr(torch_loop, "AdaptiveGradientGating", never_gating)
        plain = torch_loop.train(STEPS)
    assert plain[0][0] == gated[0][0] and not same(plain, gated, 1e-3)


def never_gating(*arguments, **options):
    return AdaptiveGradientGating(
        *arguments, **{**options, "rare_fraction": None, "alpha": 1e-9, "excluded_ids": range(VOCAB_SIZE)}
    )


# FSDP2


@functools.cache
def expected_of_torch_loop(tied=False):
    return torch_loop.train(STEPS, tied=tied)


@pytest.mark.parametrize(("ranks", "tied"), [(2, False), (4, True)])
def test_fsdp_equals_the_torch_loop(ranks, tied):
    expected = expected_of_torch_loop(tied)
    for result in run_ranks(fsdp_rank, ranks, tied):
        assert same(result, expected)


def test_fsdp_that_counts_a_rank_alone_is_found():
    expected = expected_of_torch_loop()
    assert not same(run_ranks(fsdp_rank, 2, False, True)[0], expected, 1e-6)


def test_fsdp_cuts_a_step_into_any_number_of_micro_batches():
    """Also into more than a rank has rows, as many ranks with few rows each do."""
    for result in run_ranks(fsdp_in_parts, 2, 9):
        assert same(result, expected_of_torch_loop())


def fsdp_in_parts(rank, world_size, micro_batches):
    return fsdp.train(STEPS, micro_batches)


def fsdp_rank(rank, world_size, tied, alone=False):
    if alone:
        fsdp.AdaptiveGradientGating = counting_alone
    return fsdp.train(STEPS, tied=tied)


def test_fsdp_goes_on_from_a_checkpoint_of_other_ranks(tmp_path):
    losses, weight = expected_of_torch_loop()
    (tmp_path / "token_counts_3.pt").touch()  # of an older save of four ranks
    run_ranks(fsdp_half, 2, STEPS // 2, None, tmp_path)
    for result in run_ranks(fsdp_half, 4, STEPS, tmp_path, None):
        assert same(result, (losses[STEPS // 2 :], weight))


def fsdp_half(rank, world_size, steps, resume, output):
    return fsdp.train(steps, resume=resume, output=output)


def counting_alone(*arguments, data_parallel_group, **options):
    return AdaptiveGradientGating(*arguments, **options)


# megatron-core


@functools.cache
def megatron_on_one_rank(tied):
    return run_ranks(megatron_rank, 1, 1, tied)[0]


@pytest.mark.parametrize(
    ("ranks", "degree", "tied"), [(2, 2, False), (2, 2, True), (2, 1, False), (4, 2, True), (4, 4, False)]
)
def test_megatron_core_does_not_depend_on_the_layout(ranks, degree, tied):
    for result in run_ranks(megatron_rank, ranks, degree, tied):
        assert same(result, megatron_on_one_rank(tied))


def test_megatron_core_that_counts_a_rank_alone_is_found():
    assert not same(run_ranks(megatron_rank, 2, 1, False, True)[0], megatron_on_one_rank(False), 1e-6)


def megatron_rank(rank, world_size, degree, tied, alone=False):
    if alone:
        megatron_core.AdaptiveGradientGating = counting_alone
    initialize_megatron(degree)
    return megatron_core.train(STEPS, tied=tied)


def initialize_megatron(degree):
    megatron_core.parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=degree, create_gloo_process_groups=False
    )


def test_megatron_core_goes_on_with_its_counts_on_another_layout(tmp_path):
    (tmp_path / "token_counts_7.pt").touch()  # of an older save of eight ranks
    run_ranks(saving_megatron, 4, 2, tmp_path)
    for degree in (1, 4):
        for rare, expected in run_ranks(loading_megatron, 4, degree, tmp_path):
            assert torch.equal(rare, expected) and 0.1 < expected.double().mean() < 0.9


def saving_megatron(rank, world_size, degree, folder):
    megatron_core.save_counts(megatron_that_counted(degree, 4), folder)


def loading_megatron(rank, world_size, degree, folder):
    loss_of = megatron_that_counted(degree, 0)
    megatron_core.load_counts(loss_of, folder)
    loaded = loss_of.current_gates().rare_ids
    expected = megatron_core.build().loss_of
    count_steps(expected, 4)
    return loaded, expected.current_gates().rare_ids


def megatron_that_counted(degree, steps):
    initialize_megatron(degree)
    loss_of = megatron_core.build().loss_of
    count_steps(loss_of, steps)
    return loss_of


def count_steps(loss_of, steps):
    rank = megatron_core.parallel_state.get_data_parallel_rank()
    ranks = megatron_core.parallel_state.get_data_parallel_world_size()
    for step in range(steps):
        loss_of.begin_step(zipf_batch(step)[rank::ranks, 1:])


def test_megatron_core_evaluates_the_cross_entropy_of_its_own_logits():
    for gated, plain, steps in run_ranks(megatron_evaluation, 2):
        assert gated == pytest.approx(plain, rel=1e-12) and steps == 0


def megatron_evaluation(rank, world_size):
    initialize_megatron(world_size)
    model = megatron_core.build().eval()
    batch = zipf_batch(0)
    tokens, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        loss = model(tokens, positions, None, labels=targets)
        del model.output_layer.forward  # the class's own again: logits of this rank's rows
        logits = model.loss_of.shard.all_gather(model(tokens, positions, None)).movedim(0, 2).flatten(2)
    plain = F.cross_entropy(logits[..., :VOCAB_SIZE].flatten(0, 1), targets.flatten(), reduction="sum")
    return loss.item(), plain.item(), model.loss_of.frequency.steps


def test_megatron_core_with_sequence_parallelism():
    """The same gradients: the hidden states are gathered, and their gradient is split rather than added up."""
    (plain, split), _ = run_ranks(megatron_sequence_parallel, 2)
    assert plain.keys() == split.keys() and len(plain) > 20
    for name, gradient in plain.items():
        assert torch.allclose(split[name], gradient, atol=1e-9, rtol=1e-9), name


def megatron_sequence_parallel(rank, world_size):
    torch.cuda.current_device = lambda: torch.device("cpu")  # where megatron-core makes its buffers
    WrappedTorchNorm.__new__ = sequence_parallel_norm  # megatron-core has one for GPUs only
    tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=contextlib.nullcontext)  # for dropout
    initialize_megatron(world_size)
    group = megatron_core.parallel_state.get_tensor_model_parallel_group()
    batch, found = zipf_batch(0), []
    tokens, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    for sequence_parallel in (False, True):
        model = megatron_core.build(sequence_parallel=sequence_parallel)
        model.loss_of.begin_step(targets)
        model(tokens, positions, None, labels=targets).backward()
        for parameter in model.parameters():  # as finalize_model_grads does
            if getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(parameter.grad, group=group)
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return found


def sequence_parallel_norm(cls, config, hidden_size, eps=1e-5, **_):
    norm = torch.nn.LayerNorm(hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
