"""Several studies side by side: confirmed losses with intervals, and loss against memory."""

from collections.abc import Sequence

import altair as alt

from lora_tune.records import UNTUNED, CandidateScore, Confirmation, Decision, StudySnapshot
from lora_tune.report import formatting as fmt
from lora_tune.report.charts.chart import GREY, ReportChart, Row, layer, report_chart
from lora_tune.report.charts.loss_memory import standing
from lora_tune.report.charts.values import (
    LOSS,
    SETTINGS_TOOLTIP,
    candidate_name,
    clean,
    gib,
    legend,
    listed,
    rounded,
    settings_row,
)
from lora_tune.report.comparison import compare_studies, same_rows

_RECOMMENDED, _DEFAULT = "recommended", "default"
_ROLES = (_RECOMMENDED, _DEFAULT, UNTUNED)
_SHAPES = ("diamond", "circle", "square")
Decided = list[tuple[str, StudySnapshot, Confirmation, Decision]]


def compared_losses_chart(snapshots: Sequence[StudySnapshot]) -> ReportChart | None:
    """Return what each study confirmed, None when none has decided."""
    decided = _decided(snapshots)
    if not decided:
        return None
    rows = [row for study in decided for row in _loss_rows(*study)]
    roles = [role for role in _ROLES if any(row["k"] == role for row in rows)]
    names = [name for name, *_ in decided]
    return report_chart(
        _loss_layers(names, roles),
        name="compare-losses",
        title=_losses_title(snapshots, decided),
        text=_losses_text(decided),
        caption=(
            "Confirmed losses on rows that the search never saw, with 95 % intervals over rows and seeds. "
            f"{_same_rows_text(decided)}"
        ),
        rows={"losses": rows},
        height=70 + 34 * len(names) * len(roles),
    )


def compared_memory_chart(snapshots: Sequence[StudySnapshot]) -> ReportChart | None:
    """Return loss against memory of all confirmed candidates, None when no study has decided."""
    decided = _decided(snapshots)
    if not decided:
        return None
    rows = [
        {
            **_score_row(name, confirmation, score),
            "k": standing(decision, score.candidate),
            "b": int(score.candidate == decision.chosen),
        }
        for name, _, confirmation, decision in decided
        for score in decision.scores
    ]
    return report_chart(
        _memory_layers([name for name, *_ in decided]),
        name="compare-memory",
        title=_memory_title(decided),
        text=_memory_text(decided),
        caption=(
            "Each mark is a confirmed candidate with its 95 % interval, the large ones are recommended; "
            "colour and shape are the study. Memory is the estimate of a lane that trains alone. "
            f"{_same_rows_text(decided)}"
        ),
        rows={"candidates": rows},
        zoom="candidates",
    )


def study_names(snapshots: Sequence[StudySnapshot]) -> list[str]:
    """Return a name for each study: its own, its folder where names are not unique, each once."""
    names = [snapshot.lock.name for snapshot in snapshots]
    labels = [
        clean(name if names.count(name) == 1 else str(snapshot.folder), 40)
        for name, snapshot in zip(names, snapshots, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} #{number}"
        for number, label in enumerate(labels, start=1)
    ]


def _decided(snapshots: Sequence[StudySnapshot]) -> Decided:
    pairs = zip(study_names(snapshots), snapshots, strict=True)
    return [
        (name, snapshot, snapshot.confirmation, snapshot.confirmation.decision)
        for name, snapshot in pairs
        if snapshot.confirmation is not None
        and snapshot.confirmation.decision is not None
        and snapshot.confirmation.decision.scores
    ]


def _score(decision: Decision, name: str | None) -> CandidateScore | None:
    return next((score for score in decision.scores if score.candidate == name), None)


def _score_row(study: str, confirmation: Confirmation, score: CandidateScore) -> Row:
    return {
        **settings_row(confirmation.candidate(score.candidate).config),
        "n": study,
        "t": candidate_name(confirmation, score.candidate),
        "y": rounded(score.loss),
        "lo": rounded(score.low),
        "hi": rounded(score.high),
        "x": gib(score.peak_bytes),
    }


def _loss_rows(
    name: str, snapshot: StudySnapshot, confirmation: Confirmation, decision: Decision
) -> list[Row]:
    rows: list[Row] = []
    for role, candidate in ((_RECOMMENDED, decision.chosen), (_DEFAULT, decision.default)):
        score = _score(decision, candidate)
        same = role == _DEFAULT and decision.default == decision.chosen
        if score is not None and not same:
            rows.append({**_score_row(name, confirmation, score), "k": role})
    if confirmation.base_evaluation is not None:
        loss = rounded(confirmation.base_evaluation.mean_loss)
        rows.append({"n": name, "t": UNTUNED, "k": UNTUNED, "y": loss, "lo": loss, "hi": loss})
    return rows


def _loss_layers(names: list[str], roles: list[str]) -> list[alt.Chart]:
    rows = layer("losses")
    y = alt.Y("n:N", sort=names, title=None, axis=alt.Axis(labelLimit=110))
    offset = alt.YOffset("k:N", scale=alt.Scale(domain=roles))
    x = alt.X("y:Q", title=f"loss ({LOSS})", scale=alt.Scale(zero=False, nice=False, padding=16))
    key = legend(roles)
    shapes = [_SHAPES[_ROLES.index(role)] for role in roles]
    color = alt.Color("k:N", scale=alt.Scale(domain=roles), legend=key)
    shape = alt.Shape("k:N", scale=alt.Scale(domain=roles, range=shapes), legend=key)
    tooltip = [alt.Tooltip("n:N", title="study"), alt.Tooltip("k:N", title="result"), *_TOOLTIP]
    return [
        rows.mark_rule(strokeWidth=2).encode(x="lo:Q", x2="hi:Q", y=y, yOffset=offset, color=color),
        rows.mark_point(filled=True, size=110, opacity=1).encode(
            x=x, y=y, yOffset=offset, color=color, shape=shape, tooltip=tooltip
        ),
    ]


_TOOLTIP = (
    alt.Tooltip("t:N", title="candidate"),
    *SETTINGS_TOOLTIP,
    alt.Tooltip("y:Q", title="confirmed loss", format=".4~g"),
    alt.Tooltip("lo:Q", title="95 % interval from", format=".4~g"),
    alt.Tooltip("hi:Q", title="to", format=".4~g"),
)


def _memory_layers(names: list[str]) -> list[alt.Chart]:
    rows = layer("candidates")
    x = alt.X(
        "x:Q",
        title="predicted peak of a lane alone (GiB)",
        scale=alt.Scale(zero=False, nice=False, padding=24),
    )
    y = alt.Y("y:Q", title=f"loss ({LOSS})", scale=alt.Scale(zero=False, nice=False, padding=12))
    key = legend(names, "study")
    color = alt.Color("n:N", scale=alt.Scale(domain=names), legend=key)
    shape = alt.Shape("n:N", scale=alt.Scale(domain=names), legend=key)
    size = alt.condition("datum.b == 1", alt.value(190), alt.value(70))
    tooltip = [
        alt.Tooltip("n:N", title="study"),
        alt.Tooltip("k:N", title="result"),
        *_TOOLTIP,
        alt.Tooltip("x:Q", title="predicted GiB", format=".2f"),
    ]
    return [
        rows.mark_rule(strokeWidth=1.5, color=GREY, opacity=0.8).encode(x=x, y="lo:Q", y2="hi:Q"),
        rows.mark_point(filled=True, opacity=1).encode(
            x=x, y=y, color=color, shape=shape, size=size, tooltip=tooltip
        ),
    ]


def _same_rows(decided: Decided) -> bool:
    first = decided[0][1]
    return all(same_rows(first, snapshot) for _, snapshot, *_ in decided[1:])


def _same_rows_text(decided: Decided) -> str:
    if _same_rows(decided):
        return "All were confirmed on the same rows."
    return "They were not all confirmed on the same rows: losses on other rows do not compare."


def _chosen(decided: Decided) -> dict[str, CandidateScore]:
    """Return the score of what each study recommends, the lowest loss first."""
    found = {name: score for name, *_, d in decided if (score := _score(d, d.chosen)) is not None}
    return dict(sorted(found.items(), key=lambda item: item[1].loss))


def _losses_title(snapshots: Sequence[StudySnapshot], decided: Decided) -> str:
    chosen = _chosen(decided)
    best, score = next(iter(chosen.items()))
    if len(chosen) < 2:
        return (
            f"Of {fmt.format_count(len(snapshots))} studies {best} alone is confirmed, with a loss of "
            f"{fmt.format_loss(score.loss)}."
        )
    losses = [f"{name} {fmt.format_loss(s.loss)}" for name, s in chosen.items()]
    if not _same_rows(decided):
        return (
            "Not all were confirmed on the same rows, and losses on other rows do not compare: "
            f"{listed(losses)}."
        )
    text = f"{best} has the lowest confirmed loss, {fmt.format_loss(score.loss)}"
    near = _not_told_apart(decided)
    if not near:
        others = "the other is" if len(chosen) == 2 else "the others are"
        return f"{text}; {others} higher by more than noise."
    return f"{text}; not to be told from it: {listed(near)}."


def _not_told_apart(decided: Decided) -> list[str]:
    """Return the studies whose difference from the best, paired row by row, may be noise."""
    names = [name for name, *_ in decided]
    found = compare_studies([snapshot for _, snapshot, *_ in decided])
    labels = {study.label: name for study, name in zip(found.studies, names, strict=True)}
    return [
        labels[difference.study]
        for group in found.groups
        for difference in group.differences
        if difference.low <= 0 or difference.p_adjusted >= 0.05
    ]


def _losses_text(decided: Decided) -> str:
    items = []
    for name, _, confirmation, decision in decided:
        scores = [
            f"{role}{candidate_name(confirmation, score.candidate)} {fmt.format_loss(score.loss)} "
            f"({fmt.format_loss(score.low)} to {fmt.format_loss(score.high)})"
            for role, candidate in ((f"{_RECOMMENDED} ", decision.chosen), ("", decision.default))
            if (score := _score(decision, candidate)) is not None
        ]
        if confirmation.base_evaluation is not None:
            scores.append(f"{UNTUNED} {fmt.format_loss(confirmation.base_evaluation.mean_loss)}")
        items.append(f"{name}: {', '.join(scores)}")
    return f"Confirmed losses with 95 % intervals. {'; '.join(items)}."


def _memory_title(decided: Decided) -> str:
    chosen = _chosen(decided)
    least = min(chosen, key=lambda name: chosen[name].peak_bytes)
    most = max(chosen, key=lambda name: chosen[name].peak_bytes)
    if chosen[least].peak_bytes == chosen[most].peak_bytes:
        what = f"{fmt.plural(len(chosen), 'recommendation')}: {fmt.format_memory(chosen[least].peak_bytes)}"
        return f"Memory to train what is recommended, {what}."
    return (
        f"What is recommended needs {fmt.format_memory(chosen[least].peak_bytes)} ({least}) to "
        f"{fmt.format_memory(chosen[most].peak_bytes)} ({most}) to train alone."
    )


def _memory_text(decided: Decided) -> str:
    items = [
        f"{name}: "
        + ", ".join(
            f"{candidate_name(confirmation, s.candidate)} {fmt.format_loss(s.loss)} in "
            f"{fmt.format_memory(s.peak_bytes)}"
            for s in decision.scores
        )
        for name, _, confirmation, decision in decided
    ]
    return f"Confirmed candidates, loss and memory. {'; '.join(items)}."
