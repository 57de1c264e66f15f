"""The confirmation on a table of losses: what is trained again, what is stored, and what is decided.

Losses are looked up by configuration and seed, so a stage that was interrupted must end as one that was not.
"""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import (
    Candidate,
    Confirmation,
    EvalResult,
    LaneJob,
    LaneOutcome,
    MetricResult,
    TrialConfig,
    TrialState,
    Verdict,
)
from lora_tune.search.confirmation import (
    BASE_TRIAL,
    ConfirmationPlan,
    ConfirmationStage,
    run_folder,
    with_fresh_seed,
)
from lora_tune.units import GIB

ROWS = 200
STEPS = 40


def config(rank: int, **changes: object) -> TrialConfig:
    values: dict[str, object] = {
        "rank": rank,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "target_set": "all-linear",
        "target_modules": ("layers.0.q_proj",),
        "learning_rate": 3e-4,
    }
    return TrialConfig(**{**values, **changes})  # type: ignore[arg-type]


def candidate(name: str, rank: int, *, gib: float = 8.0) -> Candidate:
    return Candidate(
        name=name,
        trial=None if name == "default" else int(name.split()[1]),
        config=config(rank),
        steps=STEPS,
        predicted_bytes=round(gib * GIB),
        trainable_parameters=rank * 1000,
    )


# By rank: the true mean loss. Rank 8 is as good as rank 64; rank 16 is the default and worse.
TRUTH = {64: 1.90, 8: 1.90, 16: 2.00}
CANDIDATES = (
    candidate("trial 3", 64, gib=12.0),
    candidate("trial 7", 8, gib=9.0),
    candidate("default", 16, gib=8.0),
)
PLAN = ConfirmationPlan(
    seeds=2,
    study_seed=5,
    warmup_steps=2,
    cooldown_ratio=0.2,
    practical_margin=0.005,
    eval_dtype="float32",
    folder=Path("confirmation"),
    base_parameters=1_000_000,
    selection_rows=16,
)


def losses(mean: float, seed: int) -> EvalResult:
    """Rows of unequal difficulty, the same for everyone, and a little noise of the run."""
    difficulty = np.random.default_rng(0).normal(0.0, 0.5, ROWS)
    noise = np.random.default_rng([seed, round(1e6 * mean)]).normal(0.0, 0.02, ROWS)
    counts = 5 + np.arange(ROWS) % 7
    return EvalResult(
        split="confirmation",
        loss_sums=tuple(float(x) for x in (mean + difficulty + noise) * counts),
        label_counts=tuple(int(x) for x in counts),
        compute_dtype="float32",
    )


def outcome_of(job: LaneJob) -> LaneOutcome:
    if job.config is None:
        found = losses(4.0 if job.eval_split == "confirmation" else 4.1, 0)
    else:
        found = losses(TRUTH[job.config.rank], job.config.init_seed)
    return LaneOutcome(
        trial=job.trial,
        rung=job.rung,
        state=TrialState.COMPLETE,
        evaluation=found,
        wall_s=float(job.end_step - job.start_step),
        metrics=tuple(MetricResult(metric=name, values=(1.0, 0.0)) for name in job.metrics),
    )


class Disk:
    """What outlives a stopped process."""

    def __init__(self) -> None:
        self.stored: Confirmation | None = None
        self.writes = 0

    def save(self, confirmation: Confirmation) -> None:
        self.stored = confirmation
        self.writes += 1


def stage_of(
    disk: Disk,
    candidates: tuple[Candidate, ...] = CANDIDATES,
    *,
    plan: ConfirmationPlan = PLAN,
    default: str | None = "default",
) -> ConfirmationStage:
    return ConfirmationStage(plan, candidates, default=default, earlier=disk.stored, save=disk.save)


def drive(
    stage: ConfirmationStage,
    *,
    slots: int = 2,
    most_takes: int | None = None,
    shuffled: random.Random | None = None,
    fate=outcome_of,
) -> list[LaneJob]:
    jobs: list[LaneJob] = []
    trained: list[LaneJob] = []
    takes = 0
    while True:
        new = stage.next_jobs(slots - len(jobs))
        jobs += new
        trained += new
        if not jobs:
            return trained
        if takes == most_takes:
            return trained
        if shuffled is not None:
            shuffled.shuffle(jobs)
        stage.take(fate(jobs.pop(0)))
        takes += 1


def test_every_candidate_trains_from_its_beginning_with_the_same_fresh_seeds() -> None:
    jobs = [job for job in drive(stage_of(Disk())) if job.config is not None]
    assert len({job.trial for job in jobs}) == len(jobs) == 6
    seeds: dict[int, set[int]] = {}
    for job in jobs:
        assert job.config is not None
        assert (job.start_step, job.hold_step, job.end_step) == (0, 32, 40)
        assert (job.eval_split, job.eval_dtype, job.start_folder) == (
            "confirmation",
            "float32",
            None,
        )
        assert not job.keep_state
        config = job.config
        assert config.init_seed == config.dropout_seed == config.data_seed != PLAN.study_seed
        seeds.setdefault(config.rank, set()).add(config.init_seed)
    assert seeds[64] == seeds[8] == seeds[16]
    assert len(seeds[64]) == 2


def test_the_cheaper_of_two_equals_wins_and_is_better_than_the_default() -> None:
    stage = stage_of(Disk())
    drive(stage)
    decision = stage.decision
    assert decision is not None
    assert decision.chosen == "trial 7"
    assert set(decision.tied) == {"trial 3", "trial 7"}
    assert decision.verdict is Verdict.BETTER
    assert stage.chosen_folder == run_folder(PLAN.folder, "trial 7", decision.median_seed)
    assert stage.confirmation.base_evaluation == losses(4.0, 0)
    assert stage.confirmation.base_selection_loss == losses(4.1, 0).mean_loss


def test_neither_the_order_of_results_nor_the_slots_change_the_decision() -> None:
    plain = Disk()
    drive(stage_of(plain))
    for number in range(5):
        other = Disk()
        drive(stage_of(other), slots=1 + 3 * number, shuffled=random.Random(number))
        assert other.stored is not None
        assert plain.stored is not None
        assert other.stored.decision == plain.stored.decision


def test_a_stage_interrupted_after_any_result_trains_nothing_twice() -> None:
    plain = Disk()
    whole = drive(stage_of(plain))
    for takes in range(1, len(whole)):
        disk = Disk()
        drive(stage_of(disk), slots=1, most_takes=takes)
        rest = drive(stage_of(disk), slots=1)
        assert len(rest) == len(whole) - takes
        assert disk.stored is not None
        assert plain.stored is not None
        assert disk.stored.decision == plain.stored.decision


def test_runs_of_a_candidate_that_stays_are_kept_when_the_finalists_change() -> None:
    disk = Disk()
    drive(stage_of(disk, CANDIDATES[1:]))
    stage = stage_of(disk)
    assert stage.decision is None
    jobs = drive(stage)
    assert {job.config.rank for job in jobs if job.config is not None} == {64}
    assert all(job.trial != BASE_TRIAL for job in jobs)
    assert stage.decision is not None


def test_a_stage_killed_between_its_last_result_and_the_decision_decides_when_it_goes_on() -> None:
    plain, killed = Disk(), Disk()
    drive(stage_of(plain))
    assert plain.stored is not None
    killed.stored = replace(plain.stored, decision=None)
    stage = stage_of(killed)
    assert drive(stage) == []
    assert stage.decision == plain.stored.decision
    assert killed.stored == plain.stored


@pytest.mark.parametrize("later", [CANDIDATES[::-1], CANDIDATES[1:]])
def test_finalists_that_changed_without_a_missing_run_are_decided_at_once(later) -> None:
    disk = Disk()
    drive(stage_of(disk))
    stage = stage_of(disk, later)
    assert drive(stage) == []
    assert stage.decision is not None
    assert {score.candidate for score in stage.decision.scores} == {c.name for c in later}


def test_a_decision_on_other_candidates_does_not_outlive_the_first_moment() -> None:
    disk = Disk()
    drive(stage_of(disk, CANDIDATES[1:]))
    stage_of(disk)
    assert disk.stored is not None
    assert disk.stored.decision is None


def test_a_confirmation_of_which_nothing_came_to_its_end_says_so_again_when_it_is_opened() -> None:
    def fate(job: LaneJob) -> LaneOutcome:
        if job.config is None:
            return outcome_of(job)
        return LaneOutcome(trial=job.trial, rung=0, state=TrialState.DIVERGED, reason="loss nan")

    disk = Disk()
    for _ in range(2):
        with pytest.raises(AllTrialsFailedError, match="loss nan"):
            drive(stage_of(disk), fate=fate)


def test_a_candidate_that_diverges_with_any_seed_is_not_recommended() -> None:
    def fate(job: LaneJob) -> LaneOutcome:
        if job.config is not None and job.config.rank == 8 and job.trial % 2:
            return LaneOutcome(
                trial=job.trial, rung=0, state=TrialState.DIVERGED, reason="loss inf at step 9"
            )
        return outcome_of(job)

    stage = stage_of(Disk())
    drive(stage, fate=fate)
    assert stage.decision is not None
    assert stage.decision.failed == ("trial 7",)
    assert stage.decision.chosen == "trial 3"


def test_when_no_candidate_comes_to_its_end_the_reasons_are_named() -> None:
    def fate(job: LaneJob) -> LaneOutcome:
        if job.config is None:
            return outcome_of(job)
        return LaneOutcome(trial=job.trial, rung=0, state=TrialState.DIVERGED, reason="loss nan")

    with pytest.raises(AllTrialsFailedError, match=r"none of the 3 candidates.*loss nan"):
        drive(stage_of(Disk()), fate=fate)


def test_a_base_without_a_finite_loss_ends_the_confirmation_with_its_reason() -> None:
    def fate(job: LaneJob) -> LaneOutcome:
        if job.trial == BASE_TRIAL:
            return LaneOutcome(
                trial=job.trial, rung=0, state=TrialState.DIVERGED, reason="evaluation loss nan"
            )
        return outcome_of(job)

    with pytest.raises(AllTrialsFailedError, match=r"untuned base.*evaluation loss nan"):
        drive(stage_of(Disk()), fate=fate)


def test_metrics_are_measured_once_on_the_median_run_of_each_candidate_and_on_the_base() -> None:
    disk = Disk()
    plan = replace(PLAN, metrics=("exact-match",))
    stage = stage_of(disk, plan=plan)
    jobs = [job for job in drive(stage) if job.metrics]
    decision = stage.decision
    assert decision is not None
    medians = {score.candidate: score.median_seed for score in decision.scores}
    assert {job.start_folder for job in jobs} == {
        None,
        *(run_folder(plan.folder, name, seed) for name, seed in medians.items()),
    }
    found = stage.confirmation
    assert found.base_metrics[0].mean == 0.5
    for run in found.runs:
        assert len(run.metrics) == (run.seed == medians[run.candidate])
    assert drive(stage_of(disk, plan=plan)) == []


def test_steps_are_counted_as_runs_end() -> None:
    stage = stage_of(Disk())
    assert (stage.planned_steps(), stage.finished_steps()) == (240, 0)
    drive(stage)
    assert stage.finished_steps() == 240


def test_seconds_a_step_are_shared_out_by_operations_not_by_the_clock() -> None:
    stage = stage_of(Disk())
    drive(stage)
    assert stage.decision is not None
    seconds = {score.candidate: score.step_s for score in stage.decision.scores}
    base, large, small = 4e6, 6 * 64_000, 6 * 8_000
    assert seconds["trial 3"] / seconds["trial 7"] == pytest.approx((base + large) / (base + small))
    assert math.fsum(seconds.values()) / 3 == pytest.approx(1.0, rel=1e-6)


def test_fresh_seeds_differ_by_study_and_number_and_from_the_search() -> None:
    own = config(8, init_seed=5, dropout_seed=5, data_seed=5)
    drawn = [with_fresh_seed(own, study_seed=s, seed=n).init_seed for s in (5, 6) for n in range(4)]
    assert len({5, 6, *drawn}) == 10


def test_the_refit_trains_the_chosen_configuration_and_is_then_what_is_shipped() -> None:
    disk = Disk()
    stage = stage_of(disk)
    drive(stage)
    job = stage.refit_job(steps=50)
    assert job.config is not None
    assert (job.config.rank, job.end_step, job.hold_step) == (8, 50, 40)
    stage.mark_refit()
    assert stage.chosen_folder == job.result_folder
    assert stage_of(disk).chosen_folder == job.result_folder


def test_a_confirmation_of_which_nothing_came_to_its_end_is_stored_whole() -> None:
    def fate(job: LaneJob) -> LaneOutcome:
        if job.config is None:
            return outcome_of(job)
        return LaneOutcome(trial=job.trial, rung=0, state=TrialState.DIVERGED, reason="loss nan")

    disk = Disk()
    with pytest.raises(AllTrialsFailedError):
        drive(stage_of(disk), fate=fate)
    assert disk.stored is not None
    assert len(disk.stored.runs) == 6
