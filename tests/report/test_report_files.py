"""report.md, trials.csv and report.json as files: read back, strict, complete."""

import json
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from report_studies import (
    finished_study,
    fruitless_study,
    half_confirmed_study,
    single_trial_study,
    unfinished_study,
)

from lora_tune.report import write_reports
from lora_tune.report.files import report_data


def refuse(constant: str) -> None:
    """Refuse NaN and the infinities, which JSON does not have."""
    raise ValueError(constant)


@pytest.mark.parametrize(
    "make",
    [finished_study, unfinished_study, half_confirmed_study, fruitless_study, single_trial_study],
)
def test_three_files_are_written_and_nothing_else_is_left(tmp_path, make):
    (tmp_path / "report.md").write_text("the report before")
    paths = write_reports(make(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert [path.name for path in paths] == ["report.md", "trials.csv", "report.json"]
    assert "the report before" not in paths[0].read_text(encoding="utf-8")
    json.loads(paths[2].read_text(encoding="utf-8"), parse_constant=refuse)


def test_nothing_is_replaced_when_a_report_cannot_be_made(tmp_path):
    study = finished_study(tmp_path)
    (tmp_path / "report.md").write_text("the report before")
    with pytest.raises(OSError, match="names trial 7, which"):
        write_reports(replace(study, trials=study.trials[:7]))
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_trials_csv_reads_back_as_the_records(tmp_path):
    study = finished_study(tmp_path)
    reason = 'said "no", then\nstopped; rank | 8'
    study = replace(study, trials=(replace(study.trials[0], reason=reason), *study.trials[1:]))
    write_reports(study)
    frame = pd.read_csv(tmp_path / "trials.csv", keep_default_na=False, na_values=[""])
    assert list(frame["trial"]) == [t.number for t in study.trials]
    for row, trial in zip(frame.to_dict("records"), study.trials, strict=True):
        assert row["state"] == trial.state
        assert row["rank"] == trial.config.rank
        assert row["learning_rate"] == trial.config.learning_rate
        assert row["lora_alpha"] == trial.config.lora_alpha
        assert row["target_set"] == trial.config.target_set
        assert row["predicted_bytes"] == trial.predicted_bytes
        assert row["reason"] == trial.reason or (pd.isna(row["reason"]) and not trial.reason)
        if trial.best_loss is None:
            assert pd.isna(row["eval_loss"])
        else:
            assert row["eval_loss"] == trial.best_loss
            assert row["steps"] == trial.steps
            assert row["eval_rows"] == len(trial.rungs[-1].evaluation.loss_sums)
            assert row["eval_loss_rung_0"] == trial.rungs[0].eval_loss
        assert row["suggested_rank"] == trial.suggested.rank
        assert row["kept_steps"] == trial.kept.steps if trial.kept else pd.isna(row["kept_steps"])
        assert row["repeats"] == trial.repeats if trial.repeats else pd.isna(row["repeats"])
    assert list(frame.query("suggested_rank != rank")["trial"]) == [4]
    assert list(frame.query("kept_steps < steps")["trial"]) == [0]
    text = (tmp_path / "trials.csv").read_text()
    assert ",200," in text
    assert ",200.0," not in text


def test_report_json_has_the_documented_parts_without_losses_of_single_examples(tmp_path):
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
        "forecast",
        "memory",
        "probe",
    ]
    assert data["format_version"] == 2
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
    text = json.dumps(data)
    assert "loss_sums" not in text
    assert "label_counts" not in text
    assert '"values"' not in text


def test_report_json_of_an_unfinished_study_has_neither_verdict_nor_decision(tmp_path):
    data = report_data(half_confirmed_study(tmp_path))
    assert (data["verdict"], data["decision"], data["forecast"]["error"]) == (None, None, None)
    assert len(data["confirmation"]["runs"]) == 3
    assert report_data(unfinished_study(tmp_path))["confirmation"] is None


def test_numbers_that_are_not_finite_become_null(tmp_path):
    study = finished_study(tmp_path)
    rung = replace(study.trials[2].rungs[0], eval_loss=float("nan"))
    bad = replace(study.trials[2], rungs=(rung,), penalty=float("inf"))
    study = replace(study, trials=(*study.trials[:2], bad, *study.trials[3:]))
    paths = write_reports(study)
    data = json.loads(paths[2].read_text(), parse_constant=refuse)
    assert data["trials"][2]["penalty"] is None
    assert data["trials"][2]["rungs"][0]["eval_loss"] is None


def test_a_file_name_that_is_not_utf8_is_written(tmp_path):
    study = finished_study(tmp_path)
    lock = replace(study.lock, data=replace(study.lock.data, source="d\udcff.jsonl"))
    trials = (replace(study.trials[0], reason="cannot read d\udcff"), *study.trials[1:])
    for path in write_reports(replace(study, lock=lock, trials=trials)):
        path.read_text(encoding="utf-8")


def test_importing_the_room_loads_neither_pandas_nor_torch():
    program = (
        "import sys, lora_tune.report; "
        "print({'torch', 'pandas', 'peft', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
