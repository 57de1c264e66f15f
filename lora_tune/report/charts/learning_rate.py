"""Loss at the first rung against the learning rate, and where training diverges.

Where trials differ in lora_alpha, what moves the weights is the effective step, learning rate times
lora_alpha / 32. The axis is the learning rate unless the effective step tells better which trials diverge.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, log10
from statistics import median

import altair as alt

from lora_tune.records import RungResult, StudySnapshot, TrialConfig, TrialRecord, TrialState
from lora_tune.report import formatting as fmt
from lora_tune.report.charts.chart import GREY, ReportChart, Row, layer, report_chart
from lora_tune.report.charts.values import (
    LOSS,
    TRIAL_TOOLTIP,
    between,
    clean,
    diverged_first,
    first_results,
    first_steps,
    leader,
    leader_word,
    legend,
    loss_ceiling,
    own_trials,
    rounded,
    set_name,
    set_names,
    trial_row,
)
from lora_tune.report.ranking import effective_step

NAME = "learning-rate"
_BINS_A_DECADE = 6
_LEAST_FOR_MEDIANS = 16  # trials; below it every trial is seen well enough by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What is drawn from left to right."""

    name: str
    title: str
    of: Callable[[TrialConfig], float]


LEARNING_RATE = Axis(
    name="learning rate", title="learning rate", of=lambda config: config.learning_rate
)
EFFECTIVE_STEP = Axis(
    name="effective step",
    title="effective step: learning rate x lora_alpha / 32",
    of=effective_step,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceEdge:
    """Where training diverges, on one axis; None where there is no such trial."""

    lowest_diverged: float | None
    highest_trained: float | None

    @property
    def is_sharp(self) -> bool:
        """Whether all that diverged had a higher rate than all that trained."""
        return (
            self.lowest_diverged is not None
            and self.highest_trained is not None
            and self.highest_trained < self.lowest_diverged
        )


def learning_rate_chart(snapshot: StudySnapshot) -> ReportChart | None:
    """Return the chart, None when no trial trained or diverged."""
    results = first_results(snapshot)
    diverged = diverged_first(snapshot)
    if not results and not diverged:
        return None
    top = loss_ceiling([result.eval_loss for _, result in results]) if results else 1.0
    bottom = min((result.eval_loss for _, result in results), default=0.0)
    edge_loss = top + 0.08 * ((top - bottom) or abs(top))  # a line of its own above the losses
    groups = _groups([trial for trial, _ in results] + diverged)
    chosen = leader(snapshot)
    axis = clearer_axis([t for t, _ in results], diverged)
    edge = divergence_edge([t for t, _ in results], diverged, axis)
    rows = {
        "trials": [_row(t, r.eval_loss, groups, axis, top) for t, r in results],
        "diverged": [_diverged_row(t, groups, axis, edge_loss) for t in diverged],
        "medians": _median_rows(results, axis, top),
        "edge": _edge_rows(edge),
        # on the side that has room: a sharp edge lies to the right of all that trained
        "edge_left": _edge_rows(edge) if edge.is_sharp else [],
        "edge_right": [] if edge.is_sharp else _edge_rows(edge),
        "chosen": [
            _row(t, r.eval_loss, groups, axis, top)
            for t, r in results
            if chosen is not None and t.number == chosen.number
        ],
    }
    return report_chart(
        _layers(groups, axis, has_results=bool(results)),
        name=NAME,
        title=_title(snapshot, results, edge, axis, num_diverged=len(diverged)),
        text=_text(results, edge, axis, num_diverged=len(diverged)),
        caption=_caption(
            snapshot,
            groups,
            axis,
            diverged=bool(diverged),
            num_later=sum(t.state is TrialState.DIVERGED for t, _ in results),
            medians=bool(rows["medians"]),
        ),
        rows=rows,
        zoom="trials",
    )


def divergence_edge(
    trained: Sequence[TrialRecord], diverged: Sequence[TrialRecord], axis: Axis = LEARNING_RATE
) -> DivergenceEdge:
    """Return the smallest value that diverged and the largest that did not."""
    return DivergenceEdge(
        lowest_diverged=min((axis.of(t.config) for t in diverged), default=None),
        highest_trained=max((axis.of(t.config) for t in trained), default=None),
    )


def clearer_axis(trained: Sequence[TrialRecord], diverged: Sequence[TrialRecord]) -> Axis:
    """Return the axis on which fewer pairs of a diverged and a trained trial stand the wrong way round."""
    return min((LEARNING_RATE, EFFECTIVE_STEP), key=lambda axis: _disorder(trained, diverged, axis))


def _disorder(trained: Sequence[TrialRecord], diverged: Sequence[TrialRecord], axis: Axis) -> int:
    ordered = sorted(axis.of(t.config) for t in trained)
    return sum(len(ordered) - bisect_right(ordered, axis.of(t.config)) for t in diverged)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """What the colours stand for: the target sets, or the ranks of a study with one target set."""

    by_rank: bool
    names: tuple[str, ...]

    def of(self, trial: TrialRecord) -> str:
        config = trial.config
        return f"rank {config.rank}" if self.by_rank else set_name(config)


def _groups(trials: Sequence[TrialRecord]) -> _Groups:
    sets = set_names(trials)
    if len(sets) > 1:
        return _Groups(by_rank=False, names=tuple(sets))
    ranks = sorted({t.config.rank for t in trials})
    return _Groups(by_rank=True, names=tuple(f"rank {rank}" for rank in ranks))


def _row(trial: TrialRecord, loss: float, groups: _Groups, axis: Axis, top: float) -> Row:
    return {
        **_place(trial, axis),
        "g": groups.of(trial),
        "y": rounded(min(loss, top)),
        "l": rounded(loss),
    }


def _place(trial: TrialRecord, axis: Axis) -> Row:
    return {
        **trial_row(trial),
        "x": rounded(axis.of(trial.config)),
        "u": rounded(effective_step(trial.config)),
    }


def _diverged_row(trial: TrialRecord, groups: _Groups, axis: Axis, place: float) -> Row:
    return {
        **_place(trial, axis),
        "g": groups.of(trial),
        "y": rounded(place),
        "w": clean(trial.reason, 80),
    }


def _median_rows(
    results: Sequence[tuple[TrialRecord, RungResult]], axis: Axis, top: float
) -> list[Row]:
    """Return the median loss of the trials that are neighbours on the axis; nothing when they are few."""
    if len(results) < _LEAST_FOR_MEDIANS:
        return []
    bins: dict[int, list[tuple[float, float]]] = {}
    for trial, result in results:
        rate = axis.of(trial.config)
        bins.setdefault(floor(log10(rate) * _BINS_A_DECADE), []).append((rate, result.eval_loss))
    found: list[Row] = []
    for _, pairs in sorted(bins.items()):
        if len(pairs) >= 3:
            rate, loss = (median(column) for column in zip(*pairs, strict=True))
            found.append({"x": rounded(rate), "y": rounded(min(loss, top)), "n": len(pairs)})
    return found if len(found) >= 3 else []


def _edge_rows(edge: DivergenceEdge) -> list[Row]:
    if edge.lowest_diverged is None:
        return []
    text = f"diverges from {fmt.format_scientific(edge.lowest_diverged)}"
    return [{"x": rounded(edge.lowest_diverged), "t": text}]


def _layers(groups: _Groups, axis: Axis, *, has_results: bool) -> list[alt.Chart]:
    x = alt.X(
        "x:Q",
        title=axis.title,
        scale=alt.Scale(type="log", nice=False, padding=20),
        axis=alt.Axis(format=".1~e", tickCount=6, labelFlush=True),
    )
    y = alt.Y(
        "y:Q",
        title=f"loss at the first rung ({LOSS})",
        scale=alt.Scale(zero=False, nice=False, padding=12),
        axis=alt.Axis() if has_results else None,
    )
    key = legend(groups.names, "rank" if groups.by_rank else "target modules")
    color = alt.Color("g:N", scale=alt.Scale(domain=list(groups.names)), legend=key)
    shape = alt.Shape("g:N", scale=alt.Scale(domain=list(groups.names)), legend=key)
    tooltip = [*TRIAL_TOOLTIP, alt.Tooltip("u:Q", title="effective step", format=".2~e")]
    trained = [*tooltip, alt.Tooltip("l:Q", title="loss", format=".4~g")]
    return [
        layer("edge").mark_rule(strokeDash=[6, 4], color=GREY, strokeWidth=1.5).encode(x=x),
        *(
            layer(rows)
            .mark_text(align=align, baseline="bottom", dx=dx, y="height", dy=-4)
            .encode(x=x, text="t:N")
            for rows, align, dx in (("edge_right", "left", 6), ("edge_left", "right", -6))
        ),
        layer("medians").mark_line(color=GREY, strokeWidth=2, opacity=0.8).encode(x=x, y=y),
        layer("trials")
        .mark_point(filled=True, size=55, opacity=0.75)
        .encode(x=x, y=y, color=color, shape=shape, tooltip=trained),
        layer("diverged")
        .mark_text(text="\u00d7", fontSize=20, baseline="middle")
        .encode(
            x=x, y=y, color=color, tooltip=[*tooltip, alt.Tooltip("w:N", title="why it ended")]
        ),
        layer("chosen")
        .mark_point(filled=False, size=330, strokeWidth=2.2, shape="circle", opacity=1)
        .encode(x=x, y=y, color=color, tooltip=trained),
        layer("chosen").mark_text(baseline="bottom", dy=-13).encode(x=x, y=y, text="t:N"),
    ]


def _title(
    snapshot: StudySnapshot,
    results: Sequence[tuple[TrialRecord, RungResult]],
    edge: DivergenceEdge,
    axis: Axis,
    *,
    num_diverged: int,
) -> str:
    rate = fmt.format_scientific
    if edge.highest_trained is None:
        assert edge.lowest_diverged is not None
        num_trials = len(own_trials(snapshot))
        every = (
            "All"
            if num_diverged == num_trials
            else f"No trial reached the first rung: {num_diverged}"
        )
        return (
            f"{every} of {fmt.plural(num_trials, 'trial')} diverged, at {_article(axis)} of "
            f"{rate(edge.lowest_diverged)} and above."
        )
    best = min(results, key=lambda pair: pair[1].eval_loss)[0]
    text = (
        f"At {first_steps(snapshot)} the lowest loss is at {_article(axis)} of "
        f"{rate(axis.of(best.config))}"
    )
    if edge.lowest_diverged is None:
        return f"{text}; no trial diverged there up to {rate(edge.highest_trained)}."
    if edge.is_sharp:
        return f"{text}; trials diverge from {rate(edge.lowest_diverged)} on."
    return (
        f"{text}; some trials diverge from {rate(edge.lowest_diverged)} on, others train up to "
        f"{rate(edge.highest_trained)}."
    )


def _article(axis: Axis) -> str:
    return f"{'an' if axis is EFFECTIVE_STEP else 'a'} {axis.name}"


def _text(
    results: Sequence[tuple[TrialRecord, RungResult]],
    edge: DivergenceEdge,
    axis: Axis,
    *,
    num_diverged: int,
) -> str:
    rate = fmt.format_scientific
    parts = []
    if results:
        ordered = sorted(results, key=lambda pair: pair[1].eval_loss)
        best = ", ".join(
            f"trial {t.number} {fmt.format_loss(r.eval_loss)} at {rate(axis.of(t.config))}"
            for t, r in ordered[:3]
        )
        rates = [axis.of(t.config) for t, _ in results]
        parts.append(
            f"{fmt.plural(len(results), 'trial')} with a loss, {axis.name} "
            f"{between(rates, rate)}; lowest losses: {best}; highest: "
            f"{fmt.format_loss(ordered[-1][1].eval_loss)}."
        )
    if edge.lowest_diverged is not None:
        parts.append(
            f"{fmt.plural(num_diverged, 'trial')} diverged, at {rate(edge.lowest_diverged)} and above."
        )
    return " ".join(parts) or "No trial has a loss."


def _caption(
    snapshot: StudySnapshot,
    groups: _Groups,
    axis: Axis,
    *,
    diverged: bool,
    num_later: int,
    medians: bool,
) -> str:
    what = "rank" if groups.by_rank else "target modules"
    text = (
        f"Each mark is a trial at {first_steps(snapshot)}, the only one that all trials reach; colour "
        f"and shape are its {what}. The circle marks the {leader_word(snapshot)} trial."
    )
    if medians:
        text += " The line is the median of neighbouring trials."
    if diverged:
        text += (
            " Crosses at the top are trials that diverged before its end; the dashed line is at the "
            f"lowest {axis.name} of them."
        )
    if axis is EFFECTIVE_STEP:
        text += (
            " The axis is the effective step, learning rate times lora_alpha / 32: of the two it tells "
            "better which trials diverge. At lora_alpha 32 it is the learning rate."
        )
    if num_later:
        text += f" {fmt.plural(num_later, 'trial')} among the marks diverged at a later rung."
    return text
