"""The sentences of a comparison of studies. Plain text, not escaped."""

import json
from collections.abc import Iterable, Sequence

from lora_tune.records import StudyLock
from lora_tune.report import formatting as fmt
from lora_tune.report.comparison import (
    StudyComparison,
    StudyDifference,
    StudyGroup,
)
from lora_tune.report.resolved import spec_value
from lora_tune.report.summary import Outcome


def conclusions(comparison: StudyComparison) -> list[str]:
    """Return what the comparison shows, the ranking of each group first, then what does not compare."""
    return [
        *(text for group in comparison.groups for text in _group_sentences(comparison, group)),
        *_apart(comparison),
        *_undecided(comparison),
    ]


def _group_sentences(comparison: StudyComparison, group: StudyGroup) -> Iterable[str]:
    if not group.differences:
        return
    best = group.studies[0]
    rows = group.differences[0].num_rows
    yield (
        f"{_listed(group.studies)} were confirmed on the same {fmt.plural(rows, 'row')}, so their losses "
        f"compare. The lowest is that of {best}, "
        f"{fmt.format_loss(comparison.study(best).loss)} nats per token."
    )
    for difference in group.differences:
        yield _difference_sentence(comparison, difference)


def _difference_sentence(comparison: StudyComparison, d: StudyDifference) -> str:
    reference = comparison.study(d.reference)
    side = "above" if d.difference >= 0 else "below"
    size = fmt.format_difference(abs(d.difference), signed=False)
    loss = reference.loss
    share = f" ({fmt.format_percent(abs(d.difference) / loss)})" if loss else ""
    text = (
        f"{d.study} is {size}{share} {side} {d.reference}, paired by row (95 % interval "
        f"{fmt.format_range(d.low, d.high)}, {fmt.format_p(d.p_adjusted)}, {_basis(d)})"
    )
    margin = spec_value(reference.lock.spec, "select", "practical_margin")
    if d.low <= 0 <= d.high or d.p_adjusted >= 0.05:
        return f"{text}: inside noise, neither is shown to be better."
    if loss and isinstance(margin, float) and abs(d.difference) < margin * loss:
        return f"{text}: a difference, but less than the practical margin of {fmt.format_percent(margin)}."
    return f"{text}: more than noise."


def _basis(d: StudyDifference) -> str:
    if d.seeds == 1:
        return "one seed each, which shows no seed noise"
    return f"{d.seeds} seeds each"


def _apart(comparison: StudyComparison) -> Iterable[str]:
    """Say of the groups why their losses are not ranked against each other."""
    first, *others = comparison.groups or (None,)
    if first is None:
        return
    ours = comparison.study(first.studies[0])
    for group in others:
        theirs = comparison.study(group.studies[0])
        yield (
            f"Losses of {_listed(group.studies)} are not ranked with those of {_listed(first.studies)}: they "
            "were not confirmed on the same rows in the same tokens "
            f"({_reasons(ours.lock, theirs.lock)}). What compares is each one's gain against its own "
            "default and its own untuned base."
        )


def _reasons(ours: StudyLock, theirs: StudyLock) -> str:
    """Return the settings that make the rows of two studies others, with both values."""
    pairs = [
        (
            "base model",
            ours.model.hub_id or ours.model.base,
            theirs.model.hub_id or theirs.model.base,
        ),
        ("data", ours.data.source, theirs.data.source),
        ("format", ours.data.format, theirs.data.format),
        ("chat template", ours.data.chat_template, theirs.data.chat_template),
        ("rows to train on", ours.data.num_train, theirs.data.num_train),
        ("rows to confirm on", ours.data.num_confirmation, theirs.data.num_confirmation),
        *(
            (
                f"{section}.{key}",
                spec_value(ours.spec, section, key),
                spec_value(theirs.spec, section, key),
            )
            for section, key in (
                ("study", "seed"),
                ("data", "eval"),
                ("data", "split"),
                ("data", "max_length"),
                ("data", "train_on"),
                ("data", "group"),
            )
        ),
    ]
    found = [f"{name}: {value_text(a)} and {value_text(b)}" for name, a, b in pairs if a != b]
    return "; ".join(found) or "the fingerprints of the data differ, so the file has changed"


def _undecided(comparison: StudyComparison) -> Iterable[str]:
    for study in comparison.studies:
        if study.group is not None:
            continue
        what = "unfinished" if study.summary.outcome is Outcome.UNFINISHED else "without a result"
        yield f"{study.label} is {what}: it has no confirmed loss to compare."


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def value_text(value: object) -> str:
    """Return a value of a study file as text."""
    if value is None:
        return fmt.NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return fmt.format_plain(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "none"
    return fmt.one_line(json.dumps(value) if isinstance(value, dict) else str(value))
