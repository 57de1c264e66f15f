"""The fuzz program on a few hundred inputs, and that it would see what it looks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_inputs import Steps, again, keep, outcome_of
from fuzz_mutations import Input, seeds

from lora_tune.data.estimate import estimate_data
from lora_tune.errors import DataError
from lora_tune.study.spec import DataSection

PROGRAM = Path(__file__).parent / "fuzz_inputs.py"


def fuzz(folder: Path, *, inputs: int, seed: int, timeout_s: float) -> str:
    """Run the program; return what it says, when it has found nothing."""
    done = subprocess.run(
        [
            *(sys.executable, PROGRAM, "--inputs", str(inputs), "--seed", str(seed)),
            *("--keep", folder / "findings"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "findings").exists()
    return done.stdout


def test_300_inputs_are_taken_or_refused_in_words(tmp_path: Path) -> None:
    said = fuzz(tmp_path, inputs=300, seed=0, timeout_s=240)
    assert said.startswith("300 inputs with seed 0")
    assert "0 findings" in said


@pytest.mark.campaign
def test_20_000_inputs_are_taken_or_refused_in_words(tmp_path: Path) -> None:
    said = fuzz(tmp_path, inputs=20_000, seed=0, timeout_s=3600)
    assert "10,000 study" in said
    assert "0 findings" in said


@pytest.mark.parametrize("item", seeds(), ids=lambda item: item.kind)
def test_what_the_mutations_begin_with_is_right(tmp_path: Path, item: Input) -> None:
    assert outcome_of(item, tmp_path) == "taken"


def test_steps_that_were_not_taken_before_are_noticed(tmp_path: Path) -> None:
    steps, items = Steps(), [item for item in seeds() if item.kind == "study"]
    assert steps.of(lambda: outcome_of(items[0], tmp_path)) == ("taken", True)
    assert steps.of(lambda: outcome_of(items[0], tmp_path)) == ("taken", False)
    wrong = Input("study", b"[train]\nepochs = -1\n", {})
    before = len(steps.lines)
    assert steps.of(lambda: outcome_of(wrong, tmp_path)) == ("refused", True)
    assert len(steps.lines) > before


def test_a_kept_input_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(Input("study", b"[train]\nepochs = -1\n", {}), 7, "a reason", tmp_path)
    keep(Input("jsonl", b"", {"max_length": "no number"}), 8, "a reason", tmp_path)
    assert again(tmp_path) == 1  # options that are none are no fault of the reader's
    said = capsys.readouterr().out
    assert "7: refused" in said
    assert "8: Traceback" in said


# What the program and the tables of values have found.


@pytest.mark.parametrize("kind", ["text", "json", "csv", "parquet", "imagefolder"])
def test_a_kind_of_file_is_not_taken_for_a_data_set_of_all_files_that_lie_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "private.txt").write_text("line\n" * 100)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"'{kind}' is a kind of file"):
        estimate_data(DataSection(train=kind), seed=0, base_dir=tmp_path)


def test_what_arrow_says_of_damaged_pages_is_shown_without_its_control_characters(
    tmp_path: Path,
) -> None:
    whole = next(item for item in seeds() if item.kind == "parquet")
    seen = set()
    for place in range(4, len(whole.content), 3):
        content = whole.content[:place] + b"\x0e" + whole.content[place + 1 :]
        seen.add(outcome_of(Input("parquet", content, {}), tmp_path))
    assert seen <= {"taken", "refused"}
    assert "refused" in seen
