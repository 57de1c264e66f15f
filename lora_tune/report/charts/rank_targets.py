"""What rank and target set do to the loss at the first rung: every trial, and medians."""

from collections.abc import Callable, Sequence
from statistics import median

import altair as alt

from lora_tune.records import RungResult, StudySnapshot, TrialRecord
from lora_tune.report import formatting as fmt
from lora_tune.report.charts.chart import GREY, ReportChart, Row, layer, report_chart
from lora_tune.report.charts.values import (
    LOSS,
    TRIAL_TOOLTIP,
    first_results,
    first_steps,
    legend,
    loss_ceiling,
    rounded,
    set_name,
    set_names,
    trial_row,
)

NAME = "rank-targets"
_LEAST = 2  # trials of a group, before its median is worth a claim
Results = Sequence[tuple[TrialRecord, RungResult]]


def rank_targets_chart(snapshot: StudySnapshot) -> ReportChart | None:
    """Return the chart, None where neither rank nor target set varies among the results."""
    results = first_results(snapshot)
    ranks = sorted({t.config.rank for t, _ in results})
    sets = set_names([t for t, _ in results])
    if len(ranks) < 2 and len(sets) < 2:
        return None
    top = loss_ceiling([r.eval_loss for _, r in results])
    by_rank = _medians(results, lambda t: str(t.config.rank))
    by_set = _medians(results, lambda t: set_name(t.config))
    shown, across = (by_rank, "r") if len(ranks) > 1 else (by_set, "m")
    rows: dict[str, list[Row]] = {
        "trials": [
            {**trial_row(t), "y": rounded(min(r.eval_loss, top)), "l": rounded(r.eval_loss)}
            for t, r in results
        ],
        "medians": [
            {across: int(name) if across == "r" else name, "y": rounded(min(loss, top)), "n": count}
            for name, (loss, count) in shown.items()
        ],
    }
    return report_chart(
        _layers(across, sets),
        name=NAME,
        title=_title(snapshot, by_rank, by_set),
        text=_text(by_rank, by_set),
        caption=_caption(snapshot, across),
        rows=rows,
    )


def _medians(results: Results, key: Callable[[TrialRecord], str]) -> dict[str, tuple[float, int]]:
    """Return the median loss and the number of trials of each group, groups by name."""
    groups: dict[str, list[float]] = {}
    for trial, result in results:
        groups.setdefault(key(trial), []).append(result.eval_loss)
    names = sorted(groups, key=lambda name: (len(name), name) if name.isdecimal() else (0, name))
    return {name: (median(groups[name]), len(groups[name])) for name in names}


def _layers(across: str, sets: list[str]) -> list[alt.Chart]:
    by_rank = across == "r"
    x = alt.X(
        f"{across}:O",
        title="rank" if by_rank else "target modules",
        axis=alt.Axis(labelAngle=0, labelLimit=110, labelOverlap=True),
        sort=None if by_rank else sets,
        scale=alt.Scale(paddingInner=0.25),
    )
    y = alt.Y(
        "y:Q",
        title=f"loss at the first rung ({LOSS})",
        scale=alt.Scale(zero=False, nice=False, padding=12),
    )
    key = legend(sets, "target modules") if len(sets) > 1 and by_rank else None
    color = alt.Color("m:N", scale=alt.Scale(domain=sets), legend=key)
    shape = alt.Shape("m:N", scale=alt.Scale(domain=sets), legend=key)
    points = layer("trials").mark_point(filled=True, size=50, opacity=0.75)
    encoded = points.encode(
        x=x,
        y=y,
        color=color,
        shape=shape,
        tooltip=[*TRIAL_TOOLTIP, alt.Tooltip("l:Q", title="loss", format=".4~g")],
    )
    if by_rank and len(sets) > 1:
        encoded = encoded.encode(xOffset=alt.XOffset("m:N", scale=alt.Scale(domain=sets)))
    tooltip = [
        alt.Tooltip(f"{across}:N", title="rank" if by_rank else "target modules"),
        alt.Tooltip("y:Q", title="median loss", format=".4~g"),
        alt.Tooltip("n:Q", title="trials"),
    ]
    medians = layer("medians").mark_rule(strokeWidth=3, color=GREY)
    ends = {"x": alt.X(f"{across}:O", bandPosition=0), "x2": alt.X2(f"{across}:O", bandPosition=1)}
    return [encoded, medians.encode(**ends, y=y, tooltip=tooltip)]


def _best(groups: dict[str, tuple[float, int]]) -> str | None:
    """Return the group of the lowest median of those with enough trials; None without a choice."""
    enough = {name: loss for name, (loss, count) in groups.items() if count >= _LEAST}
    return min(enough, key=lambda name: enough[name]) if len(enough) > 1 else None


def _title(
    snapshot: StudySnapshot,
    by_rank: dict[str, tuple[float, int]],
    by_set: dict[str, tuple[float, int]],
) -> str:
    rank, target = _best(by_rank), _best(by_set)
    where = f"At {first_steps(snapshot)} the median loss is lowest"
    parts = []
    if rank is not None:
        parts.append(f"at rank {rank} ({fmt.format_loss(by_rank[rank][0])})")
    if target is not None:
        parts.append(f"with target modules {target} ({fmt.format_loss(by_set[target][0])})")
    if parts:
        return f"{where} {' and '.join(parts)}."
    num_trials = sum(count for _, count in by_rank.values())
    return (
        f"Too few trials to compare ranks and target modules: {fmt.plural(num_trials, 'trial')}, "
        f"{fmt.plural(len(by_rank), 'rank')}, {fmt.plural(len(by_set), 'target set')}."
    )


def _text(by_rank: dict[str, tuple[float, int]], by_set: dict[str, tuple[float, int]]) -> str:
    def items(groups: dict[str, tuple[float, int]]) -> str:
        return ", ".join(
            f"{name} {fmt.format_loss(loss)} ({fmt.plural(count, 'trial')})"
            for name, (loss, count) in groups.items()
        )

    return f"Median loss by rank: {items(by_rank)}. By target modules: {items(by_set)}."


def _caption(snapshot: StudySnapshot, across: str) -> str:
    group = "rank" if across == "r" else "set of target modules"
    return (
        f"Each mark is a trial at {first_steps(snapshot)}; bars are the medians of a {group}. Trials differ "
        "in learning rate, alpha and dropout too, and the search tries more where it found low losses, so "
        "a difference of medians is no effect by itself."
    )
