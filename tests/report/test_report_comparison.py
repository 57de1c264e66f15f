"""Several studies side by side: what compares, what does not and why, and the files of it."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from report_studies import (
    confirmed_study,
    evaluation,
    finished_study,
    fruitless_study,
    older_study,
    unfinished_study,
)
from rich.console import Console

from lora_tune.errors import StudyFileError
from lora_tune.records import StudySnapshot
from lora_tune.report.comparison import StudyComparison, compare_studies, same_rows
from lora_tune.report.comparison_files import (
    print_comparison,
    render_comparison_html,
    render_comparison_markdown,
    write_comparison,
)
from lora_tune.report.comparison_wording import conclusions
from lora_tune.stats.paired import paired_difference


def named(study: StudySnapshot, name: str, *, sha256: str | None = None) -> StudySnapshot:
    """Return the study under a name and in a folder of its own, on other data if so wanted."""
    data = study.lock.data if sha256 is None else replace(study.lock.data, sha256=sha256)
    return replace(
        study, folder=Path("reports") / name, lock=replace(study.lock, name=name, data=data)
    )


def low_and_high() -> list[StudySnapshot]:
    """Return two studies on the same rows, the second clearly worse."""
    return [
        named(confirmed_study({"trial 7": (2.33, 2.334), "trial 5": (2.57, 2.58)}), "low"),
        named(confirmed_study({"trial 3": (2.40, 2.404), "trial 5": (2.57, 2.58)}), "high"),
    ]


def with_base(study: StudySnapshot, base: object) -> StudySnapshot:
    """Return the study with another evaluation of the untuned base."""
    return replace(study, confirmation=replace(study.confirmation, base_evaluation=base))


def test_studies_on_the_same_rows_are_ranked_and_paired():
    comparison = compare_studies([*reversed(low_and_high())])
    assert [study.group for study in comparison.studies] == [1, 1]
    (group,) = comparison.groups
    assert group.studies == ("low", "high")
    (found,) = group.differences
    assert (found.study, found.reference, found.seeds, found.num_rows) == ("high", "low", 2, 96)
    assert found.difference == pytest.approx(2.402 - 2.332)
    assert found.low < 0.07 < found.high
    assert found.low > 0
    assert found.p_adjusted < 0.01


def test_with_one_seed_the_interval_is_that_of_the_rows_by_the_closed_form():
    first = named(confirmed_study({"trial 7": (2.33,), "trial 5": (2.57,)}), "first")
    second = named(confirmed_study({"trial 3": (2.36,), "trial 5": (2.57,)}), "second")
    (found,) = compare_studies([first, second]).groups[0].differences
    witness = paired_difference(
        second.confirmation.runs_of("trial 3")[0].evaluation,
        first.confirmation.runs_of("trial 7")[0].evaluation,
    )
    assert found.difference == pytest.approx(witness.difference)
    # a bootstrap of 2,000 draws: its spread errs by 1.6 %, three times that is allowed
    assert found.standard_error == pytest.approx(witness.standard_error, rel=0.05)
    assert "one seed each, which shows no seed noise" in " ".join(
        conclusions(compare_studies([first, second]))
    )


def test_a_study_with_fewer_seeds_is_compared_on_as_many():
    many = named(confirmed_study({"trial 7": (2.33, 2.334, 2.35), "trial 5": (2.6, 2.6, 2.6)}), "a")
    few = named(confirmed_study({"trial 3": (2.40, 2.404), "trial 5": (2.57, 2.58)}), "b")
    (found,) = compare_studies([many, few]).groups[0].differences
    assert found.seeds == 2
    assert found.difference == pytest.approx(2.402 - 2.332)


def test_losses_on_other_data_are_not_ranked_and_the_reason_is_named():
    first, second = low_and_high()
    other = with_base(
        named(second, "other", sha256="other"), evaluation(2.7, split="confirmation", seed=5)
    )
    other = replace(
        other, lock=replace(other.lock, data=replace(other.lock.data, source="other.jsonl"))
    )
    comparison = compare_studies([first, other])
    assert [study.group for study in comparison.studies] == [1, 2]
    assert [group.differences for group in comparison.groups] == [(), ()]
    (sentence,) = conclusions(comparison)
    assert sentence == (
        "Losses of other are not ranked with those of low: they were not confirmed on the same rows in "
        "the same tokens (data: docstrings.jsonl and other.jsonl). What compares is each one's gain "
        "against its own default and its own untuned base."
    )


def test_same_rows_with_other_training_data_are_recognised_by_the_untuned_base():
    # data.eval names the same file in both: other training rows give another fingerprint
    first, second = low_and_high()
    assert same_rows(first, named(second, "more-data", sha256="other"))
    moved = replace(
        second.confirmation.base_evaluation,
        loss_sums=tuple(s + 1.0 for s in second.confirmation.base_evaluation.loss_sums),
    )
    assert not same_rows(first, with_base(named(second, "x", sha256="other"), moved))


def test_the_same_file_cut_into_other_tokens_does_not_compare():
    first, second = low_and_high()

    def longer(found):
        return found and replace(found, label_counts=tuple(n + 1 for n in found.label_counts))

    runs = tuple(replace(r, evaluation=longer(r.evaluation)) for r in second.confirmation.runs)
    other = replace(second, confirmation=replace(second.confirmation, runs=runs))
    assert not same_rows(first, other)


def test_studies_that_cannot_be_told_apart_are_not_ranked_in_words():
    twins = [
        named(confirmed_study({"trial 7": (2.33, 2.38), "trial 5": (2.6, 2.6)}), "a"),
        named(confirmed_study({"trial 3": (2.34, 2.37), "trial 5": (2.6, 2.6)}), "b"),
    ]
    text = " ".join(conclusions(compare_studies(twins)))
    assert "inside noise, neither is shown to be better." in text
    assert "more than noise" not in text


def test_an_unfinished_and_a_fruitless_study_have_no_loss_to_compare():
    first = named(finished_study(), "done")
    comparison = compare_studies(
        [first, named(unfinished_study(), "half"), named(fruitless_study(), "none")]
    )
    assert [study.group for study in comparison.studies] == [1, None, None]
    assert conclusions(comparison) == [
        "half is unfinished: it has no confirmed loss to compare.",
        "none is without a result: it has no confirmed loss to compare.",
    ]


def test_three_studies_have_their_p_adjusted_for_two_comparisons():
    studies = [
        *low_and_high(),
        named(confirmed_study({"trial 0": (2.341, 2.338), "trial 5": (2.6, 2.6)}), "near"),
    ]
    together = {d.study: d for d in compare_studies(studies).groups[0].differences}
    alone = compare_studies([studies[0], studies[2]]).groups[0].differences[0]
    assert together["near"].p_adjusted >= alone.p_adjusted
    assert set(together) == {"high", "near"}


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_studies_are_no_comparison(count):
    with pytest.raises(StudyFileError, match=f"two or more different studies; {count} named"):
        compare_studies([finished_study()] * count)


def test_a_study_twice_is_no_comparison():
    with pytest.raises(StudyFileError, match=r"reports/docstrings is named twice\."):
        compare_studies([finished_study(), older_study()])


def test_studies_of_one_name_are_told_apart_by_their_folders():
    studies = [finished_study(Path("here/x")), finished_study(Path("there/x"))]
    comparison = compare_studies(studies)
    assert [study.label for study in comparison.studies] == ["here/x", "there/x"]


def compared(tmp_path: Path, studies: Sequence[StudySnapshot]) -> dict[str, str]:
    """Return the files of a comparison by name."""
    paths = write_comparison(compare_studies(studies), studies, tmp_path / "deep" / "a-vs-b")
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def test_the_files_hold_both_studies(tmp_path):
    studies = low_and_high()
    files = compared(tmp_path, studies)
    assert list(files)[:4] == [
        "comparison.md",
        "comparison.html",
        "comparison.json",
        "comparison.csv",
    ]
    rows = list(csv.DictReader(StringIO(files["comparison.csv"])))
    assert [row["study"] for row in rows] == ["low", "high"]
    assert [float(row["loss"]) for row in rows] == pytest.approx([2.332, 2.402])
    assert [row["chosen"] for row in rows] == ["trial 7", "trial 3"]
    assert [row["rank"] for row in rows] == ["32", "16"]
    assert float(rows[1]["difference_to_best"]) == pytest.approx(0.07)
    data = json.loads(files["comparison.json"])
    assert data["format_version"] == 1
    assert data["problems"] == []
    assert data["groups"][0]["studies"] == ["low", "high"]
    assert data["studies"][0]["loss"] == float(rows[0]["loss"])
    assert data["conclusions"][0] in files["comparison.md"]


def cells(markdown: str, first: str) -> list[str]:
    """Return the cells of the first row that begins with a text."""
    row = next(line for line in markdown.split("\n") if line.startswith(f"| {first}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_table_sets_what_was_found_side_by_side():
    text = render_comparison_markdown(compare_studies(low_and_high()))
    assert cells(text, "recommended") == ["recommended", "trial 7", "trial 3"]
    assert cells(text, "confirmed loss")[1].startswith("2.332 (")
    assert cells(text, "against the best") == [
        "against the best of its group",
        "the lowest",
        cells(text, "against the best")[2],
    ]
    assert cells(text, "best against its default")[1].startswith("better: -0.24 (")
    assert cells(text, "memory")[1:] == ["3.98 GiB", "3.34 GiB"]


def test_settings_that_differ_stand_apart_from_those_that_do_not():
    first, second = low_and_high()
    spec = {**second.lock.spec, "train": {**second.lock.spec["train"], "effective_batch_size": 16}}
    second = replace(second, lock=replace(second.lock, spec=spec))
    text = render_comparison_markdown(compare_studies([first, second]))
    differs, same = text.split("## What differs")[1].split("## The same in all")
    assert cells(differs, "train.effective") == ["train.effective_batch_size", "8", "16"]
    assert "train.optimizer" not in differs
    assert cells(same, "train.optimizer") == ["train.optimizer", "adamw"]
    assert "study.name" not in text


def of_text(text: str) -> StudyComparison:
    """Return a comparison whose second study has this text for a name, a base and its data."""
    first, second = low_and_high()
    model = replace(second.lock.model, base=text, hub_id=text)
    data = replace(second.lock.data, source=text)
    second = replace(second, lock=replace(second.lock, name=text, model=model, data=data))
    return compare_studies([first, second])


@pytest.mark.parametrize(
    "payload", ["<img src=x onerror=alert(1)>", "a|b", "[x](javascript:0)", "{{ 7 * 7 }}\n# h"]
)
def test_names_from_outside_are_text_in_every_form(payload):
    plain, comparison = of_text("plain"), of_text(payload)
    markdown = render_comparison_markdown(comparison)
    assert "<img" not in markdown
    assert "](javascript" not in markdown.replace("\\]", "")
    assert [line for line in markdown.split("\n") if line.startswith("#")][1:] == [
        line for line in render_comparison_markdown(plain).split("\n") if line.startswith("#")
    ][1:]
    assert "<img" not in render_comparison_html(comparison)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_console_stays_within_its_width(width):
    console = Console(file=StringIO(), width=width, color_system=None)
    print_comparison(compare_studies(low_and_high()), console, folder=Path("reports/low-vs-high"))
    lines = console.file.getvalue().split("\n")
    assert max(map(len, lines)) <= width
    assert "Report: reports/low-vs-high/comparison.html" in lines


def test_a_comparison_needs_no_torch():
    program = (
        "import sys, lora_tune.report.comparison_files; "
        "print({'torch', 'peft', 'transformers', 'optuna'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
