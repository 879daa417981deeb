"""AGG under FSDP2: counts over all ranks, and a loss that sees the whole output embedding.

``torchrun --standalone --nproc-per-node 2 -m pretrain.examples.fsdp``

Letters: B sequences, S tokens of a sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from agg import AdaptiveGradientGating, VocabShard
from pretrain.examples.corpus import VOCAB_SIZE, zipf_batch
from pretrain.examples.counts import remove_older_parts
from pretrain.examples.torch_loop import SmallModel


class ModelWithLoss(nn.Module):
    """What FSDP gathers is whole only inside the forward of the module it wraps, so the loss is computed there.

    The output embedding must belong to this module's own group: call ``fully_shard`` on the blocks and on this, not on
    the embeddings. Then a tied one is whole in both of its uses, too.
    """

    def __init__(self, model: SmallModel, loss_of: AdaptiveGradientGating) -> None:
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of int64 [B, S] and [B, S]."""
        hidden = self.model(tokens)
        loss: torch.Tensor = self.loss_of(
            hidden.flatten(0, 1), self.model.output.weight, targets.flatten(), reduction="sum"
        )
        return loss


def build(tied: bool = False) -> ModelWithLoss:
    """The sharded model of this rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)  # the same weights on every rank
    loss_of = AdaptiveGradientGating(
        VocabShard(0, VOCAB_SIZE, VOCAB_SIZE),  # FSDP shards what is stored, not what is computed: all rows
        rare_fraction=0.3,
        window_steps=20,
        data_parallel_group=mesh.get_group(),
    )
    model = ModelWithLoss(SmallModel(tied=tied), loss_of)
    for block in model.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def save(step: int, model: ModelWithLoss, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """After ``step`` steps. The counts go beside the weights: each rank's part of them has a size of its own."""
    weights, moments = get_state_dict(model.model, optimizer)
    dcp.save({"weights": weights, "moments": moments, "step": step}, checkpoint_id=folder)  # type: ignore[attr-defined]
    torch.save(model.loss_of.get_extra_state(), folder / f"token_counts_{dist.get_rank()}.pt")
    remove_older_parts(folder, dist.get_world_size())


def load(model: ModelWithLoss, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """How many steps are done. Any number of ranks goes on from what any number saved."""
    weights, moments = get_state_dict(model.model, optimizer)
    state: dict[str, Any] = {"weights": weights, "moments": moments, "step": 0}
    dcp.load(state, checkpoint_id=folder)  # type: ignore[attr-defined]
    set_state_dict(model.model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"])
    model.loss_of.set_extra_state(torch.load(part) for part in sorted(folder.glob("token_counts_*.pt")))
    return int(state["step"])


def train(
    steps: int = 30, micro_batches: int = 2, tied: bool = False, resume: Path | None = None, output: Path | None = None
) -> tuple[list[float], torch.Tensor]:
    """The loss of each step over all ranks, and the whole output embedding [V, D] at the end."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build(tied)
    assert isinstance(model, FSDPModule)  # fully_shard changed its class
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    done = load(model, optimizer, resume) if resume else 0
    losses = []
    for step in range(done, steps):
        batch = zipf_batch(step)[rank::ranks]
        tokens, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
        model.loss_of.begin_step(targets)  # this rank's targets; they are added up over the group
        valid = (targets != -100).sum()
        dist.all_reduce(valid)
        total = torch.zeros(())
        for part, (some, theirs) in enumerate(
            # As many on each rank, also where rows run out: the last one syncs, and FSDP's collectives are of all.
            zip(tokens.tensor_split(micro_batches), targets.tensor_split(micro_batches), strict=True)
        ):
            model.set_requires_gradient_sync(part == micro_batches - 1)
            loss = model(some, theirs) / valid
            (loss * ranks).backward()  # FSDP averages gradients over the ranks: this makes it their sum
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
        rare = model.loss_of.current_gates().rare.double().mean()  # the same on every rank
        if rank == 0 and (step % 5 == 0 or step == steps - 1):
            print(f"step {step:2}  loss {losses[-1]:.3f}  rare {rare:.1%}")
    if output:
        save(steps, model, optimizer, output)
    weight = model.model.output.weight
    assert isinstance(weight, DTensor)
    return losses, weight.full_tensor().detach()


def main() -> None:
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
