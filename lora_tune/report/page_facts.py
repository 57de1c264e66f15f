"""The first screen of report.html: the few numbers that decide, and the command to go on with."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from lora_tune.records import Comparison, Decision, StudySnapshot, Verdict
from lora_tune.report import formatting as fmt
from lora_tune.report import verdict
from lora_tune.report.confirmation import CandidateSummary, ConfirmationSummary
from lora_tune.report.summary import ReportSummary
from lora_tune.stats.ratio import Interval
from lora_tune.units import format_bytes, format_duration


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A number with its name, and in smaller letters what it rests on."""

    name: str
    value: str
    note: str = ""


def key_facts(snapshot: StudySnapshot, summary: ReportSummary) -> list[Fact]:
    """Return the numbers of a decided study; nothing before the decision."""
    c = summary.confirmation
    if c is None or c.decision is None or c.chosen is None or c.chosen.score is None:
        return []
    return [
        _loss(c, c.chosen, c.decision),
        *_against_default(c, c.decision),
        *_against_base(c),
        *_memory(c.chosen),
        *_time(c.chosen),
        *_adapter(snapshot),
    ]


def _loss(c: ConfirmationSummary, chosen: CandidateSummary, decision: Decision) -> Fact:
    assert chosen.score is not None
    interval = Interval(chosen.score.low, chosen.score.high)
    return Fact(
        name=f"Confirmed loss of {c.call(chosen.name)}",
        value=fmt.format_loss(chosen.score.loss),
        note=f"nats per token{verdict.interval_text(interval)}; {verdict.seeds_text(decision.seeds)}, "
        f"{fmt.plural(decision.num_rows, 'unseen row')}",
    )


def _against_default(c: ConfirmationSummary, decision: Decision) -> list[Fact]:
    comparison = decision.against_default
    if decision.verdict is Verdict.NONE or comparison is None:
        return []
    return [
        Fact(
            name="Against the default",
            value=decision.verdict.value,
            note=_difference_note(c, comparison),
        )
    ]


def _difference_note(c: ConfirmationSummary, comparison: Comparison) -> str:
    low, high = comparison.low, comparison.high
    return (
        f"loss of {c.call(comparison.candidate)} less that of {c.call(comparison.reference)}: "
        f"{fmt.format_difference(comparison.difference)} (95 % interval {fmt.format_range(low, high)})"
    )


def _against_base(c: ConfirmationSummary) -> list[Fact]:
    if c.base is None or c.base.relative_reduction is None:
        return []
    reduction = c.base.relative_reduction
    interval = c.base.reduction_interval
    note = f"the untuned base's loss is {fmt.format_loss(c.base.loss)}"
    if interval is not None:
        low, high = map(fmt.format_percent, interval)
        note += f"; 95 % interval of the reduction {low} to {high}"
    side = "lower" if reduction >= 0 else "higher"
    return [
        Fact(
            name="Against the untuned base",
            value=f"{fmt.format_percent(abs(reduction))} {side}",
            note=note,
        )
    ]


def _memory(chosen: CandidateSummary) -> list[Fact]:
    needed = chosen.candidate.predicted_bytes
    if not needed:
        return []
    return [
        Fact(
            name="Memory to train it alone",
            value=fmt.format_memory(needed),
            note="peak by the estimate",
        )
    ]


def _time(chosen: CandidateSummary) -> list[Fact]:
    score, steps = chosen.score, chosen.candidate.steps
    if score is None or score.step_s <= 0:
        return []
    return [
        Fact(
            name="Time to train it",
            value=format_duration(score.step_s * steps),
            note=f"{fmt.plural(steps, 'step')} of {score.step_s:.2g} s, its share of the measured time",
        )
    ]


def _adapter(snapshot: StudySnapshot) -> list[Fact]:
    size, base = snapshot.adapter_bytes, snapshot.lock.model.base_bytes
    if not size:
        return []
    note = f"{fmt.format_count(size)} bytes"
    if base:
        note += (
            f"; the base in memory {format_bytes(base)} ({fmt.format_count(base)} bytes), "
            f"{fmt.one_line(snapshot.lock.model.quantization)}"
        )
    return [Fact(name="Adapter", value=format_bytes(size), note=note)]


def use_command(folder: Path) -> str:
    """Return the command that makes the adapter of a study ready to be served.

    A study below ``reports/`` is found by its name from the folder that it was run in.
    """
    study = folder.name if folder.parent.name == "reports" else str(folder)
    return f"lora-tune export {shlex.quote(fmt.one_line(study))} --to vllm"
