"""What killed writers leave: removed, and an only copy brought back; nothing else is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from study_records import study_lock, trial_record

from lora_tune.errors import StoreError
from lora_tune.files import is_complete, publish_folder
from lora_tune.store.folder import StudyFolder
from lora_tune.store.leftovers import leftovers_below

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from lora_tune.files import publish_folder
target = Path(sys.argv[1])
with publish_folder(target) as folder:
    (folder / "weights").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def store(tmp_path: Path) -> StudyFolder:
    folder = StudyFolder(tmp_path / "study")
    folder.path.mkdir()
    folder.save_lock(study_lock())
    folder.save_trial(trial_record(0))
    with publish_folder(folder.path / "adapter") as adapter:
        (adapter / "weights").write_text("good")
    return folder


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_a_killed_writer_left_is_removed(store: StudyFolder) -> None:
    before = names_below(store.path)
    for target in (store.path / "adapter", store.trial_folder(0) / "rung-0"):
        done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(target)], check=False)
        assert done.returncode == -9
    (store.path / ".report.html.k3x_9abc").write_text("<html")
    (store.path / ".study.db.abcdefgh").write_text("")
    (store.path / ".study.db.abcdefgh-journal").write_text("")
    assert len(leftovers_below(store.path)) == 5
    assert store.tidy() == ()
    assert names_below(store.path) == before
    assert is_complete(store.path / "adapter")


def test_a_folder_that_was_put_aside_comes_back(store: StudyFolder) -> None:
    aside = store.path / ".adapter.old.k3x_9abc"
    aside.mkdir()
    os.replace(store.path / "adapter", aside / "adapter")
    [said] = store.tidy()
    assert said.startswith(f"{store.path / 'adapter'}: a run was killed while it replaced this")
    assert is_complete(store.path / "adapter")
    assert (store.path / "adapter" / "weights").read_text() == "good"
    assert not aside.exists()
    assert store.tidy() == ()


def test_a_folder_that_was_replaced_does_not_come_back(store: StudyFolder) -> None:
    aside = store.path / ".adapter.old.k3x_9abc"
    (aside / "adapter").mkdir(parents=True)
    (aside / "adapter" / "weights").write_text("older")
    assert store.tidy() == ()
    assert (store.path / "adapter" / "weights").read_text() == "good"
    assert not aside.exists()


def test_other_hidden_files_stay(store: StudyFolder) -> None:
    kept = (".gitignore", ".nfs0000000000000001", ".a.b", ".notes.txt", "x.report.html.abcdefgh")
    for name in kept:
        (store.path / name).write_text("mine")
    assert store.tidy() == ()
    assert all((store.path / name).read_text() == "mine" for name in kept)


def test_links_are_removed_and_never_followed(store: StudyFolder, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / ".a.json.abcdefgh").mkdir(parents=True)
    (store.path / ".adapter.abcdefgh").symlink_to(precious)
    (store.path / ".adapter.old.abcdefgh").symlink_to(precious)
    (store.path / "elsewhere").symlink_to(precious)
    store.tidy()
    assert (precious / ".a.json.abcdefgh").is_dir()
    assert not (store.path / ".adapter.abcdefgh").is_symlink()
    assert (store.path / "elsewhere").is_symlink()


def test_a_study_with_a_link_out_of_it_is_not_run(store: StudyFolder, tmp_path: Path) -> None:
    (store.path / "wandb").mkdir()
    (store.path / "wandb" / "debug.log").symlink_to(tmp_path)  # wandb's own
    (store.path / "inside").symlink_to(store.path / "adapter")
    with store.owned():
        pass
    (store.path / "trials" / "0001").symlink_to(tmp_path)
    with pytest.raises(StoreError, match=r"trials/0001: is a link that leads out"), store.owned():
        pytest.fail("owned with a link out of it")
