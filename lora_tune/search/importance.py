"""How much each searched setting mattered for a good loss at the first rung, with bootstrap intervals.

PED-ANOVA, as Optuna has it: of every setting, how differently its values lie among the best trials and
among all of them (Pearson divergence of two Parzen estimates). It asks what sets good trials apart,
needs the order of the losses alone, and compares with what the sampler tried, so a sampler that
looked mostly where it was good does not count as an effect. Shares add up to 1.

Few trials give shares to settings that did nothing: with pure noise each gets about its part, and the
share of one that matters grows with the number of trials. The interval over resampled trials is for a
study of the same size: it shows how much of a share is the luck of which trials there were.

Source: Watanabe, Bansal, Hutter, PED-ANOVA, IJCAI 2023, arXiv 2304.10255; the percentile bootstrap,
Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lora_tune import records
from lora_tune.search.space import REFERENCE_ALPHA

MIN_TRIALS = 16
"""With a loss at the first rung; below it importances are noise."""

BEST_SHARE = 0.25
LEAST_BEST = 5
"""What counts as good: the best quarter of the trials, and five at least, which Optuna advises."""

RESAMPLES, LEAST_RESAMPLES, MOST_DRAWN = 100, 40, 20_000
"""How often the trials are drawn anew, and, so that large studies do not take long, how many in all."""
_INTERVAL = (2.5, 97.5)  # percent


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingImportance:
    """The share of one setting, with its 95 % interval."""

    setting: str  # "rank", "alpha_ratio", "lora_dropout", "target_set" or "effective_step"
    share: float  # of 1
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """The settings of a study by importance."""

    settings: tuple[SettingImportance, ...]  # the largest share first
    num_trials: int  # with a loss
    num_diverged: int  # counted as worse than all of these
    num_best: int  # what was called good
    first_again: float  # share of the resamples in which the first setting is first again


def setting_importance(
    trials: Sequence[records.TrialRecord], *, seed: int = 0, resamples: int | None = None
) -> Importance | None:
    """Return the importances, None with fewer than 16 results or nothing that varies.

    A trial counts once, by what was really trained; cached ones, which repeat another, do not count.
    Diverged trials count as worse than all others: only the order of losses is looked at.

    Args:
        trials: Of one study.
        seed: Of the resampling: same trials, same intervals.
        resamples: How often the trials are drawn anew; None: 100 times, more than 200 trials less often.
    """
    losses = _losses(trials)
    num_trials = sum(isfinite(loss) for loss in losses.values())
    if num_trials < MIN_TRIALS or len(set(losses.values())) < 2:
        return None
    used = [trial for trial in trials if trial.number in losses]
    values = _values(used)
    if not values:
        return None
    frozen = _frozen(values, [losses[trial.number] for trial in used])
    num_best = max(LEAST_BEST, ceil(BEST_SHARE * len(frozen)))
    shares = _shares(frozen, list(values), num_best)
    if resamples is None:
        resamples = min(RESAMPLES, max(LEAST_RESAMPLES, MOST_DRAWN // len(frozen)))
    draws = np.random.default_rng(seed).integers(len(frozen), size=(resamples, len(frozen)))
    drawn = np.array([_shares([frozen[i] for i in draw], list(values), num_best) for draw in draws])
    low, high = np.percentile(drawn, _INTERVAL, axis=0)
    order = np.argsort(-shares, kind="stable")
    names = list(values)
    return Importance(
        settings=tuple(
            SettingImportance(
                setting=names[i],
                share=float(shares[i]),
                # a resample has fewer different trials, so all of them may lie below the share
                low=float(min(low[i], shares[i])),
                high=float(max(high[i], shares[i])),
            )
            for i in order
        ),
        num_trials=num_trials,
        num_diverged=len(used) - num_trials,
        num_best=num_best,
        first_again=float((drawn.argmax(axis=1) == order[0]).mean()),
    )


def _losses(trials: Sequence[records.TrialRecord]) -> dict[int, float]:
    """Return the losses at the first rung by trial number, infinite for diverged trials."""
    found = {}
    for trial in trials:
        if trial.state is records.TrialState.CACHED:
            continue
        first = next((r.eval_loss for r in trial.rungs if r.rung == 0), None)
        if first is not None and isfinite(first):
            found[trial.number] = first
        elif trial.state is records.TrialState.DIVERGED:
            found[trial.number] = inf
    return found


def _values(trials: Sequence[records.TrialRecord]) -> dict[str, list[float]]:
    """Return the settings that vary, trial by trial: choices by their place, the step as it is."""
    configs = [trial.config for trial in trials]
    steps = [c.learning_rate * c.lora_alpha / REFERENCE_ALPHA for c in configs]
    # a ratio is alpha / rank again, so it is rounded: equal choices must be equal numbers
    ratios = [float(f"{c.lora_alpha / c.rank:.9g}") for c in configs]
    sizes = [len(c.target_modules) for c in configs]
    sets = [(size, c.target_set) for size, c in zip(sizes, configs, strict=True)]
    values = {
        "rank": _places([c.rank for c in configs]),
        "alpha_ratio": _places(ratios),
        "lora_dropout": _places([c.lora_dropout for c in configs]),
        "target_set": _places(sets),
        "effective_step": steps,
    }
    return {name: column for name, column in values.items() if len(set(column)) > 1}


def _places(column: Sequence[object]) -> list[float]:
    order = {value: float(place) for place, value in enumerate(sorted(set(column)))}  # type: ignore[type-var]
    return [order[value] for value in column]


def _frozen(values: dict[str, list[float]], losses: Sequence[float]) -> list[FrozenTrial]:
    """Return the trials as Optuna knows them; a diverged one is a little worse than the worst."""
    worst = max(loss for loss in losses if isfinite(loss))
    spaces = {name: _space(name, column) for name, column in values.items()}
    return [
        _numbered(
            optuna.trial.create_trial(
                params={name: column[i] for name, column in values.items()},
                distributions=spaces,
                value=loss if isfinite(loss) else worst + max(1.0, abs(worst)),
                state=TrialState.COMPLETE,
            ),
            i,
        )
        for i, loss in enumerate(losses)
    ]


def _space(name: str, column: Sequence[float]) -> BaseDistribution:
    if name == "effective_step":
        return FloatDistribution(min(column), max(column), log=True)
    return IntDistribution(0, int(max(column)))


def _numbered(trial: FrozenTrial, number: int) -> FrozenTrial:
    """Return the trial with an identity of its own: the evaluator tells trials apart by it."""
    trial.number = number
    trial._trial_id = number
    return trial


class _Resample:
    """What the evaluator asks of a study. Filling a real one a hundred times would take seconds."""

    directions = (StudyDirection.MINIMIZE,)

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        self._trials = trials

    def get_trials(self, deepcopy: bool, states: object) -> Sequence[FrozenTrial]:
        return self._trials

    def _is_multi_objective(self) -> bool:
        return False


def _shares(trials: Sequence[FrozenTrial], names: Sequence[str], num_best: int) -> np.ndarray:
    """Return each setting's share; equal shares where the trials tell nothing."""
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, num_best / len(trials)))
    with warnings.catch_warnings():
        # a resample may hold one value of a loss alone: then the shares are equal, as is right
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings(
            "ignore", message="Target and region quantiles", category=UserWarning
        )
        found = evaluator.evaluate(_Resample(trials), list(names))
    divergences = np.array([found[name] for name in names])
    total = divergences.sum()
    return divergences / total if total > 0 else np.full(len(names), 1 / len(names))
