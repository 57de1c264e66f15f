"""report.md: a golden, escaping of foreign text, and studies that did not go well.

After a wanted change of the report, make the golden anew and read the difference::

    python tests/report/test_report_markdown.py
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from report_studies import (
    confirmed_study,
    finished_study,
    fruitless_study,
    half_confirmed_study,
    older_study,
    single_trial_study,
    unfinished_study,
)

from lora_tune.records import StudySnapshot
from lora_tune.report import markdown_escape, render_markdown
from lora_tune.report.charts import ReportChart
from lora_tune.report.markdown import code_block, markdown_table, python_literal

GOLDEN = Path(__file__).parent / "golden" / "report.md"

PLOT = ReportChart(
    name="loss-memory",
    title="Trial 3 is tied with the best, trial 7, and needs less memory",
    text="Loss and memory of three candidates: trial 7 2.331 and 3.98 GiB; trial 3 2.335 and 3.34 GiB.",
    caption="Each mark is a candidate.",
    spec={},
)

PAYLOADS = [
    "a|b|c",
    "`code`",
    "``` fence",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "line\nbreak | x",
    "carriage\r\n| a | b |",
    "[x](javascript:alert(1))",
    "![x](http://example.org/x.png)",
    "&lt;b&gt;",
    "*bold* _em_ ~~gone~~",
    "back\\slash \\| pipe",
    "\x1b[31mred\x1b[0m\x00",
    "$x^2$ {{ 7 * 7 }} {% raw %}",
    "evil\u202etxt.exe",
    "# heading",
    "--- rule",
    "{{ lock.command }}",
]


def test_the_report_of_a_finished_study_is_the_golden():
    """Make the golden anew by running this file as a program."""
    assert golden_text() == GOLDEN.read_text(encoding="utf-8")


def golden_text() -> str:
    """Return report.md of the finished study with one plot, whose words are fixed here."""
    return render_markdown(finished_study(), charts=[PLOT])


def prose(report: str) -> str:
    """Return the report without its fenced blocks, in which nothing acts as markup."""
    return re.sub(r"^(`{3,})[a-z]*\n.*?^\1$", "", report, flags=re.MULTILINE | re.DOTALL)


def unescaped(text: str, char: str) -> bool:
    """Say whether a character occurs without a backslash that acts on it."""
    pairs, i = [], 0
    while i < len(text):
        step = 2 if text[i] == "\\" else 1
        pairs.append(text[i : i + step])
        i += step
    return char in pairs


@pytest.mark.parametrize("payload", PAYLOADS)
def test_escaped_text_has_no_markup_left(payload):
    text = markdown_escape(payload)
    assert not any(unescaped(text, char) for char in "|`*[]~$")
    assert not set("<>\n\r\x1b\x00\u202e") & set(text)
    assert not text.startswith(("#", "---"))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_table_keeps_its_shape_whatever_is_in_a_cell(payload):
    lines = markdown_table(("a", payload), [(payload, "2")]).split("\n")
    assert len(lines) == 3
    for line in lines:
        cells = line.replace("\\\\", "").replace("\\|", "").split("|")
        assert len(cells) == 4


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_report_full_of_payloads_has_the_structure_of_a_plain_one(payload):
    study = finished_study()
    lock = replace(
        study.lock,
        name=payload,
        command=payload,
        notes=(payload, payload),
        model=replace(study.lock.model, base=payload, hub_id=payload, license=payload),
        data=replace(study.lock.data, source=payload),
        versions={payload: payload},
        hardware={payload: payload},
    )
    trials = tuple(
        replace(t, reason=payload, config=replace(t.config, target_set=payload))
        for t in study.trials
    )
    report = render_markdown(
        with_answers(replace(study, lock=lock, trials=trials), payload),
        charts=[replace(PLOT, title=payload, text=payload, caption=payload)],
        problems=[payload],
    )
    plain = render_markdown(with_answers(study, "text"), charts=[PLOT], problems=["text"])
    assert "<" not in prose(report)
    assert headings(report) == headings(plain)
    assert prose(report).count("](plots/loss-memory.svg)") == 1
    assert prose(report).replace("\\[", "").count("[") == 1  # the picture's: no link beside it
    # Environment has four rows fewer of versions and hardware, all else is equal.
    assert prose(plain).count("\n| ") - prose(report).count("\n| ") == 4


def headings(report: str) -> list[str]:
    """Return the headings of the second level."""
    return [line for line in prose(report).split("\n") if line.startswith("## ")]


def with_answers(study: StudySnapshot, text: str) -> StudySnapshot:
    """Return the study with this text as every prompt, reference and answer, and text's name."""
    samples = tuple(
        replace(
            sample,
            prompt=text,
            reference=text,
            answers=tuple(replace(answer, text=text) for answer in sample.answers),
        )
        for sample in study.behaviour.samples
    )
    behaviour = replace(study.behaviour, samples=samples, general_text=text, reason=text)
    return replace(study, behaviour=behaviour)


def test_five_prompts_are_answered_by_base_default_and_winner():
    report = render_markdown(finished_study())
    part = report.split("## Answers to held-out prompts")[1].split("\n## ")[0]
    assert part.count("### Confirmation row ") == 5
    for name in (
        "Prompt:",
        "Reference, as in the data:",
        "Answer of the default (trial 5):",
        "Answer of trial 3, recommended:",
    ):
        assert part.count(f"\n{name}\n\n```text\n") == 5, name
    assert part.count("Answer of the untuned base:") == 3
    assert part.count("Answer of the untuned base (cut after 48 tokens):") == 2
    assert "    return sum(values) / len(values)\n```" in part  # lines and indents are kept


def test_an_answer_cannot_end_its_block_and_a_long_one_is_cut():
    text = "```\n## heading\n<b>\x1b[31m\u202e" + "word " * 1000
    report = render_markdown(with_answers(finished_study(), text))
    assert "## heading" not in headings(report)
    assert "\x1b" not in report
    assert "\u202e" not in report
    assert r"<b>\x1b[31m\u202eword word" in report
    assert "[... 3,5" in report
    assert "more letters in behaviour.json]" in report


def test_a_study_without_answers_says_nothing_of_them():
    for study in (older_study(), unfinished_study(), half_confirmed_study()):
        report = render_markdown(study)
        assert "What else tuning changed" not in report
        assert "Answers to" not in report
        assert "Sizes:" not in report or study.lock.model.base_bytes


def test_what_is_missing_stands_before_the_candidates():
    report = render_markdown(finished_study(), problems=["The plots could not be made (x: y)."])
    assert report.index("- The plots could not be made (x: y).") < report.index("## Candidates")


def test_a_name_with_underscores_stays_readable():
    assert markdown_escape("lora_alpha of _x_") == "lora_alpha of \\_x\\_"
    assert markdown_escape("-0.3") == "-0.3"
    assert markdown_escape("- item") == "\\- item"
    assert markdown_escape("1. item") == "1\\. item"
    assert markdown_escape("1.5") == "1.5"


def test_a_fence_is_longer_than_the_backticks_in_it():
    assert code_block("a ```` b").startswith("`````\n")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_python_literal_reads_back_as_the_text(payload):
    import ast

    assert ast.literal_eval(python_literal(payload)) == payload
    assert "\n" not in python_literal(payload)


def cells(report: str, first: str) -> list[str]:
    """Return the cells of the first table row that begins with a text."""
    row = next(line for line in report.split("\n") if line.startswith(f"| {first}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_choice_verdict_base_and_cost_come_first_and_in_this_order():
    blocks = render_markdown(finished_study()).split("\n\n")
    assert blocks[1].startswith("**Use trial 3: rank 16,")
    assert blocks[2].startswith("Better than the default: the loss of trial 7 is 0.24 nats")
    assert blocks[3].startswith(
        "On rows that the search never saw the loss of trial 3, mean over 2"
    )
    assert blocks[4] == (
        "The study took 36 min 24 s on the CPU, 7 % longer than forecast. Training trial 3 alone needs "
        "3.34 GiB by the estimate."
    )
    assert blocks[5].startswith("Sizes: the adapter's file 3.8 MiB (3,942,104 bytes), the base in")
    assert blocks[6].startswith("| setting")
    titles = [title for block in blocks for title in headings(block)]
    assert titles[:5] == [
        "## How sure is this",
        "## What else tuning changed",
        "## Candidates",
        "## Answers to held-out prompts",
        "## Cost",
    ]


def test_what_was_trained_is_shown_beside_what_was_proposed():
    study = finished_study()
    clamped = replace(study.trials[3], suggested=replace(study.trials[3].suggested, rank=64))
    trials = (*study.trials[:3], clamped, *study.trials[4:])
    report = render_markdown(replace(study, trials=trials))
    assert cells(report, "rank  ")[1] == "16 (64 was proposed, 16 is the largest that fits)"
    assert "not promoted; rank 128 proposed" in report


def test_a_candidate_has_its_losses_difference_and_cost_in_its_rows():
    report = render_markdown(finished_study())
    scores = cells(report, "trial 3 ")
    assert scores[1:] == [
        "2.335",
        "2.236 to 2.434",
        "2.303",
        "+0.032",
        "2.337, 2.333",
        "+0.0040",
        "-0.0069 to +0.015",
        "0.47",
        "tied, chosen",
    ]
    facts = cells(report.split("What they are")[1], "trial 3 ")
    assert facts[1:5] == ["anchor A4", "16", "32", "0"]
    assert facts[-2:] == ["3.34 GiB", "1.2"]
    default = cells(report, "trial 5 (default)")
    assert default[3:5] == ["-", "-"]  # the search ended it after 25 steps: no loss to compare


def test_metrics_stand_beside_the_loss_and_a_failed_one_says_why():
    report = render_markdown(finished_study())
    row = cells(report.split("Metrics beside the loss")[1], "trial 7 ")
    assert row[1:] == ["0.42 (0.32 to 0.52)", "0.53 (0.49 to 0.57)", "-"]
    assert "- style:length has no value: ZeroDivisionError in row 3: division by zero." in report
    assert "Metrics beside" not in render_markdown(confirmed_study({"trial 7": (2.3, 2.3)}))


def test_cost_is_shown_by_phase_beside_forecast_and_training_all_fully():
    report = render_markdown(finished_study())
    assert cells(report, "wall time")[1] == "36 min 24 s (2184 s), 7 % longer than forecast"
    assert cells(report, "steps of the search")[1] == "985 (41.0 % of every trial trained fully)"
    assert (
        cells(report, "steps of the confirmation")[1]
        == "1,200 (50.0 % of every trial trained fully)"
    )
    assert cells(report, "forecast ")[1].startswith(
        "34 min 0 s if no trial ends early: loading 1 min"
    )


def test_a_study_of_an_older_version_without_plan_and_forecast_is_reported():
    report = render_markdown(single_trial_study())
    assert "forecast" not in report
    assert "Planned:" not in report
    assert "Planned: 12 trials, then a confirmation of the 2 best, one more if" in render_markdown(
        finished_study()
    )


def test_a_run_that_was_killed_before_it_wrote_its_time_claims_none():
    report = render_markdown(replace(finished_study(), wall_s=0.0))
    assert "The study took" not in report
    assert cells(report, "wall time")[1] == "-"


def test_a_half_finished_confirmation_shows_its_runs():
    report = render_markdown(half_confirmed_study())
    assert report.startswith("# LoRA study docstrings (unfinished)\n")
    assert cells(report, "trial 7 ")[1:] == ["2.298", "2 runs done"]
    assert "Load the adapter" not in report


def test_a_sign_of_less_is_written_in_words():
    assert "| below 0.01 |" in render_markdown(finished_study())


def test_the_snippet_of_an_nf4_base_quantizes_it_and_a_plain_one_does_not():
    study = finished_study()
    assert "bnb_4bit_compute_dtype=torch.float32" in render_markdown(study)
    model = replace(study.lock.model, quantization="none")
    report = render_markdown(replace(study, lock=replace(study.lock, model=model)))
    assert "PeftModel.from_pretrained" in report
    assert "BitsAndBytesConfig" not in report
    assert "AVX512" not in report.split("## Load the adapter")[1]


def test_the_snippet_can_be_compiled():
    study = finished_study()
    for quantization in ("nf4", "none"):
        model = replace(study.lock.model, quantization=quantization)
        report = render_markdown(replace(study, lock=replace(study.lock, model=model)))
        compile(report.split("```python\n")[1].split("```")[0], "snippet", "exec")


def test_a_gguf_base_without_a_hub_id_is_not_passed_to_from_pretrained():
    study = finished_study()
    model = replace(study.lock.model, base="/models/small.gguf", hub_id=None, revision=None)
    report = render_markdown(replace(study, lock=replace(study.lock, model=model)))
    assert 'base_id = "path/to/the/base/model"' in report
    assert "read the base from the file small.gguf" in report


def test_an_unfinished_study_is_marked_and_has_no_adapter_to_load():
    report = render_markdown(unfinished_study())
    assert report.startswith("# LoRA study docstrings (unfinished)\n")
    assert "7 of 12 trials" in report
    assert "Load the adapter" not in report


def test_a_fruitless_study_shows_every_reason_and_no_settings():
    report = render_markdown(fruitless_study())
    assert report.startswith("# LoRA study docstrings (nothing succeeded)\n")
    assert report.count("see log") == 12
    assert "| setting" not in report


def test_a_single_trial_is_reported():
    report = render_markdown(single_trial_study())
    assert "**Use trial 0: " in report
    assert "Set select.seeds to 2 or more." in report


if __name__ == "__main__":
    GOLDEN.write_text(golden_text(), encoding="utf-8")
