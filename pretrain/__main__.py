"""The verbs of ``python -m pretrain``; nothing but parsing, dispatch and exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.cluster.endings import STOPPED, begin_rank, log_folder, note_end
from pretrain.cluster.job import node_name
from pretrain.errors import EXIT_USER_ERROR, SpikeError, UserError

# What a file system says of a path that cannot be used, or of a disk.
OF_THE_INPUT = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip
FOR_ANOTHER_TO_SAY = 5.0  # seconds: a launcher ends all ranks with the first, which may be a silent one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0; 1 when training had to stop; 2 when the input cannot be used; 75 when training was asked to stop and saved
        (:mod:`pretrain.training.stopping`). A rank that hangs ends with 70 (:mod:`pretrain.training.watchdog`).
    """
    begin_rank()
    if isinstance(sys.stdout, io.TextIOWrapper):  # where a terminal cannot show a letter, the rest is shown
        sys.stdout.reconfigure(errors="backslashreplace")
    options = parse(arguments)
    try:
        module, function = options.run.split(":")  # imported now: most verbs need torch
        code, line = int(getattr(importlib.import_module(module), function)(options) or 0), ""
    except UserError as error:
        code, line = EXIT_USER_ERROR, f"error: {error}"
        note_end(code, line, common=error.on_all_ranks)
        if not _is_to_say(error):
            time.sleep(FOR_ANOTHER_TO_SAY)
            return code
        rank = os.environ.get("RANK", "0")
        who = f"rank {rank} on {node_name()}"
        if rank != "0" and not error.on_all_ranks and who not in line:
            line = f"{who}: {line}"
    except OSError as error:
        if error.errno not in OF_THE_INPUT:
            note_end(1, f"{type(error).__name__}: {error}")
            raise
        code, line = EXIT_USER_ERROR, f"error: cannot use {error.filename or 'a file'}: {error.strerror}"
    except SpikeError as error:
        code, line = 1, f"stopped: {error}"
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except Exception as error:
        note_end(1, f"{type(error).__name__}: {error}")
        raise
    note_end(code, line)
    if line:
        print(line, file=sys.stderr)
    return 0 if code == STOPPED and log_folder() else code  # for torchrun a stop is no failure; the job knows better


def _is_to_say(error: UserError) -> bool:
    """Of the ranks that share an error and a terminal, one says it; each has a log of its own in a job."""
    first = "LOCAL_RANK" if error.on_its_node else "RANK" if error.on_all_ranks else None
    return log_folder() is not None or first is None or os.environ.get(first, "0") == "0"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The verb and its options. Overrides may also stand behind options, where argparse does not look for them."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain", description="Pretraining with Adaptive Gradient Gating."
    )
    # The deepspeed launcher puts this before the verb; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, run: str, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    for name, run, text in (
        ("prepare", "pretrain.commands:prepare", "Collect the corpus, train or take the tokenizer, write the shards."),
        (
            "train",
            "pretrain.commands:train",
            "Train, or go on training; starts its own local ranks unless a launcher did.",
        ),
    ):
        added = verb(name, run, text)
        added.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
        added.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.learning_rate=3e-4")
        if name == "prepare":
            text = "compare what is prepared already with the hashes in its manifest, and do nothing else"
            added.add_argument(
                "--verify", dest="run", action="store_const", const="pretrain.data.verify:verify", help=text
            )
        else:
            added.add_argument("--stop-at-step", type=_positive, help="save and stop after this step")
            added.add_argument("--allow-changes", action="store_true", help="go on with another batch, data, optimizer")
            start = added.add_mutually_exclusive_group()
            start.add_argument("--from-scratch", action="store_true", help="move the run that is there to aside/")
            start.add_argument("--resume-from", type=_positive, metavar="STEP", help="move newer checkpoints to aside/")
            added.add_argument("--claimed", action="store_true", help=argparse.SUPPRESS)  # by the launcher

    added = verb(
        "evaluate",
        "pretrain.commands:evaluate",
        "Perplexity by frequency group, geometry, word similarity, generation: evaluation.json.",
    )
    added.add_argument("folder", metavar="RUN", type=Path, help="a run, or a Hugging Face folder")
    added.add_argument("--checkpoint", type=_positive, metavar="STEP", help="instead of the latest: to evaluations/")
    of_published = added.add_argument_group("for a Hugging Face folder")
    of_published.add_argument("--data", metavar="RECIPE", help="whose corpus, window and word pairs to measure it on")
    of_published.add_argument("--output", type=Path, metavar="FOLDER", help="where evaluation.json is to be")
    of_published.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.sequence_length=1024")

    added = verb("generate", "pretrain.commands:generate", "Continue a prompt.")
    added.add_argument("folder", metavar="RUN", type=Path)
    added.add_argument("overrides", nargs="*", metavar="device=...", help="cpu, for a run that was trained on GPUs")
    added.add_argument("--prompt", required=True, metavar="TEXT")
    added.add_argument("--max-new-tokens", type=_positive, default=64)
    added.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token each time")
    added.add_argument("--checkpoint", type=_positive, metavar="STEP", help="instead of the latest")

    _add_checkpoint_verbs(verbs)
    _add_cluster_verbs(verbs)
    _add_study_verb(verbs)

    added = verb("report", "pretrain.commands:report", "Figures, CSV and one HTML page of runs that were evaluated.")
    added.add_argument("folders", nargs="+", metavar="RUN", type=Path, help="runs that differ only by seed are one")
    added.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    return parser


def _add_checkpoint_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "List, verify, reshard or export the checkpoints of a run."
    inner = verbs.add_parser("checkpoint", help=text, description=text).add_subparsers(
        title="verbs", required=True, metavar="VERB"
    )
    text = "Step, tokens, layout, size, age and state of each; reads everything to tell whether it is valid."
    added = inner.add_parser("list", help=text, description=text)
    added.set_defaults(run="pretrain.checkpoint_commands:list_checkpoints")
    added.add_argument("folder", metavar="RUN", type=Path)
    added.add_argument("--no-hash", action="store_true", help="compare sizes only")
    added.add_argument("--json", action="store_true", help="records instead of a table")

    text = "Name every bad file; exit code 2 if there is one."
    added = inner.add_parser("verify", help=text, description=text)
    added.set_defaults(run="pretrain.checkpoint_commands:verify")
    added.add_argument("folder", metavar="RUN", type=Path)
    added.add_argument("--step", type=_positive, metavar="STEP", help="this one only")

    text = "Save one again as another layout saves it, without a GPU; train would do it by itself."
    added = inner.add_parser("reshard", help=text, description=text)
    added.set_defaults(run="pretrain.commands:reshard")
    added.add_argument("folder", metavar="RUN", type=Path)
    added.add_argument("overrides", nargs="+", metavar="key=value", help="e.g. parallel.tensor_model_parallel_size=2")
    added.add_argument("--step", type=_positive, metavar="STEP", help="instead of the latest")
    added.add_argument("--claimed", action="store_true", help=argparse.SUPPRESS)  # by the launcher

    text = "Write the weights and the tokenizer as a Hugging Face folder, for transformers and other tools."
    added = inner.add_parser("export", help=text, description=text)
    added.set_defaults(run="pretrain.checkpoint_commands:export")
    added.add_argument("folder", metavar="RUN", type=Path)
    added.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must be empty or not exist")
    added.add_argument("--step", type=_positive, metavar="STEP", help="instead of the latest")
    added.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")


def _add_cluster_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Write the job script of a training, show what it would need, and hand it to SLURM."
    added = verbs.add_parser("submit", help=text, description=text)
    added.set_defaults(run="pretrain.cluster.submit:submit")
    added.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    added.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.learning_rate=3e-4")
    _add_job_options(added)
    added.add_argument("--array", metavar="SPEC", help="a chain of jobs that go on from each other: 1-10%%1")
    added.add_argument("--dry-run", action="store_true", help="show it, write and submit nothing")
    added.add_argument("--tokens-per-second", type=float, metavar="RATE", help="for --dry-run, before it is measured")

    text = "A table of runs: state, step, tokens/s, loss, last checkpoint, job and reason."
    added = verbs.add_parser("status", help=text, description=text)
    added.set_defaults(run="pretrain.cluster.status:status")
    added.add_argument("folders", nargs="*", metavar="RUN", type=Path, help="runs, or folders of runs; default: runs")
    added.add_argument("--json", action="store_true", help="records instead of a table")


def _add_study_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Run all runs of a study, here or on SLURM, and go on where it was stopped; or plan it, or record it."
    added = verbs.add_parser("study", help=text, description=text)
    added.set_defaults(run="pretrain.study.commands:study", array=None)
    added.add_argument("study", metavar="STUDY", help="a YAML file, or the name of a shipped study")
    added.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs; name=... is the study's")
    way = added.add_mutually_exclusive_group()
    way.add_argument("--dry-run", action="store_true", help="a table of what each run takes; nothing is started")
    way.add_argument("--report", action="store_true", help="write the records and the page of what is done")
    added.add_argument("--parallel-runs", type=_positive, default=1, metavar="N", help="at a time, here; default: 1")
    added.add_argument("--memory-gib", type=float, metavar="GIB", help="that a rank may take; default: this machine's")
    added.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation of the plan's times; 0.4")
    added.add_argument("--peak-tflops", type=float, help="dense peak of a device; default: this machine's GPU")
    added.add_argument("--slurm", action="store_true", help="one array job; each of its jobs is as follows")
    added.add_argument("--throttle", type=_positive, metavar="N", help="jobs of the array at a time; default: all")
    _add_job_options(added)


def _add_job_options(added: argparse.ArgumentParser) -> None:
    added.add_argument("--nodes", type=_positive, default=1, help="default: 1")
    added.add_argument("--gpus-per-node", type=_positive, help="default: none are asked for")
    added.add_argument("--ranks-per-node", type=_positive, help="default: RANKS_PER_NODE, or one per GPU, or 1")
    added.add_argument("--time", metavar="LIMIT", help="as SLURM writes it, 24:00:00; default: the partition's")
    added.add_argument("--sbatch-option", action="append", default=[], metavar="OPTION", help="--exclude=node7; repeat")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
