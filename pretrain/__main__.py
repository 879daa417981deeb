"""The verbs of ``python -m pretrain``; nothing but parsing, dispatch and exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain import checkpoint_commands, commands
from pretrain.errors import EXIT_USER_ERROR, NonFiniteError, RecipeError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0, 1 when training had to stop, 2 when the input cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except UserError as error:
        # Ranks that a launcher started all see a bad recipe: the first one says it.
        if not (isinstance(error, RecipeError) and os.environ.get("RANK", "0") != "0"):
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EISDIR):
            raise
        print(f"error: cannot use {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR
    except NonFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain", description="Pretraining with Adaptive Gradient Gating."
    )
    # The deepspeed launcher puts this before the verb; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    for name, run, text in (
        ("prepare", commands.prepare, "Collect the corpus, train or take the tokenizer, write the shards."),
        ("train", commands.train, "Train, or go on training; starts its own local ranks unless a launcher did."),
    ):
        added = verb(name, run, text)
        added.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
        added.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.learning_rate=3e-4")
        if name == "train":
            added.add_argument("--stop-at-step", type=_positive, help="save and stop after this step")

    added = verb(
        "evaluate", commands.evaluate, "Perplexity by frequency group, unique tokens, geometry: evaluation.json."
    )
    added.add_argument("folder", metavar="RUN", type=Path)
    added.add_argument("--checkpoint", type=_positive, metavar="STEP", help="instead of the latest")

    added = verb("generate", commands.generate, "Continue a prompt.")
    added.add_argument("folder", metavar="RUN", type=Path)
    added.add_argument("--prompt", required=True, metavar="TEXT")
    added.add_argument("--max-new-tokens", type=_positive, default=64)
    added.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token each time")
    added.add_argument("--checkpoint", type=_positive, metavar="STEP", help="instead of the latest")

    checkpoint_commands.add_verbs(verb("checkpoint", None, "Work on the checkpoints of a run."))

    added = verb("report", commands.report, "Figures and one HTML page of runs that were evaluated.")
    added.add_argument("folders", nargs="+", metavar="RUN", type=Path)
    added.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
