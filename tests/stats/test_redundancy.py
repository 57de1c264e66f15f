"""Redundancy of learning rate and alpha ratio on trials whose losses follow a known law."""

from math import log

import numpy as np
import pytest
from stats_runs import evaluation

from lora_tune.records import (
    RungResult,
    SuggestedParams,
    TrialConfig,
    TrialRecord,
    TrialState,
)
from lora_tune.stats.redundancy import ratio_redundancy


def trial(number, *, rank, step, ratio, loss, state=TrialState.PRUNED, rungs=1):
    """Return a trial that was trained at an effective step and an alpha ratio."""
    alpha = ratio * rank
    result = RungResult(
        rung=0,
        steps=10,
        eval_loss=loss,
        evaluation=evaluation([loss]),
        points=(),
        wall_s=1.0,
        num_tokens=1,
        peak_bytes=1,
        pack_lanes=1,
    )
    config = TrialConfig(
        rank=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_set="attention",
        target_modules=("q",),
        learning_rate=32 * step / alpha,
    )
    return TrialRecord(
        number=number,
        state=state,
        origin="tpe",
        suggested=SuggestedParams(
            rank=rank,
            alpha_ratio=ratio,
            lora_dropout=0.0,
            target_set="attention",
            effective_step=step,
        ),
        config=config,
        predicted_bytes=1,
        trainable_parameters=1,
        rungs=(result,) * rungs,
    )


def study(law, *, trials=24, noise=0.002, seed=0, ranks=(8, 16, 32, 64), ratios=(0.5, 1, 2, 4)):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(trials):
        rank, ratio = int(rng.choice(ranks)), float(rng.choice(ratios))
        step = float(np.exp(rng.uniform(log(3e-5), log(2e-3))))
        loss = law(step, ratio, rank) + rng.normal(0, noise)
        found.append(trial(number, rank=rank, step=step, ratio=ratio, loss=loss))
    return found


def by_step(step, ratio, rank):
    return 2.3 + 0.02 * (log(step) - log(3e-4)) ** 2


def by_both(step, ratio, rank):
    return by_step(step, ratio, rank) + 0.03 * log(ratio)


def test_a_loss_that_follows_the_effective_step_makes_the_ratio_redundant():
    found = ratio_redundancy(study(by_step))
    assert found.num_trials == 24
    assert found.rank + found.step > 0.95
    assert abs(found.ratio) < 0.02
    assert found.p_value > 0.05


def test_a_ratio_that_matters_beyond_the_step_is_seen():
    found = ratio_redundancy(study(by_both))
    assert found.ratio > 0.1
    assert found.p_value < 0.001


def test_p_values_of_a_redundant_ratio_are_as_small_as_chance_makes_them():
    p_values = [ratio_redundancy(study(by_step, seed=seed)).p_value for seed in range(300)]
    assert np.mean([p < 0.1 for p in p_values]) == pytest.approx(0.1, abs=3 * 0.3 / 300**0.5)


def test_a_study_with_one_rank_still_tells():
    found = ratio_redundancy(study(by_step, ranks=(16,)))
    assert found.rank == pytest.approx(0.0, abs=1e-9)
    assert found.step > 0.95


def test_a_study_with_two_ratios_still_tells():
    assert ratio_redundancy(study(by_both, ratios=(1, 2))).p_value < 0.001
    trials = [study(by_step, seed=seed, ratios=(1, 2)) for seed in range(300)]
    p_values = [ratio_redundancy(found).p_value for found in trials]
    assert np.mean([p < 0.1 for p in p_values]) == pytest.approx(0.1, abs=3 * 0.3 / 300**0.5)


@pytest.mark.parametrize(
    "trials",
    [
        study(by_step, trials=11),
        study(by_step, ratios=(1,)),
        study(lambda *_: 2.3, noise=0.0),
        [],
    ],
    ids=["too few", "one ratio", "one loss", "none"],
)
def test_what_does_not_vary_or_is_too_little_tells_nothing(trials):
    assert ratio_redundancy(trials) is None


def test_one_alpha_for_all_is_no_search_of_the_ratio():
    trials = [
        trial(i, rank=r, step=1e-4 * (1 + i), ratio=32 / r, loss=2.0 + 0.1 * (i % 5))
        for i, r in enumerate((4, 8, 16, 32, 64) * 4)
    ]
    assert ratio_redundancy(trials) is None


def test_cached_and_unfinished_trials_are_not_counted():
    trials = study(by_step)
    more = [
        trial(90, rank=8, step=1e-4, ratio=1, loss=9.0, state=TrialState.CACHED),
        trial(91, rank=8, step=1e-4, ratio=1, loss=9.0, state=TrialState.DIVERGED, rungs=0),
    ]
    assert ratio_redundancy(trials + more) == ratio_redundancy(trials)
