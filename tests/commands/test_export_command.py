"""``lora-tune export``: what it writes where, what it refuses, and that nothing is left half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from finished_studies import finished_study
from test_end_to_end import workplace as workplace  # the fixture

from lora_tune.commands.export import export
from lora_tune.errors import LoraTuneError, StoreError, StudyFileError
from lora_tune.export.targets import TARGETS
from lora_tune.files import is_complete
from lora_tune.records import StudySnapshot
from lora_tune.store.folder import StudyFolder


@pytest.fixture(scope="module")
def finished(workplace: Path) -> StudySnapshot:
    return finished_study(workplace, "none")


@pytest.fixture
def study(finished: StudySnapshot, tmp_path: Path) -> Path:
    """A copy of a finished study's folder, with model and rows where they were."""
    root = tmp_path / "my place"
    shutil.copytree(finished.folder.parents[1], root, symlinks=True)
    return root / "reports" / finished.folder.name


def run(study: Path, target: str, **options: object) -> None:
    given = {"output": None, "gpu": None, "push": None, "public": False, "force": False}
    export(str(study), target=target, **{**given, "as_json": False, **options})


def no_leftovers(folder: Path) -> bool:
    return not any(path.name.startswith(".") for path in folder.iterdir())


def test_paths_go_to_stdout_and_the_next_step_to_stderr(study, capsys):
    run(study, "adapter")
    shown = capsys.readouterr()
    folder = study / "export" / "adapter"
    paths = [Path(line) for line in shown.out.splitlines()]
    assert paths
    assert all(path.parent == folder and path.is_file() for path in paths)
    assert is_complete(folder)
    lines = shown.err.splitlines()
    assert lines[lines.index("Next:") + 1 :] == [f"cd '{folder}'", "python load_adapter.py"]


def test_json_is_one_object(study, capsys):
    run(study, "adapter", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "adapter"
    assert found["folder"] == str(study / "export" / "adapter")
    assert all(Path(name).is_file() for name in found["files"])
    assert found["command"] == "python load_adapter.py"
    assert found["pushed"] is None


def test_an_export_says_which_study_it_is_of(study):
    run(study, "adapter")
    mark = json.loads((study / "export" / "adapter" / "export.json").read_text())
    lock = StudyFolder(study).load_lock()
    assert lock is not None
    assert mark["target"] == "adapter"
    assert (mark["study"], mark["data_sha256"]) == (lock.name, lock.data.sha256)


def test_an_earlier_export_is_replaced_and_a_changed_one_is_not(study):
    folder = study / "export" / "adapter"
    run(study, "adapter")
    before = (folder / "README.md").stat().st_ino
    run(study, "adapter")
    assert (folder / "README.md").stat().st_ino != before
    (folder / "my notes.txt").write_text("keep me")
    with pytest.raises(StudyFileError, match=r"was changed or added since.*--force"):
        run(study, "adapter")
    assert (folder / "my notes.txt").read_text() == "keep me"
    (folder / "my notes.txt").unlink()
    (folder / "README.md").write_text("my own card")
    with pytest.raises(StudyFileError, match="was changed or added since"):
        run(study, "adapter")
    run(study, "adapter", force=True)
    assert (folder / "README.md").read_text() != "my own card"
    assert no_leftovers(folder.parent)


def test_a_folder_of_somebody_else_is_not_replaced(study, tmp_path):
    (tmp_path / "theirs").mkdir()
    run(study, "adapter", output=tmp_path / "theirs")  # an empty one may be filled
    shutil.rmtree(tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(StudyFileError, match="this folder is no export"):
        run(study, "adapter", output=tmp_path / "theirs")
    assert (tmp_path / "theirs" / "thesis.tex").exists()


def test_places_that_would_lose_something_are_refused_even_with_force(study, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(study)
    places: dict[Path, str] = {
        study: "would replace",
        study.parent: "would replace",
        study / "adapter": "inside the study's own folder",
        study / "trials": "inside the study's own folder",
        Path.home(): "would replace",
        tmp_path / "file": "this is a file or a link",
        tmp_path / "link": "would replace",
    }
    for place, message in places.items():
        with pytest.raises(StudyFileError, match=message):
            run(study, "adapter", output=place, force=True)
    assert is_complete(study / "adapter")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("adaptor", {}, r'--to is "adaptor", which is no target; did you mean adapter\?'),
        ("xyzzy", {}, "Known: adapter, merged, axolotl, llamafactory, trl, vllm, ollama, gguf"),
        ("adapter", {"gpu": "24GiB"}, "--gpu has no meaning with --to adapter"),
        ("vllm", {"push": "me/x"}, "--push goes with --to adapter and merged, not with --to vllm"),
        ("adapter", {"public": True}, "--public goes with --push"),
    ],
)
def test_options_without_meaning_are_refused(study, target, options, message):
    with pytest.raises(StudyFileError, match=message):
        run(study, target, **options)
    assert not (study / "export").exists()


def undecided(study: Path) -> None:
    store = StudyFolder(study)
    confirmation = store.load_confirmation()
    assert confirmation is not None
    store.save_confirmation(replace(confirmation, decision=None))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (undecided, "has not decided yet.*lora-tune run small.toml"),
        (lambda study: (study / "confirmation.json").unlink(), "has not decided yet"),
        (lambda study: shutil.rmtree(study / "adapter"), "no adapter to export"),
    ],
)
def test_a_study_without_a_winner_is_one_message(
    study: Path, break_it: Callable[[Path], None], message: str
) -> None:
    break_it(study)
    with pytest.raises(StoreError, match=message):
        run(study, "adapter")
    assert not (study / "export").exists()


def test_nothing_is_left_when_a_target_fails(study):
    (study.parents[1] / "model").unlink()  # a link; the model itself stays
    with pytest.raises(LoraTuneError, match=r'model\.base "model"'):
        run(study, "merged")
    assert list((study / "export").iterdir()) == []


def test_every_target_of_the_table_has_its_module():
    for name, target in TARGETS.items():
        assert name == target.name
        module = Path(__file__).parents[2] / "lora_tune" / "export" / f"{name}.py"
        assert "def export(job: ExportJob) -> ExportResult:" in module.read_text()


LOADED = """
import sys
from pathlib import Path
from lora_tune.commands.export import export
export(sys.argv[1], target=sys.argv[2], output=Path(sys.argv[3]), gpu=None, push=None, public=False,
       force=False, as_json=True)
print("loaded:", [name for name in ("torch", "peft", "transformers") if name in sys.modules],
      file=sys.stderr)
"""


@pytest.mark.parametrize("target", ["adapter", "axolotl"])
def test_copies_and_settings_are_exported_without_torch(study, tmp_path, target):
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(study), target, str(tmp_path / "out")],
        cwd=study.parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "loaded: []" in done.stderr


def test_a_place_that_cannot_be_made_is_refused_before_anything_is_done(study, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for place in (tmp_path / "file" / "sub", Path("/proc/lora-tune"), tmp_path / "dangling" / "x"):
        with pytest.raises(StudyFileError, match=r"cannot be written .*Name another place"):
            run(study, "adapter", output=place)
    with pytest.raises(StudyFileError, match="File name too long"):
        run(study, "adapter", output=tmp_path / ("x" * 300))
    assert not (study / "export").exists()
    assert no_leftovers(tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_a_winner_whose_trial_is_gone_is_refused_by_every_target(study, target):
    confirmation = StudyFolder(study).load_confirmation()
    assert confirmation is not None
    for candidate in confirmation.candidates:
        if candidate.trial is not None:
            shutil.rmtree(study / "trials" / f"{candidate.trial:04d}")
    with pytest.raises(StoreError, match=r"which the study does not have"):
        run(study, target)
    assert not (study / "export").exists()
