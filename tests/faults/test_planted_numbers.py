"""Numbers that cannot be results, planted in ten places: none wins, is a result on record or breaks a report.

Real tiny models for what happens inside a pack; a table of losses in place of a model for the search and the
confirmation. NaN, Inf and -Inf everywhere; where a loss comes in whole also 1e30 and one below zero.
"""

import json
import math
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from report_studies import confirmed_study, finished_study

from lora_tune.engine.base import BaseModel, load_base_model
from lora_tune.engine.memory_reading import HostMeter
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.errors import AllTrialsFailedError
from lora_tune.executors.in_process import InProcessExecutor
from lora_tune.metrics import Answer, score_answers
from lora_tune.records import (
    Candidate,
    Confirmation,
    EvalResult,
    LaneJob,
    LaneOutcome,
    RungResult,
    StudySnapshot,
    TokenizedRow,
    TrialConfig,
    TrialState,
)
from lora_tune.report import print_report, write_reports
from lora_tune.report.best import best_json
from lora_tune.report.terminal import open_console
from lora_tune.search.confirmation import (
    BASE_SELECTION_TRIAL,
    BASE_TRIAL,
    ConfirmationPlan,
    ConfirmationStage,
)
from lora_tune.search.fail_fast import loss_limits
from lora_tune.stats.plausibility import MOST_LOSS, checked, implausible, implausible_in

sys.path.append(str(Path(__file__).parents[1] / "search"))

from table_study import (
    FIRST_POINT,
    Disk,
    TableExecutor,
    drive,
    evaluation_of,
    make_ladder,
    new_study,
    outcome_of,
    trained,
)

NOT_FINITE = (math.nan, math.inf, -math.inf)
IMPOSSIBLE = (*NOT_FINITE, 1e30, -5.0)
BAD = 0  # seed of the lane in which numbers are planted
PLANTED_STEP = 2
SETTINGS = PackSettings(
    effective_batch_size=4, micro_batch_size=2, max_grad_norm=1.0, weight_decay=0.0, group_rank=64
)


# 1 to 4: in a pack of three lanes that share their products.


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> BaseModel:
    return load_base_model(tiny_llama, quantization="none", compute_dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def splits(make_rows: Callable[..., tuple[TokenizedRow, ...]]) -> dict[str, Any]:
    return {"train": make_rows(16, seed=1), "selection": make_rows(5, seed=2)}


def make_job(number: int, **changes: Any) -> LaneJob:
    config = TrialConfig(
        rank=4,
        lora_alpha=8.0,
        lora_dropout=0.0,
        target_set="attention-q",
        target_modules=("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        learning_rate=1e-3,
        init_seed=number,
        dropout_seed=number,
        data_seed=7,
    )
    job = LaneJob(
        trial=number,
        rung=0,
        config=config,
        start_step=0,
        hold_step=3,
        end_step=4,
        warmup_steps=1,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )
    return replace(job, **changes)


def finish(base: BaseModel, splits: dict[str, Any], jobs: list[LaneJob]) -> dict[int, LaneOutcome]:
    pack = TrialPack(base, splits["train"], SETTINGS)
    executor = InProcessExecutor(pack, splits, lanes=3, base_model=None, meter=HostMeter())
    for job in jobs:
        executor.submit(job)
    found = {}
    while executor.busy:
        found |= {outcome.trial: outcome for outcome in executor.wait()}
    return found


@pytest.fixture(scope="module")
def healthy(base: BaseModel, splits: dict[str, Any]) -> dict[int, LaneOutcome]:
    return finish(base, splits, [make_job(1), make_job(2)])


def bad_lane(base: BaseModel, *, training: bool) -> int | None:
    """Return the place of the bad lane in the running pass, None where numbers are left alone."""
    layout = base.layout
    if layout.training is not training:
        return None
    for k, adapter in enumerate(layout.adapters):
        if adapter is not None and adapter.config.init_seed == BAD:
            return k if not training or layout.steps[k] == PLANTED_STEP else None
    return None


@contextmanager
def planted(base: BaseModel, place: str, value: float) -> Iterator[None]:
    """Put a number into every pass of the bad lane's second step, or of its evaluation."""
    layer, norm = base.model.get_submodule("model.layers.0"), base.model.get_submodule("model.norm")

    def into_adapter(*_: object) -> None:
        k = bad_lane(base, training=True)
        if k is not None:
            adapter = base.layout.adapters[k]
            assert adapter is not None
            target = adapter.flat if place == "adapter weights" else adapter.flat.grad
            assert target is not None
            target.data[-1] = value

    def into_hidden_states(_: object, __: object, out: torch.Tensor) -> torch.Tensor | None:
        k = bad_lane(base, training=place == "training loss")
        if k is None:
            return None
        out = out.clone()
        out.flatten(0, 1)[base.layout.tokens[k]] = value
        return out

    if "loss" in place:
        handle = norm.register_forward_hook(into_hidden_states)
    else:
        handle = layer.register_forward_pre_hook(into_adapter)
    try:
        yield
    finally:
        handle.remove()


PLACES = ("adapter weights", "gradient", "training loss", "evaluation loss")


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", PLACES)
def test_a_number_planted_in_a_lane_ends_that_lane_alone(
    base, splits, healthy, tmp_path: Path, place: str, value: float
) -> None:
    assert base.flat  # which the slices of the hook rely on
    bad = make_job(BAD, result_folder=tmp_path / "rung-0")
    with planted(base, place, value):
        found = finish(base, splits, [make_job(1), bad, make_job(2)])
    assert found[BAD].state is TrialState.DIVERGED
    assert found[BAD].evaluation is None
    step = 4 if place == "evaluation loss" else PLANTED_STEP
    assert f"at step {step}" in found[BAD].reason
    assert list(tmp_path.iterdir()) == []
    for number in (1, 2):
        ours, wanted = found[number].evaluation, healthy[number].evaluation
        assert found[number].state is TrialState.COMPLETE
        assert ours is not None
        assert wanted is not None
        # products of other heights round otherwise
        np.testing.assert_allclose(ours.loss_sums, wanted.loss_sums, rtol=1e-5)


@pytest.mark.parametrize("place", ["adapter weights", "evaluation loss"])
def test_an_absurd_number_that_stays_is_a_divergence_too(base, splits, healthy, place: str) -> None:
    with planted(base, place, 1e30):
        found = finish(base, splits, [make_job(1), make_job(BAD)])
    outcome = checked(found[BAD])
    assert outcome.state is TrialState.DIVERGED
    assert outcome.reason
    assert outcome.evaluation is None
    assert checked(found[1]) == found[1]


def test_a_gradient_is_clipped_as_long_as_its_norm_is_a_number(base, splits) -> None:
    with planted(base, "gradient", 1e15):
        [clipped] = finish(base, splits, [make_job(BAD)]).values()
    assert checked(clipped).state is TrialState.COMPLETE
    assert clipped.points[PLANTED_STEP - 1].grad_norm > 1e14
    with planted(base, "gradient", 1e30):  # its square is beyond float32
        [lost] = finish(base, splits, [make_job(BAD)]).values()
    assert lost.state is TrialState.DIVERGED
    assert lost.reason.endswith("gradient norm inf")


# 5 and 6: what the search is given, and what it tells Optuna.


def impossible_evaluations() -> Iterator[tuple[str, EvalResult]]:
    good = evaluation_of(2.0)
    for value in IMPOSSIBLE:
        sums = (*good.loss_sums[:-1], value * 7)
        yield f"one row {value:g}", replace(good, loss_sums=sums)
        yield f"all rows {value:g}", evaluation_of(value)
    yield "opposite infinities", replace(good, loss_sums=(math.inf, -math.inf, 1.0, 1.0, 1.0))
    yield "a sum that overflows", replace(good, loss_sums=(1e308,) * 5)
    yield "no target token", replace(good, label_counts=(0,) * 5)


EVALUATIONS = dict(impossible_evaluations())


@pytest.mark.parametrize("name", EVALUATIONS)
def test_what_cannot_be_a_loss_is_never_a_result_of_the_search(name: str) -> None:
    """Every third trial comes back with it, at either rung: as complete, as a broken executor would say."""

    def fate(job: LaneJob) -> LaneOutcome:
        outcome = outcome_of(job)
        spoiled = job.trial % 3 == (2 if job.rung == 0 else 0)
        if outcome.state is TrialState.COMPLETE and spoiled:
            return replace(outcome, evaluation=EVALUATIONS[name])
        return outcome

    study, disk = new_study(), Disk()
    ladder = make_ladder(study, disk, half_step=False)
    assert drive(ladder, TableExecutor(fate=fate))
    for record in ladder.finalists(2):
        assert record.number % 3 == 1
    spoiled = [r for r in disk.records.values() if r.reason.startswith("evaluation")]
    assert any(not record.rungs for record in spoiled)  # at the first rung
    assert any(record.rungs for record in spoiled)  # and at a later one
    assert {record.state for record in spoiled} == {TrialState.DIVERGED}
    for record in disk.records.values():
        assert all(0 <= result.eval_loss < 10 for result in record.rungs)
    for trial in study.get_trials():
        told = [*(trial.values or ()), *trial.intermediate_values.values()]
        assert all(0 <= value < 30 for value in told)
        if trial.number in {r.number for r in spoiled if not r.rungs}:
            assert trial.state is optuna.trial.TrialState.PRUNED
            assert trial.user_attrs["state"] == "diverged"
            assert trial.user_attrs["reason"].startswith("evaluation")


def test_a_large_loss_of_a_model_that_works_is_still_a_result() -> None:
    assert implausible(evaluation_of(0.0)) == ""
    assert implausible(evaluation_of(14.0)) == ""
    assert implausible(evaluation_of(MOST_LOSS)) == ""
    certain = replace(evaluation_of(0.0), loss_sums=(-1e-6, 0.0, 0.0, 0.0, 0.0))
    assert implausible(certain) == ""


@pytest.mark.parametrize("first", [*IMPOSSIBLE, None])
def test_the_penalty_of_a_trial_never_rests_on_such_a_number(first: float | None) -> None:
    """Its first training loss; below all others it would make the worst trial the sampler's best."""
    points = () if first is None else (replace(FIRST_POINT, train_loss=first),)

    def fate(job: LaneJob) -> LaneOutcome:
        if job.trial == 1:
            return LaneOutcome(
                trial=1, rung=0, state=TrialState.DIVERGED, points=points, reason="loss"
            )
        return trained(job, 2.0 + job.trial / 10)

    study, disk = new_study(), Disk()
    drive(make_ladder(study, disk, num_trials=6, rungs=(10,)), TableExecutor(fate=fate))
    penalty = disk.records[1].penalty
    assert penalty is not None
    assert 2.0 < penalty < 30  # above the best trial's loss, and none of another world


def test_a_curve_with_such_a_number_sets_no_limit_to_other_trials() -> None:
    def result(losses: list[float]) -> RungResult:
        points = tuple(replace(FIRST_POINT, step=n + 1, train_loss=x) for n, x in enumerate(losses))
        return RungResult(
            rung=0, steps=3, eval_loss=2.0, evaluation=evaluation_of(2.0), points=points, wall_s=1.0,
            num_tokens=1, peak_bytes=1, pack_lanes=1,
        )  # fmt: skip

    good = [result([4.0, 3.0 + n / 10, 2.0]) for n in range(3)]
    for value in NOT_FINITE:
        assert loss_limits([*good, result([4.0, value, 2.0])]) == loss_limits(good)
        assert loss_limits([*good[:2], result([4.0, value, 2.0])]) == ()


def test_a_value_that_is_not_finite_is_not_told_to_optuna() -> None:
    study, disk = new_study(), Disk()
    ladder = make_ladder(study, disk)
    ladder.next_jobs(1)
    for value in NOT_FINITE:
        with pytest.raises(AssertionError):
            ladder.proposer.tell(0, state=TrialState.COMPLETE, value=value, vram_excess_bytes=0)
    assert study.get_trials()[0].state is optuna.trial.TrialState.RUNNING


@pytest.mark.parametrize("kind", ["INF_NEG", "INF_POS"])
def test_a_value_changed_in_the_database_wins_nothing(tmp_path: Path, kind: str) -> None:
    """Optuna's best is then the worst trial; ours is not, for its records are the study's own."""

    def fate(job: LaneJob) -> LaneOutcome:
        return trained(job, 9.0 if job.trial == 1 else 2.0 + abs(job.trial - 4) / 10)

    database, disk = tmp_path / "study.db", Disk()
    url = f"sqlite:///{database}"
    study = new_study(optuna.storages.RDBStorage(url))
    ladder = make_ladder(study, disk, num_trials=8, half_step=False)
    drive(ladder, TableExecutor(fate=fate), most_takes=6)
    assert study.get_trials()[1].state is optuna.trial.TrialState.COMPLETE
    with closing(sqlite3.connect(database)) as connection, connection:
        [number] = connection.execute("SELECT trial_id FROM trials WHERE number = 1").fetchone()
        connection.execute(
            "UPDATE trial_values SET value_type = ?, value = NULL WHERE trial_id = ?",
            (kind, number),
        )
    again = new_study(optuna.storages.RDBStorage(url))
    assert math.isinf(again.get_trials()[1].value or 0.0)
    ladder = make_ladder(again, disk, num_trials=8, half_step=False)
    assert drive(ladder, TableExecutor(fate=fate))
    assert all(record.number != 1 for record in ladder.finalists(2))
    assert len(disk.records[1].rungs) == 1
    assert all(0 <= result.eval_loss < 10 for r in disk.records.values() for result in r.rungs)
    others = [trial for trial in again.get_trials() if trial.number != 1]
    assert all(math.isfinite(value) for trial in others for value in trial.values or ())


# 7 to 9: the confirmation, the untuned base, and metrics.

CANDIDATES = tuple(
    Candidate(
        name=f"trial {number}",
        trial=number,
        config=replace(make_job(number).config, rank=4 * (number + 1)),
        steps=4,
        predicted_bytes=1000,
        trainable_parameters=10,
    )
    for number in range(3)
)


def make_stage() -> ConfirmationStage:
    plan = ConfirmationPlan(
        seeds=2,
        study_seed=5,
        warmup_steps=1,
        cooldown_ratio=0.2,
        practical_margin=0.005,
        eval_dtype="train",
        folder=Path("confirmation"),
        base_parameters=1000,
    )
    return ConfirmationStage(
        plan, CANDIDATES, default="trial 2", earlier=None, save=lambda found: None
    )


def run_stage(stage: ConfirmationStage, fate: Callable[[LaneJob], EvalResult]) -> Confirmation:
    while jobs := stage.next_jobs(2):
        for job in jobs:
            stage.take(
                LaneOutcome(
                    trial=job.trial, rung=0, state=TrialState.COMPLETE, evaluation=fate(job)
                )
            )
    return stage.confirmation


def healthy_run(job: LaneJob) -> EvalResult:
    mean = (
        4.0 if job.config is None else 2.0 + job.config.rank / 100 + job.config.init_seed % 7 / 1e4
    )
    return evaluation_of(mean, [0.01 * row * math.sin(mean * 1e4) for row in range(5)])


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_candidate_with_one_such_run_has_failed_and_is_not_chosen(name: str) -> None:
    best = run_stage(make_stage(), healthy_run).decision
    assert best is not None
    assert best.best == "trial 0"
    spoiled: list[int] = []

    def fate(job: LaneJob) -> EvalResult:
        if job.config is not None and job.config.rank == 4 and not spoiled:
            spoiled.append(job.trial)
            return EVALUATIONS[name]
        return healthy_run(job)

    found = run_stage(make_stage(), fate)
    assert found.decision is not None
    assert found.decision.failed == ("trial 0",)
    assert found.decision.chosen != "trial 0"
    assert all(math.isfinite(score.loss) for score in found.decision.scores)
    [bad] = [run for run in found.runs if run.state is not TrialState.COMPLETE]
    assert (bad.candidate, bad.state, bad.evaluation) == ("trial 0", TrialState.DIVERGED, None)
    assert bad.reason.startswith("evaluation")


@pytest.mark.parametrize("name", EVALUATIONS)
def test_when_all_candidates_end_so_there_is_one_message(name: str) -> None:
    def fate(job: LaneJob) -> EvalResult:
        return healthy_run(job) if job.config is None else EVALUATIONS[name]

    with pytest.raises(AllTrialsFailedError, match="none of the 3 candidates came to its end") as e:
        run_stage(make_stage(), fate)
    assert "evaluation" in str(e.value)


@pytest.mark.parametrize("trial", [BASE_TRIAL, BASE_SELECTION_TRIAL])
@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_untuned_base_with_such_a_loss_is_one_message(name: str, trial: int) -> None:
    def fate(job: LaneJob) -> EvalResult:
        return EVALUATIONS[name] if job.trial == trial else healthy_run(job)

    with pytest.raises(AllTrialsFailedError, match="untuned base cannot be evaluated: evaluation"):
        run_stage(make_stage(), fate)


@pytest.mark.parametrize("value", [*NOT_FINITE, 10**400, complex(1, 2), "0.9", None, np.nan])
def test_a_metric_of_such_a_value_has_a_reason_instead(value: Any) -> None:
    answers = [Answer("p", "r", "good"), Answer("p", "r", "bad")]

    def metric(prompt: str, reference: str, prediction: str) -> Any:
        return 0.5 if prediction == "good" else value

    found = score_answers("own", metric, answers)
    assert (found.values, found.mean) == ((), None)
    assert found.reason.startswith("row 2: ")


# 10: records and reports.


def spoiled_record(place: str, value: float) -> StudySnapshot:
    """Return a finished study with the number in one place of its records."""
    study = finished_study()
    assert study.confirmation is not None
    found, trial = study.confirmation, study.trials[0]
    first = trial.rungs[0]
    run = found.runs[0]
    assert run.evaluation is not None
    assert found.base_evaluation is not None

    def rung(**changes: Any) -> StudySnapshot:
        spoiled = replace(trial, rungs=(replace(first, **changes), *trial.rungs[1:]))
        return replace(study, trials=(spoiled, *study.trials[1:]))

    def confirmation(**changes: Any) -> StudySnapshot:
        return replace(study, confirmation=replace(found, **changes))

    def evaluation(good: EvalResult) -> EvalResult:
        return replace(good, loss_sums=(value, *good.loss_sums[1:]))

    measured = next(other for other in found.runs if other.metrics)
    metric = measured.metrics[0]
    spoiled_run = replace(measured, metrics=(replace(metric, values=(value, *metric.values[1:])),))
    makers: dict[str, Callable[[], StudySnapshot]] = {
        "a training loss": lambda: rung(points=(replace(first.points[0], train_loss=value),)),
        "a gradient norm": lambda: rung(points=(replace(first.points[0], grad_norm=value),)),
        "a rung's loss": lambda: rung(eval_loss=value),
        "a rung's row": lambda: rung(evaluation=evaluation(first.evaluation)),
        "a first loss": lambda: replace(
            study, trials=(trial, replace(study.trials[1], first_loss=value), *study.trials[2:])
        ),
        "a penalty": lambda: replace(
            study, trials=(trial, replace(study.trials[1], penalty=value), *study.trials[2:])
        ),
        "a run's row": lambda: confirmation(
            runs=(replace(run, evaluation=evaluation(run.evaluation)), *found.runs[1:])
        ),
        "a run's metric": lambda: confirmation(
            runs=tuple(spoiled_run if other is measured else other for other in found.runs)
        ),
        "the base's row": lambda: confirmation(base_evaluation=evaluation(found.base_evaluation)),
        "the base's selection loss": lambda: confirmation(base_selection_loss=value),
    }
    return makers[place]()


SHOWN = ("a training loss", "a gradient norm", "a first loss")
REFUSED = (
    "a rung's loss",
    "a rung's row",
    "a penalty",
    "a run's row",
    "a run's metric",
    "the base's row",
    "the base's selection loss",
)


def strict_json(text: str) -> Any:
    """Return JSON as a parser reads it that knows no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(("place", "value"), list(zip((*SHOWN, *REFUSED), cycle(NOT_FINITE))))
def test_a_report_is_whole_whatever_number_is_in_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, value: float
) -> None:
    study = spoiled_record(place, value)
    paths = write_reports(study, folder=tmp_path)
    print_report(study, open_console(), folder=tmp_path)
    shown = capsys.readouterr().out
    assert shown.startswith("Use trial ") or shown.startswith("No measurable difference")
    data = strict_json((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["problems"] == []
    assert len(data["charts"]) == sum(path.suffix == ".svg" for path in paths)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for block in page.split('type="application/json"')[1:]:
        strict_json(block.split(">", 1)[1].split("</script>")[0])
    csv = (tmp_path / "trials.csv").read_text(encoding="utf-8")
    assert len(csv.splitlines()) == 1 + len(study.trials)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", [*SHOWN, *REFUSED])
def test_the_recommendation_as_json_is_json(place: str, value: float) -> None:
    strict_json(json.dumps(best_json(spoiled_record(place, value)), allow_nan=False))


@pytest.mark.parametrize("value", [*NOT_FINITE, -5.0])
@pytest.mark.parametrize("place", REFUSED)
def test_a_record_says_where_it_holds_what_cannot_be_a_result(place: str, value: float) -> None:
    study = spoiled_record(place, value)
    assert study.confirmation is not None
    if place == "a run's metric" and math.isfinite(value):
        assert implausible_in(study.confirmation) == ""  # a metric may be below zero
        return
    records = (*study.trials, study.confirmation)
    [problem] = filter(None, map(implausible_in, records))
    assert f"{value:g}" in problem or "loss nan" in problem
    place_named = problem.split(": ")[0]
    assert place_named.split(".")[0] in {
        "rungs", "penalty", "runs", "base_evaluation", "base_selection_loss",
    }  # fmt: skip


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", SHOWN)
def test_training_readings_may_be_anything(place: str, value: float) -> None:
    study = spoiled_record(place, value)
    assert study.confirmation is not None
    assert not any(map(implausible_in, (*study.trials, study.confirmation)))


def test_records_of_healthy_studies_hold_no_such_number() -> None:
    for study in (
        finished_study(),
        confirmed_study({"trial 3": (2.3, None), "trial 5": (2.5, 2.4)}),
    ):
        assert study.confirmation is not None
        assert not any(map(implausible_in, (*study.trials, study.confirmation)))
