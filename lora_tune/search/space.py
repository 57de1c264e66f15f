"""The search space: what the sampler sees, and what is trained.

Rank, alpha ratio, dropout and target set are ordered, so the sampler sees the index of each choice,
not a category. Learning rate and alpha ratio are rotated: the sampler sees the effective step
``u = learning_rate * lora_alpha / 32`` and the ratio, so that a change of the ratio does not move
the step. Proposals over the memory budget are clamped to the largest rank that fits: the
suggested value stays with the sampler, the effective one is trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_tune.errors import InfeasibleError
from lora_tune.records import SuggestedParams, TargetSet, TrialConfig
from lora_tune.study.spec import SpaceSection

if TYPE_CHECKING:
    import optuna

# The lora_alpha at which the effective step equals the learning rate.
REFERENCE_ALPHA = 32.0


class SearchSpace:
    """The dimensions of a study on one model under one memory budget."""

    def __init__(self, space: SpaceSection, target_sets: Sequence[TargetSet], *, seed: int) -> None:
        self.ranks = tuple(sorted(set(space.rank)))
        self.ratios = (
            None if space.lora_alpha is not None else tuple(sorted(set(space.alpha_ratio)))
        )
        self.fixed_alpha = space.lora_alpha
        self.dropouts = tuple(sorted(set(space.lora_dropout)))
        self.target_sets = tuple(s for s in target_sets if s.max_rank >= self.ranks[0])
        self.sets_that_do_not_fit = tuple(s.name for s in target_sets if s.max_rank < self.ranks[0])
        self.step_bounds = space.learning_rate
        self.use_rslora = space.use_rslora
        self.seed = seed
        if not self.target_sets:
            raise InfeasibleError("no target set of the space fits the memory budget")

    def suggest(self, trial: "optuna.Trial") -> SuggestedParams:
        """Ask the sampler for every dimension, always all of them and in one order."""
        rank = self.ranks[trial.suggest_int("rank_index", 0, len(self.ranks) - 1)]
        ratio = None
        if self.ratios is not None:
            ratio = self.ratios[trial.suggest_int("alpha_ratio_index", 0, len(self.ratios) - 1)]
        dropout = self.dropouts[trial.suggest_int("dropout_index", 0, len(self.dropouts) - 1)]
        index = trial.suggest_int("target_set_index", 0, len(self.target_sets) - 1)
        step = trial.suggest_float("effective_step", *self.step_bounds, log=True)
        return SuggestedParams(
            rank=rank,
            alpha_ratio=ratio,
            lora_dropout=dropout,
            target_set=self.target_sets[index].name,
            effective_step=step,
        )

    def as_optuna(self, params: SuggestedParams) -> dict[str, float]:
        """Return the sampler's own encoding of a configuration, for ``enqueue_trial``.

        Raises:
            ValueError: A value that the space does not have. Optuna would take it with a warning, and
                the trial would no longer belong to the space that the sampler models.
        """
        names = [target.name for target in self.target_sets]
        lowest, highest = self.step_bounds
        if not lowest <= params.effective_step <= highest:
            raise ValueError(f"step {params.effective_step} is outside {lowest} to {highest}")
        encoded: dict[str, float] = {
            "rank_index": _index("rank", self.ranks, params.rank),
            "dropout_index": _index("lora_dropout", self.dropouts, params.lora_dropout),
            "target_set_index": _index("target set", names, params.target_set),
            "effective_step": params.effective_step,
        }
        if self.ratios is not None and params.alpha_ratio is not None:
            encoded["alpha_ratio_index"] = _index("alpha_ratio", self.ratios, params.alpha_ratio)
        return encoded

    def effective(self, params: SuggestedParams) -> TrialConfig:
        """Return what is trained for a proposal: rank clamped, learning rate from the step.

        ``lora_alpha = ratio * effective rank`` and ``learning_rate = 32 * step / lora_alpha``.
        All trials of a study share the seeds, so that they differ by configuration alone.
        """
        target = self.target_set(params.target_set)
        rank = min(params.rank, target.max_rank)
        if params.alpha_ratio is not None:
            alpha = params.alpha_ratio * rank
        else:
            assert self.fixed_alpha is not None
            alpha = self.fixed_alpha
        return TrialConfig(
            rank=rank,
            lora_alpha=alpha,
            lora_dropout=params.lora_dropout,
            target_set=target.name,
            target_modules=target.modules,
            learning_rate=REFERENCE_ALPHA * params.effective_step / alpha,
            use_rslora=self.use_rslora,
            init_seed=self.seed,
            dropout_seed=self.seed,
            data_seed=self.seed,
        )

    def target_set(self, name: str) -> TargetSet:
        """Return the target set of this name."""
        return next(target for target in self.target_sets if target.name == name)

    def nearest_ratio(self, alpha: float, rank: int) -> float | None:
        """Return the ratio of the space nearest, as a factor, to ``alpha / rank``."""
        if self.ratios is None:
            return None
        wanted = alpha / rank
        return min(self.ratios, key=lambda ratio: max(ratio / wanted, wanted / ratio))


def _index(name: str, choices: Sequence[object], value: object) -> int:
    if value not in choices:
        raise ValueError(f"{name} {value} is not in the space: {', '.join(map(str, choices))}")
    return choices.index(value)


def training_key(config: TrialConfig) -> TrialConfig:
    """Return a configuration without its seeds and without its target set's name.

    Two proposals with equal keys are the same training, so the second one is answered from the first.
    """
    return replace(config, target_set="", init_seed=0, dropout_seed=0, data_seed=0)


def describe(params: SuggestedParams) -> Mapping[str, object]:
    """Return a proposal as flat values for Optuna's user attributes."""
    return {
        "rank": params.rank,
        "alpha_ratio": params.alpha_ratio,
        "lora_dropout": params.lora_dropout,
        "target_set": params.target_set,
        "effective_step": params.effective_step,
    }
