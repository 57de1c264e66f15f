"""A segment that goes on is measured by the trial's first loss, not by its own first batch."""

from dataclasses import replace

from lora_tune.engine.lane import Lane
from lora_tune.records import LaneJob, Point


def lane(first_loss: float | None) -> Lane:
    job = LaneJob(
        trial=0,
        rung=1,
        config=None,
        start_step=6,
        hold_step=20,
        end_step=24,
        warmup_steps=1,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )
    return Lane(job=replace(job, first_loss=first_loss), adapter=None, optimizer=None, step=6)


def noted(subject: Lane, *losses: float) -> str:
    for step, loss in enumerate(losses, start=7):
        subject.note_point(
            Point(step=step, train_loss=loss, learning_rate=1e-4, grad_norm=1.0, num_tokens=10)
        )
    return subject.divergence


def test_an_easy_first_batch_does_not_make_the_next_ones_a_divergence() -> None:
    assert noted(lane(4.4), 2.7, 3.4, 3.4, 3.4, 3.4) == ""
    assert "first (2.70)" in noted(lane(None), 2.7, 3.4, 3.4, 3.4)


def test_a_later_segment_that_rises_above_where_the_trial_began_has_diverged() -> None:
    assert "first (4.40)" in noted(lane(4.4), 2.7, 5.0, 5.0, 5.0)
