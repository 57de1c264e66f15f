"""What a report says of the probe: one sentence for the decision, and the curve that it rests on."""

from dataclasses import replace
from io import StringIO

import pytest
from report_studies import PROBE_READINGS, finished_study, lock, probe_reading
from rich.console import Console

from lora_tune.records import LanePlan, ProbeReading
from lora_tune.report import print_report, render_markdown
from lora_tune.report.files import report_data
from lora_tune.report.probe import probe_rows, probe_sentence
from lora_tune.units import GIB


def plan_of(
    lanes: int, size: int, *readings: ProbeReading, dtype: str = "bfloat16", cut: bool = False
) -> LanePlan:
    return replace(
        lock().plan,
        lanes=lanes,
        micro_batch_size=size,
        compute_dtype=dtype,
        probe_readings=readings,
        probe_cut=cut,
    )


LOST = replace(probe_reading(4, 8, 0.0), out_of_memory=True)
SENTENCES = {
    "more lanes gave little": (
        plan_of(2, 8, probe_reading(1, 8, 100), probe_reading(2, 8, 190), probe_reading(4, 8, 196)),
        "2 lanes of 8 rows in bfloat16: 1.90x one lane of 8 rows; 4 lanes gave 1.03x of 2 lanes and were not "
        "kept.",
    ),
    "all lanes that were open": (
        plan_of(2, 8, probe_reading(1, 8, 100), probe_reading(2, 8, 150)),
        "2 lanes of 8 rows in bfloat16: 1.50x one lane of 8 rows.",
    ),
    "packing does not pay": (
        plan_of(
            1,
            4,
            probe_reading(1, 2, 100),
            probe_reading(1, 4, 150),
            probe_reading(1, 8, 153),
            probe_reading(2, 4, 120),
        ),
        "One lane of 4 rows in bfloat16: 1.50x one lane of 2 rows; 2 lanes gave 0.80x of one lane and were "
        "not kept; 8 rows a lane gave 1.02x of 4 rows a lane and were not kept.",
    ),
    "memory ran out": (
        plan_of(2, 8, probe_reading(1, 8, 100), probe_reading(2, 8, 150), LOST),
        "2 lanes of 8 rows in bfloat16: 1.50x one lane of 8 rows; 4 lanes did not fit.",
    ),
    "more lanes of fewer rows": (
        plan_of(1, 8, probe_reading(1, 8, 100), probe_reading(2, 4, 101)),
        "One lane of 8 rows in bfloat16; 2 lanes of 4 rows gave 1.01x of one lane of 8 rows and were not "
        "kept.",
    ),
    "only the compute type was open": (
        plan_of(4, 8, probe_reading(1, 4, 100, "float32"), probe_reading(1, 4, 131)),
        "4 lanes of 8 rows in bfloat16 (not measured); bfloat16 was 1.31x float32.",
    ),
    "cut": (
        plan_of(1, 8, probe_reading(1, 4, 100), cut=True),
        "One lane of 8 rows in bfloat16 (not measured). The probe was cut short: more could have taken over "
        "5 % of the study's time.",
    ),
    "nothing fitted": (
        plan_of(1, 8, replace(LOST, lanes=1)),
        "One lane of 8 rows in bfloat16 (not measured).",
    ),
    "nothing was measured": (plan_of(4, 8), ""),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_decision_is_said_in_a_sentence(name: str) -> None:
    plan, sentence = SENTENCES[name]
    assert probe_sentence(plan) == sentence


def test_the_curve_has_a_row_a_reading_with_its_ratio_to_the_first() -> None:
    peak = replace(probe_reading(2, 8, 150), peak_bytes=3 * GIB)
    rows = probe_rows(plan_of(2, 8, probe_reading(1, 8, 100), peak, LOST))
    assert rows == [
        ("1", "8", "bfloat16", "100", "1.00x", "-", ""),
        ("2", "8", "bfloat16", "150", "1.50x", "3.00 GiB", "kept"),
        ("4", "8", "bfloat16", "-", "-", "-", "out of memory"),
    ]


def test_a_study_that_measured_nothing_has_no_such_section() -> None:
    study = finished_study()
    silent = replace(study, lock=replace(study.lock, plan=plan_of(4, 8)))
    assert "Lanes by measurement" in render_markdown(study)
    assert "Lanes by measurement" not in render_markdown(silent)


def test_the_console_says_it_in_one_line_and_json_has_the_readings() -> None:
    study = finished_study()
    shown = StringIO()
    print_report(study, Console(file=shown, width=200, color_system=None))
    [line] = [line for line in shown.getvalue().splitlines() if line.startswith("Lanes: ")]
    assert line.rstrip() == f"Lanes: {probe_sentence(study.lock.plan)}"
    data = report_data(study)["probe"]
    assert data["decision"] == probe_sentence(study.lock.plan)
    assert [r["tokens_per_s"] for r in data["readings"]] == [r.tokens_per_s for r in PROBE_READINGS]
    assert (data["probe_s"], data["cut"]) == (31.25, False)


def test_rungs_on_fewer_rows_are_told_apart_from_those_on_all() -> None:
    study = finished_study()
    whole = render_markdown(study)
    fewer = render_markdown(replace(study, lock=replace(study.lock, eval_rows=(19, 60, 96))))
    assert "do not compare" not in whole
    assert "losses of rungs with other rows do not compare" in fewer
    for cell in ("19 of 96", "60 of 96", "96 of 96"):
        assert f"| {cell} |" in fewer
    assert "(1 is the same order), on 19 and 60 selection rows." in fewer
    assert "the order at rung 0 and at rung 1 has a rank correlation of 0.70" in whole
    assert "rung 2 has" not in whole  # of three trials: too few to say anything
