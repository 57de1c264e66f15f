"""The winner, tested: finalists and the default train again with fresh seeds, on rows never seen before.

The trials of the search were selected by their losses, so those losses are lucky; none of them counts here.
Every candidate trains from its beginning, with the same seeds as the others (data order, initialisation,
dropout), and is scored on the confirmation split, which nothing else reads. ``stats.selection`` decides.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import (
    Candidate,
    Confirmation,
    ConfirmationRun,
    Decision,
    LaneJob,
    LaneOutcome,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.search.plan import hold_step_of
from lora_tune.stats.plausibility import checked
from lora_tune.stats.selection import CandidateRuns, decide

# Where a trial's number is asked for, below those of the search.
BASE_TRIAL = -1  # the untuned base on the confirmation split
BASE_SELECTION_TRIAL = -2  # and on the selection split
REFIT_TRIAL = -3
_FIRST_RUN = -4  # the runs and, below them, the metrics count down from here
DEFAULT_NAME = "default"
REFIT_FOLDER = "refit"
STATE_SUFFIX = ".state"
_SEED_KEY = 0x636F6E66  # keeps these seeds apart from all others that a study derives


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmationPlan:
    """How candidates are trained again."""

    seeds: int
    study_seed: int
    warmup_steps: int
    cooldown_ratio: float
    practical_margin: float
    eval_dtype: str  # "train" or "float32"
    folder: Path  # where the runs publish their adapters
    base_parameters: int
    selection_rows: int | None = None  # rows behind the losses of the search's last rung; None: all
    clusters: tuple[int, ...] = ()  # of each row of the confirmation split
    metrics: tuple[str, ...] = ()


def candidate_of(record: TrialRecord, *, steps: int | None = None) -> Candidate:
    """Return a trial of the search as a candidate; it trains to the step that it kept, or to ``steps``."""
    kept = record.kept
    full = steps if steps is not None else kept.steps if kept is not None else 0
    return Candidate(
        name=f"trial {record.number}",
        trial=record.number,
        config=record.config,
        steps=full,
        predicted_bytes=record.predicted_bytes,
        trainable_parameters=record.trainable_parameters,
    )


def run_folder(folder: Path, candidate: str, seed: int) -> Path:
    """Return where the files of a run are: its adapter."""
    return folder / f"{candidate.replace(' ', '-')}-seed-{seed}"


def state_folder(run: Path) -> Path:
    """Return where the state of a run's lane is while it trains."""
    return run.with_name(f"{run.name}{STATE_SUFFIX}")


def chosen_folder(folder: Path, confirmation: Confirmation) -> Path:
    """Return where the adapter to ship is, below the folder of all runs, after the decision."""
    decision = confirmation.decision
    assert decision is not None
    if confirmation.refit:
        return folder / REFIT_FOLDER
    return run_folder(folder, decision.chosen, decision.median_seed)


def with_fresh_seed(config: TrialConfig, *, study_seed: int, seed: int) -> TrialConfig:
    """Return the configuration with another data order, initialisation and dropout.

    The same ``seed`` gives every candidate the same three, and none that the search has used.
    """
    drawn = int(np.random.SeedSequence([study_seed, _SEED_KEY, seed]).generate_state(1)[0] >> 1)
    return replace(config, init_seed=drawn, dropout_seed=drawn, data_seed=drawn)


class ConfirmationStage:
    """Asks for the runs that are missing, takes their outcomes, decides; resumable after any of them.

    Attributes:
        confirmation: All that is known so far; each change of it is saved first.
    """

    def __init__(
        self,
        plan: ConfirmationPlan,
        candidates: Sequence[Candidate],
        *,
        default: str | None,
        earlier: Confirmation | None,
        save: Callable[[Confirmation], None],
    ) -> None:
        """Begin, or go on where an earlier run of the study stopped.

        Args:
            plan: How the candidates train.
            candidates: Finalists and the default.
            default: Name of the candidate that is the default configuration; None: there is none.
            earlier: What was stored; runs of candidates that are the same again are kept.
            save: Makes a confirmation durable.

        Raises:
            AllTrialsFailedError: All runs are known, and no candidate came to its end.
        """
        self.plan = plan
        self.confirmation = _go_on(plan, tuple(candidates), default, earlier)
        self._save = save
        self._in_flight: set[int] = set()
        self._runs = {
            _FIRST_RUN - number: (candidate, seed)
            for number, (candidate, seed) in enumerate(
                (candidate, seed) for seed in range(plan.seeds) for candidate in candidates
            )
        }
        lowest = _FIRST_RUN - len(self._runs)
        self._measured = {lowest - n: name for n, name in enumerate(self._metric_names())}
        if earlier is not None and self.confirmation != earlier:
            self._save(self.confirmation)  # what was decided of other candidates counts no more
        self._remove_needless_states()
        self._decide_if_done()

    def next_jobs(self, count: int) -> list[LaneJob]:
        """Return up to ``count`` jobs to do now; none when the rest waits for running ones."""
        jobs = [job for job in self._missing() if job.trial not in self._in_flight][:count]
        self._in_flight.update(job.trial for job in jobs)
        return jobs

    def take(self, outcome: LaneOutcome) -> None:
        """Record how a job ended, durably; with the last run comes the decision.

        Raises:
            AllTrialsFailedError: No candidate came to its end, or the untuned base has no finite loss.
        """
        outcome = checked(outcome)
        self._in_flight.discard(outcome.trial)
        found = self.confirmation
        if outcome.trial in self._runs:
            candidate, seed = self._runs[outcome.trial]
            found = replace(found, runs=(*found.runs, _run(candidate.name, seed, outcome)))
        elif outcome.trial in (BASE_TRIAL, BASE_SELECTION_TRIAL):
            if outcome.evaluation is None:
                raise AllTrialsFailedError(
                    f"the untuned base cannot be evaluated: {outcome.reason}"
                )
            if outcome.trial == BASE_TRIAL:
                found = replace(found, base_evaluation=outcome.evaluation)
            else:
                found = replace(found, base_selection_loss=outcome.evaluation.mean_loss)
        else:
            found = self._with_metrics(found, outcome)
        self._keep(found)
        self._remove_needless_states()
        self._decide_if_done()

    @property
    def decision(self) -> Decision | None:
        """What was decided, None while runs are missing."""
        return self.confirmation.decision

    @property
    def chosen(self) -> Candidate:
        """The candidate to recommend, after the decision."""
        assert self.confirmation.decision is not None
        return self.confirmation.candidate(self.confirmation.decision.chosen)

    @property
    def chosen_folder(self) -> Path:
        """Where the adapter to ship is: of the chosen candidate's median seed, or of its refit."""
        return chosen_folder(self.plan.folder, self.confirmation)

    def planned_steps(self) -> int:
        """Return the optimizer steps of all runs."""
        return sum(candidate.steps for candidate, _ in self._runs.values())

    def finished_steps(self) -> int:
        """Return the optimizer steps of the runs that have ended; one that ended early counts whole."""
        return sum(self.confirmation.candidate(r.candidate).steps for r in self.confirmation.runs)

    @property
    def num_runs(self) -> int:
        """Runs of all candidates and seeds."""
        return len(self._runs)

    def name_of(self, trial: int) -> str:
        """Return what a job is for, by its number, in a few words."""
        if trial in self._runs:
            candidate, seed = self._runs[trial]
            return f"{candidate.name} seed {seed}"
        return f"answers of {self._measured.get(trial) or 'the untuned base'}"

    def config_of(self, trial: int) -> TrialConfig:
        """Return what a job of this stage trains, by its number."""
        candidate, _ = self._runs[trial]
        return candidate.config

    def mark_refit(self) -> None:
        """Record that the shipped adapter was trained once more, on all rows."""
        self._keep(replace(self.confirmation, refit=True))
        self._remove_needless_states()

    def refit_job(self, *, steps: int) -> LaneJob:
        """Return the training of the chosen candidate on other rows; its few evaluated rows mean nothing."""
        decision = self.confirmation.decision
        assert decision is not None
        config = with_fresh_seed(
            self.chosen.config, study_seed=self.plan.study_seed, seed=decision.median_seed
        )
        job = self._evaluation(REFIT_TRIAL, config, steps, "selection")
        return replace(
            job,
            start_step=0,
            hold_step=hold_step_of(steps, self.plan.cooldown_ratio),
            warmup_steps=self.plan.warmup_steps,
            eval_dtype="train",
            eval_rows=1,
            result_folder=self.plan.folder / REFIT_FOLDER,
            state_folder=state_folder(self.plan.folder / REFIT_FOLDER),
            train_split="all",
        )

    def _decide_if_done(self) -> None:
        found = self.confirmation
        if found.decision is None and not self._unfinished(found):
            self._keep(replace(found, decision=self._decide(found)))

    def _missing(self) -> list[LaneJob]:
        found = self.confirmation
        if found.decision is not None:
            return [self._metric_job(number) for number in self._measured if self._asks(number)]
        jobs = [self._run_job(number) for number in self._unfinished_runs(found)]
        if found.base_evaluation is None:
            jobs.append(self._evaluation(BASE_TRIAL, None, 0, "confirmation"))
        if found.base_selection_loss is None:
            job = self._evaluation(BASE_SELECTION_TRIAL, None, 0, "selection")
            jobs.append(replace(job, eval_dtype="train", eval_rows=self.plan.selection_rows))
        return jobs

    def _unfinished_runs(self, found: Confirmation) -> list[int]:
        done = {(run.candidate, run.seed) for run in found.runs}
        return [
            n for n, (candidate, seed) in self._runs.items() if (candidate.name, seed) not in done
        ]

    def _unfinished(self, found: Confirmation) -> bool:
        bare = found.base_evaluation is None or found.base_selection_loss is None
        return bare or bool(self._unfinished_runs(found))

    def _run_job(self, number: int) -> LaneJob:
        candidate, seed = self._runs[number]
        config = with_fresh_seed(candidate.config, study_seed=self.plan.study_seed, seed=seed)
        job = self._evaluation(number, config, candidate.steps, "confirmation")
        folder = run_folder(self.plan.folder, candidate.name, seed)
        return replace(
            job,
            start_step=0,
            hold_step=hold_step_of(candidate.steps, self.plan.cooldown_ratio),
            warmup_steps=self.plan.warmup_steps,
            result_folder=folder,
            state_folder=state_folder(folder),
        )

    def _remove_needless_states(self) -> None:
        """Remove the lane states of runs that are on record, and of candidates that are none any more."""
        folder = self.plan.folder
        unfinished = [self._runs[number] for number in self._unfinished_runs(self.confirmation)]
        needed = {state_folder(run_folder(folder, c.name, seed)) for c, seed in unfinished}
        if not self.confirmation.refit:
            needed.add(state_folder(folder / REFIT_FOLDER))
        for found in set(folder.glob(f"*{STATE_SUFFIX}")) - needed:
            shutil.rmtree(found, ignore_errors=True)

    def _evaluation(
        self, number: int, config: TrialConfig | None, steps: int, split: str
    ) -> LaneJob:
        """Return a job that trains nothing and scores a whole split."""
        return LaneJob(
            trial=number,
            rung=0,
            config=config,
            start_step=steps,
            hold_step=steps,
            end_step=steps,
            warmup_steps=0,
            eval_split=split,
            eval_dtype=self.plan.eval_dtype,
            start_folder=None,
            result_folder=None,
            keep_state=False,
        )

    def _metric_names(self) -> list[str]:
        """Return who is measured beside the loss: each candidate, and as an empty name the untuned base."""
        if not self.plan.metrics:
            return []
        return [*(candidate.name for candidate in self.confirmation.candidates), ""]

    def _asks(self, number: int) -> bool:
        name = self._measured[number]
        if not name:
            return not self.confirmation.base_metrics
        run = self._median_run(name)
        return run is not None and not run.metrics

    def _median_run(self, name: str) -> ConfirmationRun | None:
        decision = self.confirmation.decision
        assert decision is not None
        seeds = {score.candidate: score.median_seed for score in decision.scores}
        return next(
            (run for run in self.confirmation.runs_of(name) if run.seed == seeds.get(name)), None
        )

    def _metric_job(self, number: int) -> LaneJob:
        name = self._measured[number]
        run = self._median_run(name) if name else None
        if run is None:
            job = self._evaluation(number, None, 0, "confirmation")
        else:
            candidate = self.confirmation.candidate(name)
            job = self._evaluation(number, candidate.config, candidate.steps, "confirmation")
            job = replace(job, start_folder=run_folder(self.plan.folder, name, run.seed))
        return replace(job, eval_dtype="train", eval_rows=None, metrics=self.plan.metrics)

    def _with_metrics(self, found: Confirmation, outcome: LaneOutcome) -> Confirmation:
        name = self._measured[outcome.trial]
        if not name:
            return replace(found, base_metrics=outcome.metrics)
        measured = self._median_run(name)
        runs = tuple(
            replace(run, metrics=outcome.metrics) if run == measured else run for run in found.runs
        )
        return replace(found, runs=runs)

    def _decide(self, found: Confirmation) -> Decision:
        seconds = self._step_seconds(found)
        runs = [
            CandidateRuns(
                name=candidate.name,
                evaluations=tuple(run.evaluation for run in found.runs_of(candidate.name)),
                peak_bytes=candidate.predicted_bytes,
                step_s=seconds[candidate.name],
                rank=candidate.config.rank,
                lora_dropout=candidate.config.lora_dropout,
            )
            for candidate in found.candidates
        ]
        if not any(all(run.evaluations) for run in runs):
            reasons = sorted({run.reason for run in found.runs if run.reason})
            raise AllTrialsFailedError(
                f"none of the {len(runs)} candidates came to its end with all fresh seeds: "
                f"{'; '.join(reasons[:3])}. Lower space.learning_rate, or see confirmation.json."
            )
        return decide(
            runs,
            default=found.default,
            practical_margin=self.plan.practical_margin,
            clusters=found.clusters,
            seed=self.plan.study_seed,
        )

    def _step_seconds(self, found: Confirmation) -> dict[str, float]:
        """Return each candidate's seconds a step: what a lane took on average, shared out by operations.

        Lanes that train together take the same time, so a clock cannot tell them apart. A token costs 4
        operations a frozen parameter (forward, and the gradient of activations) and 6 a trained one.
        """
        done = [run for run in found.runs if run.state is TrialState.COMPLETE]
        work = {
            c.name: 4.0 * self.plan.base_parameters + 6.0 * c.trainable_parameters
            for c in found.candidates
        }
        total = sum(work[run.candidate] * found.candidate(run.candidate).steps for run in done)
        wall_s = sum(run.wall_s for run in done)
        return {name: wall_s * share / total if total else 0.0 for name, share in work.items()}

    def _keep(self, found: Confirmation) -> None:
        self._save(found)
        self.confirmation = found


def _go_on(
    plan: ConfirmationPlan,
    candidates: tuple[Candidate, ...],
    default: str | None,
    earlier: Confirmation | None,
) -> Confirmation:
    """Return what is known already: all of it if nothing has changed, else the runs that still count."""
    fresh = Confirmation(
        candidates=candidates, default=default, seeds=plan.seeds, clusters=plan.clusters
    )
    if earlier is None:
        return fresh
    same = (candidates, default, plan.seeds)
    if (earlier.candidates, earlier.default, earlier.seeds) == same:
        return earlier
    known = {candidate.name for candidate in candidates if candidate in earlier.candidates}
    kept = (run for run in earlier.runs if run.candidate in known and run.seed < plan.seeds)
    return replace(
        fresh,
        runs=tuple(replace(run, metrics=()) for run in kept),
        base_evaluation=earlier.base_evaluation,
        base_selection_loss=earlier.base_selection_loss,
        base_metrics=earlier.base_metrics,
    )


def _run(candidate: str, seed: int, outcome: LaneOutcome) -> ConfirmationRun:
    return ConfirmationRun(
        candidate=candidate,
        seed=seed,
        state=outcome.state,
        evaluation=outcome.evaluation,
        reason=outcome.reason,
        wall_s=outcome.wall_s,
        num_tokens=outcome.num_tokens,
        peak_bytes=outcome.peak_bytes,
        pack_lanes=outcome.pack_lanes,
        span=outcome.span,
    )
