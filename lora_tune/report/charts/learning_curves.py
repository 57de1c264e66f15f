"""Training loss over steps, trial by trial, with the evaluations at the rungs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from math import isfinite
from statistics import median

import altair as alt

from lora_tune.records import StudySnapshot, TrialRecord, TrialState
from lora_tune.report import formatting as fmt
from lora_tune.report.charts.chart import GREY, ReportChart, Row, layer, report_chart
from lora_tune.report.charts.values import (
    LOSS,
    TRIAL_TOOLTIP,
    leader,
    leader_word,
    loss_ceiling,
    own_trials,
    rounded,
    sentence_case,
    trial_row,
)
from lora_tune.report.ranking import has_result, ranked

NAME = "learning-curves"
MOST_TRIALS = 40
MOST_POINTS = 50
"""Of the longest curve: the means of so many stretches of steps, which takes out some of the noise too.
The stretches of shorter curves are as long, so that all are as smooth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A trial's training loss: (step, nats per target token), the steps rising."""

    trial: TrialRecord
    first_loss: float  # of the first step alone
    last_step: int
    points: tuple[tuple[float, float], ...]


def learning_curves_chart(snapshot: StudySnapshot) -> ReportChart | None:
    """Return the chart, None when no trial left training points."""
    best = leader(snapshot)
    order = [t for t in ranked(own_trials(snapshot)) if has_result(t)]
    if best in order:
        order = [best, *(t for t in order if t is not best)]
    size = -(-max(snapshot.lock.rungs, default=1) // MOST_POINTS)
    made = (thinned_curve(trial, size=size) for trial in order)
    curves = list(islice((curve for curve in made if curve is not None), MOST_TRIALS))
    if not curves:
        return None
    first = curves[0]
    front = first.trial is best
    behind = curves[1:] if front else curves
    steps = [rung for rung in snapshot.lock.rungs if any(c.trial.steps >= rung for c in curves)]
    losses = [loss for curve in curves for _, loss in curve.points]
    starts = [curve.points[0][1] for curve in curves]
    top = max(loss_ceiling(losses), median(starts), *(loss for _, loss in first.points))
    rows: dict[str, list[Row]] = {
        "behind": [row for curve in behind for row in _point_rows(curve)],
        "front": _point_rows(first) if front else [],
        "trials": [trial_row(curve.trial) for curve in curves],
        "evaluations": [row for c in behind for row in _eval_rows(c.trial, top)],
        "front_evaluations": _eval_rows(first.trial, top) if front else [],
        "rungs": [{"x": rung} for rung in steps],
    }
    return report_chart(
        _layers(top),
        name=NAME,
        title=_title(snapshot, first, [t for t in order if t.rungs], front=front),
        text=_text(curves),
        caption=_caption(snapshot, curves, total=len(order), front=front),
        rows=rows,
        zoom="front",
    )


def thinned_curve(trial: TrialRecord, *, size: int) -> Curve | None:
    """Return a trial's curve over all rungs, a point for every ``size`` steps; None without points.

    A rung ends in a branch that cools down; the next rung goes on from before it. Where both have a
    step the later rung counts, so the curve is that of the longest training.
    """
    by_step: dict[int, float] = {}
    for result in trial.rungs:
        points = [point for point in result.points if isfinite(point.train_loss)]
        if points:
            by_step = {s: loss for s, loss in by_step.items() if s < points[0].step}
            by_step.update((point.step, point.train_loss) for point in points)
    if not by_step:
        return None
    steps = sorted(by_step)
    stretches = groupby(steps, key=lambda step: (step - steps[0]) // size)
    parts = [list(part) for _, part in stretches]
    means = tuple((sum(p) / len(p), sum(by_step[s] for s in p) / len(p)) for p in parts)
    return Curve(trial=trial, first_loss=by_step[steps[0]], last_step=steps[-1], points=means)


def _point_rows(curve: Curve) -> list[Row]:
    number = f"trial {curve.trial.number}"
    return [{"t": number, "x": rounded(step), "y": rounded(loss)} for step, loss in curve.points]


def _eval_rows(trial: TrialRecord, top: float) -> list[Row]:
    return [
        {
            **trial_row(trial),
            "x": result.steps,
            "y": rounded(min(result.eval_loss, top)),
            "l": rounded(result.eval_loss),
            "g": f"rung {result.rung}",
        }
        for result in trial.rungs
        if isfinite(result.eval_loss)
    ]


def _layers(top: float) -> list[alt.Chart]:
    x = alt.X("x:Q", title="optimizer steps", scale=alt.Scale(nice=False, padding=6))
    y = alt.Y(
        "y:Q",
        title=f"loss ({LOSS})",
        scale=alt.Scale(zero=False, nice=False, domainMax=rounded(top), padding=10),
    )
    hover = alt.selection_point(
        name="hover", on="pointerover", clear="pointerout", fields=["t"], empty=False
    )
    settings = alt.LookupData(
        data=alt.NamedData(name="trials"), key="t", fields=["s", "r", "a", "d", "m", "lr"]
    )
    tooltip = list(TRIAL_TOOLTIP)  # a line has one tooltip, so no loss of a single step
    evaluation = [
        *TRIAL_TOOLTIP,
        alt.Tooltip("g:N", title="evaluated at"),
        alt.Tooltip("x:Q", title="step"),
        alt.Tooltip("l:Q", title="loss on selection rows", format=".4~g"),
    ]
    accent = alt.value("#d55e00")
    behind = layer("behind").transform_lookup(lookup="t", from_=settings)
    front = layer("front").transform_lookup(lookup="t", from_=settings)
    return [
        layer("rungs").mark_rule(strokeDash=[2, 4], color=GREY, opacity=0.7).encode(x="x:Q"),
        behind.mark_line(color=GREY, clip=True).encode(
            x=x,
            y=y,
            detail="t:N",
            opacity=alt.condition(hover, alt.value(1), alt.value(0.35)),
            strokeWidth=alt.condition(hover, alt.value(3), alt.value(1.3)),
            tooltip=tooltip,
        ),
        layer("evaluations")
        .mark_point(filled=True, size=30, color=GREY, opacity=0.55)
        .encode(x=x, y=y, tooltip=evaluation)
        .add_params(hover),
        front.mark_line(strokeWidth=2.6).encode(x=x, y=y, color=accent, tooltip=tooltip),
        layer("front_evaluations")
        .mark_point(filled=True, size=110, shape="diamond", opacity=1)
        .encode(x=x, y=y, color=accent, tooltip=evaluation),
    ]


def _title(
    snapshot: StudySnapshot, first: Curve, trials: Sequence[TrialRecord], *, front: bool
) -> str:
    if not front:
        return f"Training loss of {fmt.plural(len(trials), 'trial')} over their steps."
    trial = first.trial
    start, end = first.first_loss, first.points[-1][1]
    text = (
        f"{sentence_case(leader_word(snapshot))}: trial {trial.number}, whose training loss went from "
        f"{fmt.format_loss(start)} to {fmt.format_loss(end)} in {fmt.plural(first.last_step, 'step')}"
    )
    stopped = sum(t.state is TrialState.PRUNED for t in trials)
    if not stopped:
        return f"{text}."
    return f"{text}; {stopped} of {fmt.plural(len(trials), 'trial')} were stopped earlier."


def _text(curves: Sequence[Curve]) -> str:
    items = []
    for curve in curves[:5]:
        evaluations = ", ".join(
            f"{fmt.format_loss(r.eval_loss)} after {r.steps}" for r in curve.trial.rungs
        )
        items.append(f"trial {curve.trial.number}: {evaluations}")
    return f"Losses on selection rows after so many steps, best trials first. {'; '.join(items)}."


def _caption(snapshot: StudySnapshot, curves: Sequence[Curve], *, total: int, front: bool) -> str:
    text = (
        "Lines: training loss, the mean of neighbouring steps. Marks: loss on the selection rows at the end "
        "of a rung (dotted), after the learning rate was brought down; a trial that goes on does so from "
        "before that."
    )
    if front:
        text += f" In colour: the {leader_word(snapshot)} trial."
    if total > len(curves):
        text += f" Shown are the best {len(curves)} of {total}."
    return text
