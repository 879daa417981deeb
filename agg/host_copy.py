"""A tensor on its way from the device to the host."""

from __future__ import annotations

from typing import Any

import torch

from agg import kernels


class HostCopy:
    """Starts the copy at once and waits for it only when it is asked for: a step later that costs nothing.

    Args:
        tensor: on any device; on a GPU it may not change before the work queued so far has run.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = tensor.to("cpu", non_blocking=True)  # to pinned memory
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    @property
    def is_here(self) -> bool:
        """Whether it can be read without a wait."""
        return kernels.values_are_at_hand(self._tensor) and self._event is None

    def __deepcopy__(self, memo: dict[int, Any]) -> HostCopy:
        return HostCopy(self.get().clone())  # events cannot be copied

    def get(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensor
