"""Waiting that always ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(
    condition: Callable[[], Any], seconds: float, what: str, state: Callable[[], Any] = str, every: float = 0.1
) -> Any:
    """The first true value of ``condition``.

    Args:
        what: is waited for, for the message.
        state: how things stand when it did not come.
        every: seconds between looks.

    Raises:
        AssertionError: it did not come in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} after {seconds:.0f} s\n{state()}")
        time.sleep(every)
