"""When each segment was trained, and in which lane."""

from collections.abc import Sequence

import altair as alt

from lora_tune.records import StudySnapshot
from lora_tune.report import formatting as fmt
from lora_tune.report.charts.chart import ReportChart, Row, layer, report_chart
from lora_tune.report.charts.values import (
    SETTINGS_TOOLTIP,
    candidates_of,
    clean,
    legend,
    rounded,
    settings_row,
    trial_row,
)
from lora_tune.report.timeline import Segment, timeline
from lora_tune.units import format_duration

NAME = "timeline"
_CONFIRMATION = "confirmation"
_LANE_HEIGHT = 26  # pixels
_UNITS = ((7200.0, 3600.0, "h"), (300.0, 60.0, "min"), (0.0, 1.0, "s"))  # from so many seconds on


def timeline_chart(snapshot: StudySnapshot) -> ReportChart | None:
    """Return the chart, None when no segment has its time recorded, as in studies of older versions."""
    segments = timeline(snapshot)
    if not segments:
        return None
    last = max(segment.ended_s for segment in segments)
    unit_s, unit = next((size, name) for least, size, name in _UNITS if last >= least)
    lanes = sorted({segment.slot for segment in segments})
    parts = [f"rung {i}" for i in range(len(snapshot.lock.rungs))] + [_CONFIRMATION]
    present = {_part(segment) for segment in segments}
    return report_chart(
        _layers([part for part in parts if part in present], unit),
        name=NAME,
        title=_title(segments, lanes),
        text=_text(segments, parts),
        caption=_caption(any_early=any(segment.ended_early for segment in segments)),
        rows={"segments": [_row(snapshot, segment, unit_s) for segment in segments]},
        zoom="segments",
        zoom_axes="x",
        height=max(100, 40 + _LANE_HEIGHT * len(lanes)),
    )


def _caption(*, any_early: bool) -> str:
    text = (
        "Each bar is one segment in its lane, its evaluation included; bars above each other trained at the "
        "same time in one pack. Time in which the study did not run is left out, and evaluations alone have "
        "no lane."
    )
    if any_early:
        text += " Pale bars ended early (diverged, out of memory, failed)."
    return text


def _part(segment: Segment) -> str:
    return _CONFIRMATION if segment.rung is None else f"rung {segment.rung}"


def _row(snapshot: StudySnapshot, segment: Segment, unit_s: float) -> Row:
    return {
        **_planned(snapshot, segment),
        "s": segment.state,
        "k": _part(segment),
        "p": int(segment.ended_early),
        "y": segment.slot + 1,
        "x": rounded(segment.began_s / unit_s),
        "e": rounded(segment.ended_s / unit_s),
        "w": format_duration(segment.ended_s - segment.began_s),
    }


def _planned(snapshot: StudySnapshot, segment: Segment) -> Row:
    """Return whose segment it is, what was trained, and up to which step."""
    if segment.candidate is not None:
        candidate = candidates_of(snapshot)[segment.candidate]
        who = f"{clean(candidate.name)}, seed {segment.seed}"
        return {**settings_row(candidate.config), "t": who, "n": candidate.steps}
    assert segment.rung is not None
    trial = next(t for t in snapshot.trials if t.number == segment.trial)
    return {**trial_row(trial), "n": snapshot.lock.rungs[segment.rung]}


def _layers(parts: list[str], unit: str) -> list[alt.Chart]:
    return [
        layer("segments")
        .mark_bar(height={"band": 0.82}, stroke="#808080", strokeWidth=0.5)
        .encode(
            x=alt.X(
                "x:Q",
                title=f"time since the study began ({unit})",
                scale=alt.Scale(nice=False, zero=True),
            ),
            x2="e:Q",
            y=alt.Y("y:O", title="lane"),
            opacity=alt.condition("datum.p == 1", alt.value(0.4), alt.value(1)),
            color=alt.Color("k:N", scale=alt.Scale(domain=parts), legend=legend(parts)),
            tooltip=[
                alt.Tooltip("t:N", title="segment of"),
                alt.Tooltip("k:N", title="part"),
                alt.Tooltip("s:N", title="state"),
                *SETTINGS_TOOLTIP,
                alt.Tooltip("n:Q", title="planned up to step"),
                alt.Tooltip("y:O", title="lane"),
                alt.Tooltip("w:N", title="took"),
            ],
        )
    ]


def _title(segments: Sequence[Segment], lanes: list[int]) -> str:
    began = min(segment.began_s for segment in segments)
    ended = max(segment.ended_s for segment in segments)
    busy = sum(segment.ended_s - segment.began_s for segment in segments)
    share = busy / (len(lanes) * (ended - began)) if ended > began else 1.0
    trained = fmt.plural(len(segments), "segment")
    if len(lanes) == 1:
        return (
            f"{trained} in one lane fill {100 * share:.0f} % of {format_duration(ended - began)}."
        )
    return (
        f"{trained} in {len(lanes)} lanes fill {100 * share:.0f} % of the lanes' "
        f"{format_duration(ended - began)}."
    )


def _text(segments: Sequence[Segment], parts: list[str]) -> str:
    items = []
    for part in parts:
        found = [segment for segment in segments if _part(segment) == part]
        if found:
            began, ended = min(s.began_s for s in found), max(s.ended_s for s in found)
            items.append(
                f"{part}: {fmt.plural(len(found), 'segment')} from {format_duration(began)} to "
                f"{format_duration(ended)}"
            )
    if num_early := sum(segment.ended_early for segment in segments):
        items.append(f"{fmt.plural(num_early, 'segment')} ended early")
    return f"{'; '.join(items)}."
