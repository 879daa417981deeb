"""What counts as a spike and what follows, without a run."""

from __future__ import annotations

import pytest

from pretrain.checkpointing.checkpoint import Progress
from pretrain.errors import NonFiniteError, RecipeError
from pretrain.recipe import SpikesRecipe
from pretrain.training.spikes import after_skipping, after_training, find_spike, pass_over
from tests.small_runs import change


def test_find_spike():
    spikes = SpikesRecipe(loss_factor=2.0, grad_norm_factor=3.0, window_steps=3, on_nonfinite="rollback")
    progress = Progress(0, 0, 0)
    for point in ((9.0, 9.0), (2.0, 1.0), (1.0, 0.5), (2.0, 1.0)):
        assert find_spike(spikes, progress, 100.0, 100.0) is None or len(progress.recent) == 3
        progress = after_training(spikes, progress, 8, 256, point)
    assert progress == Progress(4, 32, 1024, recent=((2.0, 1.0), (1.0, 0.5), (2.0, 1.0)))
    assert find_spike(spikes, progress, 4.0, 3.0) is None
    assert find_spike(spikes, progress, 4.1, 3.0).reason == "the loss is 4.1, 2.0 x the median of 3 steps"
    assert find_spike(spikes, progress, 4.0, 3.1).reason == "the gradient norm is 3.1, 3.1 x the median of 3 steps"
    assert find_spike(spikes, progress, 4.0, 3.1).action == "skip"
    for loss, norm in ((float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("inf"))):
        assert find_spike(spikes, progress, loss, norm).action == "rollback"
    assert after_training(SpikesRecipe(), progress, 8, 256, (1.0, 1.0)).recent == ()


def test_a_median_of_zero_has_no_multiple():
    """As where all text is one token, or all targets are ignored."""
    spikes = SpikesRecipe(loss_factor=2.0, grad_norm_factor=2.0, window_steps=3)
    assert find_spike(spikes, Progress(3, 24, 768, recent=((0.0, 0.0),) * 3), 1e-7, 1e-7) is None


def test_a_window_that_was_made_shorter_holds_the_last_steps():
    spikes = SpikesRecipe(loss_factor=2.0, window_steps=3)
    progress = Progress(9, 72, 2304, recent=((9.0, 1.0),) * 6 + ((1.0, 1.0),) * 3)
    spike = find_spike(spikes, progress, 4.0, 1.0)
    assert spike is not None and spike.reason == "the loss is 4, 4.0 x the median of 3 steps"


def test_skipped_ranges_merge():
    progress = after_skipping(after_skipping(Progress(0, 0, 0), 1, 8), 1, 8)
    progress = after_training(SpikesRecipe(), progress, 8, 256, (1.0, 1.0))
    progress = after_skipping(progress, 2, 16)
    assert progress == Progress(5, 40, 256, skipped_samples=((0, 16), (24, 40)))


def test_in_a_row_counts_skips_without_a_trained_step_between():
    spikes, progress = SpikesRecipe(on_nonfinite="skip", max_in_a_row=2), Progress(0, 0, 0)
    spike = find_spike(spikes, progress, float("nan"), 1.0)
    for _ in range(2):
        progress = pass_over(spikes, progress, spike, 8)
    progress = after_training(spikes, progress, 8, 256, (1.0, 1.0))
    for _ in range(2):
        progress = pass_over(spikes, progress, spike, 8)
    with pytest.raises(NonFiniteError, match="step 6: the loss is nan, after 2 skipped steps in a row"):
        pass_over(spikes, progress, spike, 8)


def test_steps_that_a_rollback_passed_over_are_not_skips_in_a_row():
    spikes = SpikesRecipe(on_nonfinite="skip", on_outlier="rollback", max_in_a_row=2)
    progress = after_skipping(Progress(100, 800, 25_600), 50, 400)
    spike = find_spike(spikes, progress, float("nan"), 1.0)
    for _ in range(2):
        progress = pass_over(spikes, progress, spike, 8)
    assert progress.skipped_samples == ((800, 1216),)
    with pytest.raises(NonFiniteError, match="after 2 skipped steps in a row"):
        pass_over(spikes, progress, spike, 8)


@pytest.mark.parametrize(
    ("spikes", "message"),
    [
        ({"loss_factor": 0.5}, "spikes.loss_factor is 0.5, must be 0 (off) or above 1"),
        ({"grad_norm_factor": float("inf")}, "spikes.grad_norm_factor is inf"),
        ({"window_steps": 0}, "spikes.window_steps is 0, must be at least 1"),
        ({"max_in_a_row": 0}, "spikes.max_in_a_row is 0, must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(prepared_recipe, spikes, message):
    with pytest.raises(RecipeError) as caught:
        change(prepared_recipe, spikes=spikes).check()
    assert message in str(caught.value)
