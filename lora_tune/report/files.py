"""The files of a report: report.md, report.json and tables as CSV, each replaced in one step."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from lora_tune.files import write_text
from lora_tune.records import (
    Confirmation,
    ConfirmationRun,
    EvalResult,
    MetricResult,
    StudySnapshot,
    TrialRecord,
)
from lora_tune.report import verdict, wording
from lora_tune.report.cost import CostSummary
from lora_tune.report.memory import memory_frame
from lora_tune.report.probe import probe_sentence
from lora_tune.report.study_markdown import render_markdown
from lora_tune.report.summary import ReportSummary, summarize
from lora_tune.report.tables import trials_frame

FORMAT_VERSION = 2


def write_reports(snapshot: StudySnapshot) -> list[Path]:
    """Write report.md, trials.csv, report.json and, after readings on a GPU, memory.csv.

    All are made before the first is written, and each replaces its predecessor in one
    step, so a reader never sees half a file.

    Returns:
        The paths written.
    """
    contents = {
        "report.md": render_markdown(snapshot),
        "trials.csv": trials_frame(snapshot).to_csv(index=False, lineterminator="\n"),
        "report.json": json.dumps(report_data(snapshot), indent=2, allow_nan=False) + "\n",
    }
    if snapshot.memory.readings:
        contents["memory.csv"] = memory_frame(snapshot).to_csv(index=False, lineterminator="\n")
    paths = []
    for name, text in contents.items():
        write_text(snapshot.folder / name, text)
        paths.append(snapshot.folder / name)
    return paths


def report_data(snapshot: StudySnapshot) -> dict[str, Any]:
    """Return report.json: plain values, unrounded, where a number that is not finite is null.

    - ``format_version``: 2. A reader should refuse a number that it does not know.
    - ``recommendation``: what report.md begins with, as one paragraph.
    - ``verdict``: null, or ``state`` (``better``, ``not distinguishable``, ``worse``, ``no default``)
      and ``sentence``.
    - ``summary``: the fields of ``ReportSummary``; intervals are ``[low, high]`` at 95 %.
    - ``lock``: study.lock.json as it was resolved.
    - ``trials``: by number, each with its configuration and a list ``rungs``. An ``evaluation``
      has ``split``, ``mean_loss``, ``num_examples``, ``num_labels`` and ``compute_dtype``;
      losses of single examples and training points stay in ``trials/NNNN/trial.json``.
    - ``confirmation``: null, or ``candidates``, ``runs`` (each a training with a fresh seed), the
      ``default``'s name, ``seeds``, ``refit``, and the untuned base's evaluations and metrics.
    - ``decision``: null, or the fields of ``Decision``: scores, comparisons, tie set, choice, power.
    - ``forecast``: null, or what was forecast, with ``total_s``, ``took_s`` and ``error`` (took /
      forecast - 1, null until the study is finished).
    - ``memory``: ``readings``, each a measured pack and its estimate, and ``limits``, the times
      that the lanes of a pack were lowered. Both are empty for a study on a CPU.
    - ``probe``: ``readings`` of the plans that were measured before the first trial, in order of
      time, the ``decision`` as a sentence (empty if nothing was measured), and whether it was
      ``cut`` short.

    Losses are nats per target token, ``*_s`` seconds, ``*_bytes`` bytes.
    """
    summary = summarize(snapshot)
    confirmation = snapshot.confirmation
    decision = confirmation.decision if confirmation else None
    data = {
        "format_version": FORMAT_VERSION,
        "recommendation": wording.recommendation(summary),
        "verdict": _verdict(summary),
        "summary": _summary(summary),
        "lock": asdict(snapshot.lock),
        "trials": [_trial(trial) for trial in snapshot.trials],
        "confirmation": confirmation and _confirmation(confirmation),
        "decision": decision and asdict(decision),
        "forecast": _forecast(summary.cost),
        "memory": asdict(snapshot.memory),
        "probe": {
            "decision": probe_sentence(snapshot.lock.plan),
            "readings": [asdict(reading) for reading in snapshot.lock.plan.probe_readings],
            "probe_s": snapshot.lock.plan.probe_s,
            "cut": snapshot.lock.plan.probe_cut,
        },
    }
    plain: dict[str, Any] = _plain(data)
    return plain


def _verdict(summary: ReportSummary) -> dict[str, str] | None:
    c = summary.confirmation
    if c is None or c.decision is None:
        return None
    return {"state": c.decision.verdict.value, "sentence": verdict.verdict_sentence(c)}


def _summary(summary: ReportSummary) -> dict[str, Any]:
    """Return the summary without what stands elsewhere in the file."""
    data = asdict(summary)
    del data["cost"]["forecast"]
    if data["confirmation"]:
        del data["confirmation"]["decision"]
    return data


def _confirmation(confirmation: Confirmation) -> dict[str, Any]:
    base = confirmation.base_evaluation
    return {
        "default": confirmation.default,
        "seeds": confirmation.seeds,
        "refit": confirmation.refit,
        "candidates": [asdict(candidate) for candidate in confirmation.candidates],
        "runs": [_run(run) for run in confirmation.runs],
        "base_evaluation": base and _evaluation(base),
        "base_selection_loss": confirmation.base_selection_loss,
        "base_metrics": _metrics(confirmation.base_metrics),
    }


def _run(run: ConfirmationRun) -> dict[str, Any]:
    data = asdict(run)
    data["evaluation"] = run.evaluation and _evaluation(run.evaluation)
    data["metrics"] = _metrics(run.metrics)
    return data


def _metrics(metrics: Sequence[MetricResult]) -> list[dict[str, Any]]:
    return [
        {"metric": m.metric, "mean": m.mean, "num_rows": len(m.values), "reason": m.reason}
        for m in metrics
    ]


def _forecast(cost: CostSummary) -> dict[str, Any] | None:
    forecast = cost.forecast
    if forecast is None:
        return None
    return {
        **asdict(forecast),
        "total_s": forecast.total_s,
        "took_s": cost.wall_s,
        "error": cost.forecast_error,
    }


def _trial(trial: TrialRecord) -> dict[str, Any]:
    data = asdict(trial)
    for rung, result in zip(data["rungs"], trial.rungs, strict=True):
        del rung["points"]
        rung["evaluation"] = _evaluation(result.evaluation)
    return data


def _evaluation(evaluation: EvalResult) -> dict[str, Any]:
    return {
        "split": evaluation.split,
        "mean_loss": evaluation.mean_loss,
        "num_examples": len(evaluation.label_counts),
        "num_labels": sum(evaluation.label_counts),
        "compute_dtype": evaluation.compute_dtype,
    }


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: no NaN, no infinity, no path."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
