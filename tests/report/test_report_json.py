"""report.json: what is in it, checked by an independent validator against the schema that documents it.

After a wanted change of the format, make the schema anew and read the difference::

    python tests/report/test_report_json.py
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from report_studies import (
    ADAPTER_BYTES,
    BASE_BYTES,
    LOAD_S,
    NUM_SLOTS,
    finished_study,
    fruitless_study,
    half_confirmed_study,
    older_study,
    single_trial_study,
    unfinished_study,
)
from test_report_memory import FEW
from test_report_memory import study as measured_study

from lora_tune.records import LaneSpan, MemoryLog, StudySnapshot, TrialState
from lora_tune.report.comparison import compare_studies
from lora_tune.report.comparison_tables import comparison_frame
from lora_tune.report.memory import memory_frame
from lora_tune.report.report_json import json_schema, report_data
from lora_tune.report.tables import trials_frame

DOCS = Path(__file__).parent.parent.parent / "docs"
SCHEMA = DOCS / "report.schema.json"

MAKERS = [
    finished_study,
    older_study,
    unfinished_study,
    half_confirmed_study,
    fruitless_study,
    single_trial_study,
]


def schema_text() -> str:
    """Return the schema as it is committed."""
    return json.dumps(json_schema(), indent=1) + "\n"


def strict(schema: object) -> object:
    """Return the schema with no key allowed that it does not name."""
    if isinstance(schema, dict):
        closed = {key: strict(value) for key, value in schema.items()}
        if "properties" in closed:
            closed["additionalProperties"] = False
        return closed
    return [strict(value) for value in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def validator() -> jsonschema.protocols.Validator:
    """Validates by the committed schema, and allows no key that it does not document."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(strict(schema))


def written(study: StudySnapshot) -> dict[str, object]:
    """Return the object of a study's file, read back from its text."""
    return json.loads(json.dumps(report_data(study), allow_nan=False))


def test_the_committed_schema_is_that_of_the_code():
    """Make it anew by running this file as a program."""
    assert schema_text() == SCHEMA.read_text(encoding="utf-8")


@pytest.mark.parametrize("make", MAKERS)
def test_every_key_of_a_report_is_documented_and_of_its_type(validator, make):
    validator.validate(written(make()))


def test_a_report_after_readings_on_a_gpu_is_documented_too(validator):
    measured = measured_study(*FEW)
    assert isinstance(measured.memory, MemoryLog)
    assert measured.memory.readings
    validator.validate(written(measured))


def test_the_validator_finds_planted_faults(validator):
    good = written(finished_study())
    for path, value in (
        (["format_version"], 2),
        (["trials", 0, "config", "rank"], "16"),
        (["decision", "scores", 0, "loss"], "low"),
        (["behaviour", "samples", 0, "answers", 0, "ended"], 1),
        (["summary", "unknown"], 1),
        (["timeline", 0, "phase"], "warm-up"),
    ):
        bad = json.loads(json.dumps(good))
        place = bad
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert not validator.is_valid(bad), path
    del good["timeline"]
    assert not validator.is_valid(good)


def test_the_report_has_its_parts_without_losses_of_single_examples(tmp_path):
    data = report_data(finished_study(tmp_path))
    assert list(data) == [
        "format_version",
        "recommendation",
        "verdict",
        "summary",
        "lock",
        "trials",
        "confirmation",
        "decision",
        "behaviour",
        "forecast",
        "memory",
        "probe",
        "timeline",
        "adapter_bytes",
        "base_bytes",
        "charts",
        "problems",
    ]
    assert data["format_version"] == 3
    assert data["summary"]["chosen"] == data["decision"]["chosen"] == "trial 3"
    assert data["verdict"]["state"] == "better"
    assert data["decision"]["tied"] == ["trial 7", "trial 3"]
    assert len(data["decision"]["scores"][0]["seed_losses"]) == 2
    assert len(data["summary"]["confirmation"]["base"]["interval"]) == 2
    assert data["trials"][7]["rungs"][2]["eval_loss"] == pytest.approx(2.298, abs=1e-12)
    assert data["trials"][7]["rungs"][2]["evaluation"]["num_examples"] == 96
    runs = data["confirmation"]["runs"]
    assert [(run["candidate"], run["seed"]) for run in runs[:2]] == [("trial 7", 0), ("trial 7", 1)]
    assert runs[0]["evaluation"]["mean_loss"] == pytest.approx(2.329)
    assert data["confirmation"]["candidates"][1]["config"]["rank"] == 16
    assert data["confirmation"]["base_metrics"][0]["num_rows"] == 96
    assert data["forecast"]["error"] == pytest.approx(2184 / 2040 - 1)
    assert data["trials"][12]["repeats"] == 3
    assert (data["adapter_bytes"], data["base_bytes"]) == (ADAPTER_BYTES, BASE_BYTES)
    text = json.dumps(data)
    assert "loss_sums" not in text
    assert "label_counts" not in text
    assert '"values"' not in text


def test_an_unfinished_study_has_neither_verdict_nor_decision(tmp_path):
    data = report_data(half_confirmed_study(tmp_path))
    assert (data["verdict"], data["decision"], data["forecast"]["error"]) == (None, None, None)
    assert (data["behaviour"], data["adapter_bytes"]) == (None, 0)
    assert len(data["confirmation"]["runs"]) == 3
    assert report_data(unfinished_study(tmp_path))["confirmation"] is None


def test_answers_and_forgetting_are_those_of_the_study():
    study = finished_study()
    found = report_data(study)["behaviour"]
    assert found["subjects"] == ["untuned base", "trial 5", "trial 3"]
    assert [sample["prompt"] for sample in found["samples"]] == [
        sample.prompt for sample in study.behaviour.samples
    ]
    changes = {row["subject"]: row["change"] for row in found["forgetting"]}
    assert changes["untuned base"] is None
    assert changes["trial 3"] == pytest.approx(3.446 / 3.412 - 1)
    assert found["forgot"] is False


def test_the_timeline_has_every_segment_once_and_no_slot_twice_at_a_time():
    study = finished_study()
    found = report_data(study)["timeline"]
    search = [(s["trial"], s["rung"]) for s in found if s["phase"] == "search"]
    # a cached trial repeats the rungs of another one and trained none of its own
    trained = [(t.number, r.rung) for t in study.trials if t.repeats is None for r in t.rungs]
    assert sorted(search) == sorted(trained)
    runs = [(s["candidate"], s["seed"]) for s in found if s["phase"] == "confirmation"]
    assert sorted(runs) == sorted((run.candidate, run.seed) for run in study.confirmation.runs)
    assert {s["slot"] for s in found} == set(range(NUM_SLOTS))
    assert min(s["began_s"] for s in found) == LOAD_S
    for slot in range(NUM_SLOTS):
        own = sorted((s["began_s"], s["ended_s"]) for s in found if s["slot"] == slot)
        assert all(first[1] <= second[0] for first, second in zip(own, own[1:], strict=False))
    states = {(s["trial"], s["rung"]): s["state"] for s in found if s["phase"] == "search"}
    assert (states[7, 0], states[7, 2], states[6, 1]) == ("promoted", "complete", "pruned")
    assert report_data(older_study())["timeline"] == []


def test_a_trial_that_ended_early_has_the_segment_in_which_it_did(validator):
    study = finished_study()
    trials = list(study.trials)
    for number, ended_s in ((1, 66.0), (2, 500.0)):
        span = LaneSpan(slot=3, began_s=60.0, ended_s=ended_s)
        trials[number] = replace(trials[number], state=TrialState.DIVERGED, span=span)
    data = written(replace(study, trials=tuple(trials)))
    validator.validate(data)
    found = {(s["trial"], s["rung"]): s for s in data["timeline"] if s["trial"] in (1, 2)}
    assert {place: segment["state"] for place, segment in found.items()} == {
        (1, 0): "diverged",
        (2, 0): "promoted",
        (2, 1): "diverged",
    }
    assert (found[1, 0]["slot"], found[1, 0]["began_s"], found[1, 0]["ended_s"]) == (3, 60.0, 66.0)
    assert "span" not in data["trials"][1], "it stands in the timeline"


def test_numbers_that_are_not_finite_become_null():
    study = finished_study()
    bad = replace(study.trials[2], penalty=float("inf"), first_loss=float("nan"))
    data = written(replace(study, trials=(*study.trials[:2], bad, *study.trials[3:])))
    assert data["trials"][2]["penalty"] is None
    assert data["trials"][2]["first_loss"] is None


def test_the_page_on_the_report_names_every_key_at_the_top():
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z_]+)` \|", text.split("## report.json")[1], re.MULTILINE)[
        :17
    ] == [*report_data(finished_study())]


def test_the_page_on_the_report_names_every_column_and_no_other():
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    others = [finished_study(), finished_study(Path("reports/other"))]
    for frame, part in (
        (trials_frame(finished_study()), text.split("## trials.csv")[1].split("## ")[0]),
        (memory_frame(measured_study(*FEW)), text.split("## memory.csv")[1].split("## ")[0]),
        (comparison_frame(compare_studies(others)), text.split("comparison.csv | what it is")[1]),
    ):
        first_cells = re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)
        named = {name for cell in first_cells for name in re.findall(r"`([a-z_0-9]+)`", cell)}
        assert named == set(frame.columns) - {"eval_loss_rung_2"}


def test_the_places_that_the_page_on_the_report_names_exist():
    data = report_data(finished_study())
    part = (DOCS / "report.md").read_text(encoding="utf-8").split("### Where things are")[1]
    paths = re.findall(r"`\.([a-z_0-9]+(?:\.[a-z_0-9]+)+)", part.split("```")[0])
    assert len(paths) >= 12
    for path in paths:
        place = data
        for key in path.split("."):
            assert key in place, path
            place = place[key]


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
