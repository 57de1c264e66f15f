"""The report on a terminal. A narrow one loses columns, never its lines' shape."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_tune.records import StudySnapshot, TrialRecord
from lora_tune.report import candidates, verdict, wording
from lora_tune.report import formatting as fmt
from lora_tune.report.behaviour import summarize_behaviour
from lora_tune.report.confirmation import ConfirmationSummary
from lora_tune.report.probe import probe_sentence
from lora_tune.report.ranking import FAILED_STATES, ranked
from lora_tune.report.summary import Outcome, ReportSummary, summarize
from lora_tune.report.tables import ALWAYS, Column, remark, trial_columns
from lora_tune.report.terminal import plain_table, say, say_unbroken
from lora_tune.units import format_duration

MAX_ROWS = 40
MAX_REMARKS = 8
MIN_REMARK_WIDTH = 24
# Columns of candidates.SCORE_HEADERS that a narrow console drops, in this order.
DROPPED_FIRST = ("each seed", "its 95 % interval", "p", "gap", "to the best", "search loss")


def print_report(
    snapshot: StudySnapshot,
    console: Console,
    *,
    next_command: str | None = None,
    folder: Path | None = None,
) -> None:
    """Print recommendation, verdict, candidates, trials, where the adapter is, and what comes next.

    Args:
        snapshot: The study, finished or not.
        console: Where to print; its width decides which columns are shown.
        next_command: What to name as the next step instead of what the study suggests.
        folder: Where the files of the report are, instead of the study's folder.
    """
    reports = folder or snapshot.folder
    summary = summarize(snapshot)
    say(console, wording.headline(summary), style="bold")
    if waiting := wording.waiting_sentence(summary):
        say(console, waiting)
    for sentence in wording.conclusions(summary):
        say(console, sentence)
    behaviour = summarize_behaviour(snapshot)
    for sentence in behaviour.sentences if behaviour else ():
        say(console, sentence)
    if summary.confirmation is not None:
        _print_confirmation(console, summary.confirmation)
    trials = ranked(snapshot.trials)
    if trials:
        columns = trial_columns(summary.device)
        _print_trials(console, trials, columns, leader=summary.leader)
    if summary.chosen is None and summary.leader is not None:
        say(console, wording.runner_up_sentence(summary))
        say(console, wording.anchor_sentence(summary))
    for warning in summary.warnings:
        say(console, f"Warning: {warning}", style="yellow")
    say(console, _cost(summary))
    if forecast := wording.forecast_sentence(summary.cost):
        say(console, forecast)
    if sentence := wording.sizes_sentence(snapshot):
        say(console, sentence)
    if sentence := probe_sentence(snapshot.lock.plan):
        say(console, f"Lanes: {sentence}")
    if summary.memory is not None:
        say(console, f"Memory: {' '.join(wording.memory_sentences(summary))}")
    console.print()
    if summary.outcome is Outcome.FINISHED:
        say_unbroken(console, f"Adapter: {snapshot.folder / 'adapter'}")
    page = reports / "report.html"
    say_unbroken(console, f"Report: {page if page.is_file() else reports / 'report.md'}")
    if next_command is None and summary.outcome is Outcome.FINISHED:
        next_command = f"lora-tune export {shlex.quote(str(snapshot.folder))} --to TARGET"
    if next_command is None and summary.outcome is Outcome.NOTHING:
        say(console, f"Next: {wording.next_step(summary, snapshot.lock)}")
    else:
        command = next_command or wording.next_step(summary, snapshot.lock)
        say_unbroken(console, f"Next: {command}")


def _print_trials(
    console: Console,
    trials: Sequence[TrialRecord],
    known: Sequence[Column],
    *,
    leader: int | None,
) -> None:
    shown = trials[:MAX_ROWS]
    columns = _columns_that_fit(console, shown, known)
    console.print()
    console.print(_table(columns, shown, leader=leader, console=console))
    if len(trials) > len(shown):
        say(console, f"... and {len(trials) - len(shown)} more trials in trials.csv")
    if not any(c.header == "remark" for c in columns) or _remark_is_cut(console, columns, shown):
        _print_remarks(console, trials)
    console.print()


def _columns_that_fit(
    console: Console, trials: Sequence[TrialRecord], known: Sequence[Column]
) -> list[Column]:
    columns = list(known)
    if _remark_width(console, columns, trials) < MIN_REMARK_WIDTH:
        columns = [c for c in columns if c.header != "remark"]
    while _width(columns, trials) > console.width and any(c.keep < ALWAYS for c in columns):
        columns.remove(min(columns, key=lambda c: c.keep))
    return columns


def _width(columns: Sequence[Column], trials: Sequence[TrialRecord]) -> int:
    """Return the cells that a table takes: its columns, and two between them."""
    widths = [max(len(c.header), *(Text(c.text(t)).cell_len for t in trials)) for c in columns]
    return sum(widths) + 2 * (len(columns) - 1)


def _remark_width(
    console: Console, columns: Sequence[Column], trials: Sequence[TrialRecord]
) -> int:
    """Return what is left for the remarks when every other column of the list is shown."""
    others = [c for c in columns if c.header != "remark"]
    return console.width - _width(others, trials) - 2


def _remark_is_cut(
    console: Console, columns: Sequence[Column], trials: Sequence[TrialRecord]
) -> bool:
    room = _remark_width(console, columns, trials)
    return any(len(remark(t)) > room for t in trials if t.state in FAILED_STATES)


def _table(
    columns: Sequence[Column],
    trials: Sequence[TrialRecord],
    *,
    leader: int | None,
    console: Console,
) -> Table:
    table = plain_table()
    for column in columns:
        last = column.header == "remark"
        table.add_column(
            column.header,
            justify="right" if column.numeric else "left",
            no_wrap=True,
            overflow="ellipsis",
            max_width=_remark_width(console, columns, trials) if last else None,
        )
    for trial in trials:
        style = "bold green" if trial.number == leader else _style(trial)
        table.add_row(*(Text(c.text(trial), style=style) for c in columns))
    return table


def _style(trial: TrialRecord) -> str:
    return "dim" if trial.state in FAILED_STATES else ""


def _print_remarks(console: Console, trials: Sequence[TrialRecord]) -> None:
    """Print what the table has no room for; a trial that was merely not promoted needs no line."""
    worth = [t for t in trials if t.state in FAILED_STATES]
    worth += [t for t in trials if t not in worth and remark(t) != t.reason]
    if worth:
        console.print()
    for trial in worth[:MAX_REMARKS]:
        text = remark(trial) or "no reason recorded"
        say(console, f"Trial {trial.number} {trial.state.value}: {text}")
    if len(worth) > MAX_REMARKS:
        left = fmt.plural(len(worth) - MAX_REMARKS, "remark")
        say(console, f"... and {left} more in report.md")


def _print_confirmation(console: Console, c: ConfirmationSummary) -> None:
    console.print()
    headers, rows = candidates.score_table(c)
    kept = list(range(len(headers)))
    for header in DROPPED_FIRST:
        if header in headers and _cells(headers, rows, kept) > console.width:
            kept.remove(headers.index(header))
    table = _plain_table([headers[i] for i in kept], len(kept))
    for candidate, row in zip([*c.candidates, None], rows, strict=False):
        chosen = candidate is not None and candidate.chosen
        table.add_row(*(Text(row[i], style="bold green" if chosen else "") for i in kept))
    console.print(table)
    if c.metrics:
        metric_headers, metric_rows = candidates.metric_table(c)
        table = _plain_table(metric_headers, len(metric_headers))
        for cells in metric_rows:
            table.add_row(*map(Text, cells))
        console.print()
        console.print(table)
    for reason in candidates.metric_reasons(c):
        say(console, reason)
    if c.decision is not None:
        _print_decision(console, c)


def _print_decision(console: Console, c: ConfirmationSummary) -> None:
    assert c.decision is not None
    for sentence in verdict.tie_items(c, c.decision):
        say(console, sentence)
    if sentence := verdict.search_sentence(c):
        say(console, sentence)
    say(console, verdict.adapter_sentence(c))


def _cells(headers: Sequence[str], rows: Sequence[Sequence[str]], kept: Sequence[int]) -> int:
    """Return the width of a table of some columns, two cells between them."""
    widths = [max(Text(row[i]).cell_len for row in [headers, *rows]) for i in kept]
    return sum(widths) + 2 * (len(kept) - 1)


def _plain_table(headers: Sequence[str], count: int) -> Table:
    table = plain_table()
    for i, header in enumerate(headers):
        table.add_column(Text(header), no_wrap=0 < i < count - 1, overflow="fold")
    return table


def _cost(summary: ReportSummary) -> str:
    cost = summary.cost
    parts = [f"{format_duration(cost.wall_s)} on the {wording.device_name(summary.device)}"]
    if not cost.wall_s:
        parts = [f"on the {wording.device_name(summary.device)}"]
    if cost.tokens_per_s:
        parts.append(f"{fmt.format_count(cost.num_tokens)} tokens")
        parts.append(f"{fmt.format_count(cost.tokens_per_s)} tokens/s")
    if summary.highest_peak_bytes:
        whose = "peak" if summary.device.startswith("cuda") else "memory of the process"
        parts.append(f"highest {whose} {fmt.format_memory(summary.highest_peak_bytes)}")
    return f"{wording.progress_text(summary)}; {', '.join(parts)}."
