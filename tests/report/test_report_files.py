"""The files of a report: read back, strict, complete, also when plots cannot be made."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
from report_studies import (
    finished_study,
    fruitless_study,
    half_confirmed_study,
    older_study,
    single_trial_study,
    unfinished_study,
)

from lora_tune.report import write_reports
from lora_tune.report.files import page_with_plots
from lora_tune.report.plots import draw


@dataclass(frozen=True)
class SimpleChart:
    """A chart as far as pictures of it go."""

    name: str
    spec: dict[str, object]
    title: str = "A title"
    text: str = "Words."
    caption: str = "How to read it."


def refuse(constant: str) -> None:
    """Refuse NaN and the infinities, which JSON does not have."""
    raise ValueError(constant)


MAKERS = [
    finished_study,
    older_study,
    unfinished_study,
    half_confirmed_study,
    fruitless_study,
    single_trial_study,
]


@pytest.mark.parametrize("make", MAKERS)
def test_the_files_are_written_and_nothing_else_is_left(tmp_path, make):
    (tmp_path / "report.md").write_text("the report before")
    paths = write_reports(make(tmp_path))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(paths)
    names = ["report.md", "report.html", "report.json", "trials.csv"]
    assert [path.name for path in paths[:4]] == names
    assert all(path.parent == tmp_path / "plots" for path in paths[4:])
    assert "the report before" not in paths[0].read_text(encoding="utf-8")
    data = json.loads(paths[2].read_text(encoding="utf-8"), parse_constant=refuse)
    assert data["problems"] == []
    assert [tmp_path / chart["file"] for chart in data["charts"]] == paths[4:]


def test_every_picture_is_shown_in_the_text_with_its_words(tmp_path):
    paths = write_reports(finished_study(tmp_path))
    text = paths[0].read_text(encoding="utf-8")
    data = json.loads(paths[2].read_text(encoding="utf-8"))
    assert len(data["charts"]) >= 4
    for chart, line in zip(data["charts"], re.findall(r"^!\[.*$", text, re.MULTILINE), strict=True):
        assert line.endswith(f"]({chart['file']})")
        # the words are the picture's alternative text, their markup escaped
        assert line.replace("\\", "").startswith(f"![{chart['text'][:40]}")


def test_pictures_of_plots_that_are_no_longer_there_are_removed_and_others_kept(tmp_path):
    first = write_reports(finished_study(tmp_path))
    own = tmp_path / "plots" / "mine.svg"
    own.write_text("<svg/>")
    second = write_reports(fruitless_study(tmp_path))
    assert len(second) < len(first)
    assert set((tmp_path / "plots").iterdir()) == {*second[4:], own}


def test_a_report_written_elsewhere_names_the_adapter_in_the_study(tmp_path):
    study = finished_study(tmp_path / "study")
    paths = write_reports(study, folder=tmp_path / "deep" / "elsewhere")
    assert {path.parent.name for path in paths} == {"elsewhere", "plots"}
    assert not study.folder.exists()
    text = paths[0].read_text(encoding="utf-8")
    assert f'PeftModel.from_pretrained(base, "{study.folder / "adapter"}")' in text


def broken_charts():
    raise ImportError("no module named vl_convert")


def test_plots_that_cannot_be_made_are_a_named_problem():
    plots = draw(broken_charts)
    assert plots.charts == ()
    assert plots.problems == (
        "The plots could not be made (ImportError: no module named vl_convert).",
    )


def test_a_picture_that_cannot_be_drawn_costs_that_picture_alone():
    good = SimpleChart("good", {"mark": "point", "data": {"values": []}})
    plots = draw(lambda: [SimpleChart("bad", {"mark": "no such mark"}), good])
    assert list(plots.pictures) == ["good"]
    assert [chart.name for chart in plots.charts] == ["bad", "good"]
    assert len(plots.problems) == 1
    assert plots.problems[0].startswith("The plot bad could not be made (")


def test_a_page_whose_plots_cannot_be_put_in_is_made_without_them():
    def render(charts, problems):
        if charts:
            raise RuntimeError("the bundle is damaged")
        return f"page without plots: {' '.join(problems)}"

    plots = draw(lambda: [SimpleChart("good", {"mark": "point", "data": {"values": []}})])
    page, problems = page_with_plots(render, plots)
    assert problems == (
        "The plots of the page could not be made (RuntimeError: the bundle is damaged).",
    )
    assert page == f"page without plots: {problems[0]}"


def test_a_missing_plotting_library_leaves_the_text_report_and_says_so(tmp_path):
    """In a process of its own, which cannot import vl_convert: as where its wheel does not exist."""
    program = (
        "import sys; sys.modules['vl_convert'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from report_studies import finished_study\n"
        "from lora_tune.report import write_reports\n"
        "write_reports(finished_study(Path(sys.argv[2])))"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", program, here, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "could not be made (ModuleNotFoundError" in done.stderr
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert data["problems"]
    assert all(chart["file"] is None for chart in data["charts"])
    assert "## Missing from this report" in text
    assert "![" not in text
    assert "Use trial 3" in text
    assert "vl_convert" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "plots").exists()


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
