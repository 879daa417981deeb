"""Where a checkpoint was trained: written into its manifest, as it may be evaluated elsewhere and later."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch

from pretrain.recipe import Recipe
from pretrain.topology import Topology
from pretrain.versions import versions


def trained_on(recipe: Recipe, topology: Topology) -> dict[str, Any]:
    """Layout, precision, hardware (of the first rank) and versions of these ranks."""
    return {
        "world_size": topology.world_size,
        "tensor_model_parallel_size": topology.tensor_parallel_size,
        "data_parallel_size": topology.data_parallel_size,
        "sharding": recipe.parallel.sharding,
        "precision": recipe.precision,
        "hardware": _hardware(topology.device),
        "versions": versions(),
    }


def trained_on_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The same of the ranks that trained a checkpoint; earlier versions did not note their hardware."""
    if "trained_on" in manifest:
        return dict(manifest["trained_on"])
    layout = manifest["layout"]
    return {
        "world_size": layout["world_size"],
        "tensor_model_parallel_size": layout["tensor_model_parallel_size"],
        "data_parallel_size": layout["data_parallel_size"],
        "sharding": f"zero{layout['zero_stage']}",
        "precision": "bf16" if layout["bf16"] else "fp32",
        "hardware": None,
        "versions": manifest["versions"],
    }


@functools.cache  # asked in every save
def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"
