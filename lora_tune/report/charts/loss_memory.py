"""Loss against memory: what the confirmed candidates reach and need, and the front of trade-offs."""

from collections.abc import Mapping
from statistics import median

import altair as alt

from lora_tune.records import CandidateScore, Confirmation, Decision, StudySnapshot, TrialRecord
from lora_tune.report import formatting as fmt
from lora_tune.report.charts.chart import GREY, ReportChart, Row, layer, report_chart
from lora_tune.report.charts.theme import HALO
from lora_tune.report.charts.values import (
    LOSS,
    SETTINGS_TOOLTIP,
    TRIAL_TOOLTIP,
    candidate_name,
    decision_of,
    gib,
    leader,
    legend,
    listed,
    loss_ceiling,
    own_trials,
    rounded,
    sentence_case,
    settings_row,
    trial_row,
)
from lora_tune.report.ranking import has_result

NAME = "loss-memory"
_STANDINGS = ("recommended", "best", "tied with the best", "worse than the best")
_SHAPES = ("diamond", "square", "circle", "triangle-up")


def loss_memory_chart(snapshot: StudySnapshot) -> ReportChart | None:
    """Return the chart, None before any trial has a result."""
    confirmation, decision = snapshot.confirmation, decision_of(snapshot)
    if confirmation is None or decision is None or not decision.scores:
        return _search_chart(snapshot)
    scores = decision.scores
    alone = alone_bytes(snapshot)
    trials = [
        trial for trial in own_trials(snapshot) if trial.number in alone and has_result(trial)
    ]
    top = max(loss_ceiling([_loss(t) for t in trials] or [0.0]), *(s.high for s in scores))
    candidates = [_candidate_row(s, confirmation, decision) for s in scores]
    names = sorted(candidates, key=lambda row: float(str(row["x"])))
    x = _memory_axis("predicted peak of a lane alone")
    rows = {
        "candidates": candidates,
        "names_above": names[::2],  # above and below in turns, so that neighbours keep apart
        "names_below": names[1::2],
        "front": _front_rows(decision),
        "trials": [_trial_row(t, alone[t.number], top) for t in trials],
    }
    return report_chart(
        [*_trial_layers(x), *_candidate_layers(_present(candidates), x)],
        name=NAME,
        title=_title(confirmation, decision),
        text=_text(confirmation, decision, num_trials=len(trials)),
        caption=_caption(decision, shown=bool(trials), lanes=snapshot.lock.plan.lanes),
        rows=rows,
        zoom="candidates",
    )


def alone_bytes(snapshot: StudySnapshot) -> Mapping[int, float]:
    """Return what each trial's lane needs alone, about, by trial number; nothing where that is unknown.

    A trial's own estimate is of a full pack of K such lanes. What a pack needs grows evenly with its
    lanes: pack = shared + K * lane, alone = shared + lane. The candidates that were trials have both
    estimates, and their median gives ``shared``. By the closed form this is within 0.2 % for a base of
    8 billion parameters and within 5 % for one of 135 million.
    """
    lanes = snapshot.lock.plan.lanes
    packs = {trial.number: trial.predicted_bytes for trial in snapshot.trials}
    if lanes <= 1:
        return packs
    candidates = snapshot.confirmation.candidates if snapshot.confirmation is not None else ()
    shared = [
        (lanes * c.predicted_bytes - packs[c.trial]) / (lanes - 1)
        for c in candidates
        if c.trial in packs
    ]
    if not shared or not 0 <= median(shared) < min(packs.values()):
        return {}
    base = median(shared)
    return {number: base + (pack - base) / lanes for number, pack in packs.items()}


def _loss(trial: TrialRecord) -> float:
    """Return the loss at the highest rung of a trial that has one."""
    assert trial.best_loss is not None
    return trial.best_loss


def _trial_row(trial: TrialRecord, num_bytes: float, top: float) -> Row:
    loss = _loss(trial)
    return {
        **trial_row(trial),
        "x": gib(num_bytes),
        "y": rounded(min(loss, top)),
        "l": rounded(loss),
        "n": trial.steps,
        "o": "above the axis" if loss > top else "",
    }


def _candidate_row(score: CandidateScore, confirmation: Confirmation, decision: Decision) -> Row:
    name = score.candidate
    return {
        **settings_row(confirmation.candidate(name).config),
        "t": candidate_name(confirmation, name),
        "k": standing(decision, name),
        "x": gib(score.peak_bytes),
        "y": rounded(score.loss),
        "lo": rounded(score.low),
        "hi": rounded(score.high),
        "f": "yes" if name in decision.front.members else "no",
    }


def standing(decision: Decision, name: str) -> str:
    """Return where a candidate stands, as in the legend."""
    if name == decision.chosen:
        return _STANDINGS[0]
    if name == decision.best:
        return _STANDINGS[1]
    return _STANDINGS[2] if name in decision.tied else _STANDINGS[3]


def _present(rows: list[Row]) -> list[str]:
    """Return the standings that occur, in the order of the legend."""
    found = {row["k"] for row in rows}
    return [standing for standing in _STANDINGS if standing in found]


def _front_rows(decision: Decision) -> list[Row]:
    """Return the members of the front that are one in loss and memory alone too, by memory.

    Members that owe their place to their time lie above the line, which is drawn in two dimensions.
    """
    members = [s for s in decision.scores if s.candidate in decision.front.members]
    ordered = sorted(members, key=lambda s: (s.peak_bytes, s.loss))
    rows: list[Row] = []
    lowest = float("inf")
    for score in ordered:
        if score.loss < lowest:
            lowest = score.loss
            rows.append({"x": gib(score.peak_bytes), "y": rounded(score.loss)})
    return rows


def _memory_axis(what: str) -> alt.X:
    scale = alt.Scale(zero=False, nice=False, padding=44)
    return alt.X("x:Q", title=f"{what} (GiB)", scale=scale)


def _loss_axis(field: str = "y") -> alt.Y:
    scale = alt.Scale(zero=False, nice=False, padding=24)
    return alt.Y(f"{field}:Q", title=f"loss ({LOSS})", scale=scale)


def _trial_layers(x: alt.X) -> list[alt.Chart]:
    points = layer("trials").mark_point(filled=True, size=28, opacity=0.45, color=GREY)
    shape = alt.condition("datum.o", alt.value("triangle-up"), alt.value("circle"))
    return [
        points.encode(
            x=x,
            y=_loss_axis(),
            shape=shape,
            tooltip=[
                *TRIAL_TOOLTIP,
                alt.Tooltip("n:Q", title="steps"),
                alt.Tooltip("l:Q", title="loss in the search", format=".4~g"),
                alt.Tooltip("x:Q", title="predicted GiB", format=".2f"),
            ],
        )
    ]


def _candidate_layers(standings: list[str], x: alt.X) -> list[alt.Chart]:
    shapes = [_SHAPES[_STANDINGS.index(standing)] for standing in standings]
    key = legend(standings)
    color = alt.Color("k:N", scale=alt.Scale(domain=standings), legend=key)
    shape = alt.Shape("k:N", scale=alt.Scale(domain=standings, range=shapes), legend=key)
    tooltip = [
        alt.Tooltip("t:N", title="candidate"),
        alt.Tooltip("k:N", title="result"),
        alt.Tooltip("f:N", title="on the Pareto front"),
        *SETTINGS_TOOLTIP,
        alt.Tooltip("y:Q", title="confirmed loss", format=".4~g"),
        alt.Tooltip("lo:Q", title="95 % interval from", format=".4~g"),
        alt.Tooltip("hi:Q", title="to", format=".4~g"),
        alt.Tooltip("x:Q", title="predicted GiB", format=".2f"),
    ]
    rows = layer("candidates")
    return [
        layer("front")
        .mark_line(strokeDash=[5, 4], color=GREY, strokeWidth=1.5, interpolate="step-after")
        .encode(x=x, y=_loss_axis(), order="x:Q"),
        rows.mark_rule(strokeWidth=2).encode(x=x, y=_loss_axis("lo"), y2="hi:Q", color=color),
        rows.mark_point(filled=True, size=150, opacity=1).encode(
            x=x, y=_loss_axis(), color=color, shape=shape, tooltip=tooltip
        ),
        *_label_layers(x),
    ]


def _label_layers(x: alt.X) -> list[alt.Chart]:
    """Return the names at the ends of the intervals."""
    sides = (("names_above", "hi", "bottom", -5), ("names_below", "lo", "top", 5))
    return [
        layer(rows)
        .mark_text(baseline=baseline, dy=dy, **style)
        .encode(x=x, y=_loss_axis(end), text="t:N")
        for rows, end, baseline, dy in sides
        for style in ({"style": HALO}, {})
    ]


def _title(confirmation: Confirmation, decision: Decision) -> str:
    scores = {score.candidate: score for score in decision.scores}
    chosen, best = scores[decision.chosen], scores[decision.best]
    who = sentence_case(candidate_name(confirmation, chosen.candidate))
    if chosen is not best:
        saved = best.peak_bytes - chosen.peak_bytes
        cost = f"needs {fmt.format_memory(saved)} less" if saved > 0 else "is preferred"
        return f"{who} is tied with the best, {candidate_name(confirmation, best.candidate)}, and {cost}."
    if len(scores) == 1:
        return (
            f"{who} is the only candidate that was confirmed: loss {fmt.format_loss(chosen.loss)}, "
            f"{fmt.format_memory(chosen.peak_bytes)} alone."
        )
    text = (
        f"{who} has the lowest confirmed loss, {fmt.format_loss(chosen.loss)}, and needs "
        f"{fmt.format_memory(chosen.peak_bytes)} alone"
    )
    smaller = [s for s in scores.values() if s.peak_bytes < chosen.peak_bytes]
    if not smaller:
        return f"{text}, the least of those confirmed."
    least_one = min(smaller, key=lambda s: (s.peak_bytes, s.loss))
    return (
        f"{text}; {candidate_name(confirmation, least_one.candidate)} needs "
        f"{fmt.format_memory(least_one.peak_bytes)} for {fmt.format_loss(least_one.loss)}."
    )


def _text(confirmation: Confirmation, decision: Decision, *, num_trials: int) -> str:
    items = [
        f"{candidate_name(confirmation, s.candidate)}: loss {fmt.format_loss(s.loss)} (95 % interval "
        f"{fmt.format_loss(s.low)} to {fmt.format_loss(s.high)}), {fmt.format_memory(s.peak_bytes)}, "
        f"{standing(decision, s.candidate)}"
        for s in decision.scores
    ]
    front = listed([candidate_name(confirmation, name) for name in decision.front.members])
    text = f"Confirmed candidates by loss: {'; '.join(items)}. Pareto front: {front}."
    return f"{text} {fmt.plural(num_trials, 'trial')} of the search behind." if num_trials else text


def _caption(decision: Decision, *, shown: bool, lanes: int) -> str:
    text = (
        "Large marks: candidates trained again with fresh seeds, loss on rows that the search never saw, "
        "with 95 % intervals. Dashed: the Pareto front, where less memory costs loss. Memory is the "
        "estimate of a lane that trains alone."
    )
    if not shown:
        return text
    about = " Their memory is worked out from the estimate of a pack." if lanes > 1 else ""
    return (
        f"{text} Small grey marks: trials of the search at their highest rung, on other rows and many "
        f"after fewer steps, so not to be compared with the large ones.{about}"
    )


def _search_chart(snapshot: StudySnapshot) -> ReportChart | None:
    """Return the chart of a study without a decision: its trials alone."""
    trials = [trial for trial in own_trials(snapshot) if has_result(trial)]
    best = leader(snapshot)
    if not trials or best is None:
        return None
    top = loss_ceiling([_loss(trial) for trial in trials])
    lanes = snapshot.lock.plan.lanes
    memory = "a lane alone" if lanes == 1 else f"a pack of {lanes} such lanes"
    loss, size = fmt.format_loss(best.best_loss), fmt.format_memory(best.predicted_bytes)
    low, high = (pick(t.predicted_bytes for t in trials) for pick in (min, max))
    return report_chart(
        _trial_layers(_memory_axis(f"predicted peak of {memory}")),
        name=NAME,
        title=(
            f"Not confirmed yet: trial {best.number} is the best so far, loss {loss} after "
            f"{fmt.plural(best.steps, 'step')}, {size} for {memory}."
        ),
        text=(
            f"{fmt.plural(len(trials), 'trial')} with a result, losses "
            f"{fmt.format_loss(min(map(_loss, trials)))} to {fmt.format_loss(max(map(_loss, trials)))}, "
            f"{fmt.format_memory(low)} to {fmt.format_memory(high)}."
        ),
        caption=(
            "Each mark is a trial at its highest rung, on the rows on which trials are chosen. Losses "
            "after different numbers of steps do not compare; nothing here is confirmed."
        ),
        rows={"trials": [_trial_row(t, t.predicted_bytes, top) for t in trials]},
        zoom="trials",
    )
