"""The probe's readings: what was tried before the first trial, and why the study's plan was kept."""

from collections.abc import Sequence

from lora_tune.records import LanePlan, ProbeReading
from lora_tune.report import formatting as fmt

PROBE_HEADERS = ("lanes", "rows a lane", "type", "tokens/s", "to the first", "peak", "decision")


def probe_rows(plan: LanePlan) -> list[tuple[str, ...]]:
    """Return the readings as cells, in order of time; the ratio is to the first one."""
    readings = plan.probe_readings
    kept = _kept(plan)
    return [
        (
            str(reading.lanes),
            str(reading.micro_batch_size),
            reading.compute_dtype,
            fmt.NOTHING if reading.out_of_memory else fmt.format_count(reading.tokens_per_s),
            _times(reading, readings[0]) or fmt.NOTHING,
            fmt.format_memory(reading.peak_bytes or 0),
            "out of memory" if reading.out_of_memory else "kept" if reading is kept else "",
        )
        for reading in readings
    ]


def probe_sentence(plan: LanePlan) -> str:
    """Say what the readings decided; nothing if nothing was measured."""
    if not plan.probe_readings:
        return ""
    parts = [_plan_text(plan), *_more_lanes(plan), *_larger_sizes(plan), *_types(plan)]
    text = f"{'; '.join(parts)}."
    text = text[0].upper() + text[1:]
    if plan.probe_cut:
        text += " The probe was cut short: more could have taken over 5 % of the study's time."
    return text


def _plan_text(plan: LanePlan) -> str:
    kept, alone = _kept(plan), _alone(plan)
    text = f"{_size_text(plan.lanes, plan.micro_batch_size)} in {plan.compute_dtype}"
    if kept is None:
        return f"{text} (not measured)"
    if alone is None or alone is kept:
        return text
    return f"{text}: {_times(kept, alone)} {_size_text(alone.lanes, alone.micro_batch_size)}"


def _types(plan: LanePlan) -> list[str]:
    """Compare the kept compute type with the other one, where both were measured."""
    first = plan.probe_readings[0]
    same = {r.compute_dtype: r for r in plan.probe_readings if _size(r) == _size(first)}
    own = same.pop(plan.compute_dtype, first)
    return [
        f"{own.compute_dtype} was {ratio} {other.compute_dtype}"
        for other in same.values()
        if (ratio := _times(own, other))
    ]


def _larger_sizes(plan: LanePlan) -> list[str]:
    lone = [r for r in _in_type(plan) if r.lanes == 1]
    own = [r for r in lone if r.micro_batch_size == plan.micro_batch_size]
    larger = [r for r in lone if r.micro_batch_size > plan.micro_batch_size]
    return [_rejected(other, mine) for mine, other in zip(own[:1], larger[:1], strict=False)]


def _more_lanes(plan: LanePlan) -> list[str]:
    kept = _kept(plan)
    more = [r for r in _in_type(plan) if r.lanes > plan.lanes]
    return [] if kept is None else [_rejected(other, kept) for other in more[:1]]


def _rejected(reading: ProbeReading, kept: ProbeReading) -> str:
    """Say what came of a reading that was not kept, against one that differs in lanes, in rows, or both."""
    name, of = (_size_text(*_size(r)) for r in (reading, kept))
    if reading.micro_batch_size == kept.micro_batch_size:
        name, of = f"{reading.lanes} lanes", _lanes_text(kept.lanes)
    elif reading.lanes == kept.lanes == 1:
        name, of = (f"{fmt.plural(r.micro_batch_size, 'row')} a lane" for r in (reading, kept))
    ratio = _times(reading, kept)
    return f"{name} gave {ratio} of {of} and were not kept" if ratio else f"{name} did not fit"


def _kept(plan: LanePlan) -> ProbeReading | None:
    """Return the reading of the plan itself."""
    wanted = (plan.lanes, plan.micro_batch_size)
    found = [r for r in _in_type(plan) if _size(r) == wanted and not r.out_of_memory]
    return found[0] if found else None


def _alone(plan: LanePlan) -> ProbeReading | None:
    """Return what the plan compares with: one lane of its rows; for one lane, of the fewest rows."""
    lone = [r for r in _in_type(plan) if r.lanes == 1 and not r.out_of_memory]
    same = [r for r in lone if r.micro_batch_size == plan.micro_batch_size and plan.lanes > 1]
    return next(iter(same or lone), None)


def _in_type(plan: LanePlan) -> Sequence[ProbeReading]:
    return [r for r in plan.probe_readings if r.compute_dtype == plan.compute_dtype]


def _size(reading: ProbeReading) -> tuple[int, int]:
    return reading.lanes, reading.micro_batch_size


def _size_text(lanes: int, micro_batch_size: int) -> str:
    return f"{_lanes_text(lanes)} of {fmt.plural(micro_batch_size, 'row')}"


def _lanes_text(lanes: int) -> str:
    return "one lane" if lanes == 1 else f"{lanes} lanes"


def _times(reading: ProbeReading, other: ProbeReading) -> str:
    """Return the ratio of their tokens/s, or nothing if one ran out of memory."""
    if reading.out_of_memory or other.out_of_memory:
        return ""
    return f"{reading.tokens_per_s / other.tokens_per_s:.2f}x"
