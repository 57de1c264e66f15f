"""``lora-tune init``: the file it writes loads as it stands and with every line of it uncommented.

Questions are asked on a real pseudo-terminal, and nowhere else.
"""

import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from lora_tune.commands.init import StudyChoices, init
from lora_tune.errors import DataError, LoraTuneError, ModelError, StudyFileError
from lora_tune.study.loader import load_study, validate_study
from lora_tune.study.schema import schema_text
from lora_tune.study.spec import StudySpec

MODEL = "smollm2-135m-instruct"
RIVALS = {"lora_alpha": "alpha_ratio", "epochs": "max_steps"}  # which the loader takes one of


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with rows."""
    rows = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(60)]
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def choices(**changes: str | None) -> StudyChoices:
    known = StudyChoices(model=MODEL, data="my rows.jsonl", name=None, gpu=None)
    return known._replace(**changes)


def written(path: str = "study.toml", **changes: str | None) -> str:
    init(Path(path), choices(**changes), force=False, may_ask=False)
    return Path(path).read_text("utf-8")


# What is written.


def test_the_file_loads_with_what_was_given_and_the_defaults_of_all_else() -> None:
    written(gpu="rtx4090")
    spec = load_study(Path("study.toml"))
    plain = StudySpec.model_validate({"model": {"base": MODEL}, "data": {"train": "my rows.jsonl"}})
    assert spec.study.name == "my-rows"
    assert spec.memory.gpu == "RTX 4090"
    assert spec.model_copy(update={"study": plain.study, "memory": plain.memory}) == plain


def test_every_key_is_there_once_with_lines_above_it() -> None:
    text = written()
    lines = text.splitlines()
    for section, field in StudySpec.model_fields.items():
        assert f"[{section}]" in text
        assert field.annotation is not None
        begin = next(i for i, line in enumerate(lines) if line.startswith(f"[{section}]"))
        end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith("[")), None)
        for key in field.annotation.model_fields:
            [place] = [
                i
                for i, line in enumerate(lines[begin:end], begin)
                if re.match(rf"(# )?{key} = ", line)
            ]
            assert lines[place - 1].startswith("# "), key
            assert lines[place - 1].endswith(")."), key
    assert max(map(len, lines)) <= 100


def commented_keys(text: str) -> list[tuple[str, str]]:
    """Return section and line of every key that is commented out."""
    found, section = [], ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line[1 : line.index("]")]
        elif re.match(r"# [a-z_]+ = ", line):
            found.append((section, line))
    return found


def test_every_commented_key_may_be_uncommented() -> None:
    text = written()
    found = commented_keys(text)
    assert len(found) > 30
    for section, line in found:
        begin = text.index(f"[{section}]")
        changed = text[:begin] + text[begin:].replace(f"\n{line}\n", f"\n{line[2:]}\n", 1)
        validate_study(tomllib.loads(changed), source=Path("changed.toml"))


def test_all_of_them_together_may_be_uncommented_but_for_rivals() -> None:
    kept = [
        line[2:]
        if re.match(r"# [a-z_]+ = ", line) and line[2:].split(" = ")[0] not in RIVALS
        else line
        for line in written().splitlines()
    ]
    spec = validate_study(tomllib.loads("\n".join(kept)), source=Path("x.toml"))
    assert spec.search.max_hours == 4
    assert spec.data.group == "conversation_id"


def test_a_shown_default_is_the_default() -> None:
    plain = StudySpec.model_validate({"model": {"base": "m"}, "data": {"train": "x"}})
    shown = 0
    for section, line in commented_keys(written()):
        key, _, value = line[2:].partition(" = ")
        default = plain.model_dump(mode="json")[section][key]
        if default is not None:
            assert tomllib.loads(f"x = {value}")["x"] == default, line
            shown += 1
    assert shown > 25


def test_an_editor_finds_the_schema_beside_the_file() -> None:
    first = written().splitlines()[0]
    assert first == "#:schema ./study.schema.json"
    assert Path("study.schema.json").read_text("utf-8") == schema_text()


def test_paths_are_written_relative_to_the_study_file() -> None:
    written("deep/er/first.toml", name="first")
    spec = load_study(Path("deep/er/first.toml"))
    assert spec.data.train == "../../my rows.jsonl"
    assert (Path("deep/er") / spec.data.train).is_file()


def test_rows_beside_the_study_file_are_found_too() -> None:
    Path("there").mkdir()
    Path("my rows.jsonl").rename("there/rows.jsonl")
    written("there/study.toml", data="rows.jsonl")
    assert load_study(Path("there/study.toml")).data.train == "rows.jsonl"


def test_the_path_is_the_result_and_the_rest_is_talk(capsys: pytest.CaptureFixture[str]) -> None:
    written("new/study.toml")
    shown = capsys.readouterr()
    assert shown.out == "new/study.toml\n"
    assert "60 rows, format prompt-completion" in shown.err
    assert shown.err.splitlines()[-1] == "Next: lora-tune check new/study.toml"


def test_a_name_with_quotes_and_newlines_is_still_a_string() -> None:
    Path('x"\\.jsonl').write_text(Path("my rows.jsonl").read_text())
    written(data='x"\\.jsonl')
    assert load_study(Path("study.toml")).data.train == 'x"\\.jsonl'


# What is refused.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": None}, StudyFileError, "--model is missing, and there is no terminal to ask on"),
        ({"data": None}, StudyFileError, "--data is missing"),
        ({"model": "smollm2-135m-instrct"}, ModelError, f"did you mean {MODEL}"),
        ({"data": "my row.jsonl"}, DataError, "did you mean my rows.jsonl"),
        ({"gpu": "rtx4099"}, StudyFileError, "did you mean RTX 4090"),
        ({"name": "a/b"}, StudyFileError, "study.name"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_written(
    here: Path, changes: dict[str, str | None], error: type[LoraTuneError], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        written("new/study.toml", **changes)
    assert [path.name for path in here.iterdir()] == ["my rows.jsonl"]


def test_a_file_is_written_over_only_when_forced() -> None:
    Path("study.toml").write_text("mine")
    with pytest.raises(StudyFileError, match=r"study\.toml exists\. Write over it with --force"):
        written()
    assert Path("study.toml").read_text() == "mine"
    init(Path("study.toml"), choices(), force=True, may_ask=False)
    assert load_study(Path("study.toml")).model.base == MODEL


def test_a_schema_of_something_else_is_not_written_over() -> None:
    Path("study.schema.json").write_text("{}")
    with pytest.raises(StudyFileError, match="is no schema of lora-tune"):
        written()
    assert not Path("study.toml").exists()


def test_a_model_that_is_not_in_the_catalogue_may_be_on_the_hub(
    capsys: pytest.CaptureFixture[str],
) -> None:
    written(model="org/new-model")
    assert load_study(Path("study.toml")).model.base == "org/new-model"
    assert "org/new-model is not in the catalogue" in capsys.readouterr().err


# On a terminal.


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lora_tune.cli", "init", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "100"},
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, *, timeout_s: float = 60) -> None:
        """Read until the text has been shown."""
        end = time.monotonic() + timeout_s
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode()
                except OSError:  # the command has ended
                    assert text in self.seen, self.seen

    def answer(self, text: str) -> None:
        """Type a line, and forget what was shown before."""
        self.seen = ""
        os.write(self.master, text.encode() + b"\n")

    def end(self) -> int:
        """Return the exit code."""
        code = self.process.wait(timeout=60)
        os.close(self.master)
        return code


def test_a_terminal_is_asked_until_the_answers_can_be_used() -> None:
    terminal = Terminal()
    terminal.wait_for("Base model: ")
    assert "smollm2-135m-instruct" in terminal.seen
    terminal.answer("smollm2-135m-instrct")
    terminal.wait_for("did you mean")
    terminal.wait_for("Base model: ")
    terminal.answer(MODEL)
    terminal.wait_for("Training data: ")
    terminal.answer("none.jsonl")
    terminal.wait_for("file not found")
    terminal.wait_for("Training data: ")
    terminal.answer("my rows.jsonl")
    terminal.wait_for("60 rows, format prompt-completion")
    terminal.wait_for("GPU [auto]: ")
    terminal.answer("")
    terminal.wait_for("Next: lora-tune check study.toml")
    assert terminal.end() == 0
    spec = load_study(Path("study.toml"))
    assert (spec.model.base, spec.data.train, spec.memory.gpu) == (MODEL, "my rows.jsonl", "auto")


def test_ctrl_d_at_a_question_writes_nothing(here: Path) -> None:
    terminal = Terminal("--model", MODEL)
    terminal.wait_for("Training data: ")
    os.write(terminal.master, b"\x04")
    terminal.wait_for("interrupted; nothing was written")
    assert terminal.end() == 130
    assert [path.name for path in here.iterdir()] == ["my rows.jsonl"]


def test_yes_asks_nothing_on_a_terminal_either() -> None:
    terminal = Terminal("--yes", "--model", MODEL, "--data", "my rows.jsonl")
    terminal.wait_for("Next: lora-tune check study.toml")
    assert terminal.end() == 0
    assert "GPU" not in terminal.seen


# Places and rows that cannot be used.


@pytest.mark.parametrize("place", ["my rows.jsonl/x.toml", "/proc/lora-tune/x.toml"])
def test_a_place_that_cannot_be_made_is_refused(here: Path, place: str) -> None:
    with pytest.raises(StudyFileError, match=r"cannot be written .*--output"):
        written(place)
    assert [path.name for path in here.iterdir()] == ["my rows.jsonl"]


def test_the_next_command_is_one_line_that_can_be_pasted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"{'long ' * 30}/it's.toml"
    written(place)
    last = capsys.readouterr().err.splitlines()[-1]
    assert shlex.split(last.removeprefix("Next: ")) == ["lora-tune", "check", place]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", r"rows\.jsonl has no rows\.$"),
        ("\n \n", r"rows\.jsonl has no rows\.$"),
        ("{bad\n", r"rows\.jsonl:1: not JSON: .* at column 2\."),
        ("\n[1]\n2\n", r"rows\.jsonl:2: not an object\. None of the first 2 rows is an object\."),
    ],
)
def test_rows_of_which_none_can_be_used_are_named(rows: str, message: str) -> None:
    Path("rows.jsonl").write_text(rows)
    with pytest.raises(DataError, match=message):
        written(data="rows.jsonl")


@pytest.mark.parametrize("model", ["./nofolder", "../nofolder"])
def test_a_folder_that_is_not_there_is_no_hub_id(model: str) -> None:
    with pytest.raises(ModelError, match="is no file or folder"):
        written(model=model)
