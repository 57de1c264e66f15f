"""Who goes on from a rung: records built by hand, the rule's sentences one by one, then its properties."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_study import FIRST_POINT, LABEL_COUNTS, evaluation_of, make_space, suggestion

from lora_tune.records import EvalResult, RungResult, TrialRecord, TrialState
from lora_tune.search.plan import seats
from lora_tune.search.promotion import (
    HALF_STEP,
    ScoredTrial,
    choose_finalists,
    choose_seats,
    half_step_of_leader,
    is_tied,
    is_tried_near,
    promoted,
    rank_trials,
)
from lora_tune.units import GIB

MARGIN = 0.005
# Deviations of five rows whose mean over LABEL_COUNTS is zero.
NOISE = (0.07, 0.0, 0.0, -0.03, 0.0)
assert math.isclose(
    sum(n * off for n, off in zip(LABEL_COUNTS, NOISE, strict=True)), 0.0, abs_tol=1e-12
)


def result(rung: int, evaluation: EvalResult) -> RungResult:
    return RungResult(
        rung=rung,
        steps=10 * (rung + 1),
        eval_loss=evaluation.mean_loss,
        evaluation=evaluation,
        points=(FIRST_POINT,),
        wall_s=1.0,
        num_tokens=64,
        peak_bytes=1,
        pack_lanes=1,
    )


def trial(
    number: int,
    *losses: float,
    noise: Sequence[float] = (),
    state: TrialState = TrialState.RUNNING,
    memory: float = 2.0,
    rank: int = 16,
    origin: str = "tpe",
    step: float = 3e-4,
) -> TrialRecord:
    """Return a trial with a loss a rung; ``memory`` in GiB."""
    suggested = suggestion(rank=rank, effective_step=step)
    return TrialRecord(
        number=number,
        state=state,
        origin=origin,
        suggested=suggested,
        config=make_space().effective(suggested),
        predicted_bytes=round(memory * GIB),
        trainable_parameters=1,
        rungs=tuple(result(rung, evaluation_of(loss, noise)) for rung, loss in enumerate(losses)),
    )


def go_on(records: Sequence[TrialRecord], rung: int = 1, *, margin: float = 0.0) -> list[int]:
    return sorted(promoted(records, rung, practical_margin=margin))


def test_the_best_quarter_goes_on_when_rows_tell_all_trials_apart() -> None:
    records = [trial(n, 2.0 + n / 10) for n in range(24)]
    assert go_on(records) == [0, 1, 2, 3, 4, 5]
    assert go_on(records[:8]) == [0, 1]
    assert go_on(records[:1]) == [0]
    assert go_on([]) == []


def test_trials_that_did_not_come_to_the_rung_are_not_counted() -> None:
    records = [trial(n, 2.0 + n / 10) for n in range(4)]
    others = [trial(n, state=TrialState.DIVERGED) for n in range(4, 24)]
    assert go_on(records + others) == [0, 1]


def test_what_is_tied_with_the_last_seat_goes_on_up_to_the_cap() -> None:
    apart = [trial(n, 2.0 + n / 10) for n in range(6)]
    tied = [trial(n, 2.501 + n / 1e5, noise=NOISE) for n in range(6, 10)]
    rest = [trial(n, 3.0 + n) for n in range(10, 24)]
    assert go_on(apart + tied + rest) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert go_on(apart + tied[:1] + rest[:13] + [trial(24, 99.0)] * 4) == [0, 1, 2, 3, 4, 5, 6]


def test_a_worse_trial_may_be_tied_where_a_better_one_is_not() -> None:
    apart = [trial(0, 2.0), trial(1, 2.1)]
    close = trial(2, 2.105)  # the same on every row: surely worse
    noisy = trial(3, 2.106, noise=NOISE)
    rest = [trial(n, 9.0 + n) for n in range(4, 8)]
    assert go_on([*apart, close, noisy, *rest]) == [0, 1, 3]


def test_clusters_widen_the_interval() -> None:
    noise = (0.02, 0.02, 0.02, 0.005, 0.005)
    last, next_one = trial(1, 2.1), trial(2, 2.1, noise=noise)
    ranked = rank_trials([last, next_one], num_rungs=1)
    assert not is_tied(ranked[1], ranked[0])
    assert is_tied(ranked[1], ranked[0], clusters=(0, 0, 0, 1, 1))
    records = [trial(0, 2.0), last, next_one, *(trial(n, 9.0 + n) for n in range(3, 8))]
    assert go_on(records) == [0, 1]
    assert sorted(promoted(records, 1, practical_margin=0.0, clusters=(0, 0, 0, 1, 1))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("cheap", "goes_on"),
    [
        ({"memory": 1.0}, True),
        ({"memory": 1.9}, True),  # another half GiB
        ({"memory": 2.4}, False),  # the same in steps of half a GiB
        ({"rank": 8}, True),
        ({"rank": 8, "memory": 2.6}, False),
        ({"rank": 32, "memory": 1.0}, True),  # memory comes first
    ],
)
def test_one_place_is_kept_for_the_cheapest_within_the_margin(
    cheap: dict[str, float], goes_on: bool
) -> None:
    records = [trial(n, 2.0 + n / 1000) for n in range(8)]
    records[6] = trial(6, 2.006, **cheap)  # type: ignore[arg-type]
    assert go_on(records, margin=MARGIN) == ([0, 1, 6] if goes_on else [0, 1])


def test_the_cheapest_is_sought_within_the_margin_of_the_best_alone() -> None:
    records = [trial(n, 2.0 + n / 100) for n in range(7)]
    assert go_on([*records, trial(7, 2.0101, memory=1.0)], margin=MARGIN) == [0, 1]
    assert go_on([*records, trial(7, 2.0099, memory=1.0)], margin=MARGIN) == [0, 7]


def test_the_cheapest_takes_the_place_of_a_tie_not_of_a_seat() -> None:
    records = [trial(0, 2.0), trial(1, 2.001), trial(2, 2.002, noise=NOISE)]
    records += [trial(3, 2.003, memory=1.0), *(trial(n, 9.0 + n) for n in range(4, 8))]
    assert go_on(records, margin=0.0) == [0, 1, 2]
    assert go_on(records, margin=MARGIN) == [0, 1, 3]


def test_a_trial_that_ends_early_is_replaced_until_the_seats_are_filled() -> None:
    records = [trial(n, 2.0 + n / 10) for n in range(8)]
    ended = [replace(r, state=TrialState.DIVERGED) for r in records[:3]]
    assert go_on([ended[0], *records[1:]]) == [0, 1, 2]
    assert go_on([*ended, *records[3:]]) == [0, 1, 2, 3, 4]
    assert go_on([replace(r, state=TrialState.FAILED) for r in records]) == list(range(8))


def test_a_tie_fills_the_place_of_a_seat_that_ended_early() -> None:
    records = [trial(0, 2.0), trial(1, 2.1), trial(2, 2.101, noise=NOISE)]
    records += [trial(n, 9.0 + n) for n in range(3, 8)]
    assert go_on(records) == [0, 1, 2]
    assert go_on([replace(records[0], state=TrialState.DIVERGED), *records[1:]]) == [0, 1, 2]
    both = [replace(r, state=TrialState.DIVERGED) for r in records[:2]]
    assert go_on([*both, *records[2:]]) == [0, 1, 2, 3]


def test_a_trial_that_ended_in_a_later_rung_has_used_its_seat() -> None:
    records = [trial(n, 2.0 + n / 10) for n in range(8)]
    later = trial(0, 2.0, 1.9, state=TrialState.DIVERGED)
    assert go_on([later, *records[1:]]) == [0, 1]


def test_the_half_step_goes_to_rung_1_whatever_rung_0_shows_and_takes_no_seat() -> None:
    records = [trial(n, 2.0 + n / 10) for n in range(8)]
    for losses in ((), (1.0,), (9.0,)):  # still in rung 0, best, worst
        assert go_on([*records, trial(8, *losses, origin=HALF_STEP)]) == [0, 1, 8]
    ended = trial(8, origin=HALF_STEP, state=TrialState.DIVERGED)
    assert go_on([*records, ended]) == [0, 1]


def test_the_half_step_takes_the_place_of_the_last_tie() -> None:
    apart = [trial(n, 2.0 + n / 10) for n in range(6)]
    tied = [trial(n, 2.501 + n / 1e5, noise=NOISE) for n in range(6, 10)]
    records = apart + tied + [trial(n, 3.0 + n) for n in range(10, 24)]
    half = trial(24, 2.0, origin=HALF_STEP)
    assert go_on(records) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert go_on([*records, half]) == [0, 1, 2, 3, 4, 5, 6, 24]
    records[9] = trial(9, 2.5, noise=NOISE, memory=1.0)
    cheap = 0.25  # the cheapest keeps its place as well, when there are two
    assert go_on([*records, half], margin=cheap) == [0, 1, 2, 3, 4, 5, 9, 24]


def test_the_half_step_earns_the_later_rungs() -> None:
    records = [trial(n, 5.0, 2.0 + n / 10) for n in range(7)]
    assert go_on([*records, trial(7, 9.0, 1.9, origin=HALF_STEP)], 2) == [0, 7]
    assert go_on([*records, trial(7, 4.0, 2.5, origin=HALF_STEP)], 2) == [0, 1]


def test_a_state_that_was_better_counts_for_a_run_that_overfits() -> None:
    records = [trial(0, 2.0, 3.0), *(trial(n, 2.5, 2.1 + n / 10) for n in range(1, 4))]
    assert [scored.record.number for scored in rank_trials(records, num_rungs=2)] == [0, 1, 2, 3]
    assert go_on(records, 2) == [0, 1]


def test_trials_are_compared_on_the_rows_that_all_of_them_have() -> None:
    few = EvalResult(
        split="selection", loss_sums=(6.0,), label_counts=LABEL_COUNTS[:1], compute_dtype="float32"
    )
    overfitted = replace(trial(0), rungs=(result(0, few), result(1, evaluation_of(9.0))))
    noise = (0.5, -0.5, 0.5, 0.0, -0.625)  # worse on the first row alone
    other = replace(
        trial(1), rungs=(result(0, evaluation_of(5.0)), result(1, evaluation_of(1.9, noise)))
    )
    ranked = rank_trials([overfitted, other], num_rungs=2)
    assert [scored.loss for scored in ranked] == pytest.approx([2.0, 2.4])
    assert other.rungs[1].eval_loss < 2.0


def test_finalists_are_the_best_complete_trials_and_one_more_for_a_tie() -> None:
    def complete(number: int, loss: float, **keys: Sequence[float]) -> TrialRecord:
        return trial(number, loss, state=TrialState.COMPLETE, **keys)  # type: ignore[arg-type]

    def final(records: Sequence[TrialRecord], count: int) -> list[int]:
        found = choose_finalists(records, count, num_rungs=1)
        return [record.number for record in found]

    apart = [complete(0, 2.2), complete(1, 2.0), complete(2, 2.1)]
    assert final(apart, 2) == [1, 2]
    assert final(apart, 5) == [1, 2, 0]
    assert final([], 2) == []
    tied = [complete(3, 2.101, noise=NOISE), complete(4, 2.102, noise=NOISE)]
    assert final([*apart, *tied], 2) == [1, 2, 3]
    assert final([*apart, trial(5, 1.0, state=TrialState.PRUNED)], 1) == [1]


def test_a_step_is_near_within_a_quarter_at_the_same_rank_and_target_set() -> None:
    leader = trial(0, 2.0, step=4e-4)
    assert not is_tried_near([leader], like=leader, step=2e-4)
    assert is_tried_near([trial(1, step=2.4e-4)], like=leader, step=2e-4)
    assert is_tried_near([trial(1, step=1.7e-4)], like=leader, step=2e-4)
    assert not is_tried_near([trial(1, step=4e-4 / 3)], like=leader, step=2e-4)
    assert not is_tried_near([trial(1, step=2e-4, rank=8)], like=leader, step=2e-4)


def test_half_the_leader_s_step_is_asked_for_unless_tried_or_out_of_bounds() -> None:
    leader, others = trial(0, 2.0, step=4e-4), [trial(n, 2.1, step=8e-4) for n in (1, 2)]
    found = half_step_of_leader([*others, leader], lowest=3e-5)
    assert found == replace(leader.suggested, effective_step=2e-4)
    ended = replace(leader, state=TrialState.DIVERGED)  # in a later rung
    assert half_step_of_leader([ended, *others], lowest=3e-5) == found
    assert half_step_of_leader([leader, *others], lowest=3e-4) is None
    tried = trial(3, 5.0, step=2.1e-4)
    assert half_step_of_leader([leader, *others, tried], lowest=3e-5) is None


def test_there_is_no_half_step_where_ties_have_no_seat_to_give() -> None:
    leader, other = trial(0, 2.0, step=4e-4), trial(1, 2.1, step=8e-4)
    diverged = trial(2, state=TrialState.DIVERGED, step=8e-4)
    assert half_step_of_leader([], lowest=3e-5) is None
    assert half_step_of_leader([leader, other, diverged], lowest=3e-5) is None


def test_the_leader_is_that_of_rung_0_whatever_later_rungs_showed() -> None:
    leader, *others = (trial(n, 2.0 + n / 10, 2.0 - n / 10, step=4e-4 * 3**n) for n in range(4))
    found = half_step_of_leader([*others, leader], lowest=3e-5)
    assert found is not None
    assert found.effective_step == 2e-4


rungs_of_trials = st.lists(
    st.tuples(
        st.sampled_from([2.0, 2.004, 2.01, 2.05, 2.3]),
        st.sampled_from([(), NOISE, NOISE[::-1]]),
        st.sampled_from([1.0, 2.0, 3.0]),
        st.sampled_from([8, 16]),
        st.sampled_from([TrialState.RUNNING, TrialState.RUNNING, TrialState.DIVERGED]),
    ),
    max_size=30,
)


def records_of(
    values: list[tuple[float, Sequence[float], float, int, TrialState]],
) -> list[TrialRecord]:
    return [
        trial(number, loss, noise=noise, memory=memory, rank=rank, state=state)
        for number, (loss, noise, memory, rank, state) in enumerate(values)
    ]


@given(values=rungs_of_trials, seed=st.integers(0, 100))
def test_the_choice_does_not_depend_on_the_order_of_the_records(
    values: list[tuple[float, Sequence[float], float, int, TrialState]], seed: int
) -> None:
    records = records_of(values)
    shuffled = random.Random(seed).sample(records, len(records))
    assert promoted(records, 1, practical_margin=MARGIN) == promoted(
        shuffled, 1, practical_margin=MARGIN
    )


@given(values=rungs_of_trials, half=st.booleans(), data=st.data())
def test_the_choice_only_grows_when_trials_end_early(
    values: list[tuple[float, Sequence[float], float, int, TrialState]],
    half: bool,
    data: st.DataObject,
) -> None:
    """Whichever chosen trials end first, the end is the same: nothing is trained in vain."""
    fates = records_of(values)
    if half and fates:
        fates[-1] = replace(fates[-1], origin=HALF_STEP)
    now = [replace(record, state=TrialState.RUNNING) for record in fates]
    while True:
        chosen = promoted(now, 1, practical_margin=MARGIN)
        doomed = [n for n in chosen if fates[n].state is not now[n].state]
        if not doomed:
            break
        ends = data.draw(st.sampled_from(doomed))
        now[ends] = fates[ends]
        assert set(chosen) <= set(promoted(now, 1, practical_margin=MARGIN))
    assert set(promoted(fates, 1, practical_margin=MARGIN)) == set(chosen)


@given(values=rungs_of_trials)
def test_the_number_of_seats_keeps_its_bounds(
    values: list[tuple[float, Sequence[float], float, int, TrialState]],
) -> None:
    ranked: list[ScoredTrial] = rank_trials(records_of(values), num_rungs=1)
    nominal, cap = seats(len(ranked))
    chosen = choose_seats(ranked, practical_margin=MARGIN)
    assert nominal <= len(chosen) == len(set(chosen)) <= cap
    assert {scored.record.number for scored in ranked[:nominal]} <= set(chosen)
    with_half_step = choose_seats(ranked, practical_margin=MARGIN, num_taken=1)
    assert nominal <= len(with_half_step) <= max(nominal, cap - 1)
    assert set(with_half_step) <= set(chosen)
