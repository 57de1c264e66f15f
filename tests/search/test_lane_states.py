"""Lane states on disk: whoever may still go on from one finds it, and nothing else is left.

Segments are looked up in a table, but leave the folders that real ones leave.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from table_study import (
    Disk,
    Killed,
    TableExecutor,
    drive,
    evaluation_of,
    make_ladder,
    new_study,
    outcome_of,
)
from test_confirmation import CANDIDATES, PLAN, candidate, stage_of
from test_confirmation import Disk as ConfirmationDisk
from test_confirmation import drive as drive_stage
from test_confirmation import outcome_of as run_of

from lora_tune.engine.lane import STATE_FILE
from lora_tune.files import is_complete, publish_folder
from lora_tune.records import LaneJob, LaneOutcome, TrialState
from lora_tune.search.ladder import LANE_STATE
from lora_tune.search.promotion import ENDED_EARLY

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def leave(job: LaneJob, outcome: LaneOutcome) -> LaneOutcome:
    """Leave on disk what the executor leaves of a segment."""
    if job.start_folder is not None:
        assert is_complete(job.start_folder)
        assert (job.start_folder / LANE_STATE).is_file()
    if job.state_folder is not None:
        with publish_folder(job.state_folder) as folder:
            (folder / STATE_FILE).touch()
    if outcome.state is TrialState.COMPLETE and job.result_folder is not None:
        with publish_folder(job.result_folder) as folder:
            (folder / ADAPTER).write_text(f"{job.trial} {job.rung}")
            if job.keep_state:
                (folder / STATE_FILE).touch()
    return outcome


def leaving(job: LaneJob) -> LaneOutcome:
    return leave(job, outcome_of(job))


def states() -> set[str]:
    return {path.parent.as_posix() for path in Path("trials").rglob(LANE_STATE)}


def wanted_states(disk: Disk, *, num_rungs: int = 3) -> set[str]:
    """Return the folders of the states that a trial may go on from: of its last rung, if one follows."""
    return {
        f"trials/{record.number:04d}/rung-{len(record.rungs) - 1}"
        for record in disk.records.values()
        if 0 < len(record.rungs) < num_rungs and record.state not in ENDED_EARLY
    }


def test_the_engine_s_name_of_a_state_is_the_ladder_s() -> None:
    assert LANE_STATE == STATE_FILE


def test_a_finished_search_has_left_the_states_of_trials_that_were_not_promoted_and_no_other() -> (
    None
):
    disk = Disk()
    ladder = make_ladder(new_study(), disk)
    drive(ladder, TableExecutor(fate=leaving))
    ladder.finalists(2)
    found = {record.state for record in disk.records.values()}
    assert found >= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.DIVERGED}
    assert states() == wanted_states(disk)
    rungs = [
        Path(f"trials/{record.number:04d}/rung-{result.rung}")
        for record in disk.records.values()
        for result in record.rungs
    ]
    assert all(map(is_complete, rungs))
    assert [(rung / ADAPTER).is_file() for rung in rungs] == [True] * len(rungs)
    assert list(Path("trials").glob("*/state-*")) == []


def test_a_search_with_more_trials_finds_the_states_of_those_that_it_promotes_late() -> None:
    study, disk = new_study(), Disk()
    drive(make_ladder(study, disk), TableExecutor(fate=leaving))
    before = {number: len(record.rungs) for number, record in disk.records.items()}

    def worse(job: LaneJob) -> LaneOutcome:
        """Every trial that is added ends far behind, so the added seats go to earlier ones."""
        outcome = outcome_of(job)
        if job.trial >= len(before) and outcome.state is TrialState.COMPLETE:
            outcome = replace(outcome, evaluation=evaluation_of(9.0))
        return leave(job, outcome)

    drive(make_ladder(study, disk, num_trials=40), TableExecutor(fate=worse))
    assert any(len(disk.records[number].rungs) > rungs > 0 for number, rungs in before.items())
    assert states() == wanted_states(disk)


def test_what_a_killed_search_left_is_removed_when_it_is_opened_again() -> None:
    """Killed before any record was written, and then before the needless states were removed."""
    study, disk = new_study(), Disk()
    whole = Disk()
    drive(make_ladder(new_study(), whole), TableExecutor(fate=leaving))
    shutil.rmtree("trials")
    for killed_at in range(2, whole.writes, 5):
        disk.killed_at = killed_at
        with pytest.raises(Killed):
            drive(make_ladder(study, disk), TableExecutor(fate=leaving))
        for record in disk.records.values():  # as if it had been killed earlier
            for rung in range(len(record.rungs)):
                with publish_folder(Path(f"trials/{record.number:04d}/state-{rung}")):
                    pass
        disk.killed_at = None
        make_ladder(study, disk)
        for record in disk.records.values():
            ended = len(record.rungs) + (record.state in ENDED_EARLY)
            left = Path(f"trials/{record.number:04d}").glob("state-*")
            assert all(int(path.name.removeprefix("state-")) >= ended for path in left)
        assert states() >= wanted_states(disk)
    drive(make_ladder(study, disk), TableExecutor(fate=leaving))
    assert states() == wanted_states(disk)
    assert disk.records == whole.records


def test_jobs_say_where_their_lane_is_saved_and_the_last_rung_keeps_no_state() -> None:
    executor = TableExecutor()
    drive(make_ladder(new_study(), Disk()), executor)
    assert {job.rung for job in executor.trained} == {0, 1, 2}
    for job in executor.trained:
        assert job.state_folder == Path(f"trials/{job.trial:04d}/state-{job.rung}")
        assert job.keep_state == (job.rung < 2)
        assert job.train_split == "train"


# Confirmation.


def run_states() -> set[str]:
    return {path.name for path in PLAN.folder.glob("*.state")}


def confirming(fate: Callable[[LaneJob], LaneOutcome] = run_of) -> Callable[[LaneJob], LaneOutcome]:
    return lambda job: leave(job, fate(job))


def test_a_run_s_state_goes_when_the_run_is_on_record() -> None:
    disk = ConfirmationDisk()
    jobs = drive_stage(stage_of(disk), fate=confirming())
    assert run_states() == set()
    for job in jobs:
        if job.config is None:
            assert job.state_folder is None
        else:
            assert job.result_folder is not None
            assert job.state_folder == Path(f"{job.result_folder}.state")


def test_states_of_runs_that_are_to_come_stay_and_others_go_when_a_stage_is_opened() -> None:
    disk = ConfirmationDisk()
    drive_stage(stage_of(disk), slots=1, most_takes=3, fate=confirming())
    names = [f"{c.name.replace(' ', '-')}-seed-{seed}" for seed in (0, 1) for c in CANDIDATES]
    for name in (*names, "refit", "trial-99-seed-0"):
        with publish_folder(PLAN.folder / f"{name}.state"):
            pass
    stage_of(disk)
    assert disk.stored is not None
    done = {f"{run.candidate.replace(' ', '-')}-seed-{run.seed}" for run in disk.stored.runs}
    assert len(done) == 3
    assert run_states() == {f"{name}.state" for name in (*names, "refit") if name not in done}
    stage_of(disk, (*CANDIDATES[1:], candidate("trial 11", 32)))
    assert not any(name.startswith("trial-3-") for name in run_states())


def test_the_refit_trains_on_all_rows_and_its_state_goes_when_it_is_on_record() -> None:
    disk = ConfirmationDisk()
    stage = stage_of(disk)
    drive_stage(stage, fate=confirming())
    job = stage.refit_job(steps=50)
    assert (job.train_split, job.state_folder) == ("all", Path("confirmation/refit.state"))
    leave(job, replace(run_of(replace(job, trial=-4)), trial=job.trial))
    stage_of(disk)
    assert run_states() == {"refit.state"}
    stage.mark_refit()
    assert run_states() == set()
