"""The verbs under ``python -m pretrain checkpoint``; they need neither a GPU nor a process group."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.checkpointing.folder import check_whole, choose_checkpoint
from pretrain.console import say
from pretrain.errors import UserError
from pretrain.quiet import quiet_third_party
from pretrain.run_folder import RunFolder


def add_verbs(checkpoint: argparse.ArgumentParser) -> None:
    """The verbs as subparsers of ``checkpoint``."""
    verbs = checkpoint.add_subparsers(title="verbs", required=True, metavar="VERB")

    text = "Write the weights and the tokenizer as a Hugging Face folder, for transformers and other tools."
    added = verbs.add_parser("export", help=text, description=text)
    added.set_defaults(run=export)
    added.add_argument("folder", metavar="RUN", type=Path)
    added.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must be empty or not exist")
    added.add_argument("--step", type=int, help="instead of the latest")
    added.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")


def export(options: argparse.Namespace) -> None:
    folder = RunFolder(options.folder)
    recipe = folder.saved_recipe()
    checkpoint = choose_checkpoint(folder.checkpoints, options.step)
    quiet_third_party()
    import torch

    from pretrain.checkpointing.huggingface.export import export_huggingface
    from pretrain.checkpointing.portable import PortableCheckpoint
    from pretrain.data.manifest import Manifest
    from pretrain.data.prepare import TOKENIZER_NAME

    data = Path(recipe.data.folder)
    manifest = Manifest.read(data)
    if manifest is None or manifest.sha256 != check_whole(checkpoint)["identity"]["data"]:
        raise UserError(f"{data} does not hold the data of this run, whose tokenizer belongs into the export")
    saved = PortableCheckpoint(checkpoint)
    done = export_huggingface(
        saved.tensor,
        saved.names(),
        recipe.model,
        data / TOKENIZER_NAME,
        options.output,
        dtype=getattr(torch, options.dtype),
    )
    if done.tokenizer_difference:
        say(f"tokenizer.json gives other ids for some texts, tokenizer.model is exact: {done.tokenizer_difference}")
    say(
        f"{recipe.name}, {checkpoint.name}: {done.tensors} tensors, {done.tensor_bytes / 1e6:,.1f} MB of "
        f"{options.dtype} in {len(done.files)} file(s) of {options.output}"
    )
