"""The command line as a whole: help texts, exit codes, streams, colours, pipes, completion, events.

Help texts are compared with ``tests/golden/help``; ``COLUMNS=100 lora-tune CMD --help`` writes one anew.
"""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from report_studies import finished_study, fruitless_study
from test_end_to_end import copy_of
from test_end_to_end import workplace as workplace  # the fixture

import lora_tune.errors as lora_tune_errors
from lora_tune.cli import EXIT_DIFFERS, EXIT_INTERRUPTED, EXIT_NO_READER, EXIT_RESUMABLE, app
from lora_tune.commands.run import dry_run, run
from lora_tune.errors import DataError, LoraTuneError
from lora_tune.records import StudySnapshot
from lora_tune.signals import EXIT_TERMINATED
from lora_tune.store.folder import StudyFolder

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "help"
PAGE = ROOT / "docs" / "command-line.md"
COMMANDS = [
    "init",
    "check",
    "run",
    "best",
    "report",
    "export",
    "verify",
    "doctor",
    "estimate",
    "schema",
]
ESCAPE = "\x1b"
AS_LORA_TUNE = "import sys; sys.argv[0] = 'lora-tune'; from lora_tune.cli import main; main()"
OF_A_STUDY = ["best", "report", "export --to adapter", "verify"]


def lora_tune(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "lora_tune.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **(env or {})},
    )


def save(study: StudySnapshot, folder: Path) -> None:
    """Write the records of a study, as a run does."""
    folder.mkdir(parents=True)
    store = StudyFolder(folder)
    store.save_lock(study.lock)
    for trial in study.trials:
        store.save_trial(trial)
    if study.confirmation is not None:
        store.save_confirmation(study.confirmation)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study, one in which nothing succeeded, and study files."""
    folder = tmp_path_factory.mktemp("studies")
    save(fruitless_study(), folder / "reports" / "fruitless")
    save(finished_study(), folder / "reports" / "docstrings")
    os.utime(folder / "reports" / "fruitless" / "study.lock.json", (1, 1))
    (folder / "bad.toml").write_text('[space]\nrank = ["32"]\n')
    (folder / "no-rows.toml").write_text(
        '[model]\nbase = "smollm2-135m"\n[data]\ntrain = "none.jsonl"\n'
    )
    return folder


# Help.


def test_commands_come_in_the_order_in_which_they_are_used() -> None:
    assert [command.callback.__name__ for command in app.registered_commands] == COMMANDS


@pytest.mark.parametrize("command", ["", *COMMANDS], ids=lambda name: name or "lora-tune")
def test_help_texts_are_those_that_were_agreed_on(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        app([*command.split(), "--help"], prog_name="lora-tune")
    assert ended.value.code == 0
    golden = GOLDEN / f"{command or 'lora-tune'}.txt"
    assert capsys.readouterr().out == golden.read_text("utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_in_one_line_what_it_does(command: str) -> None:
    [line] = [
        line
        for line in (GOLDEN / "lora-tune.txt").read_text("utf-8").splitlines()
        if line.startswith(f"  {command} ")
    ]
    text = line.removeprefix(f"  {command}").strip()
    assert text.endswith(".")
    assert "..." not in text
    assert text in (GOLDEN / f"{command}.txt").read_text("utf-8")
    assert f"## lora-tune {command}" in PAGE.read_text("utf-8")


def test_every_option_is_on_the_page_of_the_command_line() -> None:
    page = PAGE.read_text("utf-8")
    for command in COMMANDS:
        if command == "estimate":  # its thirty options are explained in docs/memory.md
            continue
        text = (GOLDEN / f"{command}.txt").read_text("utf-8")
        section = page.partition(f"## lora-tune {command}")[2].partition("\n## ")[0]
        for option in set(re.findall(r"(?<![\w-])--[a-z-]+", text)) - {"--help"}:
            assert f"`{option}" in section or f" {option}" in section, f"{command} {option}"


# Exit codes.

EXIT_CODES = {
    0: "--version",
    2: "report --no-such-option",
    3: "run bad.toml",
    4: "report nothing",
    5: "estimate llama-3.1-8b --gpu 4GiB --require-fit",
    6: "best fruitless",
    7: "estimate smollm2-135m --gpu auto",
    8: "estimate no-such-model",
}


@pytest.mark.parametrize(("code", "command"), EXIT_CODES.items())
def test_each_kind_of_end_has_its_exit_code(
    studies: Path, tmp_path: Path, code: int, command: str
) -> None:
    done = lora_tune(*command.split(), cwd=studies, env={"PATH": str(tmp_path)})  # no nvidia-smi
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code not in (0, 5):
        assert done.stdout == ""
    if code > 2:
        assert done.stderr.startswith("lora-tune: ")


@pytest.mark.parametrize(
    "command",
    [
        ["report", "docstrings", "--output", ""],
        ["export", "--to", "adapter", "--output="],
        ["init", "--data", ""],
        ["init", ""],
    ],
)
def test_an_empty_value_is_not_the_working_directory(studies: Path, command: list[str]) -> None:
    before = sorted(studies.rglob("*"))
    done = lora_tune(*command, cwd=studies)
    assert done.returncode == 3
    assert re.fullmatch(
        r"lora-tune: (--\w+|an argument) is empty: give a value, or leave it out\.\n", done.stderr
    )
    assert sorted(studies.rglob("*")) == before


def test_init_takes_one_place(studies: Path) -> None:
    done = lora_tune("init", "folder", "--output", "a.toml", cwd=studies)
    assert done.returncode == 3
    assert "folder and --output a.toml both say where to write: give one." in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", ["best", "best --json", "report --json", "schema"])
def test_a_full_disk_is_one_message(studies: Path, command: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lora_tune.cli", *command.split()],
            cwd=studies,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 7
    assert "(No space left on device). Make room and try again.\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_the_page_lists_every_exit_code_and_no_other() -> None:
    rows = re.findall(r"^\| (\d+) \| ", PAGE.read_text("utf-8"), re.MULTILINE)
    errors = (
        found
        for found in vars(lora_tune_errors).values()
        if isinstance(found, type) and issubclass(found, LoraTuneError)
    )
    known = {error.exit_code for error in errors} | {0, 1, 2}
    known |= {EXIT_DIFFERS, EXIT_RESUMABLE, EXIT_INTERRUPTED, EXIT_NO_READER, EXIT_TERMINATED}
    assert sorted(map(int, rows)) == sorted(known)


# Which study is meant.


@pytest.mark.parametrize("command", OF_A_STUDY)
def test_a_study_that_is_not_there_is_the_same_mistake_for_every_command(
    studies: Path, command: str
) -> None:
    name, *options = command.split()
    done = lora_tune(name, "docstring", *options, cwd=studies)
    assert done.returncode == 4
    assert done.stderr.startswith(
        'lora-tune: "docstring" is no started study: there is no '
        "reports/docstring/study.lock.json; did you mean docstrings?"
    )


@pytest.mark.parametrize("study", [[], ["docstrings"], ["reports/docstrings"]])
def test_folder_name_and_the_newest_mean_the_same(studies: Path, study: list[str]) -> None:
    done = lora_tune("best", *study, "--json", cwd=studies)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == "reports/docstrings"


# Streams, colours, pipes.


@pytest.mark.parametrize(
    "command",
    [
        "best --json",
        "report --json",
        "estimate smollm2-135m --json",
        "estimate --list --json",
        "schema",
    ],
)
def test_standard_output_is_the_object_and_nothing_else(studies: Path, command: str) -> None:
    done = lora_tune(*command.split(), cwd=studies)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def on_a_terminal(*arguments: str, cwd: Path, **env: str) -> str:
    """Return what a command shows on a terminal that can do colours."""
    master, slave = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-m", "lora_tune.cli", *arguments],
        cwd=cwd,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**clean, "TERM": "xterm-256color", "COLUMNS": "100", **env},
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 65536)
            except OSError:  # it has ended
                break
        process.wait(timeout=60)
    os.close(master)
    return shown.decode()


@pytest.mark.parametrize("command", ["estimate smollm2-135m --gpu L4", "estimate --list"])
def test_a_terminal_gets_colours_unless_they_are_declined(studies: Path, command: str) -> None:
    assert ESCAPE in on_a_terminal(*command.split(), cwd=studies)
    assert ESCAPE not in on_a_terminal(*command.split(), cwd=studies, NO_COLOR="1")
    assert ESCAPE not in on_a_terminal(*command.split(), cwd=studies, CI="true")


def test_a_pipe_gets_plain_text(studies: Path) -> None:
    done = lora_tune("estimate", "--list", cwd=studies, env={"TERM": "xterm-256color"})
    assert done.stdout
    assert ESCAPE not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["estimate --list", "schema", "best --json", "best", "report"])
def test_a_reader_who_goes_away_is_no_traceback(studies: Path, command: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "lora_tune.cli", *command.split()],
        cwd=studies,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        code = process.wait(timeout=60)
    assert code == EXIT_NO_READER
    assert "Traceback" not in errors
    assert "Broken pipe" not in errors


# Completion.


def completions(words: str, *, cwd: Path) -> tuple[list[str], str]:
    """Return what bash is offered behind these words, and which modules were imported for it."""
    count = len(words.split()) - (not words.endswith(" "))
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", AS_LORA_TUNE],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={
            **os.environ,
            "_LORA_TUNE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(count),
        },
    )
    return done.stdout.split("\n")[:-1], done.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("lora-tune be", ["best"]),
        ("lora-tune best ", ["docstrings", "fruitless"]),
        ("lora-tune report fruit", ["fruitless"]),
        ("lora-tune verify do", ["docstrings"]),
        ("lora-tune check b", ["bad.toml"]),
        ("lora-tune run ", ["bad.toml", "no-rows.toml", "reports/", "docstrings", "fruitless"]),
        ("lora-tune export --to ax", ["axolotl"]),
        ("lora-tune estimate smollm2-135m-", ["smollm2-135m-instruct"]),
        ("lora-tune init --model qwen2.5-1", ["qwen2.5-1.5b", "qwen2.5-14b"]),
        ("lora-tune check --gpu rtx-409", ["rtx-4090"]),
        ("lora-tune init --gpu L", ["L4", "L40", "L40S"]),
    ],
)
def test_tab_offers_what_can_stand_there_and_imports_nothing_heavy(
    studies: Path, words: str, offered: list[str]
) -> None:
    found, imported = completions(words, cwd=studies)
    assert found == offered
    heavy = ("torch", "transformers", "optuna", "lora_tune.records", "pandas", "rich.console")
    assert not [name for name in heavy if re.search(rf"\| +{name}$", imported, re.MULTILINE)]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_shown(tmp_path: Path, shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_LORA_TUNE, "--show-completion", shell],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "_LORA_TUNE_COMPLETE" in done.stdout


# A study told as events, and foretold.


@pytest.fixture(scope="module")
def told(
    workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object], "subprocess.CompletedProcess[str]"]:
    """A folder, what ``run --dry-run`` said in it, and the study that was then run with --json."""
    folder = copy_of(workplace, tmp_path_factory.mktemp("told") / "run")
    text = (folder / "plain.toml").read_text().replace("trials = 8", "trials = 4")
    (folder / "small.toml").write_text(text)
    before = {path.name for path in folder.iterdir()}
    foretold = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(foretold):
        dry_run("small.toml", as_json=True)
    assert {path.name for path in folder.iterdir()} == before
    done = lora_tune("run", "small.toml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(foretold.getvalue()), done


def events_of(done: "subprocess.CompletedProcess[str]") -> list[dict[str, object]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_events_tell_what_the_folder_then_holds(
    told: tuple[Path, dict[str, object], "subprocess.CompletedProcess[str]"],
) -> None:
    folder, _, done = told
    events, study = events_of(done), StudyFolder(folder / "reports" / "small").snapshot()
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds[-2], kinds[-1]) == ("started", "decision", "finished")
    rungs = [(e["trial"], e["rung"], e["loss"]) for e in events if e["event"] == "rung"]
    recorded = [(t.number, r.rung, r.eval_loss) for t in study.trials for r in t.rungs]
    assert sorted(map(str, rungs)) == sorted(map(str, recorded))
    ended = {e["trial"]: e["state"] for e in events if e["event"] == "trial_ended"}
    assert ended == {trial.number: trial.state.value for trial in study.trials}
    assert study.confirmation is not None
    assert kinds.count("confirmation_run") == len(study.confirmation.runs)
    assert all(isinstance(event["time"], str) for event in events)


def test_the_last_event_is_what_best_says(
    told: tuple[Path, dict[str, object], "subprocess.CompletedProcess[str]"],
) -> None:
    folder, _, done = told
    last = events_of(done)[-1]
    del last["time"], last["event"]
    assert last == json.loads(lora_tune("best", "small.toml", "--json", cwd=folder).stdout)


def test_talk_goes_to_standard_error_and_quiet_ends_it(
    told: tuple[Path, dict[str, object], "subprocess.CompletedProcess[str]"],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, _, done = told
    assert "confirmation: " in done.stderr
    monkeypatch.chdir(folder)
    run("small.toml", command="lora-tune run", allow_code=False, as_json=False, quiet=True)
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "Next: lora-tune " in shown.out


def test_what_the_study_wrote_is_within_what_the_check_said(
    told: tuple[Path, dict[str, object], "subprocess.CompletedProcess[str]"],
) -> None:
    folder, foretold, _ = told
    disk = foretold["disk"]
    assert isinstance(disk, dict)
    weights = (folder / "reports").rglob("*.safetensors")
    written = sum(path.stat().st_size for path in weights)
    headers = 20_000 * len(list((folder / "reports").rglob("*.safetensors")))
    # at its largest the folder also holds the states of the lanes that train, gone by now
    assert 0.25 * disk["about_bytes"] < written < disk["most_bytes"] + headers


def test_a_study_that_fails_says_so_in_its_last_event(
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy_of(workplace, tmp_path / "run")
    (folder / "short.jsonl").write_text((folder / "rows.jsonl").read_text()[:300])
    text = (folder / "plain.toml").read_text().replace("rows.jsonl", "short.jsonl")
    (folder / "short.toml").write_text(text)
    monkeypatch.chdir(folder)
    with pytest.raises(DataError) as caught:
        run("short.toml", command="lora-tune run", allow_code=False, as_json=True, quiet=True)
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["event"] == "failed"
    assert json.loads(line)["message"] == str(caught.value)
