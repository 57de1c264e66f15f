"""How a trial ended is told apart everywhere: in the store, in the database and in every form of the report.

The study folder here holds one trial of each kind, as records that a store wrote and reads back: diverged,
out of memory, a worker that died (of three causes), pruned, complete, cached, and three that an
interruption left open.
"""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import optuna
import pytest
from report_studies import finished_study, half_confirmed_study
from rich.console import Console

from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import LaneJob, LaneOutcome, StudySnapshot, TrialRecord, TrialState
from lora_tune.report import print_report, write_reports
from lora_tune.search.fail_fast import failing_alike
from lora_tune.store.folder import StudyFolder

sys.path.append(str(Path(__file__).parents[1] / "search"))

from table_study import Disk, TableExecutor, drive, early, make_ladder, new_study, trained

HOST_OUT_OF_MEMORY = "the worker died three times: killed by the kernel: the host ran out of memory"
# Trial to its state and reason; 2 waits for its next rung, 5 and 6 never came to the end of the first.
ENDS = {
    1: (TrialState.DIVERGED, "loss nan at step 14, gradient norm nan"),
    8: (TrialState.INFEASIBLE, "out of memory as the only lane, at step 3"),
    9: (TrialState.FAILED, HOST_OUT_OF_MEMORY),
    10: (TrialState.FAILED, "the worker died three times: killed by signal 11 (SIGSEGV)"),
    11: (TrialState.FAILED, "the worker died three times: exit code 71"),
    2: (TrialState.RUNNING, ""),
    5: (TrialState.RUNNING, ""),
    6: (TrialState.RUNNING, ""),
}
COMMAND = "lora-tune run studies/docstrings.toml"


def changed(trial: TrialRecord) -> TrialRecord:
    if trial.number not in ENDS:
        return trial
    state, reason = ENDS[trial.number]
    rungs = trial.rungs if trial.number == 2 else ()
    return replace(trial, state=state, reason=reason, rungs=rungs)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudySnapshot:
    """The study as it is read back from its folder."""
    store = StudyFolder(tmp_path_factory.mktemp("states"))
    whole = finished_study()
    store.save_lock(replace(whole.lock, command=COMMAND))
    for trial in whole.trials:
        store.save_trial(changed(trial))
    store.save_runtime(whole.wall_s)
    return store.snapshot()


@pytest.fixture(scope="module")
def reports(study: StudySnapshot) -> Path:
    write_reports(study)
    return study.folder


def test_the_store_gives_back_every_state_and_reason(study: StudySnapshot) -> None:
    found = {trial.number: (trial.state, trial.reason) for trial in study.trials}
    assert {number: found[number] for number in ENDS} == ENDS
    assert {trial.state for trial in study.trials} == set(TrialState)


def printed(study: StudySnapshot, width: int) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    print_report(study, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 250])
def test_the_console_names_state_and_reason_of_each(study: StudySnapshot, width: int) -> None:
    text = printed(study, width)
    lines = text.splitlines()
    for number, (state, reason) in ENDS.items():
        [row] = [line for line in lines if line.split()[:1] == [str(number)]]
        assert state.value in row.split()
        if reason and width == 80:
            remarks = " ".join(text.split())
            assert f"Trial {number} {state.value}: {reason}" in remarks
        elif reason:
            assert reason in row


@pytest.mark.parametrize("width", [80, 250])
def test_the_console_says_what_waits_and_how_to_go_on(study: StudySnapshot, width: int) -> None:
    text = " ".join(printed(study, width).split())
    assert (
        "Not finished: 3 trials wait to go on (2, 5, 6); the confirmation is still to come." in text
    )
    assert text.endswith(f"Next: {COMMAND}")
    assert "3 failed" in text
    assert "3 running" in text


def test_markdown_names_state_and_reason_of_each(reports: Path) -> None:
    text = (reports / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# LoRA study docstrings (unfinished)\n")
    top = text.split("| setting")[0]
    assert "Not finished: 3 trials wait to go on (2, 5, 6)" in top
    assert COMMAND in top
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    for number, (state, reason) in ENDS.items():
        [row] = [cells for cells in rows if cells[1:4:2] == [str(number), state.value]]
        assert reason in row[-2].replace("\\", "")
    for meaning in ("Diverged: ", "Infeasible: ", "Failed: ", "Running: ", "A cached trial "):
        assert text.count(meaning) == 1


class Rows(HTMLParser):
    """Texts of the cells of every row, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_page_names_state_and_reason_of_each(reports: Path) -> None:
    page = Rows((reports / "report.html").read_text(encoding="utf-8"))
    for number, (state, reason) in ENDS.items():
        [row] = [r for r in page.rows if len(r) > 10 and r[0].strip() == str(number)]
        cells = [cell.strip() for cell in row]
        assert state.value in cells
        assert cells[-1].startswith(reason)
    text = " ".join(" ".join(page.words).split())
    assert "3 trials wait to go on" in text
    assert COMMAND in text


def test_the_table_of_trials_has_state_and_reason_of_each(reports: Path) -> None:
    with (reports / "trials.csv").open(newline="", encoding="utf-8") as stream:
        rows = {int(row["trial"]): row for row in csv.DictReader(stream)}
    assert {n: (rows[n]["state"], rows[n]["reason"]) for n in ENDS} == ENDS


def test_report_json_has_state_and_reason_of_each(reports: Path) -> None:
    data = json.loads((reports / "report.json").read_text(encoding="utf-8"))
    found = {trial["number"]: (trial["state"], trial["reason"]) for trial in data["trials"]}
    assert {number: found[number] for number in ENDS} == ENDS
    assert data["summary"]["outcome"] == "unfinished"
    assert data["summary"]["waiting"] == [2, 5, 6]
    assert data["summary"]["states"]["failed"] == 3
    assert data["lock"]["command"] == COMMAND


def test_an_interrupted_confirmation_says_how_many_runs_are_missing() -> None:
    text = " ".join(printed(half_confirmed_study(), 100).split())
    assert "Not finished: 3 runs of the confirmation are missing." in text
    assert text.endswith(f"Next: {COMMAND}")


def test_a_finished_study_waits_for_nothing() -> None:
    assert "Not finished" not in printed(finished_study(), 100)


def test_trials_that_have_not_begun_are_counted(study: StudySnapshot) -> None:
    few = replace(study, trials=study.trials[:4])
    text = " ".join(printed(few, 100).split())
    assert "Not finished: 1 trial waits to go on (2); 8 trials have not begun; the conf" in text


# In Optuna's database.

FATES: dict[int, Callable[[LaneJob], LaneOutcome]] = {
    1: lambda job: early(job, TrialState.DIVERGED, "loss nan at step 14"),
    3: lambda job: early(job, TrialState.INFEASIBLE, "out of memory as the only lane, at step 0"),
    4: lambda job: early(job, TrialState.FAILED, HOST_OUT_OF_MEMORY),
}


def fate(job: LaneJob) -> LaneOutcome:
    return FATES.get(job.trial, lambda job: trained(job, 2.0 + job.trial / 10))(job)


def test_optuna_has_state_and_reason_of_each_and_nothing_of_a_trial_that_waits() -> None:
    study, disk = new_study(), Disk()
    ladder = make_ladder(study, disk, num_trials=8, half_step=False)
    drive(ladder, TableExecutor(fate=fate), most_takes=7)  # and then the process is gone
    told = study.get_trials()
    wanted = {
        1: (optuna.trial.TrialState.PRUNED, "diverged", "loss nan at step 14"),
        3: (optuna.trial.TrialState.PRUNED, "infeasible", "out of memory as the only lane, at step 0"),
        4: (optuna.trial.TrialState.FAIL, "failed", HOST_OUT_OF_MEMORY),
    }  # fmt: skip
    drive(make_ladder(study, disk, num_trials=8, half_step=False), TableExecutor(fate=fate))
    ended = study.get_trials()
    for number, (state, ours, reason) in wanted.items():
        trial = ended[number]
        assert trial.state is state
        assert (trial.user_attrs["state"], trial.user_attrs["reason"]) == (ours, reason)
        assert (trial.constraints["vram_excess_bytes"] > 0) is (ours == "infeasible")
    assert ended[0].state is optuna.trial.TrialState.COMPLETE
    assert ended[0].user_attrs["reason"] == ""
    waiting = [trial for trial in told if trial.state is optuna.trial.TrialState.RUNNING]
    assert waiting
    for trial in waiting:
        assert "state" not in trial.user_attrs
        assert ended[trial.number].state is not optuna.trial.TrialState.RUNNING


# A machine on which nothing can be trained.


def failed(number: int, reason: str) -> TrialRecord:
    return replace(finished_study().trials[9], number=number, reason=reason)


def test_five_trials_that_all_fail_alike_stop_the_study_and_the_same_command_goes_on() -> None:
    reason = "the worker died three times: killed by signal {} (SIGSEGV) at step 3"
    broken = True

    def sick(job: LaneJob) -> LaneOutcome:
        if broken:
            return early(job, TrialState.FAILED, reason.format(11))
        return trained(job, 2.0 + job.trial / 10)

    study, disk = new_study(), Disk()
    executor = TableExecutor(fate=sick)
    with pytest.raises(AllTrialsFailedError) as found:
        drive(make_ladder(study, disk, num_trials=12), executor)
    assert found.value.exit_code == 6
    assert str(found.value).startswith("the first 5 trials all failed of the same: the worker died")
    assert "give the same command again" in str(found.value)
    states = [record.state for record in disk.records.values()]
    assert states.count(TrialState.FAILED) == 5
    # still broken: one more trial is tried, and no further one
    with pytest.raises(AllTrialsFailedError, match="the first 6 trials all failed of the same"):
        drive(make_ladder(study, disk, num_trials=12), TableExecutor(slots=1, fate=sick))
    broken = False
    ladder = make_ladder(study, disk, num_trials=12)
    assert drive(ladder, TableExecutor(fate=sick))
    assert len(ladder.finalists(2)) >= 2
    assert sum(r.state is TrialState.FAILED for r in disk.records.values()) == 6


def test_trials_that_fail_of_different_things_do_not_stop_the_study() -> None:
    reasons = ["killed by signal 9 (SIGKILL)"] * 4 + ["killed by signal 11 (SIGSEGV)"]
    assert failing_alike([failed(n, reason) for n, reason in enumerate(reasons)]) == ""


def test_reasons_that_differ_in_numbers_are_alike() -> None:
    records = [failed(n, f"worker {1000 + n}: exit code 71 at step {n}") for n in range(5)]
    assert failing_alike(records) == "worker 1004: exit code 71 at step 4"
    assert failing_alike(records[:4]) == ""


def test_a_machine_that_has_trained_anything_is_not_sick() -> None:
    records = [failed(n, "exit code 71") for n in range(5)]
    whole = {trial.number: trial for trial in finished_study().trials}
    assert failing_alike(records) == "exit code 71"
    running = replace(whole[0], number=5, state=TrialState.RUNNING, rungs=())
    cached = replace(whole[12], number=6, repeats=0, rungs=())
    assert failing_alike([*records, running, cached]) == "exit code 71"
    for trial in (whole[0], whole[1], whole[8]):  # complete, diverged, infeasible
        assert failing_alike([*records, trial]) == ""
    assert failing_alike([*records, replace(running, rungs=whole[0].rungs[:1])]) == ""
