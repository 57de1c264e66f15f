"""The report on a terminal: complete at 140 columns, calm at 80, and never wider than it is."""

from dataclasses import replace
from io import StringIO

import pytest
from report_studies import finished_study, fruitless_study, single_trial_study, unfinished_study
from rich.console import Console

from lora_tune.records import StudySnapshot
from lora_tune.report import print_report


def printed(study: StudySnapshot, *, width: int, **kwargs: str) -> str:
    """Return what a terminal of this width shows."""
    console = Console(file=StringIO(), width=width, color_system=None)
    print_report(study, console, **kwargs)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
@pytest.mark.parametrize(
    "make", [finished_study, unfinished_study, fruitless_study, single_trial_study]
)
def test_no_line_is_wider_than_the_console(make, width):
    assert max(map(len, printed(make(), width=width).split("\n"))) <= width


def test_every_trial_takes_one_line_at_80_columns_and_important_columns_stay():
    lines = printed(finished_study(), width=80).split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("trial  "))
    assert lines[start].split() == [
        *("trial", "state", "rank", "alpha", "dropout", "targets", "lr", "steps", "loss")
    ]
    numbers = [int(line.split()[0]) for line in lines[start + 1 : start + 13]]
    assert numbers == [7, 3, 0, 6, 4, 11, 2, 5, 10, 1, 8, 9]
    assert "Trial 8 infeasible: peak 4.31 GiB alone" in lines


def test_a_wide_console_shows_the_reasons_in_the_table():
    text = printed(finished_study(), width=200)
    header = next(line for line in text.split("\n") if line.startswith("trial  "))
    assert header.split()[-3:] == ["measured", "tokens/s", "reason"]
    assert "Trial 8 infeasible:" not in text


def test_a_reason_too_long_for_the_table_is_printed_in_full_below():
    study = finished_study()
    reason = "loss is not finite at step 14, " * 6 + "end"
    study = replace(
        study, trials=(study.trials[0], replace(study.trials[1], reason=reason), *study.trials[2:])
    )
    text = printed(study, width=180)
    assert reason in " ".join(text.split())


def test_the_winner_is_compared_with_the_untuned_base():
    text = " ".join(printed(finished_study(), width=80).split())
    assert "trial 7 2.331" in text
    assert "untuned base 2.874" in text
    assert "on 96 unseen rows" in text
    assert "Adapter: reports/docstrings/adapter" in text


def test_the_next_command_is_named():
    assert "Next: lora-tune run studies/docstrings.toml" in printed(unfinished_study(), width=80)
    named = printed(finished_study(), width=80, next_command="lora-tune export reports/docstrings")
    assert "Next: lora-tune export reports/docstrings" in named


def test_a_long_study_is_cut_with_a_pointer_to_the_file():
    study = finished_study()
    many = tuple(replace(study.trials[2], number=100 + i) for i in range(50))
    text = printed(replace(study, trials=study.trials + many), width=80)
    assert "... and 22 more trials in trials.csv" in text


def test_foreign_text_is_neither_markup_nor_an_escape_sequence():
    study = finished_study()
    evil = replace(study.trials[1], reason="[bold]x[/bold] \x1b[31mred [/nothing]")
    text = printed(replace(study, trials=(study.trials[0], evil, *study.trials[2:])), width=80)
    assert "Trial 1 diverged: [bold]x[/bold] [31mred [/nothing]" in text
    assert "\x1b" not in text
