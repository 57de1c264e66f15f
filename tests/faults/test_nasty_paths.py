"""Studies in nasty places: each runs to its end, or is refused in one message before anything expensive.

In a place that runs, everything is there: study file, model, rows and the study's folder.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from campaign_results import record
from fault_studies import write_study
from forked_commands import Done, commands

from lora_tune.files import is_complete

REPORTS = Path("reports") / "study"

# Below the test's folder; what they are made of is all legal in a name.
RUNNING = {
    "spaces": " two  words /trailing ",
    "other letters": "Größe/отчёты/日本語/مرحبا",
    "emoji": "🧪 results 👩‍🔬",
    "what shells and globs read": 'it\'s "$HOME" & ;|* [a-z] {b} !~ %s #1',
    "markup": "<b>bold</b>",
    "names as options and files": "--help/-rf/study.toml.json",
    "a name of 255 bytes": "n" * 255,
    "a name of 255 bytes in UTF-8": "ä" * 127 + "x",
    "very deep": "/".join(["folder-of-many"] * 18),
}
# One that has most of it.
ALL_IN_ONE = 'a b/日本語 🧪/it\'s "$HOME" & *[a]/' + "n" * 255


def run(place: Path, *, cwd: Path | None = None) -> Done:
    return commands().run("run", place / "study.toml", cwd=cwd or place)


def check_finished(done: Done, place: Path) -> None:
    assert done.code == 0, done.err
    assert is_complete(place / REPORTS / "adapter")
    assert (place / REPORTS / "report.html").stat().st_size > 10_000
    assert "Traceback" not in done.err


def test_a_study_runs_in_a_nasty_place(tmp_path: Path) -> None:
    place = tmp_path / ALL_IN_ONE
    write_study(place, executor="in-process")
    check_finished(run(place), place)


def test_a_study_runs_through_links_to_its_output_and_by_relative_paths(tmp_path: Path) -> None:
    place, real = tmp_path / "place", tmp_path / "real disk"
    write_study(place, executor="in-process")
    real.mkdir()
    (place / "reports").symlink_to(real, target_is_directory=True)
    (tmp_path / "link").symlink_to(place, target_is_directory=True)
    done = commands().run("run", "../link/./study.toml", cwd=place)
    check_finished(done, place)
    assert (real / "study" / "study.db").is_file()


@pytest.mark.campaign
def test_a_study_runs_in_every_nasty_place(tmp_path: Path) -> None:
    faults = []
    for number, (what, name) in enumerate(RUNNING.items()):
        place = tmp_path / str(number) / name
        write_study(place, executor="in-process")
        done = run(place)
        if done.code or not is_complete(place / REPORTS / "adapter"):
            faults.append(f"{what}: {done.code} {done.err[-300:]}")
    ran = len(RUNNING) - len(faults)
    record("nasty-paths", places=len(RUNNING), ran_to_the_end=ran, refused=len(REFUSED))
    assert faults == []


def test_a_model_in_a_folder_whose_name_is_not_text_is_refused_in_one_message(
    tmp_path: Path,
) -> None:
    write_study(tmp_path / "place", executor="in-process")
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin-\xe9"))
    (tmp_path / "place").rename(place)  # transformers can neither write nor read one there
    done = commands().run("run", "study.toml", cwd=place)
    assert done.code == 8, done.err
    assert "surrogates not allowed" in done.err
    assert len(done.err.strip().splitlines()) == 1


# Places that are refused: each prepares the place and returns the output to write into the study file.


def a_file_in_the_way(place: Path) -> str:
    (place / "taken").write_text("mine")
    return "taken"


def a_file_above(place: Path) -> str:
    (place / "taken").write_text("mine")
    return "taken/deeper"


def the_study_s_own_folder_is_a_file(place: Path) -> str:
    (place / "out").mkdir()
    (place / "out" / "study").write_text("mine")
    return "out"


def a_link_to_nowhere(place: Path) -> str:
    (place / "gone").symlink_to("/nowhere/at/all")
    return "gone"


def a_loop_of_links(place: Path) -> str:
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    return "a"


def a_name_that_is_too_long(place: Path) -> str:
    return "n" * 256


def a_path_that_is_too_long(place: Path) -> str:
    return "/".join(["n" * 250] * 20)


def a_path_that_is_too_long_for_sqlite(place: Path) -> str:
    return "/".join(["folder-of-many"] * 40)


def a_place_that_is_not_for_files(place: Path) -> str:
    return "/proc/studies"


def a_line_break(place: Path) -> str:
    return "two\\nlines"


def a_nul(place: Path) -> str:
    return "nul\\u0000byte"


def a_terminal_s_command(place: Path) -> str:
    return "red\\u001b[31m"


REFUSED: tuple[Callable[[Path], str], ...] = (
    a_file_in_the_way,
    a_file_above,
    the_study_s_own_folder_is_a_file,
    a_link_to_nowhere,
    a_loop_of_links,
    a_name_that_is_too_long,
    a_path_that_is_too_long,
    a_path_that_is_too_long_for_sqlite,
    a_place_that_is_not_for_files,
    a_line_break,
    a_nul,
    a_terminal_s_command,
)


def refuse(place: Path, output: str) -> None:
    """Run a study that writes to ``output``: one message, nothing trained, nothing changed."""
    study = write_study(place, executor="in-process")
    text = study.read_text()
    study.write_text(f'[study]\noutput = "{output}"\n{text}')
    before = sorted(place.rglob("*"))
    done = run(place)
    assert done.code in (3, 4), done.err
    assert len([line for line in done.err.splitlines() if line.strip()]) == 1, done.err
    assert done.err.startswith("lora-tune: ")
    assert "study.output" in done.err or "cannot be written" in done.err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("prepare", REFUSED)
def test_a_place_that_cannot_be_written_is_refused_in_one_message(
    tmp_path: Path, prepare: Callable[[Path], str]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    refuse(place, prepare(place))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Mount a folder on itself, read-only: permissions do not hold root back."""
    mount = ["mount", "--bind", str(folder), str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this process may not mount ({error})")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def test_a_read_only_place_is_refused_in_one_message(tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True)
    with read_only(place / "out"):
        refuse(place, "out")


def test_a_place_of_somebody_else_is_refused_in_one_message(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions do not hold root back")
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True, mode=0o555)
    refuse(place, "out")
