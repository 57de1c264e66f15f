"""The study: ladder asks, executor trains, store remembers. The only place where they meet.

The same command begins a study, goes on with one that was interrupted, and leaves a finished one alone.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lora_tune import signals
from lora_tune.assembly import (
    make_ladder,
    make_stage,
    proposing_seconds,
)
from lora_tune.data import row_clusters
from lora_tune.engine.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_tune.engine.base import quiet_transformers
from lora_tune.engine.memory_reading import MemoryMeter, open_meter
from lora_tune.errors import DatabaseAwayError, DataError, StoreError, StudyFileError, Terminated
from lora_tune.executors.behaviour import BehaviourPlan, Subject, subjects_of
from lora_tune.executors.interface import Executor
from lora_tune.executors.process import WorkerLostError
from lora_tune.executors.scorer import check_prompts
from lora_tune.files import (
    is_complete,
    naming_full_disk,
    publish_folder,
    published_digests,
)
from lora_tune.metrics import resolve_metrics
from lora_tune.planning import (
    Inputs,
    make_gate,
    plan_again,
    read_inputs,
    spec_hash,
)
from lora_tune.records import (
    Behaviour,
    Confirmation,
    LaneJob,
    LaneOutcome,
    LaneReading,
    ProgressState,
    StudyLock,
    StudySnapshot,
    TrialConfig,
    TrialState,
)
from lora_tune.redaction import redact, same_when_masked
from lora_tune.report import model_card, write_reports
from lora_tune.report.events import View
from lora_tune.search.calibrator import Calibrator
from lora_tune.search.confirmation import ConfirmationStage, chosen_folder
from lora_tune.search.disk import check_study_room
from lora_tune.search.gate import pack_plan_of
from lora_tune.search.ladder import Ladder, num_counted
from lora_tune.search.plan import SplitSizes, refit_steps
from lora_tune.search.restoring import SearchRecord
from lora_tune.stats.evaluation_power import evaluation_power
from lora_tune.store.database import check_database
from lora_tune.store.folder import (
    ADAPTER_FOLDER,
    CONFIRMATION_FILE,
    LOG_FOLDER,
    RUNS_FOLDER,
    StudyFolder,
)
from lora_tune.study.choices import toml_literal
from lora_tune.study.loader import notes_on_credentials
from lora_tune.study.spec import StudySpec
from lora_tune.trackers import Trackers, check_trackers, open_trackers
from lora_tune.worker import Crew, HowTheyWrite, StudyClock, StudyTask, without_tokens

# Keys that may change between runs of one study: a budget is a total, and no tracker changes a number.
CHANGEABLE = (
    ("search", "trials"),
    ("search", "max_hours"),
    ("search", "max_gpu_hours"),
    ("run", "trackers"),
    ("run", "executor"),
    ("run", "workers"),
    ("run", "checkpoint_every"),
)


class _RedactedView:
    """Passes on what the tuner tells, without what looks like a credential."""

    def __init__(self, view: View) -> None:
        self._view = view

    def update(self, state: ProgressState) -> None:
        self._view.update(state)

    def note(self, text: str) -> None:
        self._view.note(redact(text))


def run_study(
    spec: StudySpec,
    *,
    study_file: Path,
    command: str,
    view: View,
    meter_of: Callable[[str], MemoryMeter] = open_meter,
    allow_code: bool = False,
) -> StudySnapshot:
    """Run a study to its end, or go on with one; return what its folder then holds.

    Args:
        spec: The validated study file.
        study_file: Where it is; paths in it are relative to its folder.
        command: The command line that runs it, for the record.
        view: Is told how it goes.
        meter_of: Opens the meter of a device, before the base is loaded.
        allow_code: Whether metrics may be functions of the user's own modules.

    Raises:
        LoraTuneError: With one message; nothing of the study is lost.
    """
    quiet_transformers()
    check_trackers(spec.run.trackers)
    began_s = time.monotonic()
    store = StudyFolder(Path(spec.study.output) / spec.study.name)
    view = _RedactedView(view)
    if (begun := store.load_lock()) is not None:
        _check_unchanged(spec, begun)
    with ExitStack() as closing_all:
        closing_all.enter_context(signals.deferred())
        closing_all.enter_context(naming_full_disk(store.path))
        # It starts while the inputs are read: importing torch and its like takes longer than that.
        crew = Crew(spec, log_folder=store.path / LOG_FOLDER, note=view.note)
        closing_all.callback(crew.close)
        with signals.at_once():
            inputs = _read_study(spec, study_file, begun, view, allow_code=allow_code)
        closing_all.enter_context(store.owned())
        closing_all.callback(crew.close)  # before the study is given back
        for text in store.tidy():
            view.note(text)
        lock = _earlier_lock(inputs, store, workers=crew.num_workers)
        if lock is not None and _is_finished(store, lock, inputs.spec):
            _tell_again(inputs.spec, lock, store, view)
            return store.snapshot()
        check_database(
            store,
            name=spec.study.name,
            storage=spec.run.storage,
            differences=SearchRecord(spec, lock).differences if lock is not None else None,
        )
        if lock is not None:
            _reopen(store)
        clock = StudyClock(_seconds_before(store), began_s)
        task = StudyTask(
            inputs=inputs,
            lock=lock,
            command=command,
            study_file=study_file,
            clock=clock,
            workers=crew.num_workers,
            allow_code=allow_code,
            meter_of=meter_of,
        )
        lock = crew.open(task)
        check_study_room(store.path, inputs.spec, lock)
        if task.lock is None:
            store.save_lock(lock)
            store.save_study_file(study_file.read_text(encoding="utf-8"))
        assert crew.executor is not None
        study = _Study(
            inputs=without_tokens(inputs),
            lock=lock,
            store=store,
            executor=crew.executor,
            elapsed=clock,
            view=view,
            trackers=_trackers_of(inputs.spec, lock, store, view),
        )
        del inputs, task  # the rows are with the workers
        with closing(study.trackers):  # last: it may wait for a network
            try:
                _search_and_confirm(study)
            except BaseException as error:
                store.save_runtime(clock())
                # who stops a study does not wait for its plots
                if not isinstance(error, (KeyboardInterrupt, Terminated)):
                    write_reports(store.snapshot())
                raise
            crew.close()
            store.tidy()  # what workers that were killed had begun to write
            store.save_runtime(clock())
            write_reports(store.snapshot())
        return store.snapshot()


def _read_study(
    spec: StudySpec, study_file: Path, lock: StudyLock | None, view: View, *, allow_code: bool
) -> Inputs:
    """Return what the study file names, read and checked."""
    for note in notes_on_credentials(spec, study_file):
        view.note(note)
    folder = study_file.parent
    metrics = resolve_metrics(spec.select.metrics, allow_code=allow_code, base_dir=folder)
    inputs = read_inputs(spec, base_dir=folder, lock=lock)
    if metrics:
        check_prompts(inputs.data.confirmation)
    for note in inputs.notes:
        view.note(note)
    return inputs


def _earlier_lock(inputs: Inputs, store: StudyFolder, *, workers: int) -> StudyLock | None:
    """Return the lock of a study that has begun, with the budget and the workers of now on record."""
    lock = store.load_lock()
    if lock is None:
        return None
    _check_same_rows(inputs, lock)
    lock = replace(lock, plan=replace(lock.plan, workers=workers))
    lock = _with_budget(inputs, lock)
    store.save_lock(lock)
    return lock


def _tell_again(spec: StudySpec, lock: StudyLock, store: StudyFolder, view: View) -> None:
    """Write the reports of a finished study, and what its trackers do not have: one may be new."""
    write_reports(store.snapshot())
    with closing(_trackers_of(spec, lock, store, view)) as trackers:
        trackers.catch_up(store.load_trials(), store.load_confirmation())


def _trackers_of(spec: StudySpec, lock: StudyLock, store: StudyFolder, view: View) -> Trackers:
    return open_trackers(
        spec.run.trackers,
        lock,
        store.path,
        cooldown_ratio=spec.train.cooldown_ratio,
        note=view.note,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Study:
    """A study that has been begun: what its stages have in common."""

    inputs: Inputs  # of the rows only what they belong to
    lock: StudyLock
    store: StudyFolder
    executor: Executor
    elapsed: Callable[[], float]
    view: View
    trackers: Trackers


def _search_and_confirm(study: _Study) -> None:
    inputs, lock, store, view = study.inputs, study.lock, study.store, study.view
    plan, executor = lock.plan, study.executor
    gate = make_gate(inputs, plan.compute_dtype, plan.budget_bytes, group_rank=plan.group_rank)
    ladder = make_ladder(inputs, lock, store, gate, study.elapsed, note=view.note)
    progress = _Progress(study, ladder, executor)
    executor.on_step = progress.show_and_go_on
    calibrator = Calibrator(
        gate, pack_plan_of(lock), lock, log=store.load_memory(), config_of=progress.config_of
    )
    executor.max_lanes = calibrator.lanes

    def told() -> None:
        if peaks := executor.take_pack_peaks():
            if text := calibrator.add(peaks):
                view.note(text)
            store.save_memory(calibrator.log)
            executor.max_lanes = min(executor.max_lanes, calibrator.lanes)
        store.save_runtime(study.elapsed())  # a budget counts what a killed run has spent
        progress.show()

    def track_trial(outcome: LaneOutcome) -> None:
        study.trackers.trial_ended(ladder.records[outcome.trial], outcome)

    study.trackers.catch_up(ladder.records.values(), store.load_confirmation())
    train(ladder, executor, told=told, track=track_trial)
    _note_power(study, ladder)
    progress.stage = stage = make_stage(inputs, lock, store, gate, ladder, note=view.note)
    study.trackers.catch_up(ladder.records.values(), stage.confirmation)

    def track_run(outcome: LaneOutcome) -> None:
        study.trackers.confirmation_ended(stage.confirmation, outcome)

    train(stage, executor, told=told, track=track_run)
    if inputs.spec.select.refit == "all-rows" and not stage.confirmation.refit:
        _refit(study, stage)
    if inputs.spec.select.samples:
        _observe_behaviour(study, stage.confirmation)
    _publish_adapter(study, stage)


class _Source(Protocol):
    """What asks for jobs: the ladder, then the confirmation."""

    def next_jobs(self, count: int) -> list[LaneJob]:
        """Return up to ``count`` jobs to do now."""
        ...

    def take(self, outcome: LaneOutcome) -> object:
        """Record how a job ended."""
        ...


def train(
    source: _Source,
    executor: Executor,
    *,
    told: Callable[[], None],
    track: Callable[[LaneOutcome], None],
) -> None:
    """Train what is asked for until nothing more is; ``track`` is shown every outcome on record.

    Whatever ends it early, the lanes that train are saved, and what has come to its end is recorded.
    """
    ended: list[LaneOutcome] = []
    try:
        while True:
            for job in source.next_jobs(executor.free_slots):
                executor.submit(job)
            if not executor.busy:
                return
            ended = executor.wait()
            while ended:
                outcome = ended.pop(0)
                source.take(outcome)
                track(outcome)
            told()
            signals.check()
    except BaseException:
        executor.save_states()
        for outcome in (*ended, *executor.ended()):
            # Its record is there by then, and it is told when the study goes on.
            with suppress(DatabaseAwayError):
                source.take(outcome)
        raise


def _seconds_before(store: StudyFolder) -> float:
    """Return the seconds of earlier runs: at least until the end of the last segment that was recorded.

    A process that was killed between a record and its own time would else have begun anew before it.
    """
    confirmation, trials = store.load_confirmation(), store.load_trials()
    spans = [result.span for trial in trials for result in trial.rungs]
    spans += [trial.span for trial in trials]
    spans += [run.span for run in confirmation.runs] if confirmation is not None else []
    return max([store.load_runtime(), *(span.ended_s for span in spans if span is not None)])


def _is_finished(store: StudyFolder, lock: StudyLock, spec: StudySpec) -> bool:
    """Return whether nothing is left to do: no trial to begin or go on with, the winner published."""
    trials, confirmation = store.load_trials(), store.load_confirmation()
    most_s = proposing_seconds(spec, lock, num_trials=num_counted(trials))
    out_of_time = most_s is not None and store.load_runtime() > most_s
    return (
        confirmation is not None
        and confirmation.decision is not None
        and _is_published(store, confirmation)
        and lock.study_plan is not None
        and (out_of_time or num_counted(trials) >= lock.study_plan.num_trials)
        and all(trial.state is not TrialState.RUNNING for trial in trials)
    )


def _is_published(store: StudyFolder, confirmation: Confirmation) -> bool:
    """Return whether the study's adapter is there, and the one that was decided for."""
    shipped = published_digests(store.path / ADAPTER_FOLDER) or {}
    source = published_digests(chosen_folder(store.path / RUNS_FOLDER, confirmation)) or shipped
    there = (store.path / ADAPTER_FOLDER / WEIGHTS_FILE).is_file()
    return there and shipped.get(WEIGHTS_FILE) == source.get(WEIGHTS_FILE)


def _reopen(store: StudyFolder) -> None:
    """Take back the decision, which is made again when the search has come to its new end.

    Otherwise a process killed before that would leave a study that looks finished.
    """
    confirmation = store.load_confirmation()
    if confirmation is not None and confirmation.decision is not None:
        store.save_confirmation(replace(confirmation, decision=None))


def _note_power(study: _Study, ladder: Ladder) -> None:
    """Say how fine a difference the first rung's rows could tell, as measured on its trials."""
    scored = [
        record.rungs[0].evaluation
        for record in ladder.records.values()
        if record.rungs and record.state is not TrialState.CACHED
    ]
    if not scored:
        return
    margin, loss = study.inputs.spec.select.practical_margin, min(e.mean_loss for e in scored)
    power = evaluation_power(
        scored, wanted=margin * loss, clusters=row_clusters(study.inputs.data.selection)
    )
    if power is None:
        return
    text = (
        f"the {power.num_rows} selection rows of rung 0 tell trials apart that differ by "
        f"{power.smallest_visible:.3f} nats per token ({power.smallest_visible / loss:.1%}) or more"
    )
    if power.rows_needed is not None:
        text += f"; for the practical margin of {margin:.1%} it would take {power.rows_needed:,}"
    study.view.note(f"{text}.")


def _refit(study: _Study, stage: ConfirmationStage) -> None:
    """Train the chosen configuration once more, on the rows of all three splits."""
    inputs, data = study.inputs, study.inputs.data
    sizes = SplitSizes.of(data)
    num_rows = sizes.train + sizes.selection + sizes.confirmation
    steps = refit_steps(inputs.spec, stage.chosen.steps, sizes)
    study.view.note(
        f"training {stage.chosen.name} once more on all {num_rows} rows, {steps} steps."
    )
    refit = _Refit(stage.refit_job(steps=steps))
    train(refit, study.executor, told=lambda: None, track=lambda outcome: None)
    outcome = refit.outcome
    assert outcome is not None
    if outcome.evaluation is None:
        study.view.note(
            f"it did not come to its end ({outcome.reason}): the scored adapter is kept."
        )
        return
    stage.mark_refit()


class _Refit:
    """Asks for the one job of the refit."""

    def __init__(self, job: LaneJob) -> None:
        self.job: LaneJob | None = job
        self.outcome: LaneOutcome | None = None

    def next_jobs(self, count: int) -> list[LaneJob]:
        """Return the job, once."""
        jobs, self.job = [self.job] if self.job is not None else [], None
        return jobs

    def take(self, outcome: LaneOutcome) -> None:
        """Keep how it ended."""
        self.outcome = outcome


def _observe_behaviour(study: _Study, confirmation: Confirmation) -> None:
    """Store how the chosen adapter writes beside the base and the default's, unless that is known."""
    inputs, store, decision = study.inputs, study.store, confirmation.decision
    assert decision is not None
    subjects = subjects_of(confirmation, store.path / RUNS_FOLDER)
    default = next((s.name for s in subjects if s.name == confirmation.default), None)
    if _is_behaviour_of(store.load_behaviour(), subjects, decision.chosen, default):
        return
    plan = BehaviourPlan(
        num_samples=inputs.spec.select.samples,
        max_length=inputs.spec.data.max_length,
        seed=inputs.spec.study.seed,
    )
    names = ", ".join(subject.name for subject in subjects)
    study.view.note(f"answers to held-out prompts, and loss on a general text, of {names} ...")
    began = study.elapsed()
    question = HowTheyWrite(subjects=subjects, chosen=decision.chosen, default=default, plan=plan)
    try:
        found = study.executor.answer(question)
    except WorkerLostError as error:
        found = question.unanswered(str(error))
    assert isinstance(found, Behaviour)
    store.save_behaviour(found)
    store.save_runtime(study.elapsed())
    took = f"that took {study.elapsed() - began:.0f} s"
    study.view.note(
        f"{took}; something is missing: {found.reason}." if found.reason else f"{took}."
    )


def _is_behaviour_of(
    found: Behaviour | None, subjects: tuple[Subject, ...], chosen: str, default: str | None
) -> bool:
    """Return whether these answers are of the same adapters: another seed of a candidate is another one."""
    if found is None:
        return False
    seeds: dict[str | None, int | None] = {subject.name: subject.seed for subject in subjects}
    known = (found.chosen, found.chosen_seed, found.default, found.default_seed)
    return known == (chosen, seeds[chosen], default, seeds.get(default))


def _publish_adapter(study: _Study, stage: ConfirmationStage) -> None:
    """Put the recommended adapter and its model card into the study's ``adapter`` folder."""
    store = study.store
    if not is_complete(stage.chosen_folder):
        raise StoreError(
            f"{stage.chosen_folder}: missing or damaged (its files do not match manifest.json), so the "
            f"adapter cannot be published. Bring the folder back, or delete {store.path / CONFIRMATION_FILE} "
            "and run the same command again: the finalists are trained once more."
        )
    card = model_card(store.snapshot(), base_model=study.lock.model.hub_id)
    with publish_folder(store.path / ADAPTER_FOLDER) as folder:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copyfile(stage.chosen_folder / name, folder / name)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _check_unchanged(spec: StudySpec, lock: StudyLock) -> None:
    """Refuse to go on with other settings than the study began with."""
    before, now = _flat(lock.spec), _flat(spec.model_dump(mode="json"))
    changed = [
        key
        for key in now
        if not same_when_masked(before.get(key, now[key]), now[key]) and key not in CHANGEABLE
    ]
    if changed:
        lines = [
            f"  {'.'.join(k)}: was {_toml(before.get(k))}, is {_toml(now[k])}" for k in changed
        ]
        raise StudyFileError(
            f"the study file differs from the one that {lock.name} began with:\n"
            + "\n".join(lines)
            + f"\nOnly {', '.join('.'.join(key) for key in CHANGEABLE)} may change. "
            "Change it back, or give the study another name (study.name)."
        )


def _toml(value: object) -> str:
    return "not given" if value is None else toml_literal(value)


def _check_same_rows(inputs: Inputs, lock: StudyLock) -> None:
    if inputs.data.fingerprint.sha256 != lock.data.sha256:
        raise DataError(
            f"{inputs.spec.data.train}: the rows differ from those that {lock.name} began with. Bring them "
            "back, or give the study another name (study.name). If nobody changed them: this version keeps "
            "rows that look alike in one split, so begin the study anew."
        )


def _with_budget(inputs: Inputs, lock: StudyLock) -> StudyLock:
    """Return the lock with a budget that may have changed, which belongs to the record."""
    spec = inputs.spec
    lock = replace(lock, spec=spec.model_dump(mode="json"), spec_sha256=spec_hash(spec))
    return plan_again(inputs, lock)


def _flat(values: dict[str, object]) -> dict[tuple[str, str], object]:
    return {
        (section, key): value
        for section, keys in values.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }


class _Progress:
    """Gathers what the live view shows."""

    def __init__(self, study: _Study, ladder: Ladder, executor: Executor) -> None:
        self.study, self.ladder, self.executor = study, ladder, executor
        self.stage: ConfirmationStage | None = None  # None while the search goes on
        self.began_s = study.elapsed()
        self.steps_before: float | None = None

    def config_of(self, trial: int) -> TrialConfig:
        """Return what a lane trains, by the number of its job."""
        if self.stage is not None and trial < 0:
            return self.stage.config_of(trial)
        return self.ladder.records[trial].config

    def show_and_go_on(self) -> None:
        """Tell the view where the study is, unless a signal came that ends it."""
        signals.check()
        self.show()

    def show(self) -> None:
        """Tell the view where the study is."""
        states: dict[str, int] = {}
        for record in self.ladder.records.values():
            states[str(record.state)] = states.get(str(record.state), 0) + 1
        best = self.ladder.best
        spent = self.study.elapsed() - self.began_s
        lanes = self.executor.readings()
        self.study.view.update(
            ProgressState(
                phase=self._phase(lanes),
                trials_done=sum(1 for r in self.ladder.records.values() if r.rungs or r.reason),
                trials_total=self.ladder.plan.num_trials,
                states=states,
                lanes=lanes,
                best_trial=best.number if best else None,
                best_loss=best.best_loss if best else None,
                tokens_per_s=self.executor.num_tokens / spent if spent else 0.0,
                memory_bytes=self.executor.memory_bytes(),
                budget_bytes=self.study.lock.plan.budget_bytes,
                elapsed_s=self.study.elapsed(),
                left_s=self._left_s(lanes, spent),
                runs_done=len(self.stage.confirmation.runs) if self.stage is not None else 0,
                runs_total=self.stage.num_runs if self.stage is not None else 0,
                names=self._names(lanes),
            )
        )

    def _names(self, lanes: tuple[LaneReading, ...]) -> tuple[tuple[int, str], ...]:
        if self.stage is None:
            return ()
        return tuple((lane.trial, self.stage.name_of(lane.trial)) for lane in lanes)

    def _phase(self, lanes: tuple[LaneReading, ...]) -> str:
        if self.stage is not None:
            return "confirmation"
        return f"rung {max(lane.rung for lane in lanes)}" if lanes else "search"

    def _left_s(self, lanes: tuple[LaneReading, ...], spent: float) -> float | None:
        """Return the seconds left if optimizer steps go on as fast as those of this run so far."""
        finished, planned = self.ladder.finished_steps(), self.ladder.planned_steps()
        if self.stage is not None:
            planned = finished + self.stage.planned_steps()
            finished += self.stage.finished_steps()
            running = sum(lane.step for lane in lanes)
        else:
            sizes = self.study.lock.study_plan
            planned += sizes.confirmation_steps if sizes is not None else 0
            running = sum(max(0, lane.step - self.ladder.start_step(lane.rung)) for lane in lanes)
        if self.steps_before is None:
            self.steps_before = finished
        done = finished + running - self.steps_before
        return spent / done * max(0, planned - finished - running) if done > 0 else None
