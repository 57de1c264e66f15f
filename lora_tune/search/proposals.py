"""The Optuna side of the search: ask, adopt again, tell.

A proposal is a function of (study seed, trial number, results told so far): the sampler is seeded anew
for every trial, so that a study that was interrupted proposes what it would have proposed.
Optuna learns rung-0 values only: mixed fidelities would mislead its model.
"""

import math
import warnings

import numpy as np
import optuna

from lora_tune.records import SuggestedParams, TrialState
from lora_tune.search.anchors import Anchor
from lora_tune.search.space import SearchSpace, describe

VRAM_CONSTRAINT = "vram_excess_bytes"


class Proposer:
    """Asks an Optuna study for configurations and tells it what became of them."""

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        anchors: list[Anchor],
        *,
        sampler: str,
        startup_trials: int,
        seed: int,
    ) -> None:
        self.study = study
        self.space = space
        self.anchors = anchors
        self.sampler = sampler
        self.startup_trials = startup_trials
        self.seed = seed
        self._open: dict[int, optuna.Trial] = {}

    def origin(self, number: int) -> str:
        """Return who proposes this trial: an anchor, or the sampler."""
        return f"anchor {self.anchors[number].name}" if number < len(self.anchors) else self.sampler

    def propose(self, number: int) -> SuggestedParams:
        """Return the configuration of trial ``number``, new or left open by an earlier run.

        Numbers have to be proposed in order.
        """
        self._seed_sampler(number)
        trials = self.study.get_trials(deepcopy=False)
        if number < len(trials) and trials[number].state == optuna.trial.TrialState.RUNNING:
            trial = optuna.Trial(self.study, trials[number]._trial_id)
            self._draw_again(trial, trials[number])
        else:
            if number == len(trials) and number < len(self.anchors):
                self.study.enqueue_trial(self.space.as_optuna(self.anchors[number].params))
            trial = self.study.ask()
        assert trial.number == number, f"proposed {trial.number} for {number}"
        params = self.space.suggest(trial)
        for key, value in describe(params).items():
            trial.set_user_attr(key, value)
        self._open[number] = trial
        return params

    def is_told(self, number: int) -> bool:
        """Return whether Optuna already knows the outcome of this trial."""
        trials = self.study.get_trials(deepcopy=False)
        return number < len(trials) and trials[number].state.is_finished()

    def tell(self, number: int, *, state: TrialState, value: float, vram_excess_bytes: int) -> None:
        """Tell Optuna a trial's rung-0 outcome.

        Args:
            number: The trial.
            state: COMPLETE with the loss; DIVERGED or INFEASIBLE, told as PRUNED with a finite
                penalty as ``value``; FAILED, told as FAIL.
            value: Finite.
            vram_excess_bytes: Peak minus budget; feasible at or below zero.
        """
        assert math.isfinite(value)
        trial = self._open.pop(number, None) or self._adopt(number)
        known = self.study.get_trials(deepcopy=False)[number]  # may be half told: killed in between
        if VRAM_CONSTRAINT not in known.constraints:
            trial.set_constraint(VRAM_CONSTRAINT, float(vram_excess_bytes))
        trial.set_user_attr("state", str(state))
        if state is TrialState.FAILED:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif state in (TrialState.DIVERGED, TrialState.INFEASIBLE):
            if 0 not in known.intermediate_values:
                trial.report(value, step=0)
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(trial, value)

    def _draw_again(self, trial: optuna.Trial, stored: optuna.trial.FrozenTrial) -> None:
        """Bring the sampler to where it was when it had drawn the values that are stored already."""
        for name, distribution in stored.distributions.items():
            if name not in trial.relative_params and not distribution.single():
                self.study.sampler.sample_independent(self.study, stored, name, distribution)

    def _adopt(self, number: int) -> optuna.Trial:
        self._seed_sampler(number)
        return optuna.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)

    def _seed_sampler(self, number: int) -> None:
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        if self.sampler == "random":
            self.study.sampler = optuna.samplers.RandomSampler(seed=seed)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=self.startup_trials, seed=seed
            )
