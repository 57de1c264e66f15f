"""The ladder: rung 0 for every trial, then the best quarter goes on, rung by rung.

All decisions are functions of the trial records, so a study that is opened again goes on as if it had
never stopped, and results may come back in any order. Trials are proposed in generations of
``window``: a generation is asked for when all earlier ones have been told, in the order of their
numbers, so that a proposal never depends on which lane was faster.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import (
    LaneJob,
    LaneOutcome,
    RungResult,
    SuggestedParams,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.search.proposals import Proposer
from lora_tune.search.space import SearchSpace
from lora_tune.units import GIB

PROMOTED_SHARE = 4  # one of so many goes on to the next rung
FALLBACK_PENALTY = 20.0  # nats; only when no finite loss is known: above ln of any vocabulary
MEMORY_STEP = GIB // 2  # memory differences below this do not make a configuration cheaper

_ENDED = (TrialState.DIVERGED, TrialState.INFEASIBLE, TrialState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderPlan:
    """Sizes of the ladder, all counts in optimizer steps or trials."""

    num_trials: int
    rungs: tuple[int, ...]
    warmup_steps: int
    cooldown_ratio: float
    window: int  # trials proposed at once
    budget_bytes: int
    eval_rows: tuple[int, ...] = ()  # selection rows used at each rung; empty: all of them


def rung_steps(shares: Iterable[float], *, total_steps: int, min_steps: int) -> tuple[int, ...]:
    """Return the optimizer steps at the end of each rung; rungs that coincide are merged.

    >>> rung_steps((0.125, 0.5, 1.0), total_steps=800, min_steps=50)
    (100, 400, 800)
    >>> rung_steps((0.125, 0.5, 1.0), total_steps=60, min_steps=50)
    (50, 60)
    """
    steps = {min(total_steps, max(min_steps, round(share * total_steps))) for share in shares}
    return tuple(sorted(steps | {total_steps}))


def start_steps(rungs: Sequence[int], *, cooldown_ratio: float) -> tuple[int, ...]:
    """Return the step at which a trial enters each rung: where the state of the last one was kept.

    >>> start_steps((100, 400, 800), cooldown_ratio=0.2)
    (0, 80, 320)
    """
    return (0, *(_hold_step(end, cooldown_ratio) for end in rungs[:-1]))


def planned_steps(rungs: Sequence[int], *, cooldown_ratio: float, num_trials: int) -> int:
    """Return the optimizer steps of all trials and rungs, when none ends early.

    >>> planned_steps((100, 400, 800), cooldown_ratio=0.2, num_trials=8)  # then 2 trials, then 1
    1920
    """
    total, trials = 0, num_trials
    for start, end in zip(start_steps(rungs, cooldown_ratio=cooldown_ratio), rungs, strict=True):
        total += trials * (end - start)
        trials = max(1, math.ceil(trials / PROMOTED_SHARE))
    return total


def _hold_step(end: int, cooldown_ratio: float) -> int:
    return max(1, end - round(cooldown_ratio * end))


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
        self._tell_generations()

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
        """Record how a segment ended, durably, then tell Optuna what may be told."""
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
            )
        self._store(record)
        self._tell_generations()
        return record

    def select_winner(self, *, practical_margin: float) -> TrialRecord:
        """Mark what was not promoted as pruned and return the trial to recommend.

        Of the trials at the last rung whose loss is within ``practical_margin`` (relative) of the best,
        the cheapest wins: predicted memory in steps of half a GiB, then rank, then dropout, then loss.

        Raises:
            AllTrialsFailedError: No trial reached the last rung.
        """
        for record in list(self.records.values()):
            if record.state is TrialState.RUNNING:
                self._store(replace(record, state=TrialState.PRUNED))
        finished = [r for r in self.records.values() if r.state is TrialState.COMPLETE]
        if not finished:
            reasons = sorted({record.reason for record in self.records.values() if record.reason})
            raise AllTrialsFailedError(
                f"none of the {len(self.records)} trials can be recommended: all ended early. "
                f"Reasons: {'; '.join(reasons[:3])}. Lower space.learning_rate, or see trials.csv."
            )
        best = min(record.rungs[-1].eval_loss for record in finished)
        tied = [r for r in finished if r.rungs[-1].eval_loss <= best * (1 + practical_margin)]
        return min(
            tied,
            key=lambda r: (
                r.predicted_bytes // MEMORY_STEP,
                r.config.rank,
                r.config.lora_dropout,
                r.rungs[-1].eval_loss,
            ),
        )

    @property
    def best(self) -> TrialRecord | None:
        """The lowest loss at the highest rung that any trial has reached."""
        scored = [r for r in self.records.values() if r.rungs and r.state not in _ENDED]
        if not scored:
            return None
        return min(scored, key=lambda r: (-len(r.rungs), r.rungs[-1].eval_loss))

    def planned_steps(self) -> int:
        """Return the optimizer steps of all trials and rungs that the plan foresees."""
        return planned_steps(
            self.plan.rungs,
            cooldown_ratio=self.plan.cooldown_ratio,
            num_trials=self.plan.num_trials,
        )

    def finished_steps(self) -> int:
        """Return the optimizer steps of all finished segments; one that ended early counts whole."""
        done = 0
        for record in self.records.values():
            early = record.state in _ENDED and len(record.rungs) < len(self.plan.rungs)
            done += sum(self._segment_steps(rung) for rung in range(len(record.rungs) + early))
        return done

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
        if self._may_propose():
            return self._propose(), 0
        if not self._rung_zero_done():
            return None, 0
        for rung in range(1, len(self.plan.rungs)):
            chosen = self._promoted(rung)
            for number in chosen:
                if len(self.records[number].rungs) == rung and self._idle(number):
                    return self.records[number], rung
            if any(len(self.records[number].rungs) <= rung for number in chosen):
                break  # the next rung's choice waits for all of this one
        return None, 0

    def _idle(self, number: int) -> bool:
        return number not in self.in_flight

    def _may_propose(self) -> bool:
        number = len(self.records)
        if self._closed or number >= self.plan.num_trials:
            return False
        if self._out_of_time() and number > 0:
            self._closed = True
            self._tell_generations()
            return False
        if number < len(self.proposer.anchors):
            return True
        generation_start = number - number % self.plan.window
        return all(self.proposer.is_told(earlier) for earlier in range(generation_start))

    def _propose(self) -> TrialRecord:
        number = len(self.records)
        suggested: SuggestedParams = self.proposer.propose(number)
        config = self.space.effective(suggested)
        predicted_bytes, trainable = self._predict(config)
        record = TrialRecord(
            number=number,
            state=TrialState.RUNNING,
            origin=self.proposer.origin(number),
            suggested=suggested,
            config=config,
            predicted_bytes=predicted_bytes,
            trainable_parameters=trainable,
        )
        self._store(record)
        return record

    @property
    def _last_number(self) -> int:
        """Trials there will be: fewer than planned when time ran out."""
        return len(self.records) if self._closed else self.plan.num_trials

    def _rung_zero_done(self) -> bool:
        complete = self._closed or len(self.records) >= self.plan.num_trials
        return complete and all(r.rungs or r.state in _ENDED for r in self.records.values())

    def _promoted(self, rung: int) -> list[int]:
        """Return the trials that train rung ``rung``: the best quarter of those that could.

        A promoted trial that diverges makes room for the next best.
        """
        entered = sum(1 for r in self.records.values() if len(r.rungs) >= rung)
        able = [r for r in self.records.values() if len(r.rungs) >= rung and r.state not in _ENDED]
        able.sort(key=lambda r: (r.rungs[rung - 1].eval_loss, r.number))
        return [record.number for record in able[: max(1, math.ceil(entered / PROMOTED_SHARE))]]

    def _job(self, record: TrialRecord, rung: int) -> LaneJob:
        folder = self._trial_folder(record.number)
        return LaneJob(
            trial=record.number,
            rung=rung,
            config=record.config,
            start_step=self.start_step(rung),
            hold_step=_hold_step(self.plan.rungs[rung], self.plan.cooldown_ratio),
            end_step=self.plan.rungs[rung],
            warmup_steps=self.plan.warmup_steps,
            eval_split="selection",
            eval_dtype="train",
            start_folder=folder / f"rung-{rung - 1}" if rung else None,
            result_folder=folder / f"rung-{rung}",
            eval_rows=self.plan.eval_rows[rung] if self.plan.eval_rows else None,
        )

    def _store(self, record: TrialRecord) -> None:
        self._save(record)
        self.records[record.number] = record

    def _tell_generations(self) -> None:
        """Tell Optuna, in order of number, every generation of which all outcomes are known."""
        window = self.plan.window
        for start in range(0, len(self.records), window):
            numbers = [n for n in range(start, start + window) if n < self._last_number]
            known = [self.records.get(number) for number in numbers]
            if not all(r is not None and (r.rungs or r.state in _ENDED) for r in known):
                return
            for record in known:
                assert record is not None
                if not self.proposer.is_told(record.number):
                    self._tell(record, start + window)

    def _tell(self, record: TrialRecord, generation_end: int) -> None:
        excess = record.predicted_bytes - self.plan.budget_bytes
        if record.rungs:
            state, value = TrialState.COMPLETE, record.rungs[0].eval_loss
        else:
            state, value = record.state, self._penalty(record, generation_end)
            if state is not TrialState.FAILED:  # of which Optuna is told no value
                self._store(replace(record, penalty=value))
            if state is TrialState.INFEASIBLE:
                excess = max(excess, 1)
        self.proposer.tell(record.number, state=state, value=value, vram_excess_bytes=excess)

    def _penalty(self, record: TrialRecord, generation_end: int) -> float:
        """Return the worst finite loss known when the generation is told, and a tenth more."""
        losses = [
            other.rungs[0].eval_loss
            for other in self.records.values()
            if other.rungs and other.number < generation_end
        ]
        if record.first_loss is not None and math.isfinite(record.first_loss):
            losses.append(record.first_loss)
        return 1.1 * max(losses) if losses else FALLBACK_PENALTY
