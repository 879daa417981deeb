"""``model.init_from``: a run that starts with the weights of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from agg import VocabShard
from pretrain.checkpointing.huggingface.config import config_problems
from pretrain.checkpointing.huggingface.files import HuggingFaceFolder
from pretrain.checkpointing.huggingface.tensors import tensor_maps
from pretrain.data.prepare import PreparedData
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.recipe import Recipe

_SHOWN_PROBLEMS = 5


def check_initial_weights(recipe: Recipe, prepared: PreparedData) -> HuggingFaceFolder:
    """Open ``model.init_from`` and see that it is the recipe's model and the data's tokenizer; reads no weights.

    Raises:
        UserError: with all that differs.
    """
    path = Path(recipe.model.init_from)
    folder = HuggingFaceFolder(path)
    problems = config_problems(folder.config, recipe.model) + _tensor_problems(folder, recipe, prepared.vocab_size)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        lines = problems[:_SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise UserError(
            f"the model in model.init_from {path} is not the recipe's:\n" + "\n".join(f"  - {line}" for line in lines)
        )
    _check_tokenizer(path, prepared)
    return folder


@torch.no_grad()
def load_initial_weights(
    module: torch.nn.Module, recipe: Recipe, prepared: PreparedData, shard: VocabShard, tensor_parallel_rank: int
) -> None:
    """Put this tensor-parallel rank's part of every weight into the freshly built ``module``, one parameter at a time.

    Rows that only pad the vocabulary stay as they were drawn.

    Raises:
        UserError: see :func:`check_initial_weights`.
    """
    folder = check_initial_weights(recipe, prepared)
    parameters = dict(module.named_parameters())
    for entry in tensor_maps(recipe.model, prepared.vocab_size):
        whole = entry.restore([folder.tensor(name).float() for name in entry.theirs])
        parameter = parameters.pop(entry.ours)
        if whole.shape[0] != entry.shape[0]:  # a vocabulary
            parameter[: shard.real] = whole[shard.start : shard.start + shard.real]
        else:
            parameter.copy_(_part_of_rank(whole, parameter, tensor_parallel_rank, shard.world_size))
    assert not parameters, f"nothing was loaded for {', '.join(parameters)}"


def _part_of_rank(whole: torch.Tensor, parameter: torch.nn.Parameter, rank: int, size: int) -> torch.Tensor:
    """As megatron-core's ``_initialize_affine_weight_cpu`` cuts a matrix; stride 2 is [gate; up]."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    return torch.cat(whole.chunk(stride * size, dim)[rank::size], dim)


def _tensor_problems(folder: HuggingFaceFolder, recipe: Recipe, vocab_size: int) -> list[str]:
    problems = []
    for entry in tensor_maps(recipe.model, vocab_size):
        for name, shape in zip(entry.theirs, entry.their_shapes, strict=True):
            there = folder.shape(name)
            if there != shape:
                found = "is missing" if there is None else f"has shape {there}"
                problems.append(f"{name} {found}, the recipe makes it {shape}")
    return problems


def _check_tokenizer(path: Path, prepared: PreparedData) -> None:
    given = path / "tokenizer.model"
    if given.exists() and Tokenizer.load(given).sha256 != prepared.tokenizer.sha256:
        raise UserError(
            f"the data in {prepared.folder} were prepared with another tokenizer than {given}: prepare another "
            f"data.folder with data.tokenizer.model_file={given}"
        )
