"""When lanes trained, and in which slot: a span for every segment, none of one slot over another.

The clock is one that goes on by a second whenever it is asked, so equal times cannot hide an overlap.
"""

from collections.abc import Callable, Iterable
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from test_in_process import base as base  # the fixtures
from test_in_process import executor_of as executor_of
from test_in_process import finish, make_job, small_memory, too_fast
from test_in_process import splits as splits

from lora_tune.engine.pack import TrialPack
from lora_tune.executors.in_process import InProcessExecutor
from lora_tune.records import LaneOutcome, LaneSpan, TrialState

Executors = Callable[..., InProcessExecutor]


def ticking(start: int = 0) -> Callable[[], float]:
    seconds = count(start)
    return lambda: float(next(seconds))


def spans_of(outcomes: Iterable[LaneOutcome]) -> list[LaneSpan]:
    spans = [outcome.span for outcome in outcomes]
    assert None not in spans
    return [span for span in spans if span is not None]


def assert_apart(spans: list[LaneSpan]) -> None:
    """No two spans of a slot overlap, and every one takes some time."""
    assert all(span.began_s < span.ended_s for span in spans)
    for slot in {span.slot for span in spans}:
        own = sorted((s.began_s, s.ended_s) for s in spans if s.slot == slot)
        assert all(before[1] < after[0] for before, after in pairwise(own))


def test_lanes_of_different_lengths_take_the_smallest_free_slot(executor_of: Executors) -> None:
    jobs = [make_job(number, steps=steps) for number, steps in enumerate((6, 1, 2, 3, 1))]
    outcomes = finish(executor_of(lanes=3, clock=ticking()), jobs)
    spans = spans_of(outcomes[number] for number in range(5))
    assert_apart(spans)
    # 1 ends first and 3 joins in its slot, then 2 ends and 4 joins in its own
    assert [span.slot for span in spans] == [0, 1, 2, 1, 2]
    assert [spans[n].began_s for n in range(3)] == [0, 1, 2]
    assert spans[0].ended_s == max(span.ended_s for span in spans)


@pytest.mark.parametrize("where", ["joining", "training", "evaluation"])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_lanes_that_were_parked_have_one_span_and_keep_their_slot(
    executor_of: Executors, where: str, most: int
) -> None:
    jobs = [make_job(number, steps=3) for number in range(6)]
    executor = executor_of(lanes=4, pack=small_memory(most, where), clock=ticking())
    spans = spans_of(finish(executor, jobs).values())
    assert len(spans) == 6
    assert {span.slot for span in spans} <= set(range(4))
    assert_apart(spans)


def test_a_parked_lane_s_span_begins_when_it_first_joined(executor_of: Executors) -> None:
    jobs = [make_job(number, steps=3) for number in range(4)]
    executor = executor_of(lanes=4, pack=small_memory(2, "training"), clock=ticking())
    outcomes = finish(executor, jobs)
    spans = spans_of(outcomes[number] for number in range(4))
    assert [(span.slot, span.began_s) for span in spans] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert max(span.ended_s for span in spans[:2]) < min(span.ended_s for span in spans[2:])


def test_lanes_that_diverge_or_do_not_fit_have_a_span_too(executor_of: Executors) -> None:
    class TooSmallForRank16(TrialPack):
        def train_step(self, lanes) -> None:  # type: ignore[no-untyped-def]
            if any(lane.job.config.rank == 16 for lane in lanes):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            super().train_step(lanes)

    jobs = [make_job(2), too_fast(make_job(0, steps=8)), make_job(1), make_job(3)]
    outcomes = finish(executor_of(lanes=2, pack=TooSmallForRank16, clock=ticking()), jobs)
    assert outcomes[0].state is TrialState.DIVERGED
    assert outcomes[1].state is TrialState.INFEASIBLE
    assert_apart(spans_of(outcomes.values()))


def test_what_is_only_evaluated_has_no_span_and_takes_no_slot(
    executor_of: Executors, tmp_path: Path
) -> None:
    only = make_job(7, config=None, start_step=0, hold_step=0, end_step=0)
    outcomes = finish(executor_of(lanes=2, clock=ticking()), [only, make_job(0), make_job(1)])
    assert outcomes[7].evaluation is not None
    assert outcomes[7].span is None
    assert {span.slot for span in spans_of([outcomes[0], outcomes[1]])} == {0, 1}


def test_spans_are_on_the_clock_that_the_executor_was_given(executor_of: Executors) -> None:
    [outcome] = finish(executor_of(clock=ticking(5000)), [make_job(0)]).values()
    assert outcome.span == LaneSpan(slot=0, began_s=5000, ended_s=5001)
