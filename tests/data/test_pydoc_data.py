"""The example data set: same bytes again, good sentences, one line of output."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "studies" / "pydoc_data.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=True
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    path = tmp_path_factory.mktemp("pydoc") / "made" / "pydoc.jsonl"
    done = run("--output", path)
    assert done.stderr == ""
    assert done.stdout.endswith(f"rows in {path}\n")
    assert done.stdout.count("\n") == 1
    return path


@pytest.fixture(scope="module")
def conversations(output):
    return [json.loads(line)["messages"] for line in output.read_text().splitlines()]


def test_the_same_interpreter_writes_the_same_bytes(output, tmp_path):
    run("--output", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == output.read_bytes()
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_there_are_thousands_of_rows_and_no_answer_twice(conversations):
    assert 2500 <= len(conversations) <= 6000
    assert len({turns[2]["content"] for turns in conversations}) == len(conversations)
    assert len({turns[1]["content"] for turns in conversations}) == len(conversations)


def test_every_row_is_a_short_question_with_a_short_answer(conversations):
    for system, user, assistant in conversations:
        assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
        assert user["content"].endswith("?")
        assert 3 <= len(assistant["content"].split()) <= 30
        assert assistant["content"].isprintable()


def test_a_well_known_function_is_among_them(conversations):
    answers = {turns[1]["content"]: turns[2]["content"] for turns in conversations}
    answer = answers["What does the function json.dumps do?"]
    assert answer == "Serialize ``obj`` to a JSON formatted ``str``."


def test_a_limit_spreads_over_all_modules(tmp_path):
    done = run("--output", tmp_path / "few.jsonl", "--limit", "40")
    lines = (tmp_path / "few.jsonl").read_text().splitlines()
    assert len(lines) == 40
    assert done.stdout.startswith("40 rows in ")
    assert len({json.loads(line)["messages"][1]["content"].split(".")[0] for line in lines}) > 15


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the name. More follows.", "Return the name."),
        ("foo(x) -> int\n\nReturn the size of x.", "Return the size of x."),
        ("foo(x) -> int\nReturn the size of x.", "Return the size of x."),
        ("foo(x) -> int -- Return the size of x.", "Return the size of x."),
        ("Return e.g. the size\nof x", "Return e.g. the size of x"),
        ("foo(x) -> int", None),
        ("Too short.", None),
        ("word " * 31, None),
        ("", None),
    ],
)
def test_the_answer_is_the_first_sentence_after_a_signature(docstring, expected):
    assert runpy.run_path(str(SCRIPT))["first_sentence"](docstring) == expected
