"""The Optuna study of a search made again from its trial records, compared with them, and the other way.

Proposals are read from the records, not drawn again. What Optuna is told of a trial is a function of the
records too, and it is told in the order of numbers, so the study is the same as the one that was
lost, but for the times in it: the next proposal is what it would have been.

Optuna knows one loss of a trial, its record knows those of every row. So a record that is made again from
Optuna's study has the configuration, and how it ended early if it did; what was trained is trained again.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from math import isclose
from pathlib import Path

import optuna

from lora_tune.records import StudyLock, TrialConfig, TrialRecord, TrialState
from lora_tune.search.anchors import plan_anchors
from lora_tune.search.ladder import Ladder, LadderPlan
from lora_tune.search.promotion import ENDED_EARLY
from lora_tune.search.proposals import VRAM_CONSTRAINT, Proposer, proposal_window
from lora_tune.search.space import SearchSpace
from lora_tune.study.spec import StudySpec


class SearchRecord:
    """What the Optuna study of a search has to hold, by the study's lock and its trial records."""

    def __init__(self, spec: StudySpec, lock: StudyLock) -> None:
        """Keep what proposals and outcomes depend on.

        Args:
            spec: The study file, as resolved.
            lock: What the first start resolved.
        """
        self.space = SearchSpace(spec.space, lock.target_sets, seed=spec.study.seed)
        self.sampler = spec.search.sampler
        self.lock = lock
        anchors = plan_anchors(
            self.space,
            spec.search.anchors,
            effective_batch_size=spec.train.effective_batch_size,
            num_train=lock.data.num_train,
        ).anchors
        self.anchors = anchors[: lock.study_plan.num_trials] if lock.study_plan else anchors
        self.plan = LadderPlan(
            num_trials=2**62,  # more are to come: nothing is told unasked
            rungs=lock.rungs,
            warmup_steps=lock.warmup_steps,
            cooldown_ratio=spec.train.cooldown_ratio,
            window=proposal_window(lock.plan.lanes * lock.plan.workers),
            budget_bytes=lock.plan.budget_bytes,
        )

    def fault_of(self, record: TrialRecord) -> str | None:
        """Return what a record contradicts itself or the study in; None: nothing."""
        try:
            self.space.as_optuna(record.suggested)
        except ValueError as error:
            return f"its proposal is not of this study: {error}"
        if self.space.effective(record.suggested) != record.config:
            return "what was trained does not follow from what was proposed"
        # nearly: newer versions of Python add floats up more exactly
        if not all(isclose(r.eval_loss, r.evaluation.mean_loss) for r in record.rungs):
            return "a loss is not the mean of those of its rows"
        return None

    def fill(self, study: optuna.Study, records: Iterable[TrialRecord], *, is_over: bool) -> None:
        """Write into an empty study what it knew when the last trial was proposed.

        Args:
            study: Without trials.
            records: All trials: numbers from 0 on without a gap.
            is_over: The search has ended, so that Optuna was told of all.
        """
        known = _in_order(records)
        last = len(known) - 1
        told = max(0, last - self.plan.window + 1) if last >= len(self.anchors) else 0
        self._write(study, known).tell_first(len(known) if is_over else told)

    def differences(
        self, records: Iterable[TrialRecord], trials: Sequence[optuna.trial.FrozenTrial]
    ) -> list[str]:
        """Return what a study has otherwise than the records, as sentences; none: all is well.

        A trial more than there are records may have been proposed when the process was killed. An outcome
        that Optuna does not know yet is told when the search goes on.
        """
        wanted = self._all_told(_in_order(records))
        found = [
            f"trial {number} has {difference}"
            for number, (trial, want) in enumerate(zip(trials, wanted, strict=False))
            for difference in _difference(trial, want)
        ]
        if len(trials) < len(wanted):
            found.append(f"it holds {len(trials)} of the {len(wanted)} trials on record")
        known = range(len(wanted))
        found += [f"trial {n} has no record" for n in self.without_record(known, trials)]
        return found

    def without_record(
        self, known: Container[int], trials: Sequence[optuna.trial.FrozenTrial]
    ) -> list[int]:
        """Return the trials that had a record and are not known any more.

        The last one, if it has not ended, may just have been proposed.
        """
        last = len(trials) - 1
        return [
            trial.number
            for trial in trials
            if trial.number not in known and (trial.state.is_finished() or trial.number < last)
        ]

    def record_of(self, trial: optuna.trial.FrozenTrial) -> TrialRecord:
        """Return a trial's record as far as Optuna's study has it; RUNNING: it is to be trained again.

        Raises:
            ValueError: It has not even the proposal.
        """
        params = trial.params or trial.system_attrs.get("fixed_params", {})
        if set(params) < {"rank_index", "effective_step"}:
            raise ValueError(f"trial {trial.number} has no parameters")
        fixed = optuna.trial.FixedTrial(params)
        suggested = self.space.suggest(fixed)
        config, facts = self.space.effective(suggested), trial.user_attrs
        excess = trial.constraints.get(VRAM_CONSTRAINT, -self.plan.budget_bytes)
        per_rank = self.space.target_set(config.target_set).trainable_parameters_per_rank
        record = TrialRecord(
            number=trial.number,
            state=TrialState.RUNNING,
            origin=str(facts["origin"]),
            suggested=suggested,
            config=config,
            predicted_bytes=facts.get("predicted_bytes", int(excess) + self.plan.budget_bytes),
            trainable_parameters=config.rank * per_rank,
        )
        if not trial.state.is_finished():
            return record
        state = TrialState(facts["state"])
        if state is TrialState.CACHED:
            return replace(record, state=state, repeats=int(facts["repeats"]))
        if state in ENDED_EARLY:
            values = [*(trial.values or ()), *trial.intermediate_values.values()]
            penalty = values[0] if values else None
            return replace(record, state=state, reason=str(facts["reason"]), penalty=penalty)
        return record

    def _all_told(self, records: Sequence[TrialRecord]) -> list[optuna.trial.FrozenTrial]:
        """Return the trials of a study that was told of all that have ended."""
        study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
        self._write(study, records).tell_all()
        return list(study.get_trials(deepcopy=False))

    def _write(self, study: optuna.Study, records: Sequence[TrialRecord]) -> "_Teller":
        """Write the proposals into an empty study; return who tells it the outcomes."""
        # Nothing is drawn, so the seed does not matter; what a sampler is told depends on which it is.
        proposer = Proposer(
            study, self.space, self.anchors, sampler=self.sampler, startup_trials=0, seed=0
        )
        for record in records:
            proposer.adopt(record.number, record.suggested, origin=record.origin)
        return _Teller(self.plan, self.space, proposer, records)


class _Teller(Ladder):
    """A ladder that trains nothing: it tells Optuna of the records that it was given."""

    def __init__(
        self,
        plan: LadderPlan,
        space: SearchSpace,
        proposer: Proposer,
        records: Iterable[TrialRecord],
    ) -> None:
        super().__init__(
            plan,
            space,
            proposer,
            records=map(_at_rung_zero, records),
            save=_save_nothing,
            predict=_predict_nothing,
            trial_folder=_nowhere,
        )

    def tell_first(self, count: int) -> None:
        """Tell of the first ``count`` trials in order, until one that has not ended."""
        for number in range(count):
            if not self._is_settled(number):
                return
            self._tell(self.records[number])

    def tell_all(self) -> None:
        """Tell of every trial that has ended, whatever the order in which they did."""
        for number in filter(self._is_settled, range(len(self.records))):
            self._tell(self.records[number])

    def _remove_needless_states(self, record: TrialRecord) -> None:
        """Leave the lanes' files alone: they are the business of the ladder that trains."""


def _save_nothing(record: TrialRecord) -> None:
    """Leave the records as they are: what is told is in them already."""


def _predict_nothing(config: TrialConfig) -> tuple[int, int]:
    raise AssertionError(f"proposed {config}")


def _nowhere(number: int) -> Path:
    raise AssertionError(f"trains {number}")


def _in_order(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    known = sorted(records, key=lambda record: record.number)
    assert [record.number for record in known] == list(range(len(known)))
    return known


def _at_rung_zero(record: TrialRecord) -> TrialRecord:
    """Return the record as it was when Optuna was told of it: later rungs are none of its business."""
    if not record.rungs:
        return record
    return replace(record, rungs=record.rungs[:1], state=TrialState.RUNNING, reason="")


def _difference(trial: optuna.trial.FrozenTrial, want: optuna.trial.FrozenTrial) -> list[str]:
    found = []
    if trial.number != want.number:
        found.append(f"number {trial.number}")
    if trial.params != want.params or trial.distributions != want.distributions:
        found.append("other parameters than its record")
    needed = {"origin"}
    if trial.state.is_finished():
        needed.add("state")
        found += _other_outcome(trial, want)
    for key, value in want.user_attrs.items():
        if key in trial.user_attrs and trial.user_attrs[key] != value:
            found.append(f'another "{key}" than its record')
    found += [f'no "{key}"' for key in sorted(needed - trial.user_attrs.keys())]
    return found


def _other_outcome(trial: optuna.trial.FrozenTrial, want: optuna.trial.FrozenTrial) -> list[str]:
    if not want.state.is_finished():
        return ["ended, and its record has not"]
    found = []
    if trial.state is not want.state:
        found.append(f"the state {trial.state.name}, by its record {want.state.name}")
    if (trial.values, trial.intermediate_values) != (want.values, want.intermediate_values):
        found.append("another loss than its record")
    if trial.constraints != want.constraints:
        found.append("another memory constraint than its record")
    return found
