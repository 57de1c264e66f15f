"""The tables of a comparison: a column a study for people, a row a study for programs."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lora_tune.records import StudyLock, TrialState
from lora_tune.report import formatting as fmt
from lora_tune.report.comparison import ComparedStudy, StudyComparison, StudyDifference
from lora_tune.report.comparison_wording import value_text
from lora_tune.report.sections import TextTable, text_table
from lora_tune.units import format_duration

if TYPE_CHECKING:
    import pandas as pd

FINDINGS_CAPTION = (
    "Losses are nats per target token on rows that the search of the study never saw; those of other "
    "groups do not compare. Intervals are at 95 %. Below 0 means better than the default or the other "
    "study. Memory is the estimate for training the recommended configuration alone."
)
# What says where a study is and not what it is.
_NOT_SHOWN = frozenset({"study.name", "study.output", "model.base", "data.train", "run.trackers"})


def findings_table(comparison: StudyComparison) -> TextTable:
    """Return what each study found and what it took, a column a study."""
    rows = [
        (name, *(text(comparison, study) for study in comparison.studies))
        for name, text in _FINDINGS.items()
    ]
    used = [row for row in rows if any(cell != fmt.NOTHING for cell in row[1:])]
    return text_table(("", *(study.label for study in comparison.studies)), used)


def setup_table(comparison: StudyComparison, *, differing: bool) -> TextTable | None:
    """Return the settings in which the studies differ, or those in which they are all the same.

    None where there are none.
    """
    settings = [_settings(study.lock) for study in comparison.studies]
    names = dict.fromkeys(name for found in settings for name in found)
    rows = [(name, *(found.get(name, fmt.NOTHING) for found in settings)) for name in names]
    if differing:
        rows = [row for row in rows if len(set(row[1:])) > 1]
        headers = ("setting", *(study.label for study in comparison.studies))
        return text_table(headers, rows) if rows else None
    same = [row[:2] for row in rows if len(set(row[1:])) == 1 and row[1] != fmt.NOTHING]
    return text_table(("setting", "in all"), same) if same else None


def comparison_frame(comparison: StudyComparison) -> "pd.DataFrame":
    """Return a row a study, unrounded, None where there is nothing."""
    import pandas as pd

    rows = [
        {
            name: fmt.visible_text(cell) if isinstance(cell, str) else cell
            for name, cell in row.items()
        }
        for row in comparison_rows(comparison)
    ]
    frame = pd.DataFrame(rows)  # which cannot hold half a surrogate pair
    whole = ("rank", "group", "trainable_parameters", "predicted_bytes")
    return frame.astype(dict.fromkeys(whole, "Int64"))


def comparison_rows(comparison: StudyComparison) -> tuple[dict[str, object], ...]:
    """Return the same as plain values by name."""
    return tuple(_row(comparison, study) for study in comparison.studies)


def difference_of(comparison: StudyComparison, study: ComparedStudy) -> StudyDifference | None:
    """Return a study's difference to the best of its group; None for the best and those alone."""
    group = comparison.group_of(study)
    found = group.differences if group else ()
    return next((d for d in found if d.study == study.label), None)


def _recommended(comparison: StudyComparison, study: ComparedStudy) -> str:
    c = study.summary.confirmation
    if c is not None and c.chosen is not None:
        return c.call(c.chosen.name)
    return fmt.NOTHING if study.summary.leader is None else f"trial {study.summary.leader} so far"


def _setting(name: str) -> Callable[[StudyComparison, ComparedStudy], str]:
    def text(comparison: StudyComparison, study: ComparedStudy) -> str:
        config = study.summary.config
        if config is None:
            return fmt.NOTHING
        value = getattr(config, name)
        return fmt.format_scientific(value) if name == "learning_rate" else value_text(value)

    return text


def _loss(comparison: StudyComparison, study: ComparedStudy) -> str:
    chosen = study.chosen
    if chosen is None or chosen.score is None:
        return fmt.NOTHING
    score = chosen.score
    ends = f"{fmt.format_loss(score.low)} to {fmt.format_loss(score.high)}"
    return f"{fmt.format_loss(score.loss)} ({ends})"


def _base_loss(comparison: StudyComparison, study: ComparedStudy) -> str:
    c = study.summary.confirmation
    return fmt.format_loss(c.base.loss if c is not None and c.base is not None else None)


def _reduction(comparison: StudyComparison, study: ComparedStudy) -> str:
    c = study.summary.confirmation
    if c is None or c.base is None or c.base.relative_reduction is None:
        return fmt.NOTHING
    text = fmt.format_percent(c.base.relative_reduction)
    if c.base.reduction_interval is None:
        return text
    ends = " to ".join(map(fmt.format_percent, c.base.reduction_interval))
    return f"{text} ({ends})"


def _gain(comparison: StudyComparison, study: ComparedStudy) -> str:
    c = study.summary.confirmation
    if c is None or c.decision is None:
        return fmt.NOTHING
    found = c.decision.against_default
    verdict = c.decision.verdict.value
    if found is None:
        return verdict
    ends = fmt.format_range(found.low, found.high)
    return f"{verdict}: {fmt.format_difference(found.difference)} ({ends})"


def _group(comparison: StudyComparison, study: ComparedStudy) -> str:
    if study.group is None or len(comparison.groups) == 1:
        return fmt.NOTHING
    return str(study.group)


def _against_best(comparison: StudyComparison, study: ComparedStudy) -> str:
    group = comparison.group_of(study)
    if group is None or not group.differences:
        return fmt.NOTHING
    found = difference_of(comparison, study)
    if found is None:
        return "the lowest"
    return f"{fmt.format_difference(found.difference)} ({fmt.format_range(found.low, found.high)})"


def _memory(comparison: StudyComparison, study: ComparedStudy) -> str:
    chosen = study.chosen
    return fmt.format_memory(chosen.candidate.predicted_bytes if chosen else 0)


def _parameters(comparison: StudyComparison, study: ComparedStudy) -> str:
    chosen = study.chosen
    return (
        fmt.format_count(chosen.candidate.trainable_parameters)
        if chosen is not None
        else fmt.NOTHING
    )


def _step_time(comparison: StudyComparison, study: ComparedStudy) -> str:
    chosen = study.chosen
    score = chosen.score if chosen is not None else None
    return f"{score.step_s:.2g} s" if score is not None and score.step_s > 0 else fmt.NOTHING


def _num_trials(study: ComparedStudy) -> int:
    """Return the trials that were trained or tried; one answered by an earlier trial is none."""
    states = study.summary.states
    return sum(states.values()) - states.get(TrialState.CACHED.value, 0)


def _time(comparison: StudyComparison, study: ComparedStudy) -> str:
    wall_s = study.summary.cost.wall_s
    return format_duration(wall_s) if wall_s else fmt.NOTHING


_FINDINGS: Mapping[str, Callable[[StudyComparison, ComparedStudy], str]] = {
    "state": lambda comparison, study: study.summary.outcome.value,
    "recommended": _recommended,
    "rank": _setting("rank"),
    "lora_alpha": _setting("lora_alpha"),
    "lora_dropout": _setting("lora_dropout"),
    "target modules": _setting("target_set"),
    "learning rate": _setting("learning_rate"),
    "steps": lambda comparison, study: str(study.summary.steps),
    "confirmed loss": _loss,
    "group of comparable losses": _group,
    "against the best of its group": _against_best,
    "untuned base": _base_loss,
    "reduction against the base": _reduction,
    "best against its default": _gain,
    "parameters": _parameters,
    "memory": _memory,
    "a step": _step_time,
    "trials": lambda comparison, study: str(_num_trials(study)),
    "device": lambda comparison, study: study.lock.hardware.get("device", study.lock.plan.device),
    "time of the study": _time,
    "tokens trained on": lambda comparison, study: fmt.format_count(study.summary.cost.num_tokens),
    "steps trained": lambda comparison, study: fmt.format_count(study.summary.cost.total_steps),
}


def _settings(lock: StudyLock) -> dict[str, str]:
    """Return all that was set or found of a study before it began, as text by name."""
    model, data = lock.model, lock.data
    found: dict[str, object] = {
        "base model": model.hub_id or model.base,
        "revision": model.revision,
        "base parameters": fmt.format_count(model.num_parameters),
        "data": data.source,
        "format found": data.format,
        "chat template": data.chat_template,
        "rows to train on": fmt.format_count(data.num_train),
        "rows to select on": fmt.format_count(data.num_selection),
        "rows to confirm on": fmt.format_count(data.num_confirmation),
        "fingerprint of the data": data.sha256[:12],
        "compute type": lock.plan.compute_dtype,
        "lanes": lock.plan.lanes,
    }
    found |= {
        f"{section}.{key}": value
        for section, values in lock.spec.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if f"{section}.{key}" not in _NOT_SHOWN
    }
    found |= {f"version of {name}": version for name, version in lock.versions.items()}
    return {name: value_text(value) for name, value in found.items()}


def _row(comparison: StudyComparison, study: ComparedStudy) -> dict[str, object]:
    summary, lock, c = study.summary, study.lock, study.summary.confirmation
    chosen, config = study.chosen, study.summary.config
    score = chosen.score if chosen else None
    base = c.base if c else None
    decision = c.decision if c else None
    gain = decision.against_default if decision else None
    against = difference_of(comparison, study)
    return {
        "study": study.label,
        "folder": str(study.folder),
        "outcome": summary.outcome.value,
        "base": lock.model.hub_id or lock.model.base,
        "quantization": lock.model.quantization,
        "data": lock.data.source,
        "data_sha256": lock.data.sha256,
        "chosen": summary.chosen,
        **{name: getattr(config, name, None) for name in _CONFIG_COLUMNS},
        "steps": summary.steps,
        "group": study.group,
        **_interval("loss", score.loss if score else None, score),
        **_interval("difference_to_best", against.difference if against else None, against),
        "difference_p_adjusted": against.p_adjusted if against else None,
        "base_loss": base.loss if base else None,
        "relative_reduction": base.relative_reduction if base else None,
        "verdict": decision.verdict.value if decision else None,
        **_interval("difference_to_default", gain.difference if gain else None, gain),
        "trainable_parameters": chosen.candidate.trainable_parameters if chosen else None,
        "predicted_bytes": chosen.candidate.predicted_bytes if chosen else None,
        "step_s": score.step_s if score and score.step_s > 0 else None,
        "trials": _num_trials(study),
        "wall_s": summary.cost.wall_s,
        "num_tokens": summary.cost.num_tokens,
        "total_steps": summary.cost.total_steps,
    }


_CONFIG_COLUMNS = (
    "rank",
    "lora_alpha",
    "lora_dropout",
    "target_set",
    "learning_rate",
    "use_rslora",
)


def _interval(name: str, value: float | None, ends: object) -> dict[str, object]:
    return {
        name: value,
        f"{name}_low": getattr(ends, "low", None),
        f"{name}_high": getattr(ends, "high", None),
    }
