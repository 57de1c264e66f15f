"""``lora-tune report`` on study folders: one, several, none, a running one, and in reasonable time."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from report_speed import make_study
from report_studies import confirmed_study, finished_study, half_confirmed_study, unfinished_study

from lora_tune.commands.best import best
from lora_tune.commands.report import report
from lora_tune.errors import StoreError, StudyFileError
from lora_tune.records import StudySnapshot
from lora_tune.report.report_json import report_data
from lora_tune.store.folder import StudyFolder


def save(study: StudySnapshot, name: str) -> Path:
    """Write the records of a study below reports/, as a run does, and return its folder."""
    folder = StudyFolder(Path("reports") / name)
    folder.path.mkdir(parents=True)
    folder.save_lock(replace(study.lock, name=name))
    for trial in study.trials:
        folder.save_trial(trial)
    if study.confirmation is not None:
        folder.save_confirmation(study.confirmation)
    if study.behaviour is not None:
        folder.save_behaviour(study.behaviour)
    folder.save_runtime(study.wall_s)
    return folder.path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, as studies are found from the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    return tmp_path


def test_the_newest_study_is_reported_in_its_folder(capsys):
    folder = save(finished_study(), "docstrings")
    report([], output=None, as_json=False)
    shown = capsys.readouterr()
    assert shown.out.startswith("Use trial 3: rank 16")
    assert "On a general text (plain prose that comes with the tool)" in shown.out
    assert "Sizes: the base in memory 0.11 GiB (113,283,072 bytes)." in shown.out
    assert f"Report: {folder / 'report.html'}\n" in shown.out
    assert f"Next: lora-tune export {folder} --to TARGET\n" in shown.out
    assert shown.err.startswith(
        f"written in {folder}: report.md, report.html, report.json, trials.csv and "
    )
    assert (folder / "report.md").is_file()


def test_json_is_alone_on_stdout_and_equals_the_file(capsys):
    folder = save(finished_study(), "docstrings")
    report(["docstrings"], output=None, as_json=True)
    shown = capsys.readouterr()
    assert shown.out == (folder / "report.json").read_text(encoding="utf-8")
    assert json.loads(shown.out)["summary"]["chosen"] == "trial 3"
    assert "written in" in shown.err


def test_output_leaves_the_study_s_folder_as_it_was(capsys):
    folder = save(finished_study(), "docstrings")
    before = sorted(folder.rglob("*"))
    report(["docstrings"], output=Path("elsewhere"), as_json=False)
    assert sorted(folder.rglob("*")) == before
    assert Path("elsewhere/report.html").is_file()
    assert "Report: elsewhere/report.html" in capsys.readouterr().out


def test_the_study_s_own_folder_is_a_fine_output():
    folder = save(finished_study(), "docstrings")
    report(["docstrings"], output=folder, as_json=True)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "is in the folder adapter, next to this report." in text


@pytest.mark.parametrize("make", [unfinished_study, half_confirmed_study])
def test_an_unfinished_study_is_marked_in_every_form(make, capsys):
    folder = save(make(), "half")
    report(["half"], output=None, as_json=False)
    shown = capsys.readouterr().out
    assert shown.startswith("Unfinished (")
    assert "Next: lora-tune run studies/docstrings.toml" in shown
    assert "(unfinished)" in (folder / "report.md").read_text(encoding="utf-8").split("\n")[0]
    assert "unfinished" in (folder / "report.html").read_text(encoding="utf-8")
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert data["summary"]["outcome"] == "unfinished"


def test_a_study_is_read_while_its_records_are_written():
    study = finished_study()
    path = save(study, "running")
    folder, stop, failed = StudyFolder(path), threading.Event(), []

    def write() -> None:
        try:
            while not stop.is_set():
                for trial in study.trials:
                    folder.save_trial(trial)
                folder.save_confirmation(study.confirmation)
                folder.save_runtime(study.wall_s)
        except OSError as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            assert len(report_data(folder.snapshot())["trials"]) == 13
    finally:
        stop.set()
        writer.join()
    assert failed == []


def test_two_studies_are_compared_in_a_folder_of_both_names(capsys):
    save(confirmed_study({"trial 7": (2.33, 2.334), "trial 5": (2.57, 2.58)}), "low")
    save(confirmed_study({"trial 3": (2.40, 2.404), "trial 5": (2.57, 2.58)}), "high")
    report(["low", "high"], output=None, as_json=False)
    shown = capsys.readouterr()
    assert shown.out.startswith("low and high were confirmed on the same 96 rows, so their losses")
    assert "Report: reports/low-vs-high/comparison.html" in shown.out
    assert "written in reports/low-vs-high: comparison.md, comparison.html" in shown.err
    assert not Path("reports/low/report.md").exists()


def test_a_comparison_as_json_goes_where_it_is_told(capsys):
    save(finished_study(), "a")
    save(unfinished_study(), "b")
    report(["a", "b"], output=Path("out"), as_json=True)
    shown = capsys.readouterr()
    data = json.loads(shown.out)
    assert [study["study"] for study in data["studies"]] == ["a", "b"]
    assert shown.out == Path("out/comparison.json").read_text(encoding="utf-8")


def test_a_comparison_of_many_has_a_short_name():
    for name in "abcde":
        save(unfinished_study(), name)
    report(list("abcde"), output=None, as_json=True)
    assert Path("reports/a-vs-b-vs-3-more/comparison.md").is_file()


def test_the_folder_of_another_study_is_not_written_to():
    save(finished_study(), "a")
    other = save(finished_study(), "b")
    before = sorted(other.rglob("*"))
    with pytest.raises(
        StudyFileError, match=r"reports/b: is the folder of a study, whose own report"
    ):
        report(["a"], output=other, as_json=False)
    with pytest.raises(StudyFileError, match=r"reports/b: is the folder of a study"):
        report(["a", "b"], output=other, as_json=False)
    assert sorted(other.rglob("*")) == before


def test_an_output_that_is_a_file_is_refused():
    save(finished_study(), "a")
    Path("file").touch()
    with pytest.raises(StudyFileError, match=r"file: is a file; --output names a folder"):
        report(["a"], output=Path("file"), as_json=False)


def test_a_report_whose_records_are_gone_is_not_replaced_by_an_empty_one():
    folder = save(finished_study(), "a")
    report(["a"], output=None, as_json=True)
    before = (folder / "report.md").read_bytes()
    shutil.rmtree(folder / "trials")
    (folder / "confirmation.json").unlink()
    with pytest.raises(StoreError, match=r"has a report of 13 trials, but no records of them in"):
        report(["a"], output=None, as_json=True)
    assert (folder / "report.md").read_bytes() == before


def test_the_same_study_twice_is_named():
    save(finished_study(), "a")
    with pytest.raises(StudyFileError, match=r"reports/a is named twice"):
        report(["a", "reports/a"], output=None, as_json=False)


def test_a_study_of_500_trials_is_reported_in_seconds_without_torch(tmp_path):
    make_study(tmp_path / "large", num_trials=500)
    program = (
        "import sys; from pathlib import Path; from lora_tune.commands.report import report; "
        "report([sys.argv[1]], output=None, as_json=False); "
        "found = {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(str(found) if found else 0)"
    )
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "large")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    # processor time, not the clock's; about 4 s on two quiet cores, three times that where they are shared
    seconds = sum(after[2:4]) - sum(before[2:4])
    assert 0 < seconds < 12
    data = json.loads((tmp_path / "large" / "report.json").read_text(encoding="utf-8"))
    assert len(data["trials"]) == 500
    assert data["problems"] == []
    assert (tmp_path / "large" / "report.html").stat().st_size < 3_000_000


def test_a_place_that_cannot_be_made_is_refused_and_nothing_is_written():
    save(finished_study(), "a")
    Path("file").touch()
    before = sorted(Path().rglob("*"))
    for place in (Path("file/sub"), Path("/proc/lora-tune")):
        with pytest.raises(StudyFileError, match=r"cannot be written .*--output"):
            report(["a"], output=place, as_json=False)
    assert sorted(Path().rglob("*")) == before


def test_a_missing_record_is_said_by_the_report_and_on_stderr(capsys):
    folder = save(finished_study(), "a")
    report(["a"], output=Path("whole"), as_json=True)
    assert "missing" not in capsys.readouterr().err
    confirmation = StudyFolder(folder).load_confirmation()
    assert confirmation is not None
    needed = {candidate.trial for candidate in confirmation.candidates}
    gone = next(number for number in range(12) if number not in needed)
    shutil.rmtree(folder / "trials" / f"{gone:04d}")
    said = f"trials/{gone:04d} is missing and left out here: restore it."
    report(["a"], output=None, as_json=False)
    assert f"Warning: {said}" in capsys.readouterr().out
    assert said in (folder / "report.md").read_text(encoding="utf-8")
    report(["a"], output=None, as_json=True)
    shown = capsys.readouterr()
    assert f"Warning: reports/a: {said}" in shown.err
    assert said in json.loads(shown.out)["summary"]["warnings"]
    best("a", as_json=True)
    assert f"Warning: {said}" in capsys.readouterr().err


def test_the_next_command_can_be_pasted_for_a_folder_with_a_blank(capsys):
    folder = save(finished_study(), "my study")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    report([str(folder)], output=None, as_json=False)
    best(str(folder), as_json=False)
    shown = capsys.readouterr().out
    assert shown.count("Next: lora-tune export 'reports/my study' --to TARGET\n") == 2
