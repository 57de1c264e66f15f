"""The table of all trials in report.html: the text that people read, and the value that sorts it."""

from dataclasses import dataclass
from math import isfinite

from lora_tune.records import StudySnapshot, TrialRecord
from lora_tune.report.ranking import ranked
from lora_tune.report.summary import ReportSummary
from lora_tune.report.tables import Column, trial_columns, trial_row

# A column of numbers by the key of its unrounded value in ``tables.trial_row``.
SORT_KEYS = {
    "trial": "trial",
    "rank": "rank",
    "alpha": "lora_alpha",
    "ratio": "alpha_ratio",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "steps": "kept_steps",
    "loss": "kept_loss",
    "predicted": "predicted_bytes",
    "measured": "peak_bytes",
    "tokens/s": "tokens_per_s",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialCell:
    """A cell as text; ``value`` sorts a column of numbers and is None where there is no number."""

    text: str
    value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialLine:
    """A trial's row of the table."""

    number: int
    state: str
    chosen: bool
    cells: tuple[TrialCell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialTable:
    """All trials, best first."""

    columns: tuple[Column, ...]
    lines: tuple[TrialLine, ...]


def trial_table(snapshot: StudySnapshot, *, leader: int | None) -> TrialTable:
    """Return the table of all trials; ``leader`` is the trial to be marked."""
    columns = trial_columns(snapshot.lock.plan.device)
    lines = (
        TrialLine(
            number=trial.number,
            state=trial.state.value,
            chosen=trial.number == leader,
            cells=_cells(trial, columns),
        )
        for trial in ranked(snapshot.trials)
    )
    return TrialTable(columns=columns, lines=tuple(lines))


def _cells(trial: TrialRecord, columns: tuple[Column, ...]) -> tuple[TrialCell, ...]:
    values = trial_row(trial, num_rungs=0)
    return tuple(
        TrialCell(
            text=column.text(trial),
            value=_number(values[SORT_KEYS[column.header]]) if column.numeric else None,
        )
        for column in columns
    )


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and isfinite(value) else None


def state_counts(summary: ReportSummary) -> list[tuple[str, int]]:
    """Return the states that trials are in, with how many, most first."""
    return sorted(summary.states.items(), key=lambda item: (-item[1], item[0]))
