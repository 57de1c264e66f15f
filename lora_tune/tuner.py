"""The study: ladder asks, executor trains, store remembers. The only place where they meet.

The same command begins a study, goes on with one that was interrupted, and leaves a finished one alone.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from lora_tune.engine.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_tune.engine.base import BaseModel, quiet_transformers
from lora_tune.engine.memory_reading import MemoryMeter, open_meter
from lora_tune.engine.pack import TrialPack
from lora_tune.errors import AllTrialsFailedError, DataError, StudyFileError
from lora_tune.executors.in_process import InProcessExecutor
from lora_tune.executors.interface import Executor
from lora_tune.files import publish_folder, write_text
from lora_tune.planning import (
    Inputs,
    draft_plan,
    load_base,
    make_gate,
    make_lock,
    pack_settings,
    read_inputs,
    spec_hash,
)
from lora_tune.records import (
    Confirmation,
    LaneJob,
    ProgressState,
    StudyLock,
    StudySnapshot,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.report import model_card, write_reports
from lora_tune.search.anchors import make_anchors
from lora_tune.search.calibrator import Calibrator
from lora_tune.search.gate import Gate, PackPlan
from lora_tune.search.ladder import Ladder, LadderPlan
from lora_tune.search.proposals import Proposer
from lora_tune.search.space import SearchSpace
from lora_tune.store.database import open_optuna_study
from lora_tune.store.folder import DATABASE, STUDY_FILE, StudyFolder
from lora_tune.study.spec import StudySpec
from lora_tune.units import format_bytes

BASE_TRIAL = -1  # the untuned base, where a trial's number is asked for
ADAPTER_FOLDER = "adapter"
# Keys that may change between runs of one study: a budget is a total.
CHANGEABLE = (("search", "trials"), ("search", "max_hours"))


class View(Protocol):
    """What the tuner tells while it works; ``report.ProgressView`` is one."""

    def update(self, state: ProgressState) -> None:
        """Show where the study is."""
        ...

    def note(self, text: str) -> None:
        """Say a sentence."""
        ...


def run_study(
    spec: StudySpec,
    *,
    study_file: Path,
    command: str,
    view: View,
    meter_of: Callable[[str], MemoryMeter] = open_meter,
) -> StudySnapshot:
    """Run a study to its end, or go on with one; return what its folder then holds.

    Args:
        spec: The validated study file.
        study_file: Where it is; paths in it are relative to its folder.
        command: The command line that runs it, for the record.
        view: Is told how it goes.
        meter_of: Opens the meter of a device, before the base is loaded.

    Raises:
        LoraTuneError: With one message; nothing of the study is lost.
    """
    quiet_transformers()
    began = time.monotonic()
    store = StudyFolder(Path(spec.study.output) / spec.study.name)
    lock = store.load_lock()
    if lock is not None:
        _check_unchanged(spec, lock)
    inputs = read_inputs(spec, base_dir=study_file.parent, lock=lock)
    for note in inputs.notes:
        view.note(note)
    with store.owned():
        lock = store.load_lock()
        if lock is not None:
            _check_same_rows(inputs, lock)
            if _is_finished(store, spec):
                return store.snapshot()
            # a raised budget belongs to the record
            lock = replace(lock, spec=spec.model_dump(mode="json"), spec_sha256=spec_hash(spec))
            store.save_lock(lock)
        meter, draft = meter_of(inputs.device), None
        if lock is None:
            draft = draft_plan(inputs, free_bytes=meter.free_bytes)
            for note in draft.notes:
                view.note(note)
        earlier_s = store.load_runtime()

        def elapsed() -> float:
            return earlier_s + time.monotonic() - began

        base = load_base(inputs, lock)
        if lock is None:
            assert draft is not None
            lock = make_lock(
                inputs, base, draft, command=command, study_file=study_file, note=view.note
            )
            store.save_lock(lock)
            write_text(store.path / STUDY_FILE, study_file.read_text(encoding="utf-8"))
        _note_less_memory(meter, lock, view)
        try:
            _search_and_confirm(inputs, lock, base, store, meter, elapsed, view)
        finally:
            store.save_runtime(elapsed())
            write_reports(store.snapshot())
        return store.snapshot()


def _search_and_confirm(
    inputs: Inputs,
    lock: StudyLock,
    base: BaseModel,
    store: StudyFolder,
    meter: MemoryMeter,
    elapsed: Callable[[], float],
    view: View,
) -> None:
    spec, plan = inputs.spec, lock.plan
    base.set_gradient_checkpointing(plan.gradient_checkpointing)
    executor = InProcessExecutor(
        TrialPack(base, inputs.data.train, pack_settings(spec, plan)),
        {"selection": inputs.data.selection, "confirmation": inputs.data.confirmation},
        lanes=plan.lanes,
        base_model=inputs.files.hub_id or str(inputs.folder),
        meter=meter,
    )
    gate = make_gate(inputs, plan.compute_dtype, plan.budget_bytes, group_rank=plan.group_rank)
    ladder = _make_ladder(inputs, lock, store, gate, elapsed)
    calibrator = Calibrator(
        gate,
        _pack_plan(lock),
        lock,
        log=store.load_memory(),
        config_of=lambda trial: ladder.records[trial].config,
    )
    executor.max_lanes = calibrator.lanes
    progress = _Progress(ladder, executor, lock, elapsed, view)
    executor.on_step = progress.show

    def told() -> None:
        if peaks := executor.take_pack_peaks():
            if note := calibrator.add(peaks):
                view.note(note)
            store.save_memory(calibrator.log)
            executor.max_lanes = min(executor.max_lanes, calibrator.lanes)
        progress.show()

    search(ladder, executor, told=told)
    winner = ladder.select_winner(practical_margin=spec.select.practical_margin)
    confirmation = store.load_confirmation()
    if confirmation is None or confirmation.winner != winner.number:
        progress.phase = "confirmation"
        progress.show()
        confirmation = confirm(winner, executor, lock, store, dtype=_confirmation_dtype(inputs))
        store.save_confirmation(confirmation)
    store.save_runtime(elapsed())
    _publish_adapter(store, winner, lock)


def _is_finished(store: StudyFolder, spec: StudySpec) -> bool:
    """Return whether there is nothing left to do: all trials ended, the winner confirmed and published."""
    trials = store.load_trials()
    return (
        store.load_confirmation() is not None
        and (store.path / ADAPTER_FOLDER / WEIGHTS_FILE).is_file()
        and len(trials) >= spec.search.trials
        and all(trial.state is not TrialState.RUNNING for trial in trials)
    )


def search(ladder: Ladder, executor: Executor, *, told: Callable[[], None]) -> None:
    """Train what the ladder asks for until it asks for nothing more."""
    while True:
        for job in ladder.next_jobs(executor.free_slots):
            executor.submit(job)
        if not executor.busy:
            return
        for outcome in executor.wait():
            ladder.take(outcome)
        told()


def confirm(
    winner: TrialRecord, executor: Executor, lock: StudyLock, store: StudyFolder, *, dtype: str
) -> Confirmation:
    """Score the winner and the untuned base on the split that the search never saw.

    Raises:
        AllTrialsFailedError: A score is not finite.
    """
    steps, rung = winner.steps, len(lock.rungs) - 1
    adapter = LaneJob(
        trial=winner.number,
        rung=rung,
        config=winner.config,
        start_step=steps,
        hold_step=steps,
        end_step=steps,
        warmup_steps=0,
        eval_split="confirmation",
        eval_dtype=dtype,
        start_folder=store.trial_folder(winner.number) / f"rung-{rung}",
        result_folder=None,
    )
    untuned = replace(adapter, trial=BASE_TRIAL, config=None, start_folder=None)
    seen = len(winner.rungs[-1].evaluation.label_counts)  # selection rows behind the winner's loss
    selection = replace(untuned, eval_split="selection", eval_dtype="train", eval_rows=seen)
    jobs = [adapter, untuned, selection]
    results = []
    for job in jobs:  # one by one: they must fit wherever a single lane does
        executor.submit(job)
        [outcome] = executor.wait()
        if outcome.evaluation is None:
            raise AllTrialsFailedError(f"confirmation of trial {winner.number}: {outcome.reason}")
        results.append(outcome.evaluation)
    return Confirmation(
        winner=winner.number,
        winner_evaluation=results[0],
        base_evaluation=results[1],
        base_selection_loss=results[2].mean_loss,
    )


def _pack_plan(lock: StudyLock) -> PackPlan:
    return PackPlan(
        micro_batch_size=lock.plan.micro_batch_size,
        gradient_checkpointing=lock.plan.gradient_checkpointing,
        most_lanes=lock.plan.lanes,
    )


def _make_ladder(
    inputs: Inputs, lock: StudyLock, store: StudyFolder, gate: Gate, elapsed: Callable[[], float]
) -> Ladder:
    spec, plan = inputs.spec, lock.plan
    space = SearchSpace(spec.space, lock.target_sets, seed=spec.study.seed)
    anchors = []
    if spec.search.anchors:
        anchors = make_anchors(
            space,
            effective_batch_size=spec.train.effective_batch_size,
            num_train=len(inputs.data.train),
        )
    records = store.load_trials()
    proposer = Proposer(
        open_optuna_study(store.path / DATABASE, name=lock.name, num_records=len(records)),
        space,
        anchors[: spec.search.trials],
        sampler=spec.search.sampler,
        startup_trials=spec.search.startup_trials,
        seed=spec.study.seed,
    )

    def predict(config: TrialConfig) -> tuple[int, int]:
        return gate.predict(config, _pack_plan(lock), lanes=plan.lanes)

    def out_of_time() -> bool:
        hours = spec.search.max_hours
        return hours is not None and elapsed() > 3600 * hours

    return Ladder(
        LadderPlan(
            num_trials=spec.search.trials,
            rungs=lock.rungs,
            warmup_steps=lock.warmup_steps,
            cooldown_ratio=spec.train.cooldown_ratio,
            window=plan.lanes,
            budget_bytes=plan.budget_bytes,
            eval_rows=lock.eval_rows,
        ),
        space,
        proposer,
        records=records,
        save=store.save_trial,
        predict=predict,
        trial_folder=store.trial_folder,
        out_of_time=out_of_time,
    )


def _publish_adapter(store: StudyFolder, winner: TrialRecord, lock: StudyLock) -> None:
    """Put the winner's adapter and its model card into the study's ``adapter`` folder."""
    trained = store.trial_folder(winner.number) / f"rung-{len(lock.rungs) - 1}"
    card = model_card(store.snapshot(), base_model=lock.model.hub_id)
    with publish_folder(store.path / ADAPTER_FOLDER) as folder:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copyfile(trained / name, folder / name)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _note_less_memory(meter: MemoryMeter, lock: StudyLock, view: View) -> None:
    """Say that a plan, made earlier or for another GPU, may use more than is free now."""
    if meter.peaks() is not None and meter.free_bytes < lock.plan.budget_bytes:
        view.note(
            f"{format_bytes(meter.free_bytes)} of the {meter.device_name} are free, the plan may use "
            f"{format_bytes(lock.plan.budget_bytes)}: a pack that runs out of memory is halved."
        )


def _check_unchanged(spec: StudySpec, lock: StudyLock) -> None:
    """Refuse to go on with other settings than the study began with."""
    before, now = _flat(lock.spec), _flat(spec.model_dump(mode="json"))
    changed = [key for key in now if now[key] != before.get(key) and key not in CHANGEABLE]
    if changed:
        lines = [f"  {'.'.join(k)}: was {before.get(k)!r}, is {now[k]!r}" for k in changed]
        raise StudyFileError(
            f"the study file differs from the one that {lock.name} began with:\n"
            + "\n".join(lines)
            + "\nOnly search.trials and search.max_hours may change. Change it back, or give the study "
            "another name (study.name)."
        )


def _check_same_rows(inputs: Inputs, lock: StudyLock) -> None:
    if inputs.data.fingerprint.sha256 != lock.data.sha256:
        raise DataError(
            f"{inputs.spec.data.train}: the rows differ from those that {lock.name} began with. Bring them "
            "back, or give the study another name (study.name)."
        )


def _flat(values: dict[str, object]) -> dict[tuple[str, str], object]:
    return {
        (section, key): value
        for section, keys in values.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }


def _confirmation_dtype(inputs: Inputs) -> str:
    wanted = inputs.spec.select.compute_dtype
    if wanted == "auto":
        return "float32" if inputs.device == "cpu" else "train"
    return wanted


class _Progress:
    """Gathers what the live view shows."""

    def __init__(
        self,
        ladder: Ladder,
        executor: InProcessExecutor,
        lock: StudyLock,
        elapsed: Callable[[], float],
        view: View,
    ) -> None:
        self.ladder, self.executor, self.lock = ladder, executor, lock
        self.elapsed, self.view = elapsed, view
        self.phase = "search"
        self.began_s = elapsed()
        self.work_before = ladder.finished_steps()

    def show(self) -> None:
        """Tell the view where the study is."""
        states: dict[str, int] = {}
        for record in self.ladder.records.values():
            states[str(record.state)] = states.get(str(record.state), 0) + 1
        best = self.ladder.best
        spent = self.elapsed() - self.began_s
        lanes = self.executor.readings()
        running = sum(max(0, lane.step - self.ladder.start_step(lane.rung)) for lane in lanes)
        done = self.ladder.finished_steps() + running - self.work_before
        left = self.ladder.planned_steps() - self.ladder.finished_steps() - running
        self.view.update(
            ProgressState(
                phase=self.phase if not lanes else f"rung {max(lane.rung for lane in lanes)}",
                trials_done=sum(1 for r in self.ladder.records.values() if r.rungs or r.reason),
                trials_total=self.ladder.plan.num_trials,
                states=states,
                lanes=lanes,
                best_trial=best.number if best else None,
                best_loss=best.best_loss if best else None,
                tokens_per_s=self.executor.num_tokens / spent if spent else 0.0,
                memory_bytes=self.executor.meter.in_use(),
                budget_bytes=self.lock.plan.budget_bytes,
                elapsed_s=self.elapsed(),
                left_s=spent / done * max(0, left) if done > 0 else None,
            )
        )
