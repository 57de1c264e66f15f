"""Bad study files: each ends with one message, exit code 3, no traceback, in time, and nothing written.

The loader reads all of them; the commands ``check`` and ``run`` a part, each in a process of its own that is
forked from one with the imports done, so that a second means what the file costs. Seconds are those of a
core: this machine may be busy.
"""

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bad_study_files import (
    REQUIRED,
    assert_good_message,
    is_refused,
    keys,
    with_value,
    wrong_values,
)
from campaign_results import record
from hypothesis import given, settings
from hypothesis import strategies as st
from report_studies import finished_study

from lora_tune.errors import LoraTuneError, StudyFileError
from lora_tune.store.folder import StudyFolder
from lora_tune.study.choices import toml_literal
from lora_tune.study.loader import load_study, validate_study
from lora_tune.study.schema import study_schema
from lora_tune.study.spec import StudySpec

MOST_S = 2.0  # of a core, a file, beyond imports
FULL = (Path(__file__).parents[2] / "studies" / "quickstart.toml").read_text("utf-8")

# Runs each command line of a JSON list in a fork, output in files; prints exit codes and seconds of a core.
# One that waits is ended by the alarm.
RUNNER = """
import json, os, resource, signal, sys
import lora_tune.cli, lora_tune.commands.check, lora_tune.commands.run
done = []
for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{sys.argv[1]}/{number}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        signal.alarm(60)
        sys.argv = ["lora-tune", *arguments]
        code = 0
        try:
            lora_tune.cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    _, status, used = os.wait4(child, 0)
    done.append((os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime))
print(json.dumps(done))
"""


class Ended(NamedTuple):
    """How a command ended."""

    arguments: tuple[str, ...]
    code: int
    seconds: float
    out: str
    err: str


def run_all(commands: Iterable[tuple[str, ...]], *, cwd: Path, out: Path) -> list[Ended]:
    """Run command lines of ``lora-tune``, one after the other."""
    out.mkdir()
    lines = list(commands)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(out)],
        input=json.dumps(lines),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return [
        Ended(line, code, seconds, *((out / f"{number}.{n}").read_text() for n in (1, 2)))
        for number, (line, (code, seconds)) in enumerate(
            zip(lines, json.loads(done.stdout), strict=True)
        )
    ]


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Return every file of a folder with its size and when it was written."""
    return sorted(
        (str(path.relative_to(folder)), path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    )


def message_of(path: Path) -> str:
    with pytest.raises(StudyFileError) as caught:
        load_study(path)
    return str(caught.value)


# One wrong value for every kind of value and every key.


def test_a_wrong_value_of_any_key_gets_one_line_that_names_key_and_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    tried = 0
    for section, key, text in wrong_values():
        path.write_text(text)
        message = message_of(path)
        assert_good_message(message, path, text.count("\n"))
        assert f"{section}.{key}" in message, text
        [place] = [n for n, line in enumerate(text.split("\n"), 1) if line.startswith(f"{key} =")]
        assert all(line.startswith(f"{path}:{place}: ") for line in message.split("\n")), message
        tried += 1
    assert tried > 1500
    record("bad-study-values", files=tried)


def test_commands_end_with_that_message_and_code_3_and_write_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    texts = [text for _, _, text in wrong_values()][::40]
    for number, text in enumerate(texts):
        (work / f"{number}.toml").write_text(text)
    before = listing(work)
    paths = [Path(f"{number}.toml") for number in range(len(texts))]
    ended = run_all(
        ((command, str(path)) for path in paths for command in ("check", "run")),
        cwd=work,
        out=tmp_path / "out",
    )
    assert len(ended) > 80
    for one in ended:
        assert one.code == 3, one
        assert one.out == "", one
        assert one.seconds < MOST_S, one
        path = Path(one.arguments[1])
        message = one.err.removeprefix("lora-tune: ").removesuffix("\n")
        assert_good_message(message, path, (work / path).read_text().count("\n"))
    assert listing(work) == before


def test_an_unknown_key_of_any_section_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    for section, key in keys():
        if len(key) < 4:
            continue
        wrong = key[:-2] + key[-1] + key[-2] + "x"
        text = f"{REQUIRED}[{section}]\n{wrong} = 1\n"
        if f"[{section}]" in REQUIRED:
            text = REQUIRED.replace(f"[{section}]\n", f"[{section}]\n{wrong} = 1\n")
        path = tmp_path / "unknown.toml"
        path.write_text(text)
        message = message_of(path)
        assert_good_message(message, path, text.count("\n"))
        assert f"unknown key {section}.{wrong}; did you mean " in message
        assert key in message


# Texts that are no TOML.


def test_a_file_cut_at_any_place_is_taken_or_gets_a_good_message(tmp_path: Path) -> None:
    path = tmp_path / "cut.toml"
    refused = 0
    for end in range(0, len(FULL), 7):
        path.write_text(FULL[:end])
        refused += is_taken_or_well_refused(path, FULL[:end]) is None
    assert refused > 60


def is_taken_or_well_refused(path: Path, text: str) -> StudySpec | None:
    try:
        return load_study(path)
    except StudyFileError as error:
        assert_good_message(str(error), path, text.count("\n") + 1)
        return None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_file_with_anything_put_in_anywhere_is_taken_or_gets_a_good_message(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(FULL)))
    end = data.draw(st.integers(begin, min(len(FULL), begin + 40)))
    put = data.draw(
        st.one_of(
            st.text(max_size=12),
            st.sampled_from(
                ['"', "'", '"""', "[", "]", "[[", "{", "}", "=", ",", "\n", "#", "\\", "\0", "\x1b[2J"]
            ),
        )
    )  # fmt: skip
    text = FULL[:begin] + put + FULL[end:]
    path = tmp_path_factory.getbasetemp() / "mutated.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    is_taken_or_well_refused(path, text)


# Files that are none, or more than one.

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "model.base is missing"),
    "UTF-16": (REQUIRED.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    "Latin-1": (b'# caf\xe9\n[model]\nbase = "\xe9"\n', ":1: byte 0xe9 is not UTF-8"),
    "NUL": (REQUIRED.encode().replace(b"smollm2", b"smol\0lm2"), ":2: not valid TOML: "),
    "escapes": (b'[model]\n"\\u001b[31m" = 1\n', 'unknown key model."\\u001b[31m"'),
    "markup": (b'[model]\n"[/red]<b>" = 1\n', 'unknown key model."[/red]<b>"'),
    "dots in a key": (b'[model]\n"base.x" = 1\n', 'unknown key model."base.x"'),
    "a line of zeros": (b"[model]\n[" + b"\0" * 300, ":2: not valid TOML: [\\u0000\\u0000"),
    "a text of escapes": (
        b'[model]\nbase = "' + b"\\u0000" * 200 + b'"\n',
        "holds a control character",
    ),
    "binary": (bytes(range(256)) * 40, "not UTF-8"),
    "10,000 lists in each other": (b"[model]\nbase = " + b"[" * 10_000, ":2: more than 32 brackets"),
    "10,000 tables in each other": (b"base = " + b"{a = " * 10_000, ":1: more than 32 brackets"),
    "a key of 100,000 parts": (b"a." * 100_000 + b"a = 1\n", ":1: a key has more than 32 parts"),
    "a section of 100,000 parts": (b"[" + b"a." * 100_000 + b"a]\n", ":1: a key has more than"),
    "a number of 5,000 digits": (b"[study]\nseed = " + b"9" * 5000, ":2: a value without quotes has"),
    "a hexadecimal number of 5,000 digits": (b"[study]\nseed = 0x" + b"f" * 5000, ":2: a value"),
    "100,000 keys": (
        b"[train]\n" + b"".join(b"k%d=1\n" % n for n in range(100_000)),
        "more than 256 KiB; a study file has a few kB",
    ),
    "20,000 keys": (
        b"[train]\n" + b"".join(b"k%d=1\n" % n for n in range(20_000)),
        "and 19,982 more faults like these.",
    ),
    "10,000 items": (
        b"[space]\nrank = [" + b"0," * 10_000 + b"]\n",
        "and 9,982 more faults like these.",
    ),
    "80,000 items": (
        b"[space]\nrank = [\n" + b"0,\n" * 80_000 + b"]\n",
        ":10003: one pair of brackets holds more than 10,000 items. This is no study file.",
    ),
    "a line of 200,000 characters": (b"[model]\nbase = '" + b"x" * 200_000, ":2: not valid TOML"),
    "a key of 200,000 characters": (b"[model]\n" + b"x" * 200_000 + b" = 1\n", ":2: unknown key"),
    "twice": (b"[model]\nbase='a'\nbase='b'\n", ":3: not valid TOML: base='b' | The key is there"),
    "a section twice": (b"[model]\nbase='a'\n[model]\n", ":3: not valid TOML: [model] | The section"),
    "a dotted key and a section": (b"model.base='a'\n[model]\n", ":2: not valid TOML: [model] |"),
    "a name outside": (b"[study]\nname = '../../x'\n", ":2: study.name is"),
    "a name of dots": (b"[study]\nname = '..'\n", ":2: study.name is"),
    "an absolute name": (b"[study]\nname = '/tmp/x'\n", ":2: study.name is"),
    "a long name": (b"[study]\nname = '" + b"x" * 300 + b"'\n", ":2: study.name is"),
    "a long name of few letters": ("[study]\nname = '{}'\n".format("\u6f22" * 90).encode(), ":2: study.name"),
    "lists where sections belong": (b"[[model]]\nbase='a'\n[[data]]\n", ":1: model is [{base"),
    "a list of sections of anchors": (
        b"[[search.anchors]]\nrank = 4\n[[search.anchors]]\nrank = 0\n",
        ":4: search.anchors[1].rank is 0",
    ),
    "two lengths": (
        REQUIRED.encode() + b"[train]\nmax_steps = 5\n[space]\nepochs = [1]\n",
        "space.epochs and train.max_steps",
    ),
    "a fraction of a digit": (b"[train]\nepochs = 1.\n", ":2: not valid TOML: epochs = 1. |"),
    "a leading zero": (b"[train]\nmax_steps = 010\n", ":2: not valid TOML: max_steps = 010 |"),
    "Python's True": (b"[space]\nuse_rslora = True\n", ":2: not valid TOML: use_rslora = True |"),
    "a colon for an equals sign": (b"[model]\nbase: 'x'\n", ":2: not valid TOML: base: 'x' |"),
    "a path with backslashes": (b'[model]\nbase = "C:\\users\\x"\n', "write it twice, or use 'single"),
    "JSON": (b'{"model": {"base": "x"}}\n', ":1: not valid TOML"),
    "YAML": (b"model:\n  base: x\n", ":1: not valid TOML: model: |"),
    "no value": (b"[model]\nbase =\n", ":2: not valid TOML: base = | "),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_text_gets_its_message_in_time(tmp_path: Path, what: str) -> None:
    content, words = HOSTILE[what]
    path = tmp_path / "hostile.toml"
    path.write_bytes(content)
    began = time.process_time()
    message = message_of(path)
    assert time.process_time() - began < MOST_S
    assert_good_message(message, path, content.count(b"\n") + 1)
    assert words in message


def test_commands_refuse_hostile_texts_within_their_time_and_memory(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for number, (content, _) in enumerate(HOSTILE.values()):
        (work / f"{number}.toml").write_bytes(content)
    before = listing(work)
    ended = run_all(
        (("check", f"{number}.toml") for number in range(len(HOSTILE))),
        cwd=work,
        out=tmp_path / "out",
    )
    for one, (_, words) in zip(ended, HOSTILE.values(), strict=True):
        assert one.code == 3, one
        assert one.seconds < MOST_S, one
        assert words in one.err
        assert "Traceback" not in one.err
        assert "\x1b" not in one.err
    assert listing(work) == before
    slowest_s = round(max(one.seconds for one in ended), 1)
    record("hostile-study-files", files=len(HOSTILE), slowest_s=slowest_s)


def test_a_byte_order_mark_and_windows_line_ends_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + REQUIRED.replace("\n", "\r\n").encode())
    assert load_study(path).model.base == "smollm2-135m"
    path.write_bytes(b"\xef\xbb\xbf" + REQUIRED.replace("[data]", "\r\n[dta]\r\n").encode())
    assert f"{path}:4: unknown key dta; did you mean data?" in message_of(path)


@pytest.mark.parametrize("command", ["check", "run"])
def test_what_is_no_file_of_text_is_refused_without_waiting_or_reading(
    tmp_path: Path, command: str
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "folder.toml").mkdir()
    os.mkfifo(work / "pipe.toml")
    (work / "loop.toml").symlink_to("loop.toml")
    (work / "zero.toml").symlink_to("/dev/zero")
    (work / "nowhere.toml").symlink_to("gone.toml")
    (work / "file").write_text("")
    with (work / "data.toml").open("wb") as file:
        file.truncate(100 * 2**20)
    said = {
        "folder.toml": "a folder; name the study file in it",
        "pipe.toml": "a pipe or a device",
        "zero.toml": "a pipe or a device",
        "loop.toml": "cannot be read (",
        "nowhere.toml": "no such study file",
        "file/x.toml": "cannot be read (Not a directory)",
        "data.toml": "more than 256 KiB; a study file has a few kB",
        "a\x1b[2Jb.toml": r"a\u001b[2Jb.toml: no such study file",
    }
    before = listing(work)
    ended = run_all(((command, name) for name in said), cwd=work, out=tmp_path / "out")
    for one, words in zip(ended, said.values(), strict=True):
        assert one.code == 3, one
        assert one.seconds < MOST_S, one
        assert words in one.err, one
        assert one.err.count("\n") == 1
        assert one.err.isascii()
        assert one.err[:-1].isprintable()
    assert listing(work) == before


def test_standard_input_that_is_a_pipe_is_no_study_file(tmp_path: Path) -> None:
    ended = run_all([("check", "/dev/stdin")], cwd=tmp_path, out=tmp_path / "out")
    assert ended[0].code == 3
    assert "/dev/stdin: a pipe or a device" in ended[0].err


# What loads, but cannot be meant, is refused before anything is loaded or written.


def test_functions_and_modules_named_in_a_study_file_are_not_run(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "mine.py").write_text("open('ran', 'w')\ndef f(a, b, c): return 1\n")
    metrics = (
        "mine:f", "os:system", "__import__('os').system('touch ran')", "mine", "mine:f;x", "mine:f.g", "",
    )  # fmt: skip
    for number, metric in enumerate(metrics):
        text = f"{REQUIRED}[select]\nmetrics = [{toml_literal(metric)}]\n"
        (work / f"{number}.toml").write_text(text)
    before = listing(work)
    ended = run_all(
        (("run", f"{number}.toml") for number in range(len(metrics))),
        cwd=work,
        out=tmp_path / "out",
    )
    for one in ended:
        assert one.code == 3, one
        assert "select.metrics[0] is" in one.err
        assert "Traceback" not in one.err
    assert listing(work) == before


# A study file that was changed after the study began.

MAY_CHANGE = {
    ("search", "trials"),
    ("search", "max_hours"),
    ("search", "max_gpu_hours"),
    ("run", "trackers"),
    ("run", "executor"),
    ("run", "workers"),
    ("run", "checkpoint_every"),
}
# Another name or another output is another study, which has not begun.
ELSEWHERE = {("study", "name"), ("study", "output")}
OTHER = (
    '"auto"', '"none"', '"float32"', '"text"', '"last-assistant"', '"random"', '"all-rows"', '"cpu"',
    '"process"', "2", "3", "9", "0.5", "true", '["tensorboard"]', '["A2"]', "[2]", "[0.5]", "[1e-5, 1e-4]",
    "[0.5, 1.0]", '["mlp"]', '["rouge-l"]',
)  # fmt: skip


def begun(folder: Path) -> StudySpec:
    """Make the folder of a study that has begun with defaults, but for its executor; return its settings."""
    values = {
        "model": {"base": "gone"},
        "data": {"train": "gone.jsonl"},
        "run": {"executor": "in-process"},
    }
    spec = validate_study(values, source=Path("begun.toml"))
    store = StudyFolder(folder / "reports" / "begun")
    store.path.mkdir(parents=True)
    lock = finished_study().lock
    store.save_lock(replace(lock, name="begun", spec=spec.model_dump(mode="json")))
    return spec


def changes(spec: StudySpec) -> list[tuple[str, str, str]]:
    """Return for every key another value that the schema and the loader take, as it is written."""
    found = []
    for section, key in keys():
        held = getattr(getattr(spec, section), key)
        node = study_schema()["$defs"][f"{section.capitalize()}Section"]["properties"][key]
        examples = [toml_literal(value) for value in node.get("examples", [])]
        for value in (*examples, *OTHER):
            text = with_value(section, key, value)
            if is_refused(text):
                continue
            try:
                other = validate_study(tomllib.loads(text), source=Path("begun.toml"))
            except StudyFileError:
                continue
            if getattr(getattr(other, section), key) != held:
                found.append((section, key, value))
                break
    return found


class Quiet:
    """A view that shows nothing."""

    def update(self, state: Any) -> None: ...

    def note(self, text: str) -> None: ...


def test_any_changed_key_of_a_begun_study_is_shown_and_refused_but_for_budgets_and_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_tune.tuner import run_study

    spec = begun(tmp_path)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "begun.toml"
    tried = changes(spec)
    assert {*keys()} - {(section, key) for section, key, _ in tried} == {("train", "optimizer")}
    for section, key, value in tried:
        if (section, key) in ELSEWHERE:
            continue
        text = with_value(section, key, value)
        text = text.replace("smollm2-135m", "gone").replace("rows.jsonl", "gone.jsonl")
        if (section, key) != ("run", "executor"):  # no child need be started for this
            text = text if "[run]" in text else f"{text}[run]\n"
            text = text.replace("[run]\n", '[run]\nexecutor = "in-process"\n')
        file.write_text(text)
        before = listing(tmp_path)
        with pytest.raises(LoraTuneError) as caught:
            run_study(load_study(file), study_file=file, command="", view=Quiet())
        message = str(caught.value)
        if (
            section,
            key,
        ) in MAY_CHANGE:  # then the data are missed, which is the next thing looked at
            assert "differs from the one" not in message, (section, key)
        else:
            assert isinstance(caught.value, StudyFileError), (section, key, message)
            assert f"  {section}.{key}: was " in message
            assert message.count(": was ") == 1, message
        assert listing(tmp_path) == before
