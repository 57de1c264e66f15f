"""When a lane has to end, by its readings alone; no model is needed for that."""

import math
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.engine.lane import DIVERGED_STEPS, Lane
from lora_tune.records import LaneJob, Point
from lora_tune.stats.smoothing import smoothed_losses


def new_lane(limits: tuple[tuple[int, float], ...] = (), first_loss: float | None = None) -> Lane:
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
        first_loss=first_loss,
    )
    return Lane(job=job, adapter=None, optimizer=None, step=0)


def lane_after(
    losses: Iterable[float],
    limits: tuple[tuple[int, float], ...] = (),
    *,
    base: Callable[[int], float] | None = None,
    first_loss: float | None = None,
) -> Lane:
    """Return a lane that has read these losses from step 1 on; ``base``: what the base loses at a step."""
    lane = new_lane(limits, first_loss)
    for step, loss in enumerate(losses, 1):
        note(lane, step, loss, base or (lambda _: lane.first_loss))
    return lane


def note(
    lane: Lane, step: int, loss: float, base: Callable[[int], float], norm: float = 1.0
) -> None:
    lane.note_point(
        Point(step=step, train_loss=loss, learning_rate=1e-4, grad_norm=norm, num_tokens=8)
    )
    if steps := lane.doubted_steps:
        lane.compare_with_base({doubted: base(doubted) for doubted in steps})


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


def test_a_loss_that_is_no_number_ends_a_lane() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        assert lane_after([3.0, bad]).divergence.startswith(f"loss {bad} at step 2")
    assert lane_after([3.0, math.inf], ((2, 3.1),)).divergence.startswith("loss inf at step 2")


# A lane in doubt is compared with the base on the same rows.


def test_three_steps_far_above_the_base_end_a_lane() -> None:
    assert lane_after([3.0] + [3.6] * (DIVERGED_STEPS - 1)).divergence == ""
    assert lane_after([3.0] + [3.6] * DIVERGED_STEPS).divergence == (
        "loss 3.60 at step 4, for 3 steps more than 0.5 above the untuned model on the same rows (3.00)"
    )


def test_an_easy_first_batch_makes_no_divergence_of_harder_ones() -> None:
    losses = [2.7, 3.4, 3.5, 3.4, 3.6, 3.3, 3.4]
    asked: list[int] = []

    def base(step: int) -> float:
        asked.append(step)
        return losses[step - 1] + 0.1

    lane = lane_after(losses, base=base)
    assert lane.divergence == ""
    assert asked == [2, 3, 4]  # from then on the usual loss of the base is known well enough


def test_each_step_is_compared_with_its_own_rows_and_the_count_goes_on_from_those_above() -> None:
    easy_and_hard = {2: 9.0, 3: 3.0, 4: 3.0, 5: 3.0}  # the base's losses
    lane = lane_after([3.0, 9.0, 9.0, 9.0, 9.0], base=easy_and_hard.__getitem__)
    assert [point.step for point in lane.points] == [1, 2, 3, 4, 5]
    assert lane.divergence.endswith("on the same rows (3.00)")
    assert lane_after([3.0, 9.0, 9.0, 9.0], base=easy_and_hard.__getitem__).divergence == ""


def test_a_later_segment_is_measured_by_where_the_trial_began() -> None:
    asked: list[int] = []

    def base(step: int) -> float:
        asked.append(step)
        return 4.4

    assert lane_after([2.7, 3.4, 3.4, 3.4, 3.4], base=base, first_loss=4.4).divergence == ""
    assert asked == []
    assert lane_after([2.7, 5.0, 5.0, 5.0], base=base, first_loss=4.4).divergence
    assert asked == [2, 3, 4]


def test_nothing_is_said_of_a_lane_in_doubt_before_it_was_compared() -> None:
    lane = new_lane()
    for step, loss in enumerate((3.0, 4.0, 4.0, 4.0), 1):
        lane.note_point(
            Point(step=step, train_loss=loss, learning_rate=1e-4, grad_norm=1.0, num_tokens=8)
        )
    assert (lane.divergence, lane.doubted_steps) == ("", (2, 3, 4))
    lane.compare_with_base({2: 3.0, 3: 3.0, 4: 3.0})
    assert lane.divergence


LOSSES = st.floats(1.0, 9.0) | st.sampled_from([math.nan, math.inf])


@given(
    st.lists(st.tuples(LOSSES, st.floats(1.0, 4.0), st.sampled_from([1.0, math.inf])), max_size=30),
    st.none() | st.floats(1.0, 4.0),
    st.lists(st.floats(1.0, 9.0), max_size=3),
)
def test_a_lane_whose_readings_are_replayed_is_the_lane_that_read_them(
    readings: list[tuple[float, float, float]], first_loss: float | None, limits: list[float]
) -> None:
    at = tuple((4 * number, limit) for number, limit in enumerate(limits, 1))
    lane, again = new_lane(at, first_loss), new_lane(at, first_loss)
    for step, (loss, _, norm) in enumerate(readings, 1):
        note(lane, step, loss, lambda doubted: readings[doubted - 1][1], norm)
    again.replay(lane.points, lane.base_losses)
    names = ("points", "step", "steps_above", "base_losses", "skipped", "num_tokens", "over_limit")
    for name in (*names, "divergence", "doubted_steps"):
        # as text: a NaN equals no NaN
        assert str(getattr(again, name)) == str(getattr(lane, name)), name
    assert vars(again.smoothed).__repr__() == vars(lane.smoothed).__repr__()
