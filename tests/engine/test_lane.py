"""When a lane has to end, by its readings alone; no model is needed for that."""

import math
from collections.abc import Iterable

import pytest

from lora_tune.engine.lane import DIVERGED_STEPS, Lane
from lora_tune.records import LaneJob, Point
from lora_tune.stats.smoothing import smoothed_losses


def lane_after(losses: Iterable[float], limits: tuple[tuple[int, float], ...] = ()) -> Lane:
    """Return a lane that has read these losses, from step 1 on."""
    job = LaneJob(
        trial=7,
        rung=0,
        config=None,
        start_step=0,
        hold_step=1000,
        end_step=1000,
        warmup_steps=0,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
        loss_limits=limits,
    )
    lane = Lane(job=job, adapter=None, optimizer=None, step=0)
    for step, loss in enumerate(losses, 1):
        lane.note_point(
            Point(step=step, train_loss=loss, learning_rate=1e-4, grad_norm=1.0, num_tokens=8)
        )
    return lane


def test_a_lane_within_its_limits_goes_on() -> None:
    assert lane_after([3.0] * 20).divergence == ""
    assert lane_after([3.0] * 20, ((5, 3.01), (10, 3.01))).divergence == ""


def test_a_lane_above_a_limit_has_diverged_at_that_step() -> None:
    losses = [3.0 + 0.01 * step for step in range(20)]
    lane = lane_after(losses, ((5, 3.5), (12, 3.05), (15, 3.0)))
    assert lane.divergence == (
        "smoothed loss 3.07 at step 12, above 3.05, the limit that finished trials set there"
    )
    assert len(lane.points) == 12  # later readings of the pack are not its own any more


def test_the_loss_is_smoothed_as_the_limits_are() -> None:
    losses = [3.0, 3.4, 2.9, 3.2, 3.3, 2.8]
    smoothed = smoothed_losses(enumerate(losses, 1))[6]
    assert lane_after(losses, ((6, smoothed + 1e-9),)).divergence == ""
    assert lane_after(losses, ((6, smoothed - 1e-9),)).divergence


def test_a_single_high_reading_is_no_divergence() -> None:
    losses = [3.0] * 30 + [3.4] + [3.0] * 5
    limits = tuple((step, 3.1) for step in range(10, 37))
    assert lane_after(losses, limits).divergence == ""


def test_a_thinned_curve_is_smoothed_over_the_same_steps() -> None:
    curve = [(step, 4.0 * math.exp(-step / 200)) for step in range(1, 401)]
    whole, thinned = smoothed_losses(curve), smoothed_losses(curve[::-1][::4][::-1])
    for step in (100, 200, 400):
        assert thinned[step] == pytest.approx(whole[step], rel=0.02)


def test_three_steps_above_the_first_loss_and_a_loss_that_is_no_number_end_a_lane() -> None:
    assert lane_after([3.0] + [3.6] * (DIVERGED_STEPS - 1)).divergence == ""
    assert "more than 0.5 above" in lane_after([3.0] + [3.6] * DIVERGED_STEPS).divergence
    assert lane_after([3.0, math.nan]).divergence.startswith("loss nan at step 2")
    assert lane_after([3.0, math.inf], ((2, 3.1),)).divergence.startswith("loss inf at step 2")
