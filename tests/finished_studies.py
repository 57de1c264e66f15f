"""Small finished studies on a tiny Llama, each run once for all tests that look at what a study left."""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from test_end_to_end import STUDY, copy_of

from lora_tune.records import ProgressState, StudySnapshot
from lora_tune.study.loader import load_study
from lora_tune.tuner import run_study


class Silent:
    """A view that shows nothing."""

    def update(self, state: ProgressState) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@cache
def finished_study(
    workplace: Path, quantization: str, changes: Sequence[str] = ()
) -> StudySnapshot:
    """Return a study of three trials run to its end; the same one for the same arguments.

    Args:
        workplace: The folder that the fixture of ``test_end_to_end`` makes.
        quantization: Of the base.
        changes: Lines of the study file that replace those of the same key.
    """
    folder = copy_of(workplace, Path(tempfile.mkdtemp(dir=workplace.parent)) / "run")
    text = STUDY.format(quantization=quantization)
    for line in ("trials = 3", *changes):
        key = line.split(" = ")[0]
        [old] = [have for have in text.splitlines() if have.startswith(f"{key} =")]
        text = text.replace(old, line)
    (folder / "small.toml").write_text(text)
    with contextlib.chdir(folder):
        snapshot = run_study(
            load_study(Path("small.toml")),
            study_file=Path("small.toml"),
            command="lora-tune run small.toml",
            view=Silent(),
        )
    return replace(snapshot, folder=folder / snapshot.folder)
