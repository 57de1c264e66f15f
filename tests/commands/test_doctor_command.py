"""``lora-tune doctor``: what it finds in a folder, what it mends, and what it leaves alone."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from study_records import study_lock
from table_folder import begin, open_ladder, run_on, table_lock

from lora_tune.commands.doctor import doctor, examine
from lora_tune.errors import StoreError
from lora_tune.files import MANIFEST, publish_folder, published_digests
from lora_tune.store.folder import FORMAT, LOCK_FILE, StudyFolder
from lora_tune.store.health import check_published

HOLDER = """
import sys
from pathlib import Path
from lora_tune.store.folder import StudyFolder
with StudyFolder(Path(sys.argv[1])).owned():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a few trials with a published adapter and rung folders."""
    store = begin(tmp_path_factory.mktemp("doctor") / "table", table_lock())
    run_on(store, table_lock(), num_trials=6)
    rng = random.Random(0)
    for place in ("adapter", "trials/0000/rung-0", "trials/0001/rung-0"):
        with publish_folder(store.path / place) as folder:
            (folder / "adapter_model.safetensors").write_bytes(rng.randbytes(2000))
            (folder / "adapter_config.json").write_text('{"r": 8}')
    return store.path


@pytest.fixture
def store(template: Path, tmp_path: Path) -> StudyFolder:
    shutil.copytree(template, tmp_path / "table")
    return StudyFolder(tmp_path / "table")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def paths_found(store: StudyFolder) -> list[str]:
    return [finding.path for finding in examine(store).findings]


def test_a_whole_study_is_well_and_looking_changes_nothing(
    store: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(store.path)
    assert doctor(str(store.path), fix=False, rebuild=False, as_json=False)
    assert contents(store.path) == before
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "All is well."
    assert "6 files in 3 published folders: well" in said
    assert "6 trials: well" in said


def test_every_flipped_byte_of_a_published_file_is_found_by_name(store: StudyFolder) -> None:
    for place in ("adapter", "trials/0000/rung-0"):
        folder = store.path / place
        for name in published_digests(folder) or {}:
            whole = (folder / name).read_bytes()
            for at in {0, len(whole) // 2, len(whole) - 1, *range(0, len(whole), 173)}:
                damaged = bytearray(whole)
                damaged[at] ^= 1 << at % 8
                (folder / name).write_bytes(damaged)
                [found] = check_published(store).findings
                assert found.path == f"{place}/{name}"
            (folder / name).unlink()
            assert paths_found(store) == [f"{place}/{name}"]
            (folder / name).write_bytes(whole)
    assert paths_found(store) == []


def test_every_flipped_byte_of_a_manifest_is_found_or_means_nothing(store: StudyFolder) -> None:
    path = store.path / "adapter" / MANIFEST
    whole = path.read_bytes()
    meant = published_digests(path.parent)
    found = 0
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        if published_digests(path.parent) == meant:
            continue
        findings = check_published(store).findings
        assert findings, f"byte {at}"
        assert all(finding.path.startswith("adapter/") for finding in findings)
        found += 1
    path.write_bytes(whole)
    assert found > len(whole) // 2


def test_what_killed_runs_left_is_named_and_removed_when_asked_to(
    store: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (store.path / ".trials.csv.abcdefgh").write_text("half")
    aside = store.path / ".adapter.old.abcdefgh"
    aside.mkdir()
    os.replace(store.path / "adapter", aside / "adapter")
    before = contents(store.path)
    assert not doctor(str(store.path), fix=False, rebuild=False, as_json=False)
    assert contents(store.path) == before
    said = capsys.readouterr().out
    for name in (".trials.csv.abcdefgh", ".adapter.old.abcdefgh"):
        assert f"{name}: " in said
    assert f"Next: lora-tune doctor {store.path} --fix" in said
    assert doctor(str(store.path), fix=True, rebuild=False, as_json=False)
    assert "the earlier one is back again" in capsys.readouterr().out.replace("\n", " ")
    assert (store.path / "adapter" / MANIFEST).is_file()
    assert not (store.path / ".trials.csv.abcdefgh").exists()


def test_files_of_others_are_neither_leftovers_nor_cut(store: StudyFolder) -> None:
    """An export may be on its way; hidden files and lines without an end are their owner's."""
    theirs = {
        "export/.merged.abcdefgh/model.safetensors": b"half",
        ".env.template": b"KEY=",
        "notes.jsonl": b'{"a": 1}\n{"b": 2}',
        "wandb/.report.json.abcdefgh": b"{}",
    }
    for name, content in theirs.items():
        (store.path / name).parent.mkdir(parents=True, exist_ok=True)
        (store.path / name).write_bytes(content)
    assert examine(store).findings == ()
    assert doctor(str(store.path), fix=True, rebuild=False, as_json=False)
    assert {name: (store.path / name).read_bytes() for name in theirs} == theirs


def test_a_damaged_state_of_a_lane_costs_no_finished_rung(store: StudyFolder) -> None:
    state = store.path / "trials" / "0000" / "state-1"
    with publish_folder(state) as folder:
        (folder / "lane_state.safetensors").write_bytes(b"whole")
    (state / "lane_state.safetensors").write_bytes(b"flipped")
    [found] = examine(store).findings
    assert found.advice == "Delete that folder: the next run begins this segment again."


def test_links_out_of_the_folder_are_named_and_never_followed(
    store: StudyFolder, tmp_path: Path
) -> None:
    shutil.copytree(store.path / "adapter", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "adapter_config.json").write_text("other")
    (store.path / "export").symlink_to(tmp_path / "elsewhere")
    [found] = examine(store).findings
    assert (found.check, found.path) == ("links", "export")
    with pytest.raises(StoreError, match="leads out of the study's folder"):
        doctor(str(store.path), fix=True, rebuild=False, as_json=False)
    (store.path / "export").unlink()
    weights = store.path / "adapter" / "adapter_model.safetensors"
    shutil.move(weights, tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    assert set(paths_found(store)) == {"adapter/adapter_model.safetensors"}


def test_a_running_study_is_only_looked_at(
    store: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (store.path / ".trials.csv.abcdefgh").write_text("being written")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert doctor(str(store.path), fix=False, rebuild=False, as_json=True)
        found = json.loads(capsys.readouterr().out)
        assert found["owner"]["pid"] == other.pid
        for keys in ({"fix": True, "rebuild": False}, {"fix": False, "rebuild": True}):
            with pytest.raises(StoreError, match=f"pid {other.pid} on"):
                doctor(str(store.path), as_json=False, **keys)
        assert (store.path / ".trials.csv.abcdefgh").exists()
        other.kill()


def test_json_is_one_object_whose_keys_are_always_there(
    store: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def seen() -> dict[str, object]:
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    assert doctor(str(store.path), fix=False, rebuild=False, as_json=True)
    well = seen()
    (store.path / "study.db").unlink()
    assert not doctor(str(store.path), fix=False, rebuild=False, as_json=True)
    ill = seen()
    assert well.keys() == ill.keys()
    assert (well["well"], well["findings"], well["trials"]) == (True, [], 6)
    [finding] = ill["findings"]  # type: ignore[misc]
    assert finding == {
        "check": "database",
        "path": "study.db",
        "problem": "is missing",
        "advice": "Make it again from the trial records: lora-tune doctor --rebuild does, and puts the old "
        "one aside.",
        "remedy": "--rebuild",
    }


def test_a_study_that_has_only_been_planned_is_well(tmp_path: Path) -> None:
    store = begin(tmp_path / "table", table_lock())
    assert doctor(str(store.path), fix=True, rebuild=False, as_json=False)


def test_a_study_killed_while_it_proposed_is_well(tmp_path: Path) -> None:
    store = begin(tmp_path / "table", table_lock())
    with store.owned():
        ladder, _ = open_ladder(store, table_lock())
        ladder.proposer.propose(0)  # and no record of it is written
    assert examine(store).is_well


def test_a_lock_that_cannot_be_read_or_is_newer_is_said(
    store: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, said in (
        ("{", "cannot be read as a study record"),
        (json.dumps({"format": FORMAT + 1}), "written by a newer lora-tune"),
    ):
        (store.path / LOCK_FILE).write_text(text)
        assert not doctor(str(store.path), fix=False, rebuild=False, as_json=False)
        assert said in capsys.readouterr().out.replace("\n", " ")


def test_exit_codes_and_messages_of_the_command(store: StudyFolder) -> None:
    def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "lora_tune.cli", "doctor", *arguments],
            cwd=store.path.parent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert command("table").returncode == 0
    (store.path / "study.db").write_bytes(b"nonsense")
    ill = command("table")
    assert (ill.returncode, ill.stderr) == (4, "")
    assert "study.db: is no SQLite database." in ill.stdout
    mended = command("table", "--rebuild")
    assert mended.returncode == 0, mended.stderr
    assert "The old one is study.db.damaged-1." in " ".join(mended.stdout.split())
    nothing = command("nothing")
    assert nothing.returncode == 4
    assert '"nothing" is no started study' in nothing.stderr


def test_the_settings_of_a_study_that_this_version_does_not_know_are_said(
    tmp_path: Path,
) -> None:
    store = begin(tmp_path / "docstrings", study_lock())  # its spec has no model and no data
    [found] = examine(store).findings
    assert found.path == LOCK_FILE
    assert found.problem.startswith("model.base is missing")
