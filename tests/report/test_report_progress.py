"""The live view: one panel on a terminal, throttled lines elsewhere."""

import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from lora_tune.records import LaneReading, ProgressState
from lora_tune.report import ProgressView

STATE = ProgressState(
    phase="rung 0",
    trials_done=5,
    trials_total=24,
    states={"complete": 4, "diverged": 1, "failed": 0},
    lanes=(
        LaneReading(trial=5, rung=0, step=12, end_step=50, train_loss=2.714),
        LaneReading(trial=6, rung=0, step=0, end_step=50, train_loss=None),
    ),
    best_trial=3,
    best_loss=2.4137,
    tokens_per_s=512.4,
    memory_bytes=3 * 2**30,
    budget_bytes=4 * 2**30,
    elapsed_s=64.0,
    left_s=380.0,
)
EMPTY = ProgressState(
    phase="loading",
    trials_done=0,
    trials_total=24,
    states={},
    lanes=(),
    best_trial=None,
    best_loss=None,
    tokens_per_s=0.0,
    memory_bytes=0,
    budget_bytes=0,
    elapsed_s=0.0,
    left_s=None,
)
LINE = (
    "rung 0: 5/24 trials (4 complete, 1 diverged), 2 lanes, best 2.414 (trial 3), 512 tokens/s, "
    "memory 3.00 GiB of 4.00 GiB, 1 min 4 s spent, 6 min 20 s left"
)


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def terminal() -> Console:
    """Return a console that takes itself for a terminal and keeps what it shows."""
    return Console(
        file=StringIO(), force_terminal=True, width=80, height=40, color_system=None, _environ={}
    )


def screen(console: Console) -> str:
    """Return what was written without the cursor's movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_lines_come_at_most_every_ten_seconds_and_the_last_state_is_not_lost():
    clock, console = Clock(), Console(file=StringIO(), width=80)
    with ProgressView(console, clock=clock, environ={}) as view:
        for second in range(26):
            clock.now = float(second)
            view.update(replace(STATE, trials_done=second))
    lines = console.file.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == [
        "rung 0: 0",
        "rung 0: 10",
        "rung 0: 20",
        "rung 0: 25",
    ]


def test_a_line_says_what_decides_and_is_not_broken():
    console = Console(file=StringIO(), width=40)
    with ProgressView(console, clock=Clock(), environ={}) as view:
        view.update(STATE)
    assert console.file.getvalue() == LINE + "\n"


def test_a_state_without_lanes_losses_or_time_left_has_a_line():
    console = Console(file=StringIO(), width=80)
    with ProgressView(console, clock=Clock(), environ={}) as view:
        view.update(EMPTY)
    assert console.file.getvalue() == (
        "loading: 0/24 trials, 0 lanes, best none yet, 0 tokens/s, memory 0.0 MiB, 0 s spent, "
        "time left unknown\n"
    )


RUNS = replace(
    STATE,
    phase="confirmation",
    lanes=(LaneReading(trial=-5, rung=0, step=12, end_step=50, train_loss=2.714),),
    runs_done=3,
    runs_total=8,
    names=((-5, "trial 8 seed 1"),),
)


def test_the_confirmation_counts_runs_and_names_its_lanes():
    console = Console(file=StringIO(), width=80)
    with ProgressView(console, clock=Clock(), environ={}) as view:
        view.update(RUNS)
    assert console.file.getvalue().startswith("confirmation: 3/8 runs with fresh seeds, 1 lane, ")
    panel = terminal()
    with ProgressView(panel, clock=Clock(), environ={}) as view:
        view.update(RUNS)
    text = screen(panel)
    assert "3 of 8 runs with fresh seeds" in text
    assert "trial 8 seed 1     -  12/50  2.714" in text


def test_notes_are_printed_at_once_and_as_they_are():
    clock, console = Clock(), Console(file=StringIO(), width=80)
    with ProgressView(console, clock=clock, environ={}) as view:
        view.update(STATE)
        view.note("trial 4 diverged: [red] \x1b[31mloss is NaN")
        assert console.file.getvalue().endswith("trial 4 diverged: [red] [31mloss is NaN\n")


@pytest.mark.parametrize("variable", ["NO_COLOR", "CI"])
def test_a_terminal_shows_plain_lines_where_it_is_asked_to(variable):
    console = terminal()
    with ProgressView(console, clock=Clock(), environ={variable: "1"}) as view:
        view.update(STATE)
    assert console.file.getvalue() == LINE + "\n"


def test_a_terminal_shows_a_panel_with_the_lanes():
    console = terminal()
    with ProgressView(console, clock=Clock(), environ={}) as view:
        view.update(STATE)
        view.note("trial 4 diverged")
    text = screen(console)
    for part in (
        "rung 0",
        "5 of 24 trials (4 complete, 1 diverged)",
        "2.414 (trial 3)",
        "12/50  2.714",
        "0/50      -",
        "3.00 GiB of 4.00 GiB",
        "1 min 4 s spent, 6 min 20 s left",
        "trial 4 diverged",
    ):
        assert part in text


def test_a_panel_is_redrawn_at_most_four_times_a_second_and_shows_the_last_state():
    clock, console = Clock(), terminal()
    with ProgressView(console, clock=clock, environ={}) as view:
        for i in range(20):
            clock.now = i * 0.01
            view.update(replace(STATE, trials_done=i))
        assert "7 of 24" not in screen(console)
    assert "19 of 24" in screen(console)


def test_a_panel_tolerates_nothing_to_show_and_many_lanes():
    console, clock = terminal(), Clock()
    lanes = tuple(replace(STATE.lanes[1], trial=i, end_step=0) for i in range(30))
    with ProgressView(console, clock=clock, environ={}) as view:
        view.update(EMPTY)
        clock.now = 1.0
        view.update(replace(STATE, lanes=lanes))
    assert "none yet" in screen(console)
    assert "... and 18 lanes more" in screen(console)


def test_an_error_inside_leaves_the_terminal_usable():
    console = terminal()
    view = ProgressView(console, clock=Clock(), environ={})
    with pytest.raises(ZeroDivisionError), view:
        view.update(replace(STATE, trials_done=1 // 0))
    assert console.file.getvalue().endswith("\x1b[?25h")
