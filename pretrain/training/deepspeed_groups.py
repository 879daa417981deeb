"""megatron-core's groups as DeepSpeed asks for them."""

from __future__ import annotations

from typing import Any, ClassVar


class DeepSpeedGroups:
    """The ``mpu`` that DeepSpeed asks: megatron-core's groups under the names it uses.

    DeepSpeed calls the tensor-parallel ranks of one replica "model parallel".
    """

    _RENAMED: ClassVar = {
        "get_model_parallel_rank": "get_tensor_model_parallel_rank",
        "get_model_parallel_world_size": "get_tensor_model_parallel_world_size",
        "get_model_parallel_group": "get_tensor_model_parallel_group",
        "get_model_parallel_src_rank": "get_tensor_model_parallel_src_rank",
    }
    _SAME = (
        "get_data_parallel_rank",
        "get_data_parallel_world_size",
        "get_data_parallel_group",
        "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_world_size",
        "get_tensor_model_parallel_group",
        "get_tensor_model_parallel_src_rank",
        "get_pipeline_model_parallel_rank",
        "get_pipeline_model_parallel_world_size",
        "get_pipeline_model_parallel_group",
    )

    def __init__(self) -> None:
        from megatron.core import parallel_state

        for name in self._SAME:
            setattr(self, name, getattr(parallel_state, name))
        for name, original in self._RENAMED.items():
            setattr(self, name, getattr(parallel_state, original))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"DeepSpeed asks for {name}, which this layout does not have")
