"""Importance of settings: a planted effect is found, noise is not called one, repeats change nothing."""

import math
import random
from dataclasses import replace
from statistics import mean

import pytest

from lora_tune.records import (
    EvalResult,
    RungResult,
    SuggestedParams,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.search.importance import MIN_TRIALS, SettingImportance, setting_importance

RANKS = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0, 4.0)
SETS = ("attention", "mlp", "all-linear")


def trials(count: int, loss_of: object, *, seed: int = 0) -> list[TrialRecord]:
    """Return random trials whose loss at the first rung is a function of their configuration."""
    rng = random.Random(seed)
    return [_trial(number, rng, loss_of) for number in range(count)]


def _trial(number: int, rng: random.Random, loss_of: object) -> TrialRecord:
    rank, ratio, name = rng.choice(RANKS), rng.choice(RATIOS), rng.choice(SETS)
    step = math.exp(rng.uniform(math.log(3e-5), math.log(2e-3)))
    config = TrialConfig(
        rank=rank,
        lora_alpha=rank * ratio,
        lora_dropout=rng.choice((0.0, 0.05, 0.1)),
        target_set=name,
        target_modules=tuple(f"{name}.{i}" for i in range(SETS.index(name) + 1)),
        learning_rate=32 * step / (rank * ratio),
    )
    loss = loss_of(config, rng)  # type: ignore[operator]
    result = EvalResult(
        split="selection", loss_sums=(10 * loss,), label_counts=(10,), compute_dtype="float32"
    )
    rung = RungResult(
        rung=0,
        steps=25,
        eval_loss=loss,
        evaluation=result,
        points=(),
        wall_s=1.0,
        num_tokens=10,
        peak_bytes=0,
        pack_lanes=1,
    )
    return TrialRecord(
        number=number,
        state=TrialState.PRUNED,
        origin="random",
        suggested=SuggestedParams(
            rank=rank,
            alpha_ratio=ratio,
            lora_dropout=config.lora_dropout,
            target_set=name,
            effective_step=step,
        ),
        config=config,
        predicted_bytes=1,
        trainable_parameters=1,
        rungs=(rung,),
    )


def by_step(config: TrialConfig, rng: random.Random) -> float:
    step = config.learning_rate * config.lora_alpha / 32
    return 2.0 + math.log10(step / 4e-4) ** 2 + rng.gauss(0, 0.01)


def by_rank(config: TrialConfig, rng: random.Random) -> float:
    return 3.0 - 0.2 * math.log2(config.rank) + rng.gauss(0, 0.01)


def by_targets(config: TrialConfig, rng: random.Random) -> float:
    return 3.0 - 0.2 * SETS.index(config.target_set) + rng.gauss(0, 0.01)


def noise(config: TrialConfig, rng: random.Random) -> float:
    return 2.0 + rng.gauss(0, 0.1)


@pytest.mark.parametrize(
    ("loss_of", "setting"),
    [(by_step, "effective_step"), (by_rank, "rank"), (by_targets, "target_set")],
)
@pytest.mark.parametrize("count", [40, 120])
def test_the_planted_setting_comes_first(loss_of: object, setting: str, count: int) -> None:
    found = setting_importance(trials(count, loss_of))
    assert found is not None
    first = found.settings[0]
    assert first.setting == setting
    assert first.share > 0.5
    assert found.first_again > 0.9
    assert sum(s.share for s in found.settings) == pytest.approx(1.0)
    assert len(found.settings) == 5


def test_the_interval_covers_the_share_that_studies_of_this_size_show() -> None:
    """Witness: the mean share of 40 other studies of 60 trials with the same planted effect."""

    def steps(seed: int, resamples: int) -> SettingImportance:
        found = setting_importance(trials(60, by_step, seed=seed), resamples=resamples)
        assert found is not None
        return next(s for s in found.settings if s.setting == "effective_step")

    truth = mean(steps(1000 + seed, 1).share for seed in range(40))
    small = [steps(seed, 60) for seed in range(12)]
    assert all(s.low <= s.share <= s.high for s in small)
    assert mean(s.high - s.low for s in small) < 0.5, "an interval that says nothing covers too"
    assert sum(s.low <= truth <= s.high for s in small) >= 10


def test_with_noise_alone_no_setting_is_first_for_certain() -> None:
    certain = 0
    for seed in range(5):
        found = setting_importance(trials(60, noise, seed=seed), resamples=40)
        assert found is not None
        certain += found.first_again >= 0.95
    assert certain == 0


def test_too_few_results_give_nothing_and_diverged_trials_are_no_results() -> None:
    enough = trials(MIN_TRIALS, by_step)
    assert setting_importance(enough) is not None
    assert setting_importance(enough[:-1]) is None
    diverged = replace(enough[-1], state=TrialState.DIVERGED, rungs=())
    assert setting_importance([*enough[:-1], diverged]) is None


def test_diverged_trials_count_as_the_worst() -> None:
    """A study in which all losses are noise, but every high step diverged: the step mattered."""
    made = trials(80, noise)
    critical = 4e-4
    cut = [
        replace(t, state=TrialState.DIVERGED, rungs=())
        if t.suggested.effective_step > critical
        else t
        for t in made
    ]
    found = setting_importance(cut)
    assert found is not None
    assert found.num_trials + found.num_diverged == 80
    assert found.settings[0].setting == "effective_step"
    assert found.settings[0].share > 0.5


def test_a_repeat_is_not_counted_twice() -> None:
    made = trials(40, by_step)
    repeats = [
        replace(t, number=100 + t.number, state=TrialState.CACHED, repeats=t.number)
        for t in made[:20]
    ]
    assert setting_importance([*made, *repeats], resamples=20) == setting_importance(
        made, resamples=20
    )


def test_a_setting_that_does_not_vary_has_no_share() -> None:
    made = [
        replace(t, config=replace(t.config, lora_dropout=0.0, lora_alpha=2.0 * t.config.rank))
        for t in trials(40, by_rank)
    ]
    found = setting_importance(made)
    assert found is not None
    names = {s.setting for s in found.settings}
    assert names == {"rank", "target_set", "effective_step"}


def test_equal_losses_say_nothing() -> None:
    assert setting_importance(trials(40, lambda config, rng: 2.0)) is None


def test_the_same_trials_give_the_same_intervals() -> None:
    made = trials(40, by_rank)
    found = setting_importance(made, resamples=20)
    assert setting_importance(made, resamples=20) == found
    assert setting_importance(made, resamples=20, seed=1) != found
