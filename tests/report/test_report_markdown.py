"""report.md: a golden, escaping of foreign text, and studies that did not go well.

After a wanted change of the report, make the golden anew and read the difference::

    python tests/report/test_report_markdown.py
"""

from dataclasses import replace
from pathlib import Path

import pytest
from report_studies import finished_study, fruitless_study, single_trial_study, unfinished_study

from lora_tune.report import markdown_escape, render_markdown
from lora_tune.report.markdown import code_block, markdown_table, python_literal

GOLDEN = Path(__file__).parent / "golden" / "report.md"

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
    assert render_markdown(finished_study()) == GOLDEN.read_text(encoding="utf-8")


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
    report = render_markdown(replace(study, lock=lock, trials=trials))
    plain = render_markdown(study)
    prose = report.split("```python")[0]
    assert "<" not in prose
    assert [line for line in report.split("\n") if line.startswith("## ")] == [
        line for line in plain.split("\n") if line.startswith("## ")
    ]
    # Environment has four rows fewer of versions and hardware, all else is equal.
    assert plain.count("\n| ") - report.count("\n| ") == 4


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


def test_the_report_says_that_one_seed_was_trained():
    report = render_markdown(finished_study())
    assert "no comparison with fresh seeds was made" in report


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
    assert "No other trial has a result to compare with." in render_markdown(single_trial_study())


if __name__ == "__main__":
    GOLDEN.write_text(render_markdown(finished_study()), encoding="utf-8")
