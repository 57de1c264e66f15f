"""Predicted against measured peak memory of the packs; a GPU's only."""

import altair as alt

from lora_tune.records import MemoryReading, StudySnapshot
from lora_tune.report import formatting as fmt
from lora_tune.report.charts.chart import GREY, ReportChart, Row, layer, report_chart
from lora_tune.report.charts.values import clean, gib, legend, listed
from lora_tune.report.memory import MemorySummary, format_residual, summarize_memory

NAME = "memory"
_KINDS = ("allocated", "reserved")


def memory_chart(snapshot: StudySnapshot) -> ReportChart | None:
    """Return the chart, None without readings: a CPU keeps no peak of a pack."""
    summary = summarize_memory(snapshot)
    if summary is None:
        return None
    readings = snapshot.memory.readings
    points = [row for reading in readings for row in _rows(reading)]
    budget = snapshot.lock.plan.budget_bytes
    ends = [float(str(row[key])) for row in points for key in ("x", "y")]
    low, high = min(ends), max(ends)
    if 0 < gib(budget) < 1.6 * high:  # a budget far above would press all points into a corner
        high = max(high, gib(budget))
        limit: list[Row] = [{"y": gib(budget), "v": f"budget {fmt.format_memory(budget)}"}]
    else:
        limit = []
    return report_chart(
        _layers(),
        name=NAME,
        title=_title(summary),
        text=_text(summary, snapshot),
        caption=_caption(limited=bool(limit), budget=budget),
        rows={
            "packs": points,
            "equal": [{"x": low, "y": low}, {"x": high, "y": high}],
            "budget": limit,
        },
        zoom="packs",
    )


def _rows(reading: MemoryReading) -> list[Row]:
    m = reading.measured
    pairs = (
        (reading.predicted_allocated_bytes, m.allocated_bytes),
        (reading.predicted_reserved_bytes, m.reserved_bytes),
    )
    shared: Row = {
        "t": clean(listed([str(trial) for trial in m.trials]), 60),
        "n": m.steps,
        "o": "ran out" if m.out_of_memory else "fitted",
    }
    return [
        {
            **shared,
            "k": kind,
            "x": gib(predicted),
            "y": gib(measured),
            "e": format_residual(measured / predicted - 1),
        }
        for kind, (predicted, measured) in zip(_KINDS, pairs, strict=True)
        if predicted > 0
    ]


def _layers() -> list[alt.Chart]:
    x = alt.X("x:Q", title="predicted peak (GiB)", scale=alt.Scale(zero=False, padding=12))
    y = alt.Y("y:Q", title="measured peak (GiB)", scale=alt.Scale(zero=False, padding=12))
    key = legend(_KINDS, "peak")
    scale = alt.Scale(domain=list(_KINDS))
    shapes = alt.Scale(domain=list(_KINDS), range=["circle", "square"])
    tooltip = [
        alt.Tooltip("t:N", title="pack of trials"),
        alt.Tooltip("k:N", title="peak"),
        alt.Tooltip("x:Q", title="predicted GiB", format=".2f"),
        alt.Tooltip("y:Q", title="measured GiB", format=".2f"),
        alt.Tooltip("e:N", title="measured against predicted"),
        alt.Tooltip("n:Q", title="steps"),
        alt.Tooltip("o:N", title="memory"),
    ]
    return [
        layer("equal").mark_line(strokeDash=[5, 4], color=GREY, strokeWidth=1.5).encode(x=x, y=y),
        layer("budget").mark_rule(strokeWidth=2, color=GREY).encode(y="y:Q"),
        layer("budget")
        .mark_text(align="left", baseline="bottom", x=6, dy=-4)
        .encode(y="y:Q", text="v:N"),
        layer("packs")
        .mark_point(filled=True, size=60, opacity=0.75)
        .encode(
            x=x,
            y=y,
            color=alt.Color("k:N", scale=scale, legend=key),
            shape=alt.Shape("k:N", scale=shapes, legend=key),
            tooltip=tooltip,
        ),
    ]


def _title(summary: MemorySummary) -> str:
    packs = fmt.plural(summary.num_readings, "pack")
    if not summary.spreads:
        return f"Memory of {packs} was measured, too short to say how good the estimate is."
    allocated = summary.spreads[0]
    ran_out = ""
    if summary.num_out_of_memory:
        ran_out = f"; memory ran out in {fmt.plural(summary.num_out_of_memory, 'pack')}"
    return (
        f"The measured peak of {fmt.plural(len(allocated.residuals), 'pack')} was "
        f"{format_residual(allocated.lowest)} to {format_residual(allocated.highest)} off the estimate, "
        f"median {format_residual(allocated.median)}{ran_out}."
    )


def _text(summary: MemorySummary, snapshot: StudySnapshot) -> str:
    spreads = "; ".join(
        f"{s.peak}: {format_residual(s.lowest)} to {format_residual(s.highest)}, median "
        f"{format_residual(s.median)}, {fmt.plural(len(s.residuals), 'pack')}"
        for s in summary.spreads
    )
    highest = max(r.measured.allocated_bytes for r in snapshot.memory.readings)
    return (
        f"Measured less predicted, as a share of the predicted peak: {spreads or 'no pack counts'}. "
        f"Highest measured peak: {fmt.format_memory(highest)} allocated, the budget was "
        f"{fmt.format_memory(snapshot.lock.plan.budget_bytes)}."
    )


def _caption(*, limited: bool, budget: int) -> str:
    text = (
        "Each pack of trials has two marks: what torch allocated, and what its allocator reserved. On the "
        "dashed line the estimate is exact; above it more was needed than predicted."
    )
    if limited:
        return f"{text} The horizontal line is the budget of a pack."
    return (
        f"{text} The budget, {fmt.format_memory(budget)}, lies above the chart." if budget else text
    )
