"""Sizes of a study: rungs, trials and confirmation, as functions of the data, the steps and the budget.

Nothing here is measured and nothing imports torch: ``lora-tune check`` prints what a study will do
before any model is loaded, and the study itself is planned by the same functions.

A full run of ``total`` optimizer steps is cut at ``search.rungs``. A rung below ``least_rung_steps`` says
too little of a trial; such rungs become one of just that many steps, if a full run or the next rung is
at least twice as long. Where none is left below a full run, halving cannot save anything: only the
anchors are tried, each to its end.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from lora_tune.records import PreparedData, StudyPlan
from lora_tune.study.spec import StudySpec

PROMOTED_SHARE = 4  # one of so many goes on to the next rung
LEAST_SEATS = 2  # that go on, so that the last rung always compares
TIE_SHARE = 3  # ties add one seat for so many
RAISED_GROWTH = 2  # a rung made longer has to be at most half of what follows

# Steps of the shortest rung: 50, or a quarter of a run below 200 steps, but at least 20. Starting values,
# not measured: within 20 steps a loss falls most, and warm-up and cool-down together take a quarter of them.
RUNG_STEPS = 50
RUNG_SHARE = 0.25
LEAST_RUNG_STEPS = 20

DEFAULT_TRIALS = 24
FEWEST_TRIALS, MOST_TRIALS = 8, 64  # that a budget decides between
DEFAULT_SEEDS = 3
LEAST_TRAIN_SHARE = 0.8  # of the rows; below it a note says so


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSizes:
    """Rows of the three splits."""

    train: int
    selection: int
    confirmation: int

    @classmethod
    def of(cls, data: PreparedData) -> Self:
        """Return the sizes of prepared splits."""
        return cls(
            train=len(data.train),
            selection=len(data.selection),
            confirmation=len(data.confirmation),
        )


def full_run_steps(spec: StudySpec, num_train: int) -> int:
    """Return the optimizer steps of a full run; of the longest where ``space.epochs`` offers several."""
    if spec.train.max_steps is not None:
        return spec.train.max_steps
    return _epoch_steps(spec, max(spec.space.epochs or (spec.train.epochs,)), num_train)


def most_trials(spec: StudySpec) -> int:
    """Return the trials that a study has at most, before its data and its speed are known."""
    if spec.search.trials != "auto":
        return spec.search.trials
    return DEFAULT_TRIALS if budget_hours(spec) is None else MOST_TRIALS


def budget_hours(spec: StudySpec, *, num_devices: int = 1) -> float | None:
    """Return the wall-clock hours that a study may take, the less of both budgets; None without any.

    Args:
        spec: The study.
        num_devices: GPUs that ``search.max_gpu_hours`` is shared by.
    """
    wall, gpu = spec.search.max_hours, spec.search.max_gpu_hours
    given = [*([wall] if wall else []), *([gpu / num_devices] if gpu else [])]
    return min(given, default=None)


def least_rung_steps(spec: StudySpec, total_steps: int) -> int:
    """Return the steps of the shortest rung that a study may have.

    >>> from pathlib import Path
    >>> from lora_tune.study.loader import validate_study
    >>> values = {"model": {"base": "m"}, "data": {"train": "rows.jsonl"}}
    >>> spec = validate_study(values, source=Path("a.toml"))
    >>> [least_rung_steps(spec, total) for total in (15, 100, 1000)]
    [20, 25, 50]
    """
    if spec.search.min_rung_steps != "auto":
        return spec.search.min_rung_steps
    return max(LEAST_RUNG_STEPS, min(RUNG_STEPS, round(RUNG_SHARE * total_steps)))


def study_rungs(spec: StudySpec, num_train: int) -> tuple[int, ...]:
    """Return the optimizer steps at the end of each rung of a study; the last is a full run.

    With ``space.epochs`` the end of every number of epochs is a rung, as long as it is, and of
    ``search.rungs`` those stay that end before the first of them.
    """
    total = full_run_steps(spec, num_train)
    shares, least = spec.search.rungs, least_rung_steps(spec, total)
    if spec.space.epochs is None:
        return rung_steps(shares, total_steps=total, min_steps=least)
    ends = sorted({_epoch_steps(spec, epochs, num_train) for epochs in spec.space.epochs})
    early = [share for share in shares if share * total < ends[0]]
    first = rung_steps(
        [share * total / ends[0] for share in early], total_steps=ends[0], min_steps=least
    )
    return (*first, *ends[1:])


def rung_steps(shares: Iterable[float], *, total_steps: int, min_steps: int) -> tuple[int, ...]:
    """Return the optimizer steps at the end of each rung; rungs that coincide are merged.

    Those shorter than ``min_steps`` become one rung of that length, unless what follows it would be less
    than twice as long: then they are left out.

    >>> rung_steps((0.125, 0.5, 1.0), total_steps=800, min_steps=50)
    (100, 400, 800)
    >>> rung_steps((0.125, 0.5, 1.0), total_steps=100, min_steps=50)
    (50, 100)
    >>> rung_steps((0.125, 0.5, 1.0), total_steps=60, min_steps=50)
    (60,)
    """
    ends = {max(1, min(total_steps, round(share * total_steps))) for share in shares} | {
        total_steps
    }
    long_enough = {end for end in ends if end >= min_steps} | {total_steps}
    if len(long_enough) < len(ends) and min(long_enough) >= RAISED_GROWTH * min_steps:
        long_enough.add(min_steps)
    return tuple(sorted(long_enough))


def start_steps(rungs: Sequence[int], *, cooldown_ratio: float) -> tuple[int, ...]:
    """Return the step at which a trial enters each rung: where the state of the last one was kept.

    >>> start_steps((100, 400, 800), cooldown_ratio=0.2)
    (0, 80, 320)
    """
    return (0, *(hold_step_of(end, cooldown_ratio) for end in rungs[:-1]))


def seats(entered: int) -> tuple[int, int]:
    """Return how many of the trials that entered a rung go on, and at most with those tied to the last.

    A quarter of them, at least two and never more than entered; statistical ties add a third more seats,
    at least one. From 24 trials 6 and 8, from 6 to 8 trials 2 and 3.

    >>> seats(24), seats(8), seats(6), seats(3), seats(2), seats(1), seats(0)
    ((6, 8), (2, 3), (2, 3), (2, 3), (2, 2), (1, 1), (0, 0))
    """
    nominal = min(entered, max(LEAST_SEATS, math.ceil(entered / PROMOTED_SHARE)))
    return nominal, min(entered, nominal + max(1, round(nominal / TIE_SHARE)))


def entered_trials(num_trials: int, num_rungs: int, *, tie_seats: bool = False) -> tuple[int, ...]:
    """Return how many trials enter each rung when none ends early.

    Args:
        num_trials: Trials at the first rung.
        num_rungs: Rungs.
        tie_seats: Count every seat that ties could take, not the nominal ones alone.

    >>> entered_trials(24, 3), entered_trials(24, 3, tie_seats=True)
    ((24, 6, 2), (24, 8, 3))
    """
    entered = [num_trials]
    while len(entered) < num_rungs:
        entered.append(seats(entered[-1])[1 if tie_seats else 0])
    return tuple(entered)


def planned_steps(
    rungs: Sequence[int], *, cooldown_ratio: float, num_trials: int, tie_seats: bool = False
) -> int:
    """Return the optimizer steps of all trials and rungs, when none ends early.

    Args:
        rungs: Steps at the end of each rung.
        cooldown_ratio: Share of a rung's steps that its branch cools down; trained again by those who go on.
        num_trials: Trials at the first rung.
        tie_seats: Count every seat that ties could take, not the nominal ones alone.

    >>> planned_steps((100, 400, 800), cooldown_ratio=0.2, num_trials=24)  # then 6 trials, then 2
    5280
    >>> planned_steps((100, 400, 800), cooldown_ratio=0.2, num_trials=24, tie_seats=True)  # 8, then 3
    6400
    """
    entered = entered_trials(num_trials, len(rungs), tie_seats=tie_seats)
    starts = start_steps(rungs, cooldown_ratio=cooldown_ratio)
    return sum(
        trials * (end - start) for trials, start, end in zip(entered, starts, rungs, strict=True)
    )


def hold_step_of(end: int, cooldown_ratio: float) -> int:
    """Return the last step at constant learning rate of a rung that ends at step ``end``.

    >>> hold_step_of(100, 0.2)
    80
    """
    return max(1, end - round(cooldown_ratio * end))


def confirmation_dtype(spec: StudySpec, device: str) -> str:
    """Return the type in which the confirmation is evaluated: ``float32``, or ``train`` as lanes train."""
    if spec.select.compute_dtype != "auto":
        return spec.select.compute_dtype
    return "float32" if device == "cpu" else "train"


def plan_study(
    spec: StudySpec,
    sizes: SplitSizes,
    *,
    num_anchors: int,
    within_budget: Callable[[StudyPlan], bool] | None = None,
) -> StudyPlan:
    """Return how many rungs, trials and confirmation seeds a study has, and why, as notes.

    Trials: ``search.trials``; ``auto`` is 24, or with a budget as many from 8 to 64 as it pays for,
    the confirmation included. Seeds and finalists: as ``select`` says; ``auto`` is 3 seeds, or as many as
    keep the confirmation at most half of all steps: seeds go down to 2, then finalists to 1, then
    seeds to 1.

    Args:
        spec: The study.
        sizes: Rows of the splits.
        num_anchors: Known configurations that the search would begin with.
        within_budget: Whether a plan, with its confirmation, keeps to the study's budget; None without one.
    """
    total, rungs = full_run_steps(spec, sizes.train), study_rungs(spec, sizes.train)
    too_small = len(rungs) == 1 and len(spec.search.rungs) > 1
    given = spec.search.trials
    anchors_only = too_small and given == "auto" and num_anchors > 0

    def plan_of(num_trials: int) -> StudyPlan:
        return _with_confirmation(
            spec,
            StudyPlan(
                num_train=sizes.train,
                num_selection=sizes.selection,
                num_confirmation=sizes.confirmation,
                total_steps=total,
                rungs=rungs,
                num_trials=num_trials,
                finalists=spec.select.finalists,
                seeds=DEFAULT_SEEDS,
                search_steps=planned_steps(
                    rungs, cooldown_ratio=spec.train.cooldown_ratio, num_trials=num_trials
                ),
                confirmation_steps=0,
                anchors_only=anchors_only,
            ),
        )

    if given != "auto":
        choices = [given]
    elif anchors_only:
        choices = [num_anchors]
    elif within_budget is not None:
        choices = list(range(MOST_TRIALS, FEWEST_TRIALS - 1, -1))
    else:
        choices = [FEWEST_TRIALS if too_small else DEFAULT_TRIALS]
    plans = [plan_of(num_trials) for num_trials in choices]
    fits = within_budget or (lambda plan: True)
    plan = next((plan for plan in plans if fits(plan)), plans[-1])
    notes = [*_size_notes(spec, plan, too_small=too_small), *_confirmation_notes(spec, plan)]
    if not fits(plan):
        notes.append(
            "the budget is less than the plan needs: no new trial is begun when only later rungs and the "
            f"confirmation still fit. Raise {_budget_key(spec)}, or lower search.trials or train.epochs."
        )
    return replace(plan, notes=tuple(notes))


def confirmation_runs(plan: StudyPlan) -> int:
    """Return the full trainings of the confirmation: every finalist and the default with every seed."""
    return (plan.finalists + 1) * plan.seeds


def refit_steps(spec: StudySpec, steps: int, sizes: SplitSizes) -> int:
    """Return the optimizer steps of a run on all rows: as many passes over them as ``steps`` were before.

    A run whose length is given in steps keeps it.
    """
    if spec.train.max_steps is not None:
        return steps
    return round(steps * (sizes.train + sizes.selection + sizes.confirmation) / sizes.train)


def _with_confirmation(spec: StudySpec, plan: StudyPlan) -> StudyPlan:
    """Return the plan with the most seeds and finalists whose steps are at most those of the search."""
    sized = []
    for finalists, seeds in _confirmation_choices(spec):
        steps = (finalists + 1) * seeds * plan.total_steps
        sized.append(replace(plan, finalists=finalists, seeds=seeds, confirmation_steps=steps))
    return next((p for p in sized if p.confirmation_steps <= p.search_steps), sized[-1])


def _confirmation_choices(spec: StudySpec) -> Iterator[tuple[int, int]]:
    """Yield (finalists, seeds) from the dearest that is wanted down."""
    most, given = spec.select.finalists, spec.select.seeds
    if given != "auto":
        yield most, given
        return
    yield most, DEFAULT_SEEDS
    for finalists in range(most, 0, -1):
        yield finalists, 2
    yield 1, 1


def _size_notes(spec: StudySpec, plan: StudyPlan, *, too_small: bool) -> Iterator[str]:
    rows = plan.num_train + plan.num_selection + plan.num_confirmation
    if spec.data.eval is None and plan.num_train < LEAST_TRAIN_SHARE * rows:
        asked = spec.data.selection_rows or spec.data.confirmation_rows
        others = "data.selection_rows and data.confirmation_rows take the others."
        if not asked:
            others = "the two held-out splits have at least 8 each."
        yield f"{plan.num_train / rows:.0%} of the rows are left for training: {others}"
    if not too_small:
        return
    least = least_rung_steps(spec, plan.total_steps)
    steps = f"{plan.total_steps} optimizer step{'' if plan.total_steps == 1 else 's'}"
    yield (
        f"too small for halving: a full run has {steps}, the shortest rung {least}, and a run that is "
        f"halved at least {RAISED_GROWTH * least}. {_what_is_tried(plan, spec)}"
    )


def _what_is_tried(plan: StudyPlan, spec: StudySpec) -> str:
    if plan.anchors_only:
        return f"Only the anchors are tried ({plan.num_trials}), each to its end."
    if spec.search.trials != "auto":
        return f"All {plan.num_trials} trials that search.trials asks for train to their end."
    return f"There are no anchors: {plan.num_trials} trials train to their end."


def _confirmation_notes(spec: StudySpec, plan: StudyPlan) -> Iterator[str]:
    if plan.finalists < spec.select.finalists:
        yield (
            f"{plan.finalists} of {spec.select.finalists} finalists "
            f"{'is' if plan.finalists == 1 else 'are'} confirmed, so that the confirmation takes no more "
            "steps than the search."
        )
    if plan.confirmation_steps > plan.search_steps:
        share = plan.confirmation_steps / (plan.confirmation_steps + plan.search_steps)
        why = "select.seeds asks for it" if spec.select.seeds != "auto" else "it cannot be smaller"
        yield f"the confirmation takes {share:.0%} of all steps: {why}."


def _budget_key(spec: StudySpec) -> str:
    return "search.max_gpu_hours" if spec.search.max_hours is None else "search.max_hours"


def _epoch_steps(spec: StudySpec, epochs: float, num_train: int) -> int:
    return max(1, round(epochs * num_train / spec.train.effective_batch_size))
