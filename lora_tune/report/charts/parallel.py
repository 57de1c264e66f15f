"""Parallel coordinates: every trial as a line through its settings to its loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log10

import altair as alt

from lora_tune.records import RungResult, StudySnapshot, TrialConfig, TrialRecord
from lora_tune.report import formatting as fmt
from lora_tune.report.charts.chart import GREY, ReportChart, Row, layer, report_chart
from lora_tune.report.charts.learning_rate import EFFECTIVE_STEP, LEARNING_RATE, Axis
from lora_tune.report.charts.theme import HALO
from lora_tune.report.charts.values import (
    TRIAL_TOOLTIP,
    between,
    clean,
    diverged_first,
    first_results,
    first_steps,
    leader,
    leader_word,
    listed,
    loss_ceiling,
    rounded,
    set_name,
    set_names,
    trial_row,
)

NAME = "parallel"
_LEAST_TRIALS = 3
_MOST_BEST = 10
_MOST_LINES = 200
_DIVERGED = 1.06  # place on the axis of losses, above all finite ones
_MANY = 60  # trials, from which on lines are thinner
_TICKS = 4  # of an axis of numbers
_LOSS = "loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One vertical axis: where a trial's value stands on it, from 0 to 1, and its ticks."""

    title: str
    place: Callable[[TrialConfig], float]
    ticks: tuple[tuple[float, str], ...]


def parallel_chart(snapshot: StudySnapshot) -> ReportChart | None:
    """Return the chart, None with fewer than three trials that have a loss."""
    results = first_results(snapshot)
    if len(results) < _LEAST_TRIALS:
        return None
    diverged = diverged_first(snapshot)
    losses = sorted(result.eval_loss for _, result in results)
    low, high = losses[0], loss_ceiling(losses)
    dimensions = _dimensions([t for t, _ in results], diverged)
    span = (high - low) or 1.0
    best = leader(snapshot)
    shown = sorted(results, key=_loss_of)[:_MOST_LINES]
    order = {t.number: i for i, (t, _) in enumerate(shown)}
    rows = [
        {
            **_row(t, dimensions, (min(r.eval_loss, high) - low) / span),
            "l": rounded(r.eval_loss),
            "c": rounded(order[t.number] / (len(order) - 1)),
        }
        for t, r in shown
    ]
    axes = [dimension.title for dimension in dimensions] + [_LOSS]
    ticks = [
        {"k": d.title, "p": rounded(place), "v": text}
        for d in dimensions
        for place, text in d.ticks
    ]
    ticks += [
        {"k": _LOSS, "p": rounded(i / _TICKS), "v": fmt.format_loss(low + span * i / _TICKS)}
        for i in range(_TICKS + 1)
    ]
    if diverged:
        ticks.append({"k": _LOSS, "p": _DIVERGED, "v": "diverged"})
    return report_chart(
        _layers(axes, num_trials=len(shown)),
        name=NAME,
        title=_title(snapshot, results),
        text=_text(results),
        caption=_caption(
            snapshot, shown=len(shown), total=len(results), has_diverged=bool(diverged)
        ),
        rows={
            "trials": sorted(rows, key=lambda row: -float(str(row["c"]))),  # the best on top
            "diverged": [_row(t, dimensions, _DIVERGED) for t in diverged[:_MOST_LINES]],
            "chosen": [
                row for row in rows if best is not None and row["t"] == f"trial {best.number}"
            ],
            "ticks": ticks,
            "axes": [{"k": axis, "p": 0, "q": 1} for axis in axes],
        },
        height=360,
    )


def _row(trial: TrialRecord, dimensions: Sequence[Dimension], loss: float) -> Row:
    places = [*(dimension.place(trial.config) for dimension in dimensions), loss]
    return {**trial_row(trial), **{f"p{i}": round(place, 4) for i, place in enumerate(places)}}


def _loss_of(pair: tuple[TrialRecord, RungResult]) -> tuple[float, int]:
    return pair[1].eval_loss, pair[0].number


def _dimensions(trained: Sequence[TrialRecord], diverged: Sequence[TrialRecord]) -> list[Dimension]:
    """Return the axes of the settings; one that does not vary stays, so that its value is seen."""
    trials = [*trained, *diverged]
    configs = [trial.config for trial in trials]
    sets = set_names(trials)
    return [
        _choices("rank", lambda c: c.rank, configs, lambda v: str(int(v))),
        _choices("alpha ratio", _ratio, configs, fmt.format_plain),
        _choices("dropout", lambda c: c.lora_dropout, configs, fmt.format_plain),
        Dimension(
            title="targets",
            place=lambda c: _spread(sets.index(set_name(c)), len(sets)),
            ticks=tuple((_spread(i, len(sets)), clean(name, 13)) for i, name in enumerate(sets)),
        ),
        _logarithmic(_rate_axis([trial.config for trial in trained]), configs),
    ]


def _rate_axis(configs: Sequence[TrialConfig]) -> Axis:
    """Return the learning rate; the effective step where trials differ in lora_alpha."""
    return EFFECTIVE_STEP if len({config.lora_alpha for config in configs}) > 1 else LEARNING_RATE


def _ratio(config: TrialConfig) -> float:
    return float(f"{config.lora_alpha / config.rank:.6g}")


def _spread(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 0.5


def _choices(
    title: str,
    value: Callable[[TrialConfig], float],
    configs: Sequence[TrialConfig],
    text: Callable[[float], str],
) -> Dimension:
    """Return an axis on which the values that occur stand at equal distances."""
    values = sorted({value(config) for config in configs})
    places = {v: _spread(i, len(values)) for i, v in enumerate(values)}
    step = -(-len(values) // 12)  # of many values not every one gets its text
    return Dimension(
        title=title,
        place=lambda config: places[value(config)],
        ticks=tuple((places[v], text(v)) for v in values[::step]),
    )


def _logarithmic(axis: Axis, configs: Sequence[TrialConfig]) -> Dimension:
    logs = [log10(axis.of(config)) for config in configs]
    low, span = min(logs), max(logs) - min(logs)
    shares = [i / _TICKS for i in range(_TICKS + 1)] if span > 0 else [0.5]
    return Dimension(
        title=axis.name,
        place=lambda config: (log10(axis.of(config)) - low) / span if span > 0 else 0.5,
        ticks=tuple(
            (share, fmt.format_scientific(float(f"{10 ** (low + span * share):.1e}")))
            for share in shares
        ),
    )


def _layers(axes: Sequence[str], *, num_trials: int) -> list[alt.Chart]:
    x = alt.X(
        "k:N",
        sort=list(axes),
        title=None,
        scale=alt.Scale(type="point", padding=0.35),
        axis=alt.Axis(
            orient="top",
            labelAngle=0,
            labelPadding=12,
            labelLimit=90,
            labelOverlap=False,
            labelExpr="split(datum.label, ' ')",
            domain=False,
            ticks=False,
            grid=False,
        ),
    )
    y = alt.Y("p:Q", axis=None, scale=alt.Scale(domain=[0, _DIVERGED], nice=False))
    hover = alt.selection_point(
        name="hover", on="pointerover", clear="pointerout", fields=["t"], empty=False
    )
    tooltip = [*TRIAL_TOOLTIP, alt.Tooltip("l:Q", title="loss at the first rung", format=".4~g")]

    def lines(rows: str) -> alt.Chart:
        keys = [f"p{i}" for i in range(len(axes))]
        names = "{" + ", ".join(f"p{i}: '{axis}'" for i, axis in enumerate(axes)) + "}"
        folded = layer(rows).transform_fold(keys, as_=["i", "p"])
        return folded.transform_calculate(k=f"{names}[datum.i]")

    color = alt.Color("c:Q", scale=alt.Scale(domain=[0, 1], range="ramp"), legend=None)
    dense = num_trials > _MANY
    return [
        layer("axes").mark_rule(color=GREY).encode(x=x, y=y, y2="q:Q"),
        lines("diverged")
        .mark_line(strokeDash=[3, 3], color=GREY, strokeWidth=1, opacity=0.5)
        .encode(x=x, y=y, detail="t:N", tooltip=list(TRIAL_TOOLTIP)),
        lines("trials")
        .mark_line()
        .encode(
            x=x,
            y=y,
            detail="t:N",
            color=color,
            opacity=alt.condition(hover, alt.value(1), alt.value(0.4 if dense else 0.7)),
            strokeWidth=alt.condition(hover, alt.value(3.5), alt.value(1 if dense else 1.5)),
            tooltip=tooltip,
        ),
        lines("chosen")
        .mark_line(strokeWidth=3.2, point=alt.OverlayMarkDef(size=60, color="#d55e00", filled=True))
        .encode(x=x, y=y, detail="t:N", color=alt.value("#d55e00"), tooltip=tooltip),
        layer("trials")  # a mark is easier to point at than a line
        .transform_calculate(k=f"'{_LOSS}'", p=f"datum.p{len(axes) - 1}")
        .mark_point(filled=True, size=36, opacity=0.9)
        .encode(x=x, y=y, color=color, tooltip=tooltip)
        .add_params(hover),
        *(
            layer("ticks")
            .mark_text(align="left", dx=5, fontSize=11, **style)
            .encode(x=x, y=y, text="v:N")
            for style in ({"style": HALO}, {})
        ),
    ]


def _best(results: Sequence[tuple[TrialRecord, RungResult]]) -> list[TrialRecord]:
    """Return the best fifth at the first rung: three trials at least, ten at most."""
    ordered = sorted(results, key=_loss_of)
    return [t for t, _ in ordered[: max(_LEAST_TRIALS, min(_MOST_BEST, len(ordered) // 5))]]


def _title(snapshot: StudySnapshot, results: Sequence[tuple[TrialRecord, RungResult]]) -> str:
    best = [trial.config for trial in _best(results)]
    rate = _rate_axis([trial.config for trial, _ in results])
    where = f"of {fmt.plural(len(results), 'trial')} at {first_steps(snapshot)}"
    return (
        f"The {len(best)} best {where} have rank {between([c.rank for c in best], str)}, "
        f"{rate.name} {between([rate.of(c) for c in best], fmt.format_scientific)} and target "
        f"modules {_sets(best)}."
    )


def _sets(configs: Sequence[TrialConfig]) -> str:
    counts: dict[str, int] = {}
    for config in configs:
        name = set_name(config)
        counts[name] = counts.get(name, 0) + 1
    names = sorted(counts, key=lambda name: (-counts[name], name))
    return names[0] if len(names) == 1 else listed([f"{name} ({counts[name]})" for name in names])


def _text(results: Sequence[tuple[TrialRecord, RungResult]]) -> str:
    losses = {trial.number: result.eval_loss for trial, result in results}
    items = [
        f"trial {t.number}: rank {t.config.rank}, ratio {fmt.format_plain(_ratio(t.config))}, dropout "
        f"{fmt.format_plain(t.config.lora_dropout)}, {set_name(t.config)}, learning rate "
        f"{fmt.format_scientific(t.config.learning_rate)}, loss {fmt.format_loss(losses[t.number])}"
        for t in _best(results)[:5]
    ]
    return f"The best at the first rung: {'; '.join(items)}."


def _caption(snapshot: StudySnapshot, *, shown: int, total: int, has_diverged: bool) -> str:
    text = (
        f"Each line is a trial: its settings, and on the right its loss at {first_steps(snapshot)} in nats "
        f"per target token. Low losses have the strong colour; the {leader_word(snapshot)} trial is the "
        "thick line. Rank, ratio, dropout and target modules stand in their order, at equal distances."
    )
    if has_diverged:
        text += " Dashed lines diverged at the first rung."
    return f"{text} Shown are the best {shown} of {total}." if shown < total else text
