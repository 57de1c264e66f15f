"""The report on a terminal: complete at 140 columns, calm at 80, and never wider than it is."""

from dataclasses import replace
from io import StringIO

import pytest
from report_studies import (
    confirmed_study,
    finished_study,
    fruitless_study,
    half_confirmed_study,
    single_trial_study,
    unfinished_study,
)
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
    "make",
    [finished_study, unfinished_study, half_confirmed_study, fruitless_study, single_trial_study],
)
def test_no_line_is_wider_than_the_console(make, width):
    assert max(map(len, printed(make(), width=width).split("\n"))) <= width


def test_every_trial_takes_one_line_at_80_columns_and_important_columns_stay():
    lines = printed(finished_study(), width=80).split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("trial  "))
    assert lines[start].split() == [
        *("trial", "state", "rank", "alpha", "targets", "lr", "steps", "loss")
    ]
    numbers = [int(line.split()[0]) for line in lines[start + 1 : start + 14]]
    assert numbers == [7, 3, 0, 6, 4, 11, 2, 5, 10, 12, 1, 8, 9]


def test_every_kind_of_end_is_told_apart_with_its_reason():
    lines = printed(finished_study(), width=80).split("\n")
    for line in (
        "Trial 1 diverged: loss 9.81 at step 14",
        "Trial 8 infeasible: peak 4.31 GiB alone",
        "Trial 9 failed: worker lost: signal 9",
        "Trial 12 cached: same as trial 3",
        "Trial 4 pruned: not promoted; rank 128 proposed",
        "Trial 0 complete: overfitted, step 100 kept",
    ):
        assert line in lines
    row = next(line for line in lines if line.startswith("    0  complete"))
    assert row.split()[-4:] == ["100", "of", "200", "2.306"]


def test_a_wide_console_shows_the_remarks_in_the_table():
    text = printed(finished_study(), width=200)
    header = next(line for line in text.split("\n") if line.startswith("trial  "))
    assert header.split()[-3:] == ["predicted", "tokens/s", "remark"]
    assert "Trial 8 infeasible:" not in text


def test_a_measured_peak_stands_beside_the_estimate_on_a_gpu_alone():
    # On a CPU it is the memory of the process, libraries included.
    study = finished_study()
    assert "measured" not in printed(study, width=200).split("Adapter")[0].replace(
        "by measured", ""
    )
    plan = replace(study.lock.plan, device="cuda")
    on_gpu = printed(replace(study, lock=replace(study.lock, plan=plan)), width=200)
    header = next(line for line in on_gpu.split("\n") if line.startswith("trial  "))
    assert header.split()[-4:] == ["predicted", "measured", "tokens/s", "remark"]


def test_a_reason_too_long_for_the_table_is_printed_in_full_below():
    study = finished_study()
    reason = "loss is not finite at step 14, " * 6 + "end"
    study = replace(
        study, trials=(study.trials[0], replace(study.trials[1], reason=reason), *study.trials[2:])
    )
    text = printed(study, width=180)
    assert reason in " ".join(text.split())


def table(text: str, first: str) -> list[list[str]]:
    """Return the rows of the table whose header begins with a word, to its first empty line."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    end = lines.index("", start)
    return [line.split() for line in lines[start:end]]


def test_candidates_and_untuned_base_stand_in_one_table_by_loss():
    text = printed(finished_study(), width=140)
    rows = table(text, "candidate ")
    assert rows[0][:2] == ["candidate", "loss"]
    assert [" ".join(row[:2]) for row in rows[1:5]] == [
        "trial 7",
        "trial 3",
        "trial 5",
        "untuned base",
    ]
    assert rows[1][2:8] == ["2.331", "2.234", "to", "2.428", "2.298", "+0.033"]
    assert rows[1][8:] == ["2.329,", "2.333", "-", "-", "-", "best"]
    assert rows[2][-3:] == ["0.47", "tied,", "chosen"]
    assert rows[4][2] == "2.874"


def test_a_narrow_console_keeps_loss_and_result_of_the_candidates():
    rows = table(printed(finished_study(), width=60), "candidate ")
    assert rows[0] == ["candidate", "loss", "95", "%", "interval", "result"]
    rows = table(printed(finished_study(), width=80), "candidate ")
    assert rows[0][5:7] == ["search", "loss"]


def test_the_console_begins_with_the_choice_and_the_verdict():
    text = " ".join(printed(finished_study(), width=80).split())
    assert text.startswith("Use trial 3: rank 16, lora_alpha 32, dropout 0, target modules all-")
    assert (
        "Better than the default: the loss of trial 7 is 0.24 nats per token (9.5 %) below" in text
    )
    assert "In the search, on other rows, the loss of trial 3 was 2.303; the confirmed one" in text
    assert "it took 36 min 24 s, 7 % longer than forecast." in text
    assert "Adapter: reports/docstrings/adapter" in text


def test_a_choice_of_the_default_is_named_as_such():
    text = " ".join(
        printed(confirmed_study({"default": (2.3,)}, default="default"), width=80).split()
    )
    assert text.startswith("Use the default: rank 16")
    assert "Tuning did not beat the default: no other configuration was confirmed" in text


def test_the_next_command_is_named():
    assert "Next: lora-tune run studies/docstrings.toml" in printed(unfinished_study(), width=80)
    named = printed(finished_study(), width=80, next_command="lora-tune export reports/docstrings")
    assert "Next: lora-tune export reports/docstrings" in named


def test_a_long_study_is_cut_with_a_pointer_to_the_file():
    study = finished_study()
    many = tuple(replace(study.trials[2], number=100 + i) for i in range(50))
    text = printed(replace(study, trials=study.trials + many), width=80)
    assert "... and 23 more trials in trials.csv" in text


def test_foreign_text_is_neither_markup_nor_an_escape_sequence():
    study = finished_study()
    evil = replace(study.trials[1], reason="[bold]x[/bold] \x1b[31mred [/nothing]")
    text = printed(replace(study, trials=(study.trials[0], evil, *study.trials[2:])), width=80)
    assert "Trial 1 diverged: [bold]x[/bold] [31mred [/nothing]" in text
    assert "\x1b" not in text
