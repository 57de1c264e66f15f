"""The parts of a study, made from its inputs and its lock: executor, ladder, confirmation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lora_tune.data import row_clusters
from lora_tune.engine.base import BaseModel
from lora_tune.engine.memory_reading import MemoryMeter
from lora_tune.engine.pack import TrialPack
from lora_tune.executors.in_process import InProcessExecutor
from lora_tune.executors.scorer import MetricScorer
from lora_tune.metrics import Metric
from lora_tune.planning import Inputs, pack_settings
from lora_tune.records import (
    Candidate,
    StudyLock,
    TokenizedRow,
    TrialConfig,
    TrialState,
)
from lora_tune.redaction import redact
from lora_tune.search.anchors import folklore_default, is_folklore, plan_anchors
from lora_tune.search.confirmation import (
    DEFAULT_NAME,
    ConfirmationPlan,
    ConfirmationStage,
    candidate_of,
)
from lora_tune.search.gate import Gate, pack_plan_of
from lora_tune.search.ladder import Ladder, LadderPlan, num_counted
from lora_tune.search.plan import budget_hours, confirmation_dtype, planned_steps
from lora_tune.search.proposals import Proposer, proposal_window
from lora_tune.search.restoring import SearchRecord
from lora_tune.search.space import SearchSpace
from lora_tune.store.database import open_study
from lora_tune.store.folder import RUNS_FOLDER, StudyFolder
from lora_tune.study.spec import StudySpec


def make_executor(
    inputs: Inputs,
    lock: StudyLock,
    base: BaseModel,
    meter: MemoryMeter,
    train_rows: Sequence[TokenizedRow],
    metrics: Mapping[str, Metric],
    *,
    clock: Callable[[], float],
) -> InProcessExecutor:
    """Return an executor of the study's plan that trains on ``train_rows``, timed by the study's clock."""
    spec, scorer = inputs.spec, None
    if metrics:
        scorer = MetricScorer(
            base, inputs.tokenizer, metrics, max_new_tokens=spec.select.max_new_tokens
        )
    return InProcessExecutor(
        TrialPack(base, train_rows, pack_settings(spec, lock.plan)),
        {"selection": inputs.data.selection, "confirmation": inputs.data.confirmation},
        lanes=lock.plan.lanes,
        base_model=inputs.files.hub_id or redact(str(inputs.folder)),
        meter=meter,
        scorer=scorer,
        clock=clock,
        checkpoint_every=spec.run.checkpoint_every,
    )


def make_ladder(
    inputs: Inputs,
    lock: StudyLock,
    store: StudyFolder,
    gate: Gate,
    elapsed: Callable[[], float],
    *,
    note: Callable[[str], None],
) -> Ladder:
    """Return the ladder of a study, where the trials stored so far have left it."""
    spec, plan, sizes = inputs.spec, lock.plan, lock.study_plan
    assert sizes is not None
    space = SearchSpace(spec.space, lock.target_sets, seed=spec.study.seed)
    anchors, notes = plan_anchors(
        space,
        spec.search.anchors,
        effective_batch_size=spec.train.effective_batch_size,
        num_train=len(inputs.data.train),
    )
    records, lanes = store.load_trials(), plan.lanes * plan.workers
    for text in notes if not records else ():
        note(text)
    proposer = Proposer(
        open_study(
            store,
            lock,
            records,
            storage=spec.run.storage,
            differences=SearchRecord(spec, lock).differences,
            note=note,
        ),
        space,
        list(anchors[: sizes.num_trials]),
        sampler=spec.search.sampler,
        startup_trials=spec.search.startup_trials,
        seed=spec.study.seed,
    )

    def predict(config: TrialConfig) -> tuple[int, int]:
        return gate.predict(config, pack_plan_of(lock), lanes=plan.lanes)

    def out_of_time() -> bool:
        most_s = proposing_seconds(spec, lock, num_trials=num_counted(ladder.records.values()))
        return most_s is not None and elapsed() > most_s

    ladder = Ladder(
        LadderPlan(
            num_trials=sizes.num_trials,
            rungs=lock.rungs,
            warmup_steps=lock.warmup_steps,
            cooldown_ratio=spec.train.cooldown_ratio,
            window=proposal_window(lanes),
            budget_bytes=plan.budget_bytes,
            eval_rows=lock.eval_rows,
            practical_margin=spec.select.practical_margin,
            clusters=row_clusters(inputs.data.selection),
            half_step=spec.search.half_step,
        ),
        space,
        proposer,
        records=records,
        save=store.save_trial,
        predict=predict,
        trial_folder=store.trial_folder,
        out_of_time=out_of_time,
    )
    return ladder


def proposing_seconds(spec: StudySpec, lock: StudyLock, *, num_trials: int) -> float | None:
    """Return the seconds after which no trial is begun, so that what follows still fits the budget.

    The later rungs of the trials begun so far and the confirmation follow, at the speed of the forecast.

    Args:
        spec: The study, whose budget may have changed.
        lock: With the forecast; without one nothing is known of what follows.
        num_trials: Trials begun so far.
    """
    hours = budget_hours(spec, num_devices=lock.plan.num_devices)
    forecast = lock.forecast
    if hours is None:
        return None
    if forecast is None:
        return 3600 * hours
    search = planned_steps(
        lock.rungs, cooldown_ratio=spec.train.cooldown_ratio, num_trials=num_trials
    )
    later_share = (search - num_trials * lock.rungs[0]) / forecast.search_steps
    later_s = later_share * (forecast.search_s + forecast.evaluation_s)
    return 3600 * hours - later_s - forecast.confirmation_s


def make_stage(
    inputs: Inputs,
    lock: StudyLock,
    store: StudyFolder,
    gate: Gate,
    ladder: Ladder,
    *,
    note: Callable[[str], None],
) -> ConfirmationStage:
    """Return the confirmation of the search's finalists and of the default."""
    spec, sizes = inputs.spec, lock.study_plan
    assert sizes is not None
    finalists = ladder.finalists(sizes.finalists)
    if (sizes.finalists + 2) * sizes.seeds * sizes.total_steps > sizes.search_steps:
        finalists = finalists[: sizes.finalists]  # one tied with the last would cost too much
    candidates = [_alone(candidate_of(record), gate, lock) for record in finalists]
    default = _default_candidate(inputs, lock, gate, ladder)
    if default is None:
        note(
            "there is no default to compare with: the model has no q and v layers, or they do not fit."
        )
    elif default.name not in [candidate.name for candidate in candidates]:
        candidates.append(default)
    return ConfirmationStage(
        ConfirmationPlan(
            seeds=sizes.seeds,
            study_seed=spec.study.seed,
            warmup_steps=lock.warmup_steps,
            cooldown_ratio=spec.train.cooldown_ratio,
            practical_margin=spec.select.practical_margin,
            eval_dtype=confirmation_dtype(spec, inputs.device),
            folder=store.path / RUNS_FOLDER,
            base_parameters=lock.model.num_parameters,
            selection_rows=lock.eval_rows[-1] if lock.eval_rows else None,
            clusters=row_clusters(inputs.data.confirmation),
            metrics=spec.select.metrics,
        ),
        candidates,
        default=default.name if default is not None else None,
        earlier=store.load_confirmation(),
        save=store.save_confirmation,
    )


def _default_candidate(
    inputs: Inputs, lock: StudyLock, gate: Gate, ladder: Ladder
) -> Candidate | None:
    """Return the folklore default: the trial that has its configuration, or one outside the space.

    It trains a full run; where the space chooses between epochs, those of ``train.epochs``.
    """
    spec, steps = inputs.spec, lock.rungs[-1]
    if spec.space.epochs is not None:
        steps = min(steps, round(steps * spec.train.epochs / max(spec.space.epochs)))

    def fits(config: TrialConfig) -> bool:
        return gate.predict(config, pack_plan_of(lock), lanes=1)[0] <= lock.plan.budget_bytes

    config = folklore_default(
        model_type=inputs.shape.model_type,
        linears=inputs.shape.linear_names,
        seed=spec.study.seed,
        fits=fits,
    )
    if config is None:
        return None
    for record in sorted(ladder.records.values(), key=lambda record: record.number):
        if is_folklore(record.config, rank=config.rank) and record.state is not TrialState.CACHED:
            finished = record.state is TrialState.COMPLETE
            return _alone(candidate_of(record, steps=None if finished else steps), gate, lock)
    outside = Candidate(
        name=DEFAULT_NAME,
        trial=None,
        config=config,
        steps=steps,
        predicted_bytes=0,
        trainable_parameters=0,
    )
    return _alone(outside, gate, lock)


def _alone(candidate: Candidate, gate: Gate, lock: StudyLock) -> Candidate:
    """Return the candidate with the estimate of a lone lane of it: what its adapter takes to train."""
    peak, parameters = gate.predict(candidate.config, pack_plan_of(lock), lanes=1)
    return replace(candidate, predicted_bytes=peak, trainable_parameters=parameters)
