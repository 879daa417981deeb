"""The versions that decide whether two processes do the same."""

from __future__ import annotations

import importlib.metadata
import platform

import deepspeed
import torch

from pretrain import __version__


def versions() -> dict[str, str]:
    """Name -> version of this project, of Python, and of what computes, talks and saves."""
    return {
        "pretrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
    }
