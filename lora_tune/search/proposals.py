"""The Optuna side of the search: ask, tell, and go on with what an interrupted study left.

A proposal is a function of (study seed, trial number, results told so far, proposals in flight): the
sampler is seeded anew for every trial and draws in a copy of the study. What it drew is put into the
study in one write, as an enqueued trial, so that a study that was interrupted at any write goes on with
the same values. Optuna learns rung-0 values only: mixed fidelities would mislead its model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice

import numpy as np
import optuna

from lora_tune.records import SuggestedParams, TrialState
from lora_tune.search.anchors import Anchor
from lora_tune.search.grid import grid_cells
from lora_tune.search.line_search import next_step
from lora_tune.search.space import SearchSpace, describe, training_key

VRAM_CONSTRAINT = "vram_excess_bytes"
LINE_SEARCH_EVERY = 6  # proposals after the anchors
LINE_SEARCH = "line search"
# These learn from what is told. `random` and `grid` are what their names say: without a line search of ours.
MODELS = ("tpe", "gp")


def proposal_window(lanes: int) -> int:
    """Return the window of a study: trial n is proposed from the results of trials 0 to n - window.

    It is half as many again as there are lanes, of all workers: one that ends early leaves no slot idle.
    """
    return lanes + max(1, lanes // 2)


class Proposer:
    """Asks an Optuna study for configurations and tells it what became of them."""

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        anchors: Sequence[Anchor],
        *,
        sampler: str,
        startup_trials: int,
        seed: int,
    ) -> None:
        """Keep what proposals depend on.

        Args:
            study: One objective, minimized; in-memory or in a database.
            space: The search space, with what fits.
            anchors: Configurations to begin with.
            sampler: ``tpe``, ``gp``, ``random`` or ``grid``.
            startup_trials: Results, those of anchors counted in, before ``tpe`` and ``gp`` model them.
            seed: Of the study.
        """
        self.study = study
        self.space = space
        self.anchors = list(anchors)
        self.sampler = sampler
        self.startup_trials = startup_trials
        self.seed = seed
        self._open: dict[int, optuna.Trial] = {}
        self._cells: list[SuggestedParams] = []
        if sampler == "gp":
            _import_gp()

    def origin(self, number: int) -> str:
        """Return who proposed this trial: ``anchor A1``, ``line search`` or the sampler's name."""
        trials = self.study.get_trials(deepcopy=False)
        return str(trials[number].user_attrs["origin"])

    def propose(self, number: int, *, step_only: bool = False) -> SuggestedParams:
        """Return the configuration of trial ``number``, new or left open by an earlier run.

        Numbers have to be proposed in order. After the anchors every sixth proposal of ``tpe`` and
        ``gp`` is the best trial told so far with the effective step 1.6 times higher or lower.

        Args:
            number: The trial.
            step_only: Propose such a step in any case, if there is a best trial and a step not yet tried.
        """
        trials = self.study.get_trials(deepcopy=False)
        if number == len(trials):
            origin, params = self._choose(number, trials, step_only=step_only)
            self._enqueue(params, origin)
            trial = self.study.ask()
        elif trials[number].state is optuna.trial.TrialState.RUNNING:
            trial = optuna.Trial(self.study, trials[number]._trial_id)
        else:  # enqueued, and the process was killed before it asked
            trial = self.study.ask()
        assert trial.number == number, f"proposed {trial.number} for {number}"
        self._open[number] = trial
        return self.space.suggest(trial)

    def adopt(self, number: int, params: SuggestedParams, *, origin: str) -> None:
        """Put a proposal that is on record into a study that has lost it, as the next trial.

        Raises:
            ValueError: The space does not have it.
        """
        self._enqueue(params, origin)
        trial = self.study.ask()
        assert trial.number == number, f"adopted {number} as {trial.number}"
        self.space.suggest(trial)

    def _enqueue(self, params: SuggestedParams, origin: str) -> None:
        self.study.enqueue_trial(
            self.space.as_optuna(params), user_attrs={**describe(params), "origin": origin}
        )

    def is_told(self, number: int) -> bool:
        """Return whether Optuna already knows the outcome of this trial."""
        trials = self.study.get_trials(deepcopy=False)
        return number < len(trials) and trials[number].state.is_finished()

    def tell(
        self,
        number: int,
        *,
        state: TrialState,
        value: float,
        vram_excess_bytes: int,
        facts: Mapping[str, str | int | float] | None = None,
    ) -> None:
        """Tell Optuna a trial's rung-0 outcome.

        Args:
            number: The trial.
            state: COMPLETE with the loss, CACHED with what the earlier trial was told; DIVERGED or
                INFEASIBLE, told as PRUNED with a finite penalty as ``value`` (as COMPLETE to ``gp``,
                which learns from nothing else); FAILED, told as FAIL.
            value: Finite.
            vram_excess_bytes: Peak minus budget; feasible at or below zero.
            facts: What a person who looks at the database should find beside it, by name.
        """
        assert math.isfinite(value)
        known = self.study.get_trials(deepcopy=False)[number]  # may be half told: killed in between
        trial = self._open.pop(number, None) or optuna.Trial(self.study, known._trial_id)
        if VRAM_CONSTRAINT not in known.constraints:
            trial.set_constraint(VRAM_CONSTRAINT, float(vram_excess_bytes))
        for name, fact in {**(facts or {}), "state": str(state)}.items():
            trial.set_user_attr(name, fact)
        if state is TrialState.FAILED:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif state in (TrialState.DIVERGED, TrialState.INFEASIBLE) and self.sampler != "gp":
            if 0 not in known.intermediate_values:
                trial.report(value, step=0)
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(trial, value)

    def _choose(
        self, number: int, trials: list[optuna.trial.FrozenTrial], *, step_only: bool
    ) -> tuple[str, SuggestedParams]:
        """Return who proposes the next trial, and what."""
        if number < len(self.anchors):
            return f"anchor {self.anchors[number].name}", self.anchors[number].params
        after = number - len(self.anchors) + 1
        regular = self.sampler in MODELS and after % LINE_SEARCH_EVERY == 0
        if (step_only or regular) and (params := self._step_of_best(trials)) is not None:
            return LINE_SEARCH, params
        if self.sampler == "grid":
            if (cell := self._next_cell(trials)) is not None:
                return "grid", cell
            return "random", self._draw(number, trials)  # the grid is exhausted
        return self.sampler, self._draw(number, trials)

    def _step_of_best(self, trials: list[optuna.trial.FrozenTrial]) -> SuggestedParams | None:
        """Return the best trial with another effective step; None without a best trial or such a step."""
        trained = [
            trial for trial in trials if trial.user_attrs.get("state") == TrialState.COMPLETE
        ]
        if not trained:
            return None
        best = min(trained, key=lambda trial: (trial.value, trial.number))
        searches = sum(trial.user_attrs.get("origin") == LINE_SEARCH for trial in trials)
        return next_step(
            self.space,
            self.space.suggest(best),
            [self.space.suggest(trial) for trial in trials],
            upward=searches % 2 == 0,
        )

    def _next_cell(self, trials: list[optuna.trial.FrozenTrial]) -> SuggestedParams | None:
        """Return the first cell of the grid that no earlier proposal has trained; None after the last."""
        proposed = {
            training_key(self.space.effective(self.space.suggest(trial))) for trial in trials
        }
        for cell in self._first_cells(len(proposed) + 1):
            if training_key(self.space.effective(cell)) not in proposed:
                return cell
        return None

    def _first_cells(self, count: int) -> list[SuggestedParams]:
        self._cells += islice(self._grid, max(0, count - len(self._cells)))
        return self._cells[:count]

    @cached_property
    def _grid(self) -> Iterator[SuggestedParams]:
        return grid_cells(self.space, seed=self.seed)

    def _draw(self, number: int, trials: list[optuna.trial.FrozenTrial]) -> SuggestedParams:
        """Return what the sampler proposes after these trials; the study itself is not changed."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        copy = optuna.create_study(
            storage=optuna.storages.InMemoryStorage(), sampler=self._make_sampler(seed)
        )
        if self.sampler in MODELS:
            copy.add_trials(trials)
        return self.space.suggest(copy.ask())

    def _make_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        if self.sampler == "tpe":
            return optuna.samplers.TPESampler(n_startup_trials=self.startup_trials, seed=seed)
        if self.sampler == "gp":
            return optuna.samplers.GPSampler(n_startup_trials=self.startup_trials, seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)


def _import_gp() -> None:
    """Have Optuna import what its Gaussian process needs, which it does at the first proposal.

    It keeps the error of an import that fails there (greenlet is optional), and with it the frames of
    that proposal and all their tensors for good. Here these are of a model of one trial. Optuna's word on
    greenlet, a warning of slower proposals, is no concern of a study's.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(sampler=optuna.samplers.GPSampler(n_startup_trials=1, seed=0))
        for value in (0.0, 1.0):
            trial = study.ask()
            trial.suggest_float("x", 0.0, 1.0)
            study.tell(trial, value)
    finally:
        optuna.logging.set_verbosity(verbosity)
