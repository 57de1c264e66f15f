"""The ladder: rung 0 for every trial, then the best quarter goes on, rung by rung.

All decisions are functions of the trial records, so a study that is opened again goes on as if it had
never stopped, and results may come back in any order. Trial n is proposed when trials 0 to n - window
have ended their first rung, and Optuna has then been told of exactly these, in the order of their numbers:
a proposal never depends on which lane was faster, and a slot need not wait for a whole generation.

A proposal that comes to the configuration of an earlier trial is answered from that one's record: it is
told, but neither trained nor counted.

With three rungs or more the first promotion adds one trial that nobody proposed, the half step; see
``promotion``. With two it would be a whole extra run.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lora_tune import signals
from lora_tune.errors import AllTrialsFailedError
from lora_tune.files import drop_from
from lora_tune.records import (
    LaneJob,
    LaneOutcome,
    RungResult,
    SuggestedParams,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.redaction import redact
from lora_tune.search.fail_fast import failing_alike, loss_limits
from lora_tune.search.plan import hold_step_of, seats, start_steps
from lora_tune.search.promotion import (
    ENDED_EARLY,
    HALF_STEP,
    choose_finalists,
    half_step_of_leader,
    promoted,
)
from lora_tune.search.proposals import Proposer
from lora_tune.search.space import SearchSpace, describe, training_key
from lora_tune.stats.plausibility import MOST_LOSS, checked

LANE_STATE = "lane_state.safetensors"  # the engine's name, which cannot be imported here
FALLBACK_PENALTY = 20.0  # nats; only when no finite loss is known: above ln of any vocabulary
# Proposals in a row that were answered from records, before a step alone is asked for, and before
# the space counts as exhausted: twice as many steps have been tried in vain.
MOST_REPEATS = 8
LAST_REPEAT = 3 * MOST_REPEATS
LEAST_RUNGS_OF_HALF_STEP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderPlan:
    """Sizes of the ladder, all counts in optimizer steps or trials."""

    num_trials: int  # that are trained; answers from records and the half step come on top
    rungs: tuple[int, ...]
    warmup_steps: int
    cooldown_ratio: float
    window: int  # trial n is proposed from the results of trials 0 to n - window
    budget_bytes: int
    eval_rows: tuple[int, ...] = ()  # selection rows used at each rung; empty: all of them
    practical_margin: float = 0.005  # relative loss difference that is called a tie
    clusters: tuple[int, ...] = ()  # of each selection row; empty: each row is its own
    half_step: bool = False  # try half the step of rung 0's leader


def num_counted(records: Iterable[TrialRecord]) -> int:
    """Return how many trials count against ``num_trials``: not the cached ones, not the half step."""
    return sum(r.state is not TrialState.CACHED and r.origin != HALF_STEP for r in records)


def facts_of(record: TrialRecord, source: TrialRecord) -> dict[str, str | int | float]:
    """Return what the database says of a trial beside its proposal, as flat values without secrets.

    ``source`` is the trial that was trained: another one for a trial that repeats it.
    """
    config = record.config
    facts: dict[str, str | int | float] = {
        "number": record.number,
        "reason": redact(source.reason),
        "trained_rank": config.rank,
        "trained_lora_alpha": config.lora_alpha,
        "trained_learning_rate": config.learning_rate,
        "trainable_parameters": record.trainable_parameters,
        "predicted_bytes": record.predicted_bytes,
    }
    if record.repeats is not None:
        facts["repeats"] = record.repeats
    if source.rungs:
        facts["peak_bytes"] = source.rungs[0].peak_bytes
        facts["adapter"] = f"trials/{source.number:04d}/rung-0"
    return facts


class Ladder:
    """Decides which trial trains which segment next."""

    def __init__(
        self,
        plan: LadderPlan,
        space: SearchSpace,
        proposer: Proposer,
        *,
        records: Iterable[TrialRecord],
        save: Callable[[TrialRecord], None],
        predict: Callable[[TrialConfig], tuple[int, int]],
        trial_folder: Callable[[int], Path],
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begin or go on.

        Args:
            plan: Sizes.
            space: The search space, with what fits.
            proposer: The Optuna side.
            records: Trials of earlier runs of the same study.
            save: Makes a record durable; called before the outcome is told to Optuna.
            predict: Returns predicted peak bytes and trainable parameters of a configuration.
            trial_folder: Where a trial's files are.
            out_of_time: When true, no new trial is begun.
        """
        self.plan = plan
        self.space = space
        self.proposer = proposer
        self.records = {record.number: record for record in records}
        self.in_flight: set[int] = set()
        self._save = save
        self._predict = predict
        self._trial_folder = trial_folder
        self._out_of_time = out_of_time
        self._closed = False  # no new trial will be proposed
        self._choices: dict[tuple[int, int, int, int], list[int]] = {}
        self._num_told = 0  # trials of which Optuna knows the outcome: the first ones
        while self._num_told in self.records and proposer.is_told(self._num_told):
            self._num_told += 1
        self._tell_rest()
        for record in self.records.values():
            self._remove_needless_states(record)

    def next_jobs(self, count: int) -> list[LaneJob]:
        """Return up to ``count`` segments to train now; none when all waits for running ones."""
        jobs: list[LaneJob] = []
        while len(jobs) < count:
            record, rung = self._next_segment()
            if record is None:
                break
            self.in_flight.add(record.number)
            jobs.append(self._job(record, rung))
        return jobs

    def take(self, outcome: LaneOutcome) -> TrialRecord:
        """Record how a segment ended, durably, then tell Optuna what may be told.

        Raises:
            AllTrialsFailedError: All trials so far have failed, and of the same.
        """
        outcome = checked(outcome)
        record = self.records[outcome.trial]
        self.in_flight.discard(outcome.trial)
        if outcome.state is TrialState.COMPLETE:
            assert outcome.evaluation is not None
            result = RungResult(
                rung=outcome.rung,
                steps=self.plan.rungs[outcome.rung],
                eval_loss=outcome.evaluation.mean_loss,
                evaluation=outcome.evaluation,
                points=outcome.points,
                wall_s=outcome.wall_s,
                num_tokens=outcome.num_tokens,
                peak_bytes=outcome.peak_bytes,
                pack_lanes=outcome.pack_lanes,
                span=outcome.span,
            )
            last = outcome.rung == len(self.plan.rungs) - 1
            state = TrialState.COMPLETE if last else TrialState.RUNNING
            record = replace(record, rungs=(*record.rungs, result), state=state)
        else:
            record = replace(
                record,
                state=outcome.state,
                reason=outcome.reason,
                first_loss=next((p.train_loss for p in outcome.points), None),
                span=outcome.span,
            )
        self._store(record)
        self._remove_needless_states(record)
        self._tell_rest()
        if reason := failing_alike(self.records.values()):
            raise AllTrialsFailedError(
                f"the first {len(self._trained(0))} trials all failed of the same: {redact(reason)}. That "
                "is no matter of one trial's settings, so no further one is begun. Mend the machine, then "
                "give the same command again: the study goes on with other trials."
            )
        return record

    def finalists(self, count: int) -> list[TrialRecord]:
        """Mark what was not promoted as pruned and return the trials to confirm, best first.

        The ``count`` trials of lowest loss among those at the end of the last rung, each by its best state;
        one more when its paired 90 % interval against the last of them includes zero.

        Raises:
            AllTrialsFailedError: No trial reached the last rung.
        """
        for record in list(self.records.values()):
            if record.state is TrialState.RUNNING:
                self._store(replace(record, state=TrialState.PRUNED))
        found = choose_finalists(
            self.records.values(),
            count,
            num_rungs=len(self.plan.rungs),
            clusters=self.plan.clusters,
        )
        if not found:
            reasons = sorted({record.reason for record in self.records.values() if record.reason})
            raise AllTrialsFailedError(
                f"none of the {len(self.records)} trials can be recommended: all ended early. "
                f"Reasons: {'; '.join(reasons[:3])}. Lower space.learning_rate, or see trials.csv."
            )
        return found

    @property
    def best(self) -> TrialRecord | None:
        """The lowest loss at the highest rung that any trial has reached."""
        scored = [r for r in self.records.values() if r.rungs and r.state not in ENDED_EARLY]
        if not scored:
            return None
        return min(scored, key=lambda r: (-len(r.rungs), r.rungs[-1].eval_loss))

    def planned_steps(self) -> int:
        """Return the optimizer steps of all trials and rungs, as far as they are known.

        Of a rung whose trials are chosen those of these, ties and the half step among them; of a later one
        those of the nominal seats. Never less than what is finished, and equal to it in the end.
        """
        num_trials = sum(r.state is not TrialState.CACHED for r in self.records.values())
        if not self._rung_zero_done():
            num_trials = max(self.plan.num_trials, num_trials)
        planned, chosen = num_trials * self._segment_steps(0), dict(self._choices_made())
        for rung in range(1, len(self.plan.rungs)):
            if rung in chosen:
                num_trials = len(self._trained(rung) | set(chosen[rung]))
            else:
                num_trials = max(seats(num_trials)[0], len(self._trained(rung)))
            planned += num_trials * self._segment_steps(rung)
        return planned

    def finished_steps(self) -> int:
        """Return the optimizer steps of all finished segments; one that ended early counts whole."""
        return sum(
            len(self._trained(rung)) * self._segment_steps(rung)
            for rung in range(len(self.plan.rungs))
        )

    def _trained(self, rung: int) -> set[int]:
        """Return the trials whose segment at this rung has ended, well or early."""
        return {
            number
            for number, record in self.records.items()
            if len(record.rungs) + (record.state in ENDED_EARLY) > rung
        }

    def start_step(self, rung: int) -> int:
        """Return the step at which a trial enters a rung: where the state of the last one was kept."""
        return start_steps(self.plan.rungs, cooldown_ratio=self.plan.cooldown_ratio)[rung]

    def _segment_steps(self, rung: int) -> int:
        return self.plan.rungs[rung] - self.start_step(rung)

    def _next_segment(self) -> tuple[TrialRecord | None, int]:
        for number in sorted(self.records):
            record = self.records[number]
            if record.state is TrialState.RUNNING and not record.rungs and self._idle(number):
                return record, 0
        while self._may_propose():
            signals.check()  # proposals may take seconds
            record = self._propose()
            if record.state is TrialState.RUNNING:
                return record, 0
        if self._rung_zero_done() and (params := self._half_step_params()) is not None:
            return self._propose_half_step(params), 0
        return self._next_promoted()

    def _next_promoted(self) -> tuple[TrialRecord | None, int]:
        for rung, chosen in self._choices_made():
            for number in chosen:
                record = self.records[number]
                if (
                    len(record.rungs) == rung
                    and record.state not in ENDED_EARLY
                    and self._idle(number)
                ):
                    return record, rung
        return None, 0

    def _choices_made(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the rungs whose trials are chosen, with these; a choice waits for all of the rung before."""
        if not self._rung_zero_done():
            return
        for rung in range(1, len(self.plan.rungs)):
            chosen = self._promoted(rung)
            yield rung, chosen
            if any(self._is_on_its_way(number, rung) for number in chosen):
                return

    def _is_on_its_way(self, number: int, rung: int) -> bool:
        record = self.records[number]
        return len(record.rungs) <= rung and record.state not in ENDED_EARLY

    def _idle(self, number: int) -> bool:
        return number not in self.in_flight

    def _promoted(self, rung: int) -> list[int]:
        """Return the trials that train rung ``rung``; see ``promotion.promoted``."""
        entered = sum(len(record.rungs) >= rung for record in self.records.values())
        ended = sum(record.state in ENDED_EARLY for record in self.records.values())
        # what the choice depends on; no count ever falls
        key = (rung, entered, ended, len(self.records))
        if key not in self._choices:
            self._choices[key] = promoted(
                self.records.values(),
                rung,
                practical_margin=self.plan.practical_margin,
                clusters=self.plan.clusters,
            )
        return self._choices[key]

    def _may_propose(self) -> bool:
        number = len(self.records)
        if self._no_more_proposals:
            return False
        if self._out_of_time() and number > 0:
            self._closed = True
            self._tell_rest()
            return False
        if number < len(self.proposer.anchors):
            return True
        needed = range(self._num_told, number - self.plan.window + 1)
        return all(self._is_settled(earlier) for earlier in needed)

    @property
    def _no_more_proposals(self) -> bool:
        enough = num_counted(self.records.values()) >= self.plan.num_trials
        return self._closed or enough or self._repeats_in_a_row() >= LAST_REPEAT

    def _repeats_in_a_row(self) -> int:
        """Return how many of the latest proposals, the half step left out, were answered from records."""
        count = 0
        for number in range(len(self.records) - 1, -1, -1):
            record = self.records[number]
            if record.origin != HALF_STEP:
                if record.state is not TrialState.CACHED:
                    break
                count += 1
        return count

    def _propose(self) -> TrialRecord:
        """Propose the next trial from what it may know; one that repeats another is answered at once."""
        number = len(self.records)
        if number >= len(self.proposer.anchors):
            for earlier in range(self._num_told, number - self.plan.window + 1):
                self._tell(self.records[earlier])
        if self._repeats_in_a_row() >= MOST_REPEATS:
            suggested = self.proposer.propose(number, step_only=True)
        else:
            suggested = self.proposer.propose(number)
        record = self._new_record(number, suggested, origin=self.proposer.origin(number))
        key = training_key(record.config)
        for original in self.records.values():
            if original.repeats is None and training_key(original.config) == key:
                record = replace(record, state=TrialState.CACHED, repeats=original.number)
        self._store(record)
        self._tell_rest()  # the last of many repeats has no result to come
        return record

    def _new_record(self, number: int, suggested: SuggestedParams, *, origin: str) -> TrialRecord:
        config = self.space.effective(suggested)
        predicted_bytes, trainable = self._predict(config)
        return TrialRecord(
            number=number,
            state=TrialState.RUNNING,
            origin=origin,
            suggested=suggested,
            config=config,
            predicted_bytes=predicted_bytes,
            trainable_parameters=trainable,
        )

    def _half_step_params(self) -> SuggestedParams | None:
        if not self.plan.half_step or len(self.plan.rungs) < LEAST_RUNGS_OF_HALF_STEP:
            return None
        if any(record.origin == HALF_STEP for record in self.records.values()):
            return None
        if self._closed or self._out_of_time():
            return None
        return half_step_of_leader(self.records.values(), lowest=self.space.step_bounds[0])

    def _propose_half_step(self, params: SuggestedParams) -> TrialRecord:
        """Begin the half step: a trial like others for Optuna, beyond ``num_trials``; at most one a study."""
        number, study = len(self.records), self.proposer.study
        if len(study.get_trials(deepcopy=False)) == number:  # not enqueued by a process that ended
            study.enqueue_trial(
                self.space.as_optuna(params), user_attrs={**describe(params), "origin": HALF_STEP}
            )
        suggested = self.proposer.propose(number)
        record = self._new_record(number, suggested, origin=self.proposer.origin(number))
        self._store(record)
        return record

    def _rung_zero_done(self) -> bool:
        others = [number for number, r in self.records.items() if r.origin != HALF_STEP]
        return self._no_more_proposals and all(map(self._is_settled, others))

    def _is_settled(self, number: int) -> bool:
        """Whether it is known what rung 0 of a trial, or of the one that it repeats, came to."""
        source = self._source(self.records[number])
        return bool(source.rungs) or source.state in ENDED_EARLY

    def _source(self, record: TrialRecord) -> TrialRecord:
        return record if record.repeats is None else self.records[record.repeats]

    def _job(self, record: TrialRecord, rung: int) -> LaneJob:
        folder = self._trial_folder(record.number)
        return LaneJob(
            trial=record.number,
            rung=rung,
            config=record.config,
            start_step=self.start_step(rung),
            hold_step=hold_step_of(self.plan.rungs[rung], self.plan.cooldown_ratio),
            end_step=self.plan.rungs[rung],
            warmup_steps=self.plan.warmup_steps,
            eval_split="selection",
            eval_dtype="train",
            start_folder=folder / f"rung-{rung - 1}" if rung else None,
            result_folder=folder / f"rung-{rung}",
            state_folder=folder / f"state-{rung}",
            keep_state=rung < len(self.plan.rungs) - 1,
            eval_rows=self.plan.eval_rows[rung] if self.plan.eval_rows else None,
            loss_limits=() if rung else self._loss_limits(record.number),
            first_loss=record.rungs[0].points[0].train_loss
            if rung and record.rungs[0].points
            else None,
        )

    def _remove_needless_states(self, record: TrialRecord) -> None:
        """Remove the lane states that nobody can go on from any more, now that the record is durable.

        These are the states on the way of segments that have ended, and those kept for a next rung that has
        been trained, or that a trial which ended early will never train. A trial that was not promoted keeps
        its last one: with more trials it may be promoted later.
        """
        folder, early = self._trial_folder(record.number), record.state in ENDED_EARLY
        for rung in range(len(record.rungs) + early):
            shutil.rmtree(folder / f"state-{rung}", ignore_errors=True)
        for result in record.rungs if early else record.rungs[:-1]:
            drop_from(folder / f"rung-{result.rung}", LANE_STATE)

    def _loss_limits(self, number: int) -> tuple[tuple[int, float], ...]:
        """Return what a trial's loss may not exceed, by the trials that its proposal knew of.

        Anchors do not wait for each other, so they have no limits.
        """
        if number < len(self.proposer.anchors):
            return ()
        known = [self.records[n] for n in range(number - self.plan.window + 1)]
        return loss_limits([record.rungs[0] for record in known if record.rungs])

    def _store(self, record: TrialRecord) -> None:
        self._save(record)
        self.records[record.number] = record

    def _tell_rest(self) -> None:
        """When nothing more is proposed: tell Optuna, in order of number, of all that have ended."""
        if not self._no_more_proposals:
            return
        while self._num_told < len(self.records):
            needed = range(self._num_told, self._horizon(self._num_told) + 1)
            if not all(map(self._is_settled, needed)):
                return
            self._tell(self.records[self._num_told])

    def _horizon(self, number: int) -> int:
        """Return the last trial known when ``number`` is told.

        Nothing is told before the first proposal of the sampler's, which waits for that many anchors.
        """
        last = max(number, len(self.proposer.anchors) - self.plan.window)
        return min(last, len(self.records) - 1)

    def _tell(self, record: TrialRecord) -> None:
        if self.proposer.is_told(record.number):  # by a process that ended before it could go on
            self._num_told = record.number + 1
            return
        source = self._source(record)
        excess = record.predicted_bytes - self.plan.budget_bytes
        if source.rungs:
            state, value = TrialState.COMPLETE, source.rungs[0].eval_loss
            if record.state is TrialState.CACHED:
                state = TrialState.CACHED
        else:
            state, value = source.state, source.penalty or self._penalty(source)
            if state is not TrialState.FAILED:  # of which Optuna is told no value
                self._store(replace(record, penalty=value))
            if state is TrialState.INFEASIBLE:
                excess = max(excess, 1)
        self.proposer.tell(
            record.number,
            state=state,
            value=value,
            vram_excess_bytes=excess,
            facts=facts_of(record, source),
        )
        self._num_told = record.number + 1

    def _penalty(self, record: TrialRecord) -> float:
        """Return the worst finite loss known when the trial is told, and a tenth more."""
        losses = [
            other.rungs[0].eval_loss
            for other in self.records.values()
            if other.rungs and other.number <= self._horizon(record.number)
        ]
        first = record.first_loss
        if first is not None and 0 <= first <= MOST_LOSS:  # a sampler would see nothing beside 1e30
            losses.append(first)
        return 1.1 * max(losses) if losses else FALLBACK_PENALTY
