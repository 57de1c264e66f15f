"""report.json: what is in it, and the JSON Schema that documents it.

``ReportData`` is the file, field by field. Where a record holds more than a reader of the file needs
(losses of single rows, training points), ``_OMITTED`` and ``_SHORTENED`` say what stands in its place;
the writer and the schema both go by them.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Final, Literal

from lora_tune.records import (
    Confirmation,
    ConfirmationRun,
    Decision,
    EvalResult,
    Forecast,
    MemoryLog,
    MetricResult,
    ProbeReading,
    RungResult,
    StudyLock,
    StudySnapshot,
    TrialRecord,
)
from lora_tune.report import verdict, wording
from lora_tune.report.behaviour import BehaviourSummary, summarize_behaviour
from lora_tune.report.confirmation import ConfirmationSummary
from lora_tune.report.cost import CostSummary
from lora_tune.report.probe import probe_sentence
from lora_tune.report.summary import ReportSummary, summarize
from lora_tune.report.timeline import Segment, timeline

if TYPE_CHECKING:
    from lora_tune.report.charts import ReportChart

FORMAT_VERSION: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictData:
    """The verdict against the default configuration, as a state and as a sentence."""

    state: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationData:
    """An evaluation without the losses of its rows, which stay in trial.json and confirmation.json."""

    split: str
    mean_loss: float
    num_examples: int
    num_labels: int
    compute_dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricData:
    """A metric beside the loss without the values of its rows."""

    metric: str
    mean: float | None
    num_rows: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastData:
    """What was forecast before the first trial, and what it took.

    ``error`` is took / forecast - 1, null until the study is finished.
    """

    tokens_per_s: float
    measured: bool
    search_steps: int
    confirmation_steps: int
    search_s: float
    evaluation_s: float
    confirmation_s: float
    load_s: float
    total_s: float
    took_s: float
    error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeData:
    """The plans that were measured before the first trial, in order of time, and what they decided."""

    decision: str
    readings: tuple[ProbeReading, ...]
    probe_s: float
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartData:
    """A plot: its message, what it shows in words and numbers, how to read it, and its file.

    ``file`` is null where the plot could not be drawn.
    """

    name: str
    title: str
    text: str
    caption: str
    file: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """A study's report as numbers, unrounded; a number that is not finite is null.

    Losses are nats per target token, ``*_s`` seconds, ``*_bytes`` bytes, shares and relative changes
    fractions of 1, intervals ``[low, high]`` at 95 %. A key that goes, or changes its meaning, raises
    ``format_version``; new keys may come without.
    """

    format_version: Literal[3]
    recommendation: str
    verdict: VerdictData | None
    summary: ReportSummary
    lock: StudyLock
    trials: tuple[TrialRecord, ...]
    confirmation: Confirmation | None
    decision: Decision | None
    behaviour: BehaviourSummary | None
    forecast: ForecastData | None
    memory: MemoryLog
    probe: ProbeData
    timeline: tuple[Segment, ...]
    adapter_bytes: int
    base_bytes: int
    charts: tuple[ChartData, ...]
    problems: tuple[str, ...]


# What stands elsewhere in the file, or is too much for it.
_OMITTED: Mapping[type, tuple[str, ...]] = {
    Confirmation: ("clusters", "decision"),
    ConfirmationRun: ("span",),
    ConfirmationSummary: ("decision",),
    CostSummary: ("forecast",),
    RungResult: ("points", "span"),
    TrialRecord: ("span",),
}
_SHORTENED: Mapping[type, type] = {EvalResult: EvaluationData, MetricResult: MetricData}


def report_data(
    snapshot: StudySnapshot,
    *,
    charts: Sequence["ReportChart"] = (),
    drawn: Container[str] = (),
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the object of report.json as plain values.

    Args:
        snapshot: The study, finished or not.
        charts: Its charts.
        drawn: Names of those that are files in plots/.
        problems: What could not be made of the report and why, as sentences.
    """
    summary = summarize(snapshot)
    confirmation, plan = snapshot.confirmation, snapshot.lock.plan
    data = ReportData(
        format_version=FORMAT_VERSION,
        recommendation=wording.recommendation(summary),
        verdict=_verdict(summary),
        summary=summary,
        lock=snapshot.lock,
        trials=snapshot.trials,
        confirmation=confirmation,
        decision=confirmation.decision if confirmation else None,
        behaviour=summarize_behaviour(snapshot),
        forecast=_forecast(summary.cost),
        memory=snapshot.memory,
        probe=ProbeData(
            decision=probe_sentence(plan),
            readings=plan.probe_readings,
            probe_s=plan.probe_s,
            cut=plan.probe_cut,
        ),
        timeline=timeline(snapshot),
        adapter_bytes=snapshot.adapter_bytes,
        base_bytes=snapshot.lock.model.base_bytes,
        charts=chart_data(charts, drawn=drawn),
        problems=tuple(problems),
    )
    found: dict[str, Any] = plain(data)
    return found


def chart_data(charts: Sequence["ReportChart"], *, drawn: Container[str]) -> tuple[ChartData, ...]:
    """Return the words of charts, and the files of those that were drawn."""
    return tuple(
        ChartData(
            name=chart.name,
            title=chart.title,
            text=chart.text,
            caption=chart.caption,
            file=f"plots/{chart.name}.svg" if chart.name in drawn else None,
        )
        for chart in charts
    )


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: no record, no NaN, no infinity, no path."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, str):
        return str(value)  # of an enumeration its value
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, EvalResult):
        value = _evaluation(value)
    elif isinstance(value, MetricResult):
        value = _metric(value)
    if is_dataclass(value):
        return {name: plain(getattr(value, name)) for name in _names(type(value))}
    return str(value)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of report.json.

    pydantic is imported here: to make the file itself does not need it.
    """
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

    class ReportSchema(GenerateJsonSchema):
        """As the writer has it: every key is always there, and a number that is not finite is null."""

        def field_is_required(self, field: Any, total: bool) -> bool:
            return True

        def float_schema(self, schema: Any) -> JsonSchemaValue:
            return {"type": ["number", "null"]}

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False  # a title would repeat the key

        def dataclass_schema(self, schema: Any) -> JsonSchemaValue:
            kind = schema["cls"]
            if kind in _SHORTENED:
                return self.generate_inner(TypeAdapter(_SHORTENED[kind]).core_schema)
            found = super().dataclass_schema(schema)
            for name in _OMITTED.get(kind, ()):
                del found["properties"][name]
                found["required"].remove(name)
            return found

    found = TypeAdapter(ReportData).json_schema(schema_generator=ReportSchema)
    return {
        "$schema": ReportSchema.schema_dialect,
        **found,
        "title": "report.json of a lora-tune study",
    }


def _names(kind: type) -> tuple[str, ...]:
    if kind not in _KEPT:
        omitted = _OMITTED.get(kind, ())
        _KEPT[kind] = tuple(f.name for f in fields(kind) if f.name not in omitted)
    return _KEPT[kind]


_KEPT: dict[type, tuple[str, ...]] = {}  # names of a record's fields, looked up once


def _verdict(summary: ReportSummary) -> VerdictData | None:
    c = summary.confirmation
    if c is None or c.decision is None:
        return None
    return VerdictData(state=c.decision.verdict.value, sentence=verdict.verdict_sentence(c))


def _forecast(cost: CostSummary) -> ForecastData | None:
    forecast = cost.forecast
    if forecast is None:
        return None
    own = {f.name: getattr(forecast, f.name) for f in fields(Forecast)}
    return ForecastData(
        **own, total_s=forecast.total_s, took_s=cost.wall_s, error=cost.forecast_error
    )


def _evaluation(found: EvalResult) -> EvaluationData:
    return EvaluationData(
        split=found.split,
        mean_loss=found.mean_loss,
        num_examples=len(found.label_counts),
        num_labels=sum(found.label_counts),
        compute_dtype=found.compute_dtype,
    )


def _metric(found: MetricResult) -> MetricData:
    return MetricData(
        metric=found.metric, mean=found.mean, num_rows=len(found.values), reason=found.reason
    )
