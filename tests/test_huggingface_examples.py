"""AGG with Hugging Face's models and Trainer trains what one process trains, in the precision that was asked for."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import agg.linear_cross_entropy
from pretrain.examples import huggingface, huggingface_trainer
from pretrain.examples.corpus import VOCAB_SIZE, zipf_batch
from tests.distributed import run_ranks
from tests.test_examples import STEPS, double_precision, same  # noqa: F401


def small_models():
    size = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2Config(**size, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    llama = LlamaConfig(**size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    assert gpt2.tie_word_embeddings and not llama.tie_word_embeddings
    return [GPT2LMHeadModel(gpt2).eval(), LlamaForCausalLM(llama).eval()]


@pytest.mark.parametrize("model", small_models(), ids=lambda model: type(model).__name__)
def test_hugging_face_without_gates_is_the_loss_of_the_model(model):
    model = model.double()
    labels = zipf_batch(0)
    expected = model(input_ids=labels.clamp(min=0), labels=labels).loss
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    hidden = model.base_model(input_ids=labels.clamp(min=0)).last_hidden_state
    weight = model.get_output_embeddings().weight
    loss_of = huggingface.build_loss(VOCAB_SIZE).eval()
    loss = huggingface.summed_loss(loss_of, hidden, weight, labels) / (labels[:, 1:] != -100).sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the model's own is taken in float32
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-7), name


def test_unshifted_labels_would_be_found():
    hidden, weight, labels = torch.randn(2, 6, 4), torch.randn(VOCAB_SIZE, 4), torch.randint(VOCAB_SIZE, (2, 6))
    loss = huggingface.summed_loss(huggingface.build_loss(VOCAB_SIZE).eval(), hidden, weight, labels)
    logits = hidden @ weight.T
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(shifted.item())
    assert loss.item() != pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item())


def test_hugging_face_loop_does_not_depend_on_micro_batches():
    whole = huggingface.train(huggingface.small_gpt2(), STEPS, micro_batches=1)
    assert same(huggingface.train(huggingface.small_gpt2(), STEPS, micro_batches=4), whole)


def other_heads():
    size = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    size |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    gemma = Gemma2Config(**size, head_dim=8, final_logit_softcapping=1.0)
    return {
        "biased": PhiForCausalLM(PhiConfig(**size)),
        "scaled": GraniteForCausalLM(GraniteConfig(**size, logits_scaling=8.0)),
        "capped": Gemma2ForCausalLM(gemma),
    }


@pytest.mark.parametrize("head", ["biased", "scaled", "capped"])
def test_hugging_face_models_whose_logits_are_others_are_refused(head):
    torch.manual_seed(0)
    model, loss_of = other_heads()[head], huggingface.build_loss(VOCAB_SIZE)
    with pytest.raises(ValueError, match=f"the logits of {type(model).__name__} are not hidden states times output"):
        huggingface.check_logits(model, loss_of)
    if head == "capped":
        loss_of.soft_cap = 1.0
        huggingface.check_logits(model, loss_of)


def test_hugging_face_models_whose_logits_are_the_product_are_taken():
    for model in small_models():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            huggingface.check_logits(model.to(dtype).train(), huggingface.build_loss(VOCAB_SIZE))
            assert model.training


# Hugging Face's Trainer


@functools.cache
def expected_of_hugging_face_loop():
    return huggingface.train(huggingface.small_gpt2(), STEPS)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_trainer_equals_the_loop(ranks, tmp_path):
    expected = expected_of_hugging_face_loop()
    for result in run_ranks(trainer_rank, ranks, str(tmp_path)):
        assert same(result, expected)


def test_trainer_that_does_not_see_the_whole_step_is_found(tmp_path):
    expected = expected_of_hugging_face_loop()
    assert not same(run_ranks(trainer_rank, 1, str(tmp_path), True)[0], expected, 1e-6)


def trainer_rank(rank, world_size, folder, forgetful=False):
    if forgetful:
        huggingface_trainer.GatedTrainer.get_batch_samples = counting_the_first_micro_batch
    return outcome(huggingface_trainer.train(huggingface.small_gpt2(), folder, STEPS, logging_steps=1))


def outcome(trainer):
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses, trainer.model.lm_head.weight.detach()


def counting_the_first_micro_batch(trainer, *arguments):
    batches, valid = super(huggingface_trainer.GatedTrainer, trainer).get_batch_samples(*arguments)
    trainer.loss_of.begin_step(batches[0]["labels"][:, 1:])
    return batches, valid


def test_trainer_evaluates_the_plain_loss_and_counts_nothing(tmp_path):
    for evaluated, plain, steps in run_ranks(evaluating_trainer, 2, str(tmp_path)):
        assert evaluated == pytest.approx(plain, rel=1e-6) and steps == 0


def evaluating_trainer(rank, world_size, folder):
    trainer = huggingface_trainer.train(huggingface.small_gpt2(), folder, 2, per_device_eval_batch_size=8)
    trainer.loss_of = huggingface.build_loss(VOCAB_SIZE, torch.distributed.group.WORLD)  # as before any training
    labels = zipf_batch(99)
    evaluated = trainer.evaluate([{"input_ids": row.clamp(min=0), "labels": row} for row in labels])["eval_loss"]
    with torch.no_grad():
        plain = trainer.model(input_ids=labels.clamp(min=0), labels=labels).loss.item()
    return evaluated, plain, trainer.loss_of.frequency.steps


def test_trainer_goes_through_a_stream_of_unknown_length_again(tmp_path):
    torch.set_default_dtype(torch.float32)
    (steps,) = run_ranks(streaming_trainer, 1, str(tmp_path))
    assert steps == (6, 6)


def streaming_trainer(rank, world_size, folder):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):  # three steps
            for sequence in (sequence for step in range(3) for sequence in zipf_batch(step)):
                yield {"input_ids": sequence.clamp(min=0), "labels": sequence}

    trainer = huggingface_trainer.train(huggingface.small_gpt2(), folder, 6, dataset=Stream())
    return trainer.state.global_step, trainer.loss_of.frequency.steps


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_takes_the_loss_in_its_precision(bf16, tmp_path):
    torch.set_default_dtype(torch.float32)
    (dtypes,) = run_ranks(dtypes_of_the_loss, 1, str(tmp_path), bf16)
    assert dtypes == {torch.bfloat16 if bf16 else torch.float32}


def dtypes_of_the_loss(rank, world_size, folder, bf16):
    seen, run = set(), agg.linear_cross_entropy.Sweep.run

    def recorded(sweep):
        seen.add(sweep.hidden.dtype)
        return run(sweep)

    agg.linear_cross_entropy.Sweep.run = recorded
    huggingface_trainer.train(huggingface.small_gpt2(), folder, 1, bf16=bf16)
    return seen


@pytest.mark.parametrize("lost", [False, True])
def test_trainer_resumes_with_its_counts(tmp_path, lost):
    expected, older = expected_of_hugging_face_loop(), tmp_path / f"checkpoint-{STEPS // 2}/token_counts_3.pt"
    older.parent.mkdir()
    older.touch()  # of a save of four ranks
    for result in run_ranks(resuming_trainer, 2, str(tmp_path), lost):
        assert same(result, expected) != lost


def resuming_trainer(rank, world_size, folder, lost):
    half = STEPS // 2
    huggingface_trainer.train(
        huggingface.small_gpt2(), folder, half, logging_steps=1, save_strategy="steps", save_steps=half
    )
    torch.distributed.barrier()
    if lost:
        huggingface_trainer.GatedTrainer._load_from_checkpoint = huggingface_trainer.Trainer._load_from_checkpoint
    checkpoint = f"{folder}/checkpoint-{half}"
    return outcome(
        huggingface_trainer.train(
            huggingface.small_gpt2(), folder, STEPS, logging_steps=1, resume_from_checkpoint=checkpoint
        )
    )
