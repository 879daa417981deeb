"""The path of a GPU, taken on the CPU."""

from __future__ import annotations

import pytest
import torch

from agg import (
    kernels,
    projection,
    triton_kernels,
)


@pytest.fixture
def on_device(monkeypatch):
    """As if values were out of reach; with torch in the place of Triton."""
    monkeypatch.setattr(kernels, "values_are_at_hand", lambda tensor: False)


@pytest.fixture
def with_triton(on_device, monkeypatch):
    """Rows in pieces, Triton, and products summed in float32, as on a GPU."""
    addmm = torch.addmm

    def mixed_addmm(total, left, right, *, beta, out, out_dtype=None):
        if out_dtype is None:
            return addmm(total, left, right, beta=beta, out=out)
        # What torch asks for on a GPU, and what it does there.
        assert left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
        assert out is total and total.dtype == out_dtype == torch.float32
        return addmm(total, left.float(), right.float(), beta=beta, out=out)

    monkeypatch.setattr(kernels, "triton_for", lambda tensor: triton_kernels)
    monkeypatch.setattr(kernels, "mixed_addmm_for", lambda tensor: True)
    monkeypatch.setattr(projection, "wants_alignment", lambda tensor: True)
    monkeypatch.setattr(torch, "addmm", mixed_addmm)
