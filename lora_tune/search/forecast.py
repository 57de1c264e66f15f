"""What a study will take: seconds from a measured or modelled speed, and tokens from its file alone.

Speed is trained tokens per second. A row trained costs two passes through the base (three when backward
computes the layers again), a row evaluated one of them, see ``search/evaluation.py``. Trials of a rung
fill the lanes of packs in turn; a last pack that is not full is as fast as so many lanes are. Nothing is
taken off for trials that end early, nothing is added for ties that are promoted beside the seats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_tune.errors import StudyFileError
from lora_tune.records import Forecast, LanePlan, ProbeReading, StudyPlan
from lora_tune.search.evaluation import RungCosts
from lora_tune.search.plan import (
    FEWEST_TRIALS,
    MOST_TRIALS,
    SplitSizes,
    budget_hours,
    confirmation_runs,
    entered_trials,
    most_trials,
    plan_study,
    planned_steps,
    refit_steps,
    study_rungs,
)
from lora_tune.study.spec import StudySpec

FLOAT32_SLOWDOWN = 2.0  # where it was not measured: twice the bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpeed:
    """How fast packs of a study train."""

    readings: tuple[tuple[int, float], ...]  # (lanes, tokens/s of all of them), at least one
    lanes: int  # of a full pack
    row_tokens: float  # mean of a row
    measured: bool
    confirmation_slowdown: float = 1.0  # of its evaluation, when that is in another type
    load_s: float = 0.0  # until the first trial

    def tokens_per_s(self, lanes: int) -> float:
        """Return the speed of a pack of so many lanes: on the line between the readings around it.

        >>> speed = StudySpeed(
        ...     readings=((1, 100.0), (4, 300.0)), lanes=4, row_tokens=50, measured=True
        ... )
        >>> [round(speed.tokens_per_s(lanes)) for lanes in (1, 3, 4, 8)]
        [100, 233, 300, 300]
        """
        known, speeds = zip(*self.readings, strict=True)
        return float(np.interp(lanes, known, speeds))

    def training_s(self, runs: int, tokens: float) -> float:
        """Return the seconds of ``runs`` equal runs of so many tokens each."""
        full, left = divmod(runs, self.lanes)
        last_s = left * tokens / self.tokens_per_s(left) if left else 0.0
        return full * self.lanes * tokens / self.tokens_per_s(self.lanes) + last_s


def forecast_study(
    plan: StudyPlan,
    costs: RungCosts,
    *,
    eval_rows: Sequence[int],
    speed: StudySpeed,
    refit: int = 0,
) -> Forecast:
    """Return what a study will take when no trial ends early.

    Args:
        plan: Rungs, trials, confirmation.
        costs: What the rungs train.
        eval_rows: Selection rows evaluated at each rung.
        speed: Of its packs.
        refit: Steps of the training on all rows; 0: there is none.
    """
    entered = entered_trials(plan.num_trials, len(plan.rungs))
    step_tokens = costs.effective_batch_size * speed.row_tokens
    # one pass through the base; lanes that began together end together and are evaluated as a pack
    row_s = speed.row_tokens / (speed.tokens_per_s(speed.lanes) * costs.passes)
    search_s = sum(
        speed.training_s(trials, costs.steps(rung) * step_tokens)
        for rung, trials in enumerate(entered)
    )
    evaluated = sum(trials * rows for trials, rows in zip(entered, eval_rows, strict=True))
    runs = confirmation_runs(plan)
    confirmed = (
        (runs + 1) * plan.num_confirmation * speed.confirmation_slowdown
    )  # and the untuned base
    confirmation_s = speed.training_s(runs, plan.total_steps * step_tokens) + confirmed * row_s
    return Forecast(
        tokens_per_s=speed.tokens_per_s(speed.lanes),
        measured=speed.measured,
        search_steps=plan.search_steps,
        confirmation_steps=plan.confirmation_steps,
        search_s=search_s,
        evaluation_s=evaluated * row_s,
        confirmation_s=confirmation_s + speed.training_s(min(1, refit), refit * step_tokens),
        load_s=speed.load_s,
    )


class PlannedStudy(NamedTuple):
    """A study's sizes, what they will take, and what is said about them."""

    plan: StudyPlan
    forecast: Forecast | None  # None: the speed is not known
    eval_rows: tuple[int, ...]  # selection rows evaluated at each rung
    notes: tuple[str, ...]


def plan_and_forecast(
    spec: StudySpec,
    sizes: SplitSizes,
    *,
    num_anchors: int,
    gradient_checkpointing: bool,
    speed: StudySpeed | None,
    num_devices: int = 1,
) -> PlannedStudy:
    """Return the plan of a study and its forecast; a budget in hours decides how many trials there are.

    Args:
        spec: The study.
        sizes: Rows of the splits.
        num_anchors: Known configurations that the search begins with.
        gradient_checkpointing: As the packs train.
        speed: Of the packs; None when it is not known, and then a budget decides nothing yet.
        num_devices: GPUs that train at the same time.
    """
    costs = RungCosts(
        rungs=study_rungs(spec, sizes.train),
        cooldown_ratio=spec.train.cooldown_ratio,
        effective_batch_size=spec.train.effective_batch_size,
        gradient_checkpointing=gradient_checkpointing,
    )
    eval_rows = costs.eval_rows(sizes.selection, whole_at_last=spec.data.selection_rows is not None)
    hours = budget_hours(spec, num_devices=num_devices)
    refit = 0
    if spec.select.refit == "all-rows":
        refit = refit_steps(spec, costs.rungs[-1], sizes)

    def forecast_of(plan: StudyPlan) -> Forecast | None:
        if speed is None:
            return None
        return forecast_study(plan, costs, eval_rows=eval_rows, speed=speed, refit=refit)

    def within_budget(plan: StudyPlan) -> bool:
        forecast = forecast_of(plan)
        return forecast is None or hours is None or forecast.total_s <= 3600 * hours

    known = hours is not None and speed is not None
    plan = plan_study(
        spec, sizes, num_anchors=num_anchors, within_budget=within_budget if known else None
    )
    notes = [*plan.notes, *costs.notes(eval_rows, sizes.selection)]
    is_open = hours is not None and speed is None and spec.search.trials == "auto"
    if is_open and not plan.anchors_only:
        notes.append(
            f"search.trials is auto: {FEWEST_TRIALS} to {MOST_TRIALS} trials, as many as the budget pays "
            f"for at the speed that is measured when the study begins; {plan.num_trials} are shown here."
        )
    if refit:
        notes.append(
            f"select.refit: one more run of up to {refit} steps on all rows follows the confirmation."
        )
    return PlannedStudy(plan, forecast_of(plan), eval_rows, tuple(notes))


def measured_speed(
    plan: LanePlan, *, row_tokens: float, confirmed_in_float32: bool, load_s: float
) -> StudySpeed | None:
    """Return the speed that the probe's readings show, of all devices together; None without any.

    Of the readings of one number of lanes that one counts whose rows a pass are nearest to the plan's.

    Args:
        plan: With its readings.
        row_tokens: Mean tokens of a row.
        confirmed_in_float32: Whether the confirmation is evaluated in float32.
        load_s: Seconds until the first trial.
    """
    taken = [reading for reading in plan.probe_readings if not reading.out_of_memory]
    own = [reading for reading in taken if reading.compute_dtype == plan.compute_dtype]
    if not own:
        return None
    own.sort(key=lambda reading: -abs(reading.micro_batch_size - plan.micro_batch_size))
    nearest = {reading.lanes: reading.tokens_per_s for reading in own}  # the last of each stays
    devices = plan.num_devices
    readings = {lanes * devices: speed * devices for lanes, speed in nearest.items()}
    if 1 in nearest:
        readings |= {1: nearest[1]}  # a run alone has one device
    return StudySpeed(
        readings=tuple(sorted(readings.items())),
        lanes=plan.lanes * devices,
        row_tokens=row_tokens,
        measured=True,
        confirmation_slowdown=_float32_slowdown(plan, taken) if confirmed_in_float32 else 1.0,
        load_s=load_s,
    )


def _float32_slowdown(plan: LanePlan, readings: Sequence[ProbeReading]) -> float:
    """Return how much longer float32 takes than the type of training, by readings of the same rows."""
    if plan.compute_dtype == "float32":
        return 1.0
    of_type = {(r.compute_dtype, r.lanes, r.micro_batch_size): r.tokens_per_s for r in readings}
    for (dtype, lanes, rows), tokens_per_s in of_type.items():
        wide = of_type.get(("float32", lanes, rows))
        if dtype == plan.compute_dtype and wide is not None:
            return tokens_per_s / wide
    return FLOAT32_SLOWDOWN


class StudyTokens(NamedTuple):
    """Optimizer steps and tokens of all trials together, and how they were counted."""

    steps: int
    tokens: int
    note: str


def study_tokens(spec: StudySpec, *, num_train_rows: int | None = None) -> StudyTokens:
    """Return an upper bound of the tokens that a study's trials train, from its file alone.

    Every row is counted as ``data.max_length`` tokens and every trial of a rung as trained to its end.
    Evaluation and confirmation are not counted.

    Args:
        spec: The study; ``search.trials = "auto"`` counts as 24, with a budget as 64.
        num_train_rows: Rows of the training split; needed when the study gives epochs.

    Raises:
        StudyFileError: The study gives epochs and the number of rows is not known.
    """
    if num_train_rows is None and spec.train.max_steps is None:
        raise StudyFileError(
            "train.max_steps is not set, so the length of the study depends on the number of rows. Set "
            "train.max_steps, or give the tokens with --tokens."
        )
    batch = spec.train.effective_batch_size
    steps = planned_steps(
        study_rungs(spec, num_train_rows or 0),
        cooldown_ratio=spec.train.cooldown_ratio,
        num_trials=most_trials(spec),
    )
    note = (
        f"upper bound: {steps} optimizer steps of all trials, {batch} rows each, every row "
        f"{spec.data.max_length} tokens (data.max_length); evaluation and confirmation not counted"
    )
    return StudyTokens(steps, steps * batch * spec.data.max_length, note)
