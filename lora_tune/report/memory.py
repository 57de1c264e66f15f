"""Predicted against measured memory: the table of packs, how the residuals scatter, the margin.

A residual is measured / predicted - 1, so above 0 the estimate was too low. Nothing here exists for a
study on a CPU, which has no allocator statistics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from lora_tune.memory.calibration import (
    Residual,
    allocated_residual,
    counted,
    process_residual,
    quantile_rank,
    reserved_residual,
    safety_margin,
    supported_safety,
)
from lora_tune.records import LaneLimit, MemoryReading, StudyLock, StudySnapshot
from lora_tune.report import formatting as fmt

if TYPE_CHECKING:
    import pandas as pd

MAX_ROWS = 40  # packs in report.md; memory.csv has all
_PLOT_WIDTH = 56
_RESIDUALS: dict[str, Callable[[MemoryReading], Residual]] = {
    "allocated": allocated_residual,
    "reserved": reserved_residual,
    "process": process_residual,
}

PACK_HEADERS = (
    "trials",
    "steps",
    "rows",
    "longest",
    "allocated: predicted",
    "measured",
    "residual",
    "reserved: predicted",
    "measured",
    "residual",
    "process",
    "note",
)
SPREAD_HEADERS = ("peak", "packs", "lowest", "median", "highest", "margin")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualSpread:
    """How the residuals of one kind of peak scatter, and the safety margin that they make."""

    peak: str  # "allocated", "reserved" or "process"
    residuals: tuple[float, ...]  # in the order of time
    lowest: float
    median: float
    highest: float
    margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySummary:
    """What was measured of the packs' memory."""

    num_readings: int
    num_counted: int  # of these, long enough to be counted, or out of memory
    num_out_of_memory: int
    spreads: tuple[ResidualSpread, ...]  # empty when no reading counts
    margin_is_prior: bool  # too few readings for a quantile of their own
    prior_margin: float  # 1 / memory.safety - 1
    outside_bytes: int  # most that the process took beside torch's allocator
    supported_safety: float | None
    limits: tuple[LaneLimit, ...]


def summarize_memory(snapshot: StudySnapshot) -> MemorySummary | None:
    """Return what the readings say, None when there are none."""
    readings = snapshot.memory.readings
    if not readings:
        return None
    kept, prior = counted(readings), study_safety(snapshot.lock)
    return MemorySummary(
        num_readings=len(readings),
        num_counted=len(kept),
        num_out_of_memory=sum(r.measured.out_of_memory for r in readings),
        spreads=tuple(_spread(name, kept, prior) for name in _RESIDUALS) if kept else (),
        margin_is_prior=quantile_rank(len(kept)) is None,
        prior_margin=1 / prior - 1,
        outside_bytes=max((r.measured.outside_bytes for r in kept), default=0),
        supported_safety=supported_safety(readings),
        limits=snapshot.memory.limits,
    )


def study_safety(lock: StudyLock) -> float:
    """Return ``memory.safety`` of a study; 1 where its lock does not say."""
    section = lock.spec.get("memory")
    value = section.get("safety") if isinstance(section, dict) else None
    return float(value) if isinstance(value, int | float) else 1.0


def _spread(name: str, readings: Sequence[MemoryReading], prior: float) -> ResidualSpread:
    residuals = [_RESIDUALS[name](reading) for reading in readings]
    shares = tuple(residual.relative for residual in residuals)
    return ResidualSpread(
        peak=name,
        residuals=shares,
        lowest=min(shares),
        median=median(shares),
        highest=max(shares),
        margin=safety_margin(residuals, prior=prior),
    )


def pack_rows(readings: Sequence[MemoryReading]) -> list[tuple[str, ...]]:
    """Return the packs as rows under ``PACK_HEADERS``: the ``MAX_ROWS`` that were furthest off."""

    def error(number: int) -> float:
        return -abs(allocated_residual(readings[number]).relative)

    shown = sorted(sorted(range(len(readings)), key=error)[:MAX_ROWS])
    return [_pack_row(readings[number]) for number in shown]


def _pack_row(reading: MemoryReading) -> tuple[str, ...]:
    m = reading.measured
    return (
        " ".join(map(str, m.trials)),
        fmt.format_count(m.steps),
        fmt.format_count(m.rows),
        fmt.format_count(m.max_length),
        fmt.format_memory(reading.predicted_allocated_bytes),
        fmt.format_memory(m.allocated_bytes),
        _bounded(allocated_residual(reading), m.out_of_memory),
        fmt.format_memory(reading.predicted_reserved_bytes),
        fmt.format_memory(m.reserved_bytes),
        format_residual(reserved_residual(reading).relative),
        fmt.format_memory(m.process_bytes),
        _note(reading),
    )


def _bounded(residual: Residual, out_of_memory: bool) -> str:
    text = format_residual(residual.relative)
    return f"at least {text}" if out_of_memory else text


def _note(reading: MemoryReading) -> str:
    if reading.measured.out_of_memory:
        return "out of memory"
    return "" if counted([reading]) else "too short to count"


def spread_rows(summary: MemorySummary) -> list[tuple[str, ...]]:
    """Return the kinds of peak as rows under ``SPREAD_HEADERS``."""
    return [
        (
            spread.peak,
            fmt.format_count(len(spread.residuals)),
            format_residual(spread.lowest),
            format_residual(spread.median),
            format_residual(spread.highest),
            fmt.format_percent(spread.margin),
        )
        for spread in summary.spreads
    ]


def scatter_plot(summary: MemorySummary) -> str:
    """Return the residuals on one axis, a line a kind of peak, for a block of fixed width.

    ``.`` is one pack, ``:`` up to four, ``#`` more, ``|`` an exact estimate.
    """
    values = [0.0, *(value for spread in summary.spreads for value in spread.residuals)]
    low, high = min(values), max(values)
    if low == high:
        high = low + 0.01
    left, right = format_residual(low), format_residual(high)
    gap = " " * (_PLOT_WIDTH - len(left) - len(right))
    lines = [f"{'':10}{left}{gap}{right}"]
    for spread in summary.spreads:
        cells = [0] * _PLOT_WIDTH
        for value in spread.residuals:
            cells[_cell(value, low, high)] += 1
        marks = ["" if n == 0 else "." if n == 1 else ":" if n < 5 else "#" for n in cells]
        zero = _cell(0.0, low, high)
        marks[zero] = marks[zero] or "|"
        lines.append(f"{spread.peak:10}{''.join(mark or ' ' for mark in marks)}".rstrip())
    return "\n".join(lines)


def _cell(value: float, low: float, high: float) -> int:
    return min(_PLOT_WIDTH - 1, int((value - low) / (high - low) * _PLOT_WIDTH))


def format_residual(share: float) -> str:
    """Write a signed relative error.

    >>> format_residual(0.0123), format_residual(-0.00449)
    ('+1.2 %', '-0.4 %')
    """
    return f"{100 * share:+.1f} %"


def memory_frame(snapshot: StudySnapshot) -> "pd.DataFrame":
    """Return every reading as a row of a pandas table, in the order of time, unrounded."""
    import pandas as pd

    return pd.DataFrame([_frame_row(reading) for reading in snapshot.memory.readings])


def _frame_row(reading: MemoryReading) -> dict[str, object]:
    m = reading.measured
    return {
        "device": m.device,
        "trials": " ".join(map(str, m.trials)),
        "lanes": len(m.trials),
        "steps": m.steps,
        "rows": m.rows,
        "max_length": m.max_length,
        "num_labels": m.num_labels,
        "predicted_allocated_bytes": reading.predicted_allocated_bytes,
        "allocated_bytes": m.allocated_bytes,
        "allocated_residual": allocated_residual(reading).relative,
        "predicted_reserved_bytes": reading.predicted_reserved_bytes,
        "reserved_bytes": m.reserved_bytes,
        "reserved_residual": reserved_residual(reading).relative,
        "process_bytes": m.process_bytes,
        "process_residual": process_residual(reading).relative,
        "free_bytes": m.free_bytes,
        "out_of_memory": m.out_of_memory,
        "counted": bool(counted([reading])),
    }
