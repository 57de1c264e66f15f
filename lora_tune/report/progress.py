"""The live view of a running study: one panel on a terminal, plain lines anywhere else."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lora_tune.records import LaneReading, ProgressState
from lora_tune.report import formatting as fmt
from lora_tune.report.terminal import open_console, plain_table, wants_panel
from lora_tune.units import format_bytes, format_duration

MAX_LANES = 12
REDRAW_S = 0.25


class ProgressView:
    """Shows where a study is, while it runs.

    On a terminal it is one panel that is drawn anew; elsewhere, and with NO_COLOR or CI set, a
    plain line at most every ``min_interval_s`` seconds. Notes are printed at once in both.

    Args:
        console: Where to show; standard error when None.
        min_interval_s: Seconds between two plain lines.
        clock: Returns seconds that never run backward.
        environ: Environment variables; those of the process when None.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        min_interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._console = console or open_console(stderr=True, environ=environ)
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._last_shown_s: float | None = None
        self._pending: ProgressState | None = None
        self._live: Live | None = None
        if wants_panel(self._console, os.environ if environ is None else environ):
            # What a program pipes from standard output must not end up in the panel's stream.
            piped = not sys.stdout.isatty()
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=not piped)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, state: ProgressState) -> None:
        """Show the state, now or, when it comes too soon after the last one, later."""
        self._pending = state
        interval_s = REDRAW_S if self._live is not None else self._min_interval_s
        now = self._clock()
        if self._last_shown_s is None or now - self._last_shown_s >= interval_s:
            self._last_shown_s = now
            self._show()

    def note(self, text: str) -> None:
        """Print a sentence at once; in the panel's case above it."""
        self._console.print(Text(fmt.one_line(text)), soft_wrap=True)

    def close(self) -> None:
        """Show the last state, if it was held back, and leave the terminal as it was."""
        if self._pending is not None:
            self._show()
        if self._live is not None:
            self._live.stop()

    def _show(self) -> None:
        state, self._pending = self._pending, None
        if state is None:
            return
        if self._live is not None:
            self._live.update(progress_panel(state), refresh=True)
        else:
            self._console.print(Text(progress_line(state)), soft_wrap=True)


def progress_line(state: ProgressState) -> str:
    """Return the state as one line for a log."""
    parts = [
        f"{fmt.one_line(state.phase)}: {_done_text(state, '/')}",
        fmt.plural(len(state.lanes), "lane"),
        f"best {_best_text(state)}",
        f"{fmt.format_count(state.tokens_per_s)} tokens/s",
        f"memory {_memory_text(state)}",
        f"{format_duration(state.elapsed_s)} spent",
        _left_text(state),
    ]
    return ", ".join(parts)


def progress_panel(state: ProgressState) -> Panel:
    """Return the state as a panel."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("done", Text(_done_text(state, " of ")))
    facts.add_row("best", Text(_best_text(state)))
    facts.add_row("speed", Text(f"{fmt.format_count(state.tokens_per_s)} tokens/s"))
    facts.add_row("memory", _memory_bar(state))
    facts.add_row("time", Text(f"{format_duration(state.elapsed_s)} spent, {_left_text(state)}"))
    parts: list[RenderableType] = [facts]
    if state.lanes:
        parts += [Text(), _lanes_table(state.lanes[:MAX_LANES], dict(state.names))]
    if len(state.lanes) > MAX_LANES:
        parts.append(Text(f"... and {fmt.plural(len(state.lanes) - MAX_LANES, 'lane')} more"))
    return Panel(Group(*parts), title=Text(fmt.one_line(state.phase)), title_align="left")


def _lanes_table(lanes: tuple[LaneReading, ...], names: Mapping[int, str]) -> Table:
    table = plain_table()
    for header in ("trial", "rung", "step", "loss"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    for lane in lanes:
        table.add_row(
            fmt.one_line(names.get(lane.trial, str(lane.trial))),
            str(lane.rung) if lane.trial >= 0 else fmt.NOTHING,
            f"{lane.step}/{lane.end_step}",
            fmt.format_loss(lane.train_loss),
            ProgressBar(total=max(lane.end_step, 1), completed=lane.step, width=24),
        )
    return table


def _memory_bar(state: ProgressState) -> Table:
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(state.budget_bytes, 1), completed=state.memory_bytes, width=24)
    row.add_row(bar, Text(_memory_text(state)))
    return row


def _memory_text(state: ProgressState) -> str:
    used = format_bytes(state.memory_bytes)
    return f"{used} of {format_bytes(state.budget_bytes)}" if state.budget_bytes else used


def _best_text(state: ProgressState) -> str:
    if state.best_loss is None:
        return "none yet"
    trial = "" if state.best_trial is None else f" (trial {state.best_trial})"
    return f"{fmt.format_loss(state.best_loss)}{trial}"


def _left_text(state: ProgressState) -> str:
    return "time left unknown" if state.left_s is None else f"{format_duration(state.left_s)} left"


def _done_text(state: ProgressState, of: str) -> str:
    """Return how many trials have ended or, in the confirmation, how many of its runs."""
    if state.runs_total:
        return f"{state.runs_done}{of}{state.runs_total} runs with fresh seeds"
    return f"{state.trials_done}{of}{state.trials_total} trials{_states_text(state.states)}"


def _states_text(states: Mapping[str, int]) -> str:
    shown = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    return f" ({shown})" if shown else ""
