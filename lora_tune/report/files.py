"""The files of a report: report.md, report.json and tables as CSV, each replaced in one step."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from lora_tune.files import write_text
from lora_tune.records import EvalResult, StudySnapshot, TrialRecord
from lora_tune.report import wording
from lora_tune.report.markdown import render_markdown
from lora_tune.report.memory import memory_frame
from lora_tune.report.probe import probe_sentence
from lora_tune.report.summary import summarize
from lora_tune.report.tables import trials_frame

FORMAT_VERSION = 1


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

    - ``format_version``: 1. A reader should refuse a number that it does not know.
    - ``recommendation``: the paragraph that report.md begins with.
    - ``summary``: the fields of ``ReportSummary``; intervals are ``[low, high]`` at 95 %.
    - ``lock``: study.lock.json as it was resolved.
    - ``trials``: by number, each with its configuration and a list ``rungs``. An ``evaluation``
      has ``split``, ``mean_loss``, ``num_examples``, ``num_labels`` and ``compute_dtype``;
      losses of single examples and training points stay in ``trials/NNNN/trial.json``.
    - ``confirmation``: null, or ``winner``, the evaluations of winner and base, and
      ``base_selection_loss``; intervals are in ``summary.confirmation``.
    - ``memory``: ``readings``, each a measured pack and its estimate, and ``limits``, the times
      that the lanes of a pack were lowered. Both are empty for a study on a CPU.
    - ``probe``: ``readings`` of the plans that were measured before the first trial, in order of
      time, the ``decision`` as a sentence (empty if nothing was measured), and whether it was
      ``cut`` short.

    Losses are nats per target token, ``*_s`` seconds, ``*_bytes`` bytes.
    """
    summary = summarize(snapshot)
    confirmation = snapshot.confirmation
    data = {
        "format_version": FORMAT_VERSION,
        "recommendation": wording.recommendation(summary),
        "summary": asdict(summary),
        "lock": asdict(snapshot.lock),
        "trials": [_trial(trial) for trial in snapshot.trials],
        "confirmation": confirmation
        and {
            "winner": confirmation.winner,
            "winner_evaluation": _evaluation(confirmation.winner_evaluation),
            "base_evaluation": _evaluation(confirmation.base_evaluation),
            "base_selection_loss": confirmation.base_selection_loss,
        },
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
