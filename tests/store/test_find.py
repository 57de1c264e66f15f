"""What STUDY means on the command line: a folder, a study file, a name, or the newest."""

import os
from pathlib import Path

import pytest
from study_records import study_lock

from lora_tune.errors import StoreError, StudyFileError
from lora_tune.store.find import find_study
from lora_tune.store.folder import LOCK_FILE, StudyFolder

STUDY_FILE = '[model]\nbase = "m"\n[data]\ntrain = "rows.jsonl"\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, as studies are found from the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder: str, *, changed: int | None = None) -> Path:
    path = Path(folder)
    path.mkdir(parents=True)
    StudyFolder(path).save_lock(study_lock(path.name))
    if changed is not None:
        os.utime(path / LOCK_FILE, (changed, changed))
    return path


def message_of(study: str | None) -> str:
    with pytest.raises(StoreError) as caught:
        find_study(study)
    return str(caught.value)


def test_a_folder_is_found_wherever_it_is() -> None:
    start("elsewhere/deep/docstrings")
    assert find_study("elsewhere/deep/docstrings").path == Path("elsewhere/deep/docstrings")


def test_a_name_is_a_folder_below_reports() -> None:
    start("reports/docstrings")
    assert find_study("docstrings").path == Path("reports/docstrings")


def test_a_study_file_finds_the_study_that_it_started() -> None:
    start("reports/sweep")
    Path("sweep.toml").write_text(STUDY_FILE, encoding="utf-8")
    assert find_study("sweep.toml").path == Path("reports/sweep")


def test_a_study_file_may_write_elsewhere() -> None:
    start("out/other")
    text = '[study]\nname = "other"\noutput = "out"\n' + STUDY_FILE
    Path("sweep.toml").write_text(text, encoding="utf-8")
    assert find_study("sweep.toml").path == Path("out/other")


def test_without_a_word_the_newest_is_meant() -> None:
    start("reports/old", changed=1_000)
    start("reports/newest", changed=3_000)
    start("reports/middle", changed=2_000)
    Path("reports/not-a-study").mkdir()
    assert find_study(None).path == Path("reports/newest")


def test_a_report_that_was_passed_on_without_its_trials_is_not_the_newest_study() -> None:
    start("reports/mine", changed=1_000)
    start("reports/sample", changed=2_000)
    Path("reports/sample/report.json").write_text("{}")
    assert find_study(None).path == Path("reports/mine")
    Path("reports/sample/trials").mkdir()
    assert find_study(None).path == Path("reports/sample")


def test_a_folder_that_is_no_study_does_not_hide_a_study_of_its_name() -> None:
    start("reports/docs")
    Path("docs").mkdir()
    assert find_study("docs").path == Path("reports/docs")


def test_a_folder_that_is_a_study_comes_before_a_name() -> None:
    start("reports/docs")
    start("docs")
    assert find_study("docs").path == Path("docs")


def test_no_study_at_all_says_how_to_start_one() -> None:
    assert message_of(None) == (
        "no study below reports/. Start one with: lora-tune run STUDY.toml, or name its folder."
    )


def test_an_unknown_name_gets_the_nearest_and_all_others() -> None:
    start("reports/docstrings")
    start("reports/alpaca")
    assert message_of("docstring") == (
        '"docstring" is no started study: there is no reports/docstring/study.lock.json; '
        "did you mean docstrings? Studies below reports/: alpaca, docstrings. "
        "Start it with: lora-tune run STUDY.toml"
    )


def test_an_unknown_name_without_any_study_is_still_a_sentence() -> None:
    assert message_of("sweep") == (
        '"sweep" is no started study: there is no reports/sweep/study.lock.json. '
        "Start it with: lora-tune run STUDY.toml"
    )


def test_a_folder_that_is_no_study_is_named() -> None:
    Path("empty").mkdir()
    assert message_of("empty").startswith(
        '"empty" is no started study: there is no empty/study.lock.json.'
    )


def test_a_study_file_that_was_never_run_is_named() -> None:
    Path("sweep.toml").write_text(STUDY_FILE, encoding="utf-8")
    assert "there is no reports/sweep/study.lock.json" in message_of("sweep.toml")


def test_a_bad_study_file_is_the_study_file_s_error() -> None:
    Path("sweep.toml").write_text("[model]\n", encoding="utf-8")
    with pytest.raises(StudyFileError, match=r"model\.base is missing"):
        find_study("sweep.toml")
