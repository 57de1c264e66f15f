"""What the charts share: rows of trials, text made safe and short, and where an axis of losses ends."""

from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles

import altair as alt

from lora_tune.records import (
    Candidate,
    Confirmation,
    Decision,
    RungResult,
    StudySnapshot,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.report import formatting as fmt
from lora_tune.report.charts.chart import Row
from lora_tune.report.confirmation import called
from lora_tune.report.ranking import is_candidate, ranked, result_at
from lora_tune.units import GIB

_PHONE, _LETTER, _SYMBOL, _LONGEST = 310, 6.4, 30, 28
"""Pixels that a legend may be wide, of a letter, and of a symbol with its gap; letters of a name."""

LOSS = "nats per target token"

SETTINGS_TOOLTIP = (
    alt.Tooltip("r:Q", title="rank"),
    alt.Tooltip("a:Q", title="lora_alpha", format="~g"),
    alt.Tooltip("d:Q", title="dropout", format="~g"),
    alt.Tooltip("m:N", title="targets"),
    alt.Tooltip("lr:Q", title="learning rate", format=".2~e"),
)
TRIAL_TOOLTIP = (
    alt.Tooltip("t:N", title="trial"),
    alt.Tooltip("s:N", title="state"),
    *SETTINGS_TOOLTIP,
)


def clean(text: str, limit: int = 60) -> str:
    r"""Return foreign text on one line of at most ``limit`` characters, fit for XML.

    >>> clean("all\nlinear"), clean("abcdef", 5)
    ('all linear', 'ab...')
    """
    line = fmt.one_line(text).replace("\ufffe", "").replace("\uffff", "")
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def rounded(value: float) -> float:
    """Return a number with 6 significant digits: more cannot be seen, and makes pages large."""
    return float(f"{value:.6g}")


def gib(num_bytes: float) -> float:
    """Return bytes as GiB, rounded for a chart."""
    return rounded(num_bytes / GIB)


def settings_row(config: TrialConfig) -> Row:
    """Return what ``SETTINGS_TOOLTIP`` shows."""
    return {
        "r": config.rank,
        "a": rounded(config.lora_alpha),
        "d": rounded(config.lora_dropout),
        "m": set_name(config),
        "lr": rounded(config.learning_rate),
    }


def trial_row(trial: TrialRecord) -> Row:
    """Return what ``TRIAL_TOOLTIP`` shows."""
    return {"t": f"trial {trial.number}", "s": trial.state.value, **settings_row(trial.config)}


def own_trials(snapshot: StudySnapshot) -> list[TrialRecord]:
    """Return the trials that trained something themselves: a cached one would count twice."""
    return [trial for trial in snapshot.trials if trial.state is not TrialState.CACHED]


def first_results(snapshot: StudySnapshot) -> list[tuple[TrialRecord, RungResult]]:
    """Return the trials with a finite loss at the first rung: all of these compare."""
    pairs = [(trial, result_at(trial, 0)) for trial in own_trials(snapshot)]
    return [(trial, result) for trial, result in pairs if result is not None]


def diverged_first(snapshot: StudySnapshot) -> list[TrialRecord]:
    """Return the trials that diverged before they had a loss at the first rung."""
    trained = {trial.number for trial, _ in first_results(snapshot)}
    diverged = (t for t in own_trials(snapshot) if t.state is TrialState.DIVERGED)
    return [trial for trial in diverged if trial.number not in trained]


def set_names(trials: Sequence[TrialRecord]) -> list[str]:
    """Return the target sets by size: trained parameters of one rank."""
    sizes = {set_name(t.config): t.trainable_parameters / t.config.rank for t in trials}
    return sorted(sizes, key=lambda name: (sizes[name], name))


def set_name(config: TrialConfig) -> str:
    """Return a configuration's target set as charts have it."""
    return clean(config.target_set, 40)


def first_steps(snapshot: StudySnapshot) -> str:
    """Return the first rung in words, with its length."""
    steps = snapshot.lock.rungs[0] if snapshot.lock.rungs else 0
    return f"the first rung ({fmt.plural(steps, 'step')})"


def decision_of(snapshot: StudySnapshot) -> Decision | None:
    """Return what the confirmation decided, None before it did."""
    return snapshot.confirmation.decision if snapshot.confirmation is not None else None


def candidates_of(snapshot: StudySnapshot) -> Mapping[str, Candidate]:
    """Return the candidates of the confirmation by name."""
    found = snapshot.confirmation.candidates if snapshot.confirmation is not None else ()
    return {candidate.name: candidate for candidate in found}


def candidate_name(confirmation: Confirmation, name: str) -> str:
    """Return a candidate's name as it stands beside a mark and in a sentence."""
    return clean(called(name, default=confirmation.default))


def leader(snapshot: StudySnapshot) -> TrialRecord | None:
    """Return the trial of the recommended candidate, before the decision the best trial so far.

    None when there is no such trial, as for a default that the search did not try.
    """
    decision = decision_of(snapshot)
    if decision is not None:
        chosen = candidates_of(snapshot).get(decision.chosen)
        number = chosen.trial if chosen is not None else None
        return next((trial for trial in snapshot.trials if trial.number == number), None)
    ranking = ranked(snapshot.trials)
    return ranking[0] if ranking and is_candidate(ranking[0]) else None


def leader_word(snapshot: StudySnapshot) -> str:
    """Return what the leader is: recommended, or best so far."""
    return "recommended" if decision_of(snapshot) is not None else "best so far"


def loss_ceiling(losses: Sequence[float]) -> float:
    """Return the highest loss that an axis has room for.

    A few very bad trials would press all others together. So it is the upper fence of a box plot,
    the third quartile and 1.5 times the distance of the quartiles, where a loss lies above it.

    Source: Tukey, Exploratory Data Analysis, 1977, section 2D.

    >>> loss_ceiling([2.0, 2.1, 2.2, 2.3]), round(loss_ceiling([2.0, 2.1, 2.2, 2.3, 9.0]), 2)
    (2.3, 2.6)
    """
    highest = max(losses)
    if len(losses) < 5:
        return highest
    low, _, high = quantiles(losses, n=4, method="inclusive")
    fence = high + 1.5 * (high - low)
    return highest if highest <= fence else max(fence, min(losses) * 1.01)


def sentence_case(text: str) -> str:
    """Return text with a large first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


def between(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Return the ends of what occurs, or the only value.

    >>> between([2, 1, 3], str), between([4, 4], str)
    ('1 to 3', '4')
    """
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def legend(names: Sequence[str], title: str | None = None) -> alt.Legend:
    """Return a legend of these names in as many columns as a phone has room for."""
    width = max(_LETTER * min(len(name), _LONGEST) + _SYMBOL for name in names)
    columns = max(1, min(len(names), int(_PHONE / width)))
    return alt.Legend(title=title, columns=columns, labelLimit=round(_LETTER * _LONGEST))
