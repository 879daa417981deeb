"""The model: one seed one set of weights, sizes by formula, attention, dropout and recomputation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from agg import VocabShard
from agg.vocab_shard import padded_vocab_size
from pretrain.model.output_head import OutputHead
from pretrain.model.size import model_size, peak_flops, training_flops_per_token
from pretrain.recipe import ModelRecipe
from tests.distributed import run_ranks
from tests.small_runs import change

VOCAB = 500
STYLES = [
    ModelRecipe(style="gpt2", num_layers=2, hidden_size=32, num_attention_heads=4, sequence_length=24),
    ModelRecipe(
        style="llama", num_layers=2, hidden_size=32, num_attention_heads=8, num_query_groups=4, sequence_length=24
    ),
    ModelRecipe(
        style="llama", num_layers=2, hidden_size=32, num_attention_heads=4, sequence_length=24, tied_embeddings=True
    ),
]


def build(recipe, model):
    from pretrain.model.gpt import build_model
    from pretrain.topology import connect

    recipe = change(recipe, model=vars(model))
    topology = connect(recipe)
    shard = VocabShard.of_rank(
        VOCAB, topology.tensor_parallel_rank, topology.tensor_parallel_size, topology.tensor_parallel_group
    )
    return build_model(model, shard, padded_vocab_size(VOCAB, 128), seed=3), topology


def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (2, 25), generator=generator)
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()


def outputs(rank, world_size, recipe, model):
    module, topology = build(change(recipe, parallel={"tensor_model_parallel_size": world_size}), model)
    tokens, targets = batch()
    loss = module(tokens, targets)
    loss.backward()
    squares = torch.zeros((), dtype=torch.float64)
    for parameter in module.parameters():
        if getattr(parameter, "tensor_model_parallel", False) or rank == 0:
            squares += parameter.grad.double().square().sum()
    torch.distributed.all_reduce(squares, group=topology.tensor_parallel_group)
    module.eval()
    losses, predictions = module(tokens, targets, per_token=True)
    return {
        "loss": loss.item(),
        "grad_norm": squares.sqrt().item(),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "losses": losses.detach(),
        "predictions": predictions,
        "logits": module(tokens).detach(),
    }


@pytest.mark.parametrize("model", STYLES, ids=["gpt2", "llama", "llama-tied"])
def test_same_function_on_every_tensor_parallel_degree(prepared_recipe, model):
    alone = run_ranks(outputs, 1, prepared_recipe, model)[0]
    assert alone["parameters"] == model_size(model, VOCAB).total
    assert alone["losses"].sum().item() == pytest.approx(alone["loss"], rel=1e-6)
    assert alone["logits"].shape == (2, VOCAB)
    for world_size in (2, 4):
        for mine in run_ranks(outputs, world_size, prepared_recipe, model):
            assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-6)
            assert mine["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
            assert torch.allclose(mine["losses"], alone["losses"], atol=1e-5)
            assert torch.equal(mine["predictions"], alone["predictions"])
            assert torch.allclose(mine["logits"], alone["logits"], atol=1e-5)


def future_changes_nothing(rank, world_size, recipe, model):
    module, _ = build(recipe, model)
    module.eval()
    tokens, targets = batch()
    before, _ = module(tokens, targets, per_token=True)
    tokens[:, 12:] = 7
    after, _ = module(tokens, targets, per_token=True)
    return before.view(2, 24).detach(), after.view(2, 24).detach()


@pytest.mark.parametrize("model", STYLES[:2], ids=["gpt2", "llama"])
def test_attention_is_causal(prepared_recipe, model):
    before, after = run_ranks(future_changes_nothing, 1, prepared_recipe, model)[0]
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before[:, 12:], after[:, 12:])


def position_matters(rank, world_size, recipe, model):
    module, _ = build(recipe, model)
    module.eval()
    first = torch.tensor([[5, 9, 9, 9]])
    second = torch.tensor([[9, 5, 9, 9]])
    return module(first).detach(), module(second).detach()


@pytest.mark.parametrize("model", STYLES[:2], ids=["gpt2", "llama"])
def test_positions_are_seen(prepared_recipe, model):
    first, second = run_ranks(position_matters, 1, prepared_recipe, model)[0]
    assert not torch.allclose(first, second, atol=1e-6)


def recomputed(rank, world_size, recipe, checkpointing):
    model = ModelRecipe(
        num_layers=2, hidden_size=32, num_attention_heads=4, sequence_length=24, hidden_dropout=0.2,
        attention_dropout=0.2, activation_checkpointing=checkpointing,
    )  # fmt: skip
    module, _ = build(change(recipe, parallel={"tensor_model_parallel_size": world_size}), model)
    torch.manual_seed(11)
    loss = module(*batch())
    loss.backward()
    return loss.item(), module.decoder.layers[0].mlp.linear_fc1.weight.grad


def test_recomputation_gives_the_same_gradients_under_dropout(prepared_recipe):
    for plain, again in zip(
        run_ranks(recomputed, 2, prepared_recipe, "none"),
        run_ranks(recomputed, 2, prepared_recipe, "full"),
        strict=True,
    ):
        assert plain[0] == again[0] and torch.equal(plain[1], again[1])


def attention_masks(rank, world_size, recipe):
    from pretrain.model.attention import _ranks_drop_differently

    torch.manual_seed(5)
    with _ranks_drop_differently(rank):
        mine = F.dropout(torch.ones(1000), 0.5)
    return mine, torch.rand(3)


def test_tensor_parallel_ranks_drop_different_attention(prepared_recipe):
    """Their heads differ; what they share (hidden states) must go on from one random state."""
    (one, after_one), (two, after_two) = run_ranks(attention_masks, 2, prepared_recipe)
    assert not torch.equal(one, two) and torch.equal(after_one, after_two)


def test_flops_and_peaks():
    model = STYLES[0]
    per_token = training_flops_per_token(model, VOCAB)
    assert per_token == 6 * (model_size(model, VOCAB).layers + 512 * 32) + 12 * 2 * 32 * 24
    for device, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("A toaster", None),
    ):
        assert peak_flops(device) == peak


def test_predictions_in_bfloat16_are_not_decided_by_ties():
    """About one in fifty would be, and always for the lower id, which is the more frequent one."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1024, 64, generator=generator).bfloat16()
    weight = (0.4 * torch.randn(20_000, 64, generator=generator)).bfloat16()
    head = OutputHead(VocabShard(0, 20_000, 20_000))
    exact = (hidden.double() @ weight.double().T).argmax(1)
    target = torch.zeros(1024, dtype=torch.int64)
    assert torch.equal(head(hidden, weight, target, per_token=True)[1], exact)
    assert torch.equal(head(hidden, weight, None).argmax(1), exact)
    assert ((hidden @ weight.T).argmax(1) != exact).sum() > 5, "it would show"
