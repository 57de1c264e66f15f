"""The report on a terminal. A narrow one loses columns, never its lines' shape."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_tune.records import StudySnapshot, TrialRecord
from lora_tune.report import formatting as fmt
from lora_tune.report import wording
from lora_tune.report.probe import probe_sentence
from lora_tune.report.summary import FAILED_STATES, Outcome, ReportSummary, ranked, summarize
from lora_tune.report.tables import ALWAYS, TRIAL_COLUMNS, Column
from lora_tune.units import format_duration

MAX_ROWS = 40
MAX_REASONS = 5
MIN_REASON_WIDTH = 24


def print_report(
    snapshot: StudySnapshot, console: Console, *, next_command: str | None = None
) -> None:
    """Print recommendation, trials, confirmation, where the adapter is, and what comes next.

    Args:
        snapshot: The study, finished or not.
        console: Where to print; its width decides which columns are shown.
        next_command: What to name as the next step instead of what the study suggests.
    """
    summary = summarize(snapshot)
    _say(console, wording.recommendation(summary), style="bold")
    trials = ranked(snapshot.trials)
    if trials:
        _print_trials(console, trials, leader=summary.leader)
    _print_certainty(console, summary)
    for warning in summary.warnings:
        _say(console, f"Warning: {warning}", style="yellow")
    _say(console, _cost(summary))
    if sentence := probe_sentence(snapshot.lock.plan):
        _say(console, f"Lanes: {sentence}")
    if summary.memory is not None:
        _say(console, f"Memory: {' '.join(wording.memory_sentences(summary))}")
    console.print()
    if summary.outcome is Outcome.FINISHED:
        _print_unbroken(console, f"Adapter: {snapshot.folder / 'adapter'}")
        _print_unbroken(console, f"Report: {snapshot.folder / 'report.md'}")
    if next_command is None and summary.outcome is not Outcome.UNFINISHED:
        _say(console, f"Next: {wording.next_step(summary, snapshot.lock)}")
    else:
        command = next_command or wording.next_step(summary, snapshot.lock)
        _print_unbroken(console, f"Next: {command}")


def _say(console: Console, text: str, *, style: str = "") -> None:
    console.print(Text(fmt.one_line(text), style=style))


def _print_unbroken(console: Console, text: str) -> None:
    """Print a path or command so that it can be copied from a narrow terminal too."""
    console.print(Text(fmt.one_line(text)), soft_wrap=True)


def _print_trials(console: Console, trials: Sequence[TrialRecord], *, leader: int | None) -> None:
    shown = trials[:MAX_ROWS]
    columns = _columns_that_fit(console, shown)
    console.print()
    console.print(_table(columns, shown, leader=leader, console=console))
    if len(trials) > len(shown):
        _say(console, f"... and {len(trials) - len(shown)} more trials in trials.csv")
    if not any(c.header == "reason" for c in columns) or _reason_is_cut(console, columns, shown):
        _print_reasons(console, trials)
    console.print()


def _columns_that_fit(console: Console, trials: Sequence[TrialRecord]) -> list[Column]:
    columns = list(TRIAL_COLUMNS)
    if _reason_width(console, columns, trials) < MIN_REASON_WIDTH:
        columns = [c for c in columns if c.header != "reason"]
    while _width(columns, trials) > console.width and any(c.keep < ALWAYS for c in columns):
        columns.remove(min(columns, key=lambda c: c.keep))
    return columns


def _width(columns: Sequence[Column], trials: Sequence[TrialRecord]) -> int:
    """Return the cells that a table takes: its columns, and two between them."""
    widths = [max(len(c.header), *(Text(c.text(t)).cell_len for t in trials)) for c in columns]
    return sum(widths) + 2 * (len(columns) - 1)


def _reason_width(
    console: Console, columns: Sequence[Column], trials: Sequence[TrialRecord]
) -> int:
    """Return what is left for the reasons when every other column of the list is shown."""
    others = [c for c in columns if c.header != "reason"]
    return console.width - _width(others, trials) - 2


def _reason_is_cut(
    console: Console, columns: Sequence[Column], trials: Sequence[TrialRecord]
) -> bool:
    room = _reason_width(console, columns, trials)
    return any(len(t.reason) > room for t in trials if t.state in FAILED_STATES)


def _table(
    columns: Sequence[Column],
    trials: Sequence[TrialRecord],
    *,
    leader: int | None,
    console: Console,
) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        last = column.header == "reason"
        table.add_column(
            column.header,
            justify="right" if column.numeric else "left",
            no_wrap=True,
            overflow="ellipsis",
            max_width=_reason_width(console, columns, trials) if last else None,
        )
    for trial in trials:
        style = "bold green" if trial.number == leader else _style(trial)
        table.add_row(*(Text(c.text(trial), style=style) for c in columns))
    return table


def _style(trial: TrialRecord) -> str:
    return "dim" if trial.state in FAILED_STATES else ""


def _print_reasons(console: Console, trials: Sequence[TrialRecord]) -> None:
    failed = [t for t in trials if t.state in FAILED_STATES]
    if failed:
        console.print()
    for trial in failed[:MAX_REASONS]:
        reason = trial.reason or "no reason recorded"
        _say(console, f"Trial {trial.number} {trial.state.value}: {reason}")
    if len(failed) > MAX_REASONS:
        _say(console, f"... and {len(failed) - MAX_REASONS} more reasons in trials.csv")


def _print_certainty(console: Console, summary: ReportSummary) -> None:
    if summary.confirmation is not None:
        c = summary.confirmation
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("confirmation", no_wrap=True)
        table.add_column("loss", justify="right", no_wrap=True)
        table.add_column("95 % interval", no_wrap=True, overflow="ellipsis")
        for name, loss, interval in (
            (f"trial {summary.winner}", c.winner_loss, c.winner_interval),
            ("untuned base", c.base_loss, c.base_interval),
        ):
            ends = "-" if interval is None else " to ".join(map(fmt.format_loss, interval))
            table.add_row(name, fmt.format_loss(loss), ends)
        console.print(table)
        _say(
            console,
            f"Reduction {wording.reduction_text(c)} on {fmt.plural(c.num_examples, 'unseen row')}; "
            f"one seed. The search saw {fmt.format_loss(c.selection_loss)}.",
        )
    if summary.leader is not None:
        _say(console, wording.runner_up_sentence(summary))
        _say(console, wording.anchor_sentence(summary))


def _cost(summary: ReportSummary) -> str:
    parts = [f"{format_duration(summary.wall_s)} on {summary.device}"]
    if summary.tokens_per_s:
        parts.append(f"{fmt.format_count(summary.num_tokens)} tokens")
        parts.append(f"{fmt.format_count(summary.tokens_per_s)} tokens/s")
    if summary.highest_peak_bytes:
        parts.append(f"highest peak {fmt.format_memory(summary.highest_peak_bytes)}")
    return f"{wording.progress_text(summary)}; {', '.join(parts)}."
