"""The confirmation as tables: how each candidate scored, what it is and costs, metrics beside the loss."""

from lora_tune.records import UNTUNED
from lora_tune.report import formatting as fmt
from lora_tune.report.confirmation import (
    DEFAULT,
    BaseSummary,
    CandidateSummary,
    ConfirmationSummary,
    MetricSummary,
)
from lora_tune.report.verdict import standing_text

SCORE_HEADERS = (
    "candidate",
    "loss",
    "95 % interval",
    "search loss",
    "gap",
    "each seed",
    "to the best",
    "its 95 % interval",
    "p",
    "result",
)
SETTING_HEADERS = (
    "candidate",
    "origin",
    "rank",
    "alpha",
    "dropout",
    "targets",
    "lr",
    "steps",
    "parameters",
    "memory",
    "s a step",
)


def score_table(c: ConfirmationSummary) -> tuple[list[str], list[list[str]]]:
    """Return the candidates by confirmed loss and the untuned base, without columns that are empty."""
    rows = _score_rows(c)
    used = [i for i in range(len(SCORE_HEADERS)) if any(row[i] != fmt.NOTHING for row in rows)]
    return [SCORE_HEADERS[i] for i in used], [[row[i] for i in used] for row in rows]


def _score_rows(c: ConfirmationSummary) -> list[tuple[str, ...]]:
    rows = [_score_row(candidate, _label(c, candidate.name)) for candidate in c.candidates]
    if c.base is not None:
        ends = fmt.NOTHING
        if c.base.interval is not None:
            ends = " to ".join(map(fmt.format_loss, c.base.interval))
        rows.append(
            (
                UNTUNED,
                fmt.format_loss(c.base.loss),
                ends,
                *_base_seen(c.base),
                *[fmt.NOTHING] * 4,
                "",
            )
        )
    return rows


def _base_seen(base: BaseSummary) -> tuple[str, str]:
    if base.selection_loss is None:
        return fmt.NOTHING, fmt.NOTHING
    gap = fmt.format_difference(base.loss - base.selection_loss)
    return fmt.format_loss(base.selection_loss), gap


def _score_row(candidate: CandidateSummary, name: str) -> tuple[str, ...]:
    score = candidate.score
    if score is None:
        seen = fmt.format_loss(candidate.search_loss)
        return (name, *[fmt.NOTHING] * 2, seen, *[fmt.NOTHING] * 5, _state_text(candidate))
    difference = candidate.against_best
    return (
        name,
        fmt.format_loss(score.loss),
        f"{fmt.format_loss(score.low)} to {fmt.format_loss(score.high)}",
        fmt.format_loss(candidate.search_loss),
        fmt.format_difference(candidate.gap),
        ", ".join(map(fmt.format_loss, score.seed_losses)),
        fmt.format_difference(difference.difference if difference else None),
        fmt.format_range(difference.low, difference.high) if difference else fmt.NOTHING,
        fmt.format_p(difference.p_adjusted).removeprefix("p ").removeprefix("= ")
        if difference
        else fmt.NOTHING,
        standing_text(candidate),
    )


def _state_text(candidate: CandidateSummary) -> str:
    if candidate.reasons:
        return f"failed: {'; '.join(map(fmt.one_line, candidate.reasons))}"
    return f"{fmt.plural(candidate.runs_done, 'run')} done"


def setting_rows(c: ConfirmationSummary) -> list[tuple[str, ...]]:
    """Return what each candidate is and costs, in the columns of SETTING_HEADERS."""
    return [_setting_row(candidate, _label(c, candidate.name)) for candidate in c.candidates]


def _setting_row(candidate: CandidateSummary, name: str) -> tuple[str, ...]:
    record, score = candidate.candidate, candidate.score
    config = record.config
    return (
        name,
        fmt.one_line(candidate.origin),
        str(config.rank),
        fmt.format_plain(config.lora_alpha),
        fmt.format_plain(config.lora_dropout),
        fmt.one_line(config.target_set),
        fmt.format_scientific(config.learning_rate),
        str(record.steps),
        fmt.format_count(record.trainable_parameters),
        fmt.format_memory(record.predicted_bytes),
        f"{score.step_s:.2g}" if score is not None and score.step_s > 0 else fmt.NOTHING,
    )


def metric_caption(c: ConfirmationSummary) -> str:
    """Say what the metrics are means of."""
    text = "Metrics beside the loss, mean over the confirmation rows (95 % interval of the rows)"
    one_run = c.seeds > 1 and all(m.num_seeds <= 1 for m in c.metrics)
    return f"{text}, of each candidate's run of median loss" if one_run else text


def metric_table(c: ConfirmationSummary) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows: one row a candidate and the untuned base, one column a metric."""
    subjects = list(dict.fromkeys(m.subject for m in c.metrics))
    names = list(dict.fromkeys(m.metric for m in c.metrics))
    cells = {(m.metric, m.subject): metric_text(m) for m in c.metrics}
    rows = [
        [_label(c, subject), *(cells.get((name, subject), fmt.NOTHING) for name in names)]
        for subject in subjects
    ]
    return ["candidate", *map(fmt.one_line, names)], rows


def metric_reasons(c: ConfirmationSummary) -> list[str]:
    """Return why values are missing, one sentence a metric and reason."""
    subjects: dict[tuple[str, str], list[str]] = {}
    for m in c.metrics:
        for reason in m.reasons:
            subjects.setdefault((m.metric, reason), []).append(_label(c, m.subject))
    everyone = len({m.subject for m in c.metrics})
    whose = {
        key: "" if len(s) == everyone else f" for {', '.join(s)}" for key, s in subjects.items()
    }
    return [
        f"{fmt.one_line(metric)} has no value{whose[metric, reason]}: {fmt.one_line(reason)}."
        for metric, reason in subjects
    ]


def _label(c: ConfirmationSummary, name: str) -> str:
    """Return a candidate's name in a table's first column."""
    return f"{fmt.one_line(name)} (default)" if name == c.default != DEFAULT else fmt.one_line(name)


def metric_text(metric: MetricSummary) -> str:
    """Return a metric's mean with its interval, both without digits that the rows cannot show."""
    if metric.mean is None:
        return fmt.NOTHING
    text = fmt.format_metric(metric.mean)
    if metric.interval is None:
        return text
    low, high = map(fmt.format_metric, metric.interval)
    return f"{text} ({low} to {high})"
