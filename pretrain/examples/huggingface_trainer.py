"""AGG in Hugging Face's ``Trainer``, the same on one rank and on several.

``python -m pretrain.examples.huggingface_trainer``
``torchrun --standalone --nproc-per-node 2 -m pretrain.examples.huggingface_trainer``
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from pretrain.examples.corpus import zipf_batch
from pretrain.examples.counts import remove_older_parts
from pretrain.examples.huggingface import build_loss, check_logits, small_gpt2, summed_loss


class GatedTrainer(Trainer):  # type: ignore[misc]
    """Trains with AGG, and evaluates with the plain cross-entropy. Its checkpoints hold the token counts."""

    loss_is_scaled_for_ga = True  # compute_loss divides by all targets of the optimizer step

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        group = dist.group.WORLD if self.args.world_size > 1 else None
        self.loss_of = build_loss(self.model.config.vocab_size, group)
        check_logits(self.model, self.loss_of)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Here the Trainer draws all micro-batches of an optimizer step, so here their targets are counted."""
        batches, valid = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:  # none after the last of a stream whose length is not known: no step follows
            self.loss_of.begin_step(torch.cat([batch["labels"][:, 1:].flatten() for batch in batches]))
        return batches, valid

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Valid targets of all ranks. The Trainer's own count takes in the first label where it does not know the loss
        of the model's class, GPT2LMHeadModel for one."""
        if not batch_samples:
            return None
        valid = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batch_samples]).sum()
        total: torch.Tensor = self.accelerator.reduce(valid.to(device), reduction="sum")
        return total

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """``model`` may be wrapped in DDP, so its forward is called, but for the logits of one position only."""
        labels = inputs.pop("labels")
        outputs = model(**inputs, output_hidden_states=True, logits_to_keep=1)
        self.loss_of.train(model.training)
        weight = self.model.get_output_embeddings().weight
        with self.accelerator.autocast():  # the model's own, which ends with its forward
            loss = summed_loss(self.loss_of, outputs.hidden_states[-1], weight, labels)
        loss = loss / num_items_in_batch * self.args.world_size  # DDP takes the mean over ranks: this makes it a sum
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        gates = self.loss_of.current_gates()
        super().log({**logs, "rare_fraction": round(gates.rare.double().mean().item(), 3)}, *arguments)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # every rank: each holds a part of the window
        torch.save(self.loss_of.get_extra_state(), folder / f"token_counts_{self.args.process_index}.pt")
        remove_older_parts(folder, self.args.world_size)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        parts = sorted(Path(resume_from_checkpoint).glob("token_counts_*.pt"))
        self.loss_of.set_extra_state(torch.load(part) for part in parts)  # of any number of ranks


def train(
    model: PreTrainedModel, folder: str, steps: int = 30, dataset: Dataset[Any] | None = None, **options: Any
) -> GatedTrainer:
    """Steps of 16 sequences, on as many ranks as divide that; ``options`` are TrainingArguments."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batches = max(1, 4 // ranks)
    labels = [sequence for step in range(steps) for sequence in zipf_batch(step)]
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 16 // (ranks * micro_batches),
        "gradient_accumulation_steps": micro_batches,
        "train_sampling_strategy": "sequential",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "use_cpu": True,
    }
    trainer = GatedTrainer(
        model=model,
        args=TrainingArguments(folder, **(arguments | options)),
        train_dataset=dataset or [{"input_ids": sequence.clamp(min=0), "labels": sequence} for sequence in labels],
    )
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return trainer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(small_gpt2(), folder)


if __name__ == "__main__":
    main()
