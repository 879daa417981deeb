"""Keeps the terminal ours: what third-party libraries print at import or start, and cannot be acted on, is not shown.
And keeps the start short.

Call :func:`quiet_third_party` before importing DeepSpeed or megatron-core.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator


def quiet_third_party() -> None:
    """Errors still show; notices about optional accelerator libraries and deprecations inside libraries do not.

    It imports torch and DeepSpeed: call it where they are needed anyway.
    """
    quiet_warnings()
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no GPU
    import deepspeed.utils.logging

    deepspeed.utils.logging.logger.setLevel(logging.ERROR)


def quiet_warnings() -> None:
    """As :func:`quiet_third_party`, where DeepSpeed is not used; imports nothing."""
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine) .*not installed")
    warnings.filterwarnings(
        "ignore", module=r"(megatron|deepspeed|torch\.utils|torch\.distributed|torch\.autograd)(\..*)?"
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # megatron-core declares fused functions with torch.compile, which imports the compiler: 2 of 7 s, for nothing, as
    # no such function is called here and nothing else is compiled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for name in ("DeepSpeed", "megatron", "datasets", "torch.distributed", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def without_prints() -> Iterator[None]:
    """What a library prints on its way goes nowhere; its warnings and errors stay."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
