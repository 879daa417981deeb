"""Checkpoints of every layout read as the same unsplit model."""

from __future__ import annotations

import shutil

import pytest
import torch
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu

from pretrain.checkpointing.folder import read_manifest, write_manifest
from pretrain.checkpointing.portable import PortableCheckpoint
from pretrain.checkpointing.split import Split
from pretrain.errors import UserError
from tests.checkpointing.layouts import BF16_SOURCES, KINDS, LAYOUTS, SAVED_AT, Layout, variant_from, whole_counts

ALONE = Layout(1, 1, 0)


@pytest.mark.parametrize(("dim", "stride"), [(0, 1), (0, 2), (1, 1)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_split_is_megatrons(dim, stride, size):
    """A part is what megatron-core gives a rank when it draws the whole and cuts it."""
    whole = torch.randn(16, 8)
    split = Split((16, 8), dim, stride)
    parts = [split.part(whole, rank, size) for rank in range(size)]
    for rank, part in enumerate(parts):
        assert part.shape == split.part_shape(size)
        weight = torch.nn.Parameter(torch.empty(part.shape))
        _initialize_affine_weight_cpu(
            weight, 16, 8, part.shape[dim], dim, lambda drawn: drawn.copy_(whole), stride, rank=rank, world_size=size
        )
        assert torch.equal(part, weight)
    assert torch.equal(split.merge(parts), whole)


def test_ranks_hold_gate_and_up_of_their_own_columns():
    gate, up = [0, 1], [10, 11]
    split = Split((4,), 0, stride=2)
    assert [split.part(torch.tensor(gate + up), rank, 2).tolist() for rank in (0, 1)] == [[0, 10], [1, 11]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_reads_as_the_single_process(saved_on, layout):
    """Bit for bit what DeepSpeed's own functions say on each rank; the single process to the reduction order."""
    name = variant_from(layout)
    saved, alone = saved_on(name, layout), saved_on(name, ALONE)
    portable, reference = PortableCheckpoint(saved.checkpoint), PortableCheckpoint(alone.checkpoint)
    for rank in saved.told:
        assert sorted(rank.tensors) == sorted(portable.names())
        for parameter, tensors in rank.tensors.items():
            for kind in KINDS:
                part = portable.part(parameter, kind, rank.tensor_parallel_rank, layout.tensor)
                assert part.dtype == torch.float32 and torch.equal(part, tensors[kind]), (parameter, kind)
    assert portable.names() == reference.names()
    for parameter in portable.names():
        assert portable.shape(parameter) == tuple(alone.told[0].tensors[parameter]["weight"].shape)
        for kind in KINDS:
            if kind == "weight" and parameter.endswith("linear_qkv.bias"):
                continue  # softmax ignores the bias of keys: its gradient is rounding, of which Adam makes whole steps
            expected = reference.tensor(parameter, kind)
            tolerance = 3e-5 if kind == "weight" else 1e-4 * float(expected.abs().max())  # a step is 3e-3
            torch.testing.assert_close(portable.tensor(parameter, kind), expected, rtol=0, atol=tolerance)
    assert portable.adam_step == portable.step == SAVED_AT
    assert whole_counts(saved.told) == whole_counts(alone.told)
    assert len(list(portable.rank_states())) == layout.world_size


@pytest.mark.parametrize(("name", "layout"), BF16_SOURCES)
def test_bf16_reads_as_the_masters(saved_on, name, layout):
    saved = saved_on(name, layout)
    portable = PortableCheckpoint(saved.checkpoint)
    for rank in saved.told:
        for parameter, tensors in rank.tensors.items():
            for kind in KINDS:
                part = portable.part(parameter, kind, rank.tensor_parallel_rank, layout.tensor)
                assert torch.equal(part, tensors[kind]), (parameter, kind)
    weight = portable.tensor("embedding.word_embeddings.weight")
    assert not torch.equal(weight, weight.bfloat16().float())  # the masters, not the weights that the model runs with


def test_tensors_are_mapped(saved_on):
    """Only what is asked for is read: without ZeRO a whole parameter is the file itself."""
    portable = PortableCheckpoint(saved_on("gpt2", ALONE).checkpoint)
    one, again = (portable.tensor("embedding.word_embeddings.weight", "exp_avg") for _ in range(2))
    assert one.data_ptr() == again.data_ptr()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "parameters.json").unlink(), "parameters.json is missing"),
        (lambda folder: (folder / "offloaded_tensors").mkdir(), "optimizer state of NVMe"),
        (lambda folder: _edit(folder, optimizer="MiCS_Optimizer"), "DeepSpeed's MiCS_Optimizer"),
    ],
)
def test_what_cannot_be_moved_is_said(saved_on, tmp_path, damage, message):
    folder = tmp_path / "step"
    shutil.copytree(saved_on("gpt2", ALONE).checkpoint, folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        PortableCheckpoint(folder)


def _edit(folder, **layout):
    manifest = read_manifest(folder)
    write_manifest(folder, {**manifest, "layout": manifest["layout"] | layout})
