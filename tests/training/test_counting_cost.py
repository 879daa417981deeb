"""The figures of :mod:`tests.training.counting_cost` are those of the calls that it wraps."""

from __future__ import annotations

import re
import time

from tests.training.counting_cost import WARM_UP, StepTimes


def test_shares_of_a_step():
    """Two calls of 2 ms asleep, one of which begins the step, in steps of at least 8 ms; asleep nothing is computed."""
    times = StepTimes()
    begin = times.wrap(lambda: time.sleep(0.002), begins_step=True)
    go_on = times.wrap(lambda: time.sleep(0.002), begins_step=False)
    for _ in range(WARM_UP + 6):
        begin()
        time.sleep(0.004)
        go_on()
    step, by_clock, of_thread = times.lines()
    medians = [float(re.search(r": ([\d.]+) \[", line)[1]) for line in (step, by_clock, of_thread)]
    assert step.endswith("ms, 5 steps") and medians[0] >= 8
    assert 4 <= medians[1] < medians[0] and medians[2] < medians[1]
