"""Writing a run's weights as a Hugging Face folder, tensor by tensor; no GPU, no process group."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.checkpointing.huggingface.config import model_config, special_ids
from pretrain.checkpointing.huggingface.files import TensorWriter
from pretrain.checkpointing.huggingface.tensors import tensor_maps
from pretrain.checkpointing.huggingface.tokenizer import write_tokenizer
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.files import make_folder, write_json
from pretrain.recipe import ModelRecipe

MAX_FILE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        tensors, tensor_bytes: how many, and their bytes together.
        files: names of the safetensors files.
        tokenizer_difference: see :func:`write_tokenizer`.
    """

    tensors: int
    tensor_bytes: int
    files: list[str]
    tokenizer_difference: str


def export_huggingface(
    read: Callable[[str], torch.Tensor],
    names: Iterable[str],
    model: ModelRecipe,
    tokenizer_file: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Write ``output`` whole or not at all. The tensors of one file and one parameter are in memory at a time.

    Args:
        read: the whole parameter of a megatron-core name, over all tensor-parallel ranks, vocabulary padded.
        names: of all parameters there are.
        tokenizer_file: the SentencePiece model that the data were prepared with.
        max_file_bytes: a larger tensor gets a file of its own.

    Raises:
        UserError: ``output`` is not empty or cannot be written, the parameters are not those of ``model``, its logits
            are capped, or packages are missing.
    """
    output = usable_output(output)
    if model.logit_soft_cap:
        raise UserError(f"model.logit_soft_cap is {model.logit_soft_cap}, and {model.style} models there cap no logits")
    tokenizer = Tokenizer.load(tokenizer_file)
    maps = tensor_maps(model, tokenizer.vocab_size)
    _check_names(set(names), {entry.ours for entry in maps})
    # Within a folder that is there: it may be a mount point, which cannot be replaced.
    there = output.is_dir()
    temporary = make_folder(output if there else output.parent) / f"{output.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        if there and list(output.iterdir()) != [temporary]:
            raise _not_empty(output)  # another export has begun
        difference = write_tokenizer(tokenizer_file, temporary)
        write_json(temporary / "config.json", model_config(model, tokenizer, dtype))
        write_json(temporary / "generation_config.json", special_ids(tokenizer))
        writer = TensorWriter(temporary, max_file_bytes)
        for entry in maps:
            whole = read(entry.ours)
            if tuple(whole.shape) != entry.shape:
                raise UserError(f"{entry.ours} has shape {tuple(whole.shape)}, the recipe's model has {entry.shape}")
            for name, tensor in zip(entry.theirs, entry.export(whole), strict=True):
                writer.add(name, torch.empty(tensor.shape, dtype=dtype).copy_(tensor))
        files = writer.finish()
        for path in temporary.iterdir():
            shutil.copymode(temporary / "config.json", path)  # safetensors lets nobody else read
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if there:
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):  # it last
                path.rename(output / path.name)
        else:
            _rename(temporary, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk of {output} is full: free some space, or choose another --output") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(writer.tensors, writer.total_bytes, files, difference)


def usable_output(output: Path) -> Path:
    """The whole path.

    Raises:
        UserError: it cannot be that of a new or empty folder.
    """
    try:
        output = output.resolve()
        str(output).encode()  # safetensors and tokenizers take no other names
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise _not_empty(output)
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # RuntimeError: links that lead in a circle
        raise UserError(f"--output {str(output)!r} cannot be used: {error}; choose another one") from error
    return output


def _rename(temporary: Path, output: Path) -> None:
    try:
        temporary.rename(output)
    except OSError as error:
        if output.exists():  # of another export, by now
            raise _not_empty(output) from error
        raise


def _not_empty(output: Path) -> UserError:
    return UserError(
        f"{output} exists and is not an empty folder: empty it, if it holds remains of an export that was killed, or "
        "choose another --output"
    )


def _check_names(there: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - there):
        raise UserError(f"the checkpoint lacks parameters of the recipe's model: {', '.join(missing[:3])} ...")
    if unknown := sorted(there - wanted):
        raise UserError(f"the checkpoint has parameters that the recipe's model has not: {', '.join(unknown[:3])} ...")
