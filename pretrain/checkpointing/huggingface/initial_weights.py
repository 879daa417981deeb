"""``model.init_from``: a run that starts with the weights of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from agg import VocabShard
from pretrain.checkpointing.huggingface.config import config_problems
from pretrain.checkpointing.huggingface.files import HuggingFaceFolder
from pretrain.checkpointing.huggingface.tensors import tensor_maps
from pretrain.checkpointing.split import parameter_splits
from pretrain.data.prepared import PreparedData
from pretrain.errors import CheckpointError, UserError
from pretrain.files import file_sha256
from pretrain.recipe import Recipe

_SHOWN_PROBLEMS = 5
_DTYPES = ("F64", "F32", "F16", "BF16")  # fewer bits come with scales, in tensors of other names


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
        CheckpointError: a weight is not finite.
    """
    folder = check_initial_weights(recipe, prepared)
    parameters, splits = dict(module.named_parameters()), parameter_splits(module, shard.world_size)
    for entry in tensor_maps(recipe.model, prepared.vocab_size):
        tensors = {name: folder.tensor(name).float() for name in entry.theirs}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"model.init_from {folder.path}: {name} holds values that are not finite; take weights of a run "
                    "that did not diverge"
                )
        whole = entry.restore(list(tensors.values()))
        parameter = parameters.pop(entry.ours)
        if whole.shape[0] != entry.shape[0]:  # a vocabulary
            parameter[: shard.real] = whole[shard.start : shard.start + shard.real]
        else:
            parameter.copy_(splits[entry.ours].part(whole, tensor_parallel_rank, shard.world_size))
    assert not parameters, f"nothing was loaded for {', '.join(parameters)}"


def _tensor_problems(folder: HuggingFaceFolder, recipe: Recipe, vocab_size: int) -> list[str]:
    problems = []
    for entry in tensor_maps(recipe.model, vocab_size):
        for name, shape in zip(entry.theirs, entry.their_shapes, strict=True):
            there = folder.shape(name)
            if there != shape:
                found = "is missing" if there is None else f"has shape {there}"
                problems.append(f"{name} {found}, the recipe makes it {shape}")
            elif (dtype := folder.dtype(name)) not in _DTYPES:
                problems.append(f"{name} is of type {dtype}, and must be one of {', '.join(_DTYPES)}")
    return problems


def _check_tokenizer(path: Path, prepared: PreparedData) -> None:
    given = path / "tokenizer.model"
    if not given.is_file():
        raise UserError(
            f"{path} has no tokenizer.model, so nothing tells whether the data were prepared with its tokenizer: put "
            "the SentencePiece model there that these weights were trained with"
        )
    if file_sha256(given) != prepared.tokenizer.sha256:
        raise UserError(
            f"the data in {prepared.folder} were prepared with another tokenizer than {given}: prepare another "
            f"data.folder with data.tokenizer.model_file={given}"
        )
