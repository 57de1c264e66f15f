"""The search space: what Optuna sees, what is trained, and how the two are tied together."""

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_study import (
    BUDGET_BYTES,
    RANKS,
    SEED,
    make_space,
    needed_bytes,
    new_study,
    predict,
    suggestion,
    target_sets,
)

from lora_tune.errors import InfeasibleError
from lora_tune.records import SuggestedParams
from lora_tune.search.space import SearchSpace
from lora_tune.study.spec import SpaceSection

FIVE = {"rank_index", "alpha_ratio_index", "dropout_index", "target_set_index", "effective_step"}

proposals = st.builds(
    SuggestedParams,
    rank=st.sampled_from(RANKS),
    alpha_ratio=st.sampled_from((0.25, 0.5, 1.0, 2.0, 4.0, 8.0)),
    lora_dropout=st.sampled_from((0.0, 0.05, 0.1)),
    target_set=st.sampled_from(("attention-qv", "attention", "mlp", "all-linear")),
    effective_step=st.floats(3e-5, 2e-3),
)


def test_the_sampler_sees_all_five_dimensions() -> None:
    trial = new_study().ask()
    make_space().suggest(trial)
    assert trial.params.keys() == FIVE


def test_a_fixed_alpha_leaves_four_dimensions() -> None:
    space = make_space(lora_alpha=32)
    trial = new_study().ask()
    params = space.suggest(trial)
    assert trial.params.keys() == FIVE - {"alpha_ratio_index"}
    assert params.alpha_ratio is None
    config = space.effective(params)
    assert config.lora_alpha == 32
    assert config.learning_rate == params.effective_step


def test_a_space_of_single_values_is_still_recorded_whole() -> None:
    single = SpaceSection(
        rank=(8,), alpha_ratio=(2.0,), lora_dropout=(0.0,), learning_rate=(1e-4, 1e-4)
    )
    space = SearchSpace(single, target_sets()[:1], seed=0)
    trial = new_study().ask()
    params = space.suggest(trial)
    assert trial.params.keys() == FIVE
    assert (params.rank, params.effective_step) == (8, 1e-4)


@given(proposals)
def test_learning_rate_times_alpha_gives_back_the_effective_step(params: SuggestedParams) -> None:
    config = make_space().effective(params)
    assert config.learning_rate * config.lora_alpha / 32 == pytest.approx(
        params.effective_step, rel=1e-15 * 4
    )
    assert config.lora_alpha == params.alpha_ratio * config.rank


@given(proposals)
def test_no_trained_configuration_is_over_the_budget(params: SuggestedParams) -> None:
    config = make_space().effective(params)
    assert predict(config)[0] <= BUDGET_BYTES
    if needed_bytes(params.rank, len(config.target_modules)) <= BUDGET_BYTES:
        assert config.rank == params.rank  # what fits is trained as proposed


@given(st.sampled_from((0.25, 0.5, 1.0, 2.0, 4.0, 8.0)), st.sampled_from(RANKS))
def test_a_change_of_the_ratio_does_not_move_the_step(ratio: float, rank: int) -> None:
    space = make_space()
    one = space.effective(suggestion(rank=rank, alpha_ratio=ratio))
    other = space.effective(suggestion(rank=rank, alpha_ratio=1.0))
    assert one.learning_rate * one.lora_alpha == pytest.approx(
        other.learning_rate * other.lora_alpha, rel=1e-14
    )


def test_a_clamp_lowers_the_rank_and_keeps_ratio_and_step() -> None:
    config = make_space().effective(suggestion(rank=128, target_set="all-linear"))
    assert config.rank == 32
    assert config.lora_alpha == 64
    assert config.learning_rate == pytest.approx(1.5e-4)


@given(proposals)
def test_the_sampler_s_encoding_reads_back_as_the_same_proposal(params: SuggestedParams) -> None:
    space = make_space()
    trial = optuna.trial.FixedTrial(space.as_optuna(params))
    assert space.suggest(trial) == params


def test_choices_are_in_rising_order_and_without_repetition() -> None:
    space = make_space(rank=[64, 4, 64, 16], alpha_ratio=[2, 1, 2], lora_dropout=[0.1, 0.0, 0.1])
    assert space.ranks == (4, 16, 64)
    assert space.ratios == (1.0, 2.0)
    assert space.dropouts == (0.0, 0.1)


def test_all_trials_share_the_study_s_seeds() -> None:
    space = make_space()
    seeds = {
        (config.init_seed, config.dropout_seed, config.data_seed)
        for config in (space.effective(suggestion(rank=rank)) for rank in RANKS)
    }
    assert seeds == {(SEED, SEED, SEED)}


def test_sets_that_do_not_fit_at_the_smallest_rank_are_not_offered() -> None:
    space = SearchSpace(SpaceSection(rank=(64, 128)), target_sets(), seed=0)
    assert [target.name for target in space.target_sets] == ["attention-qv", "attention", "mlp"]


def test_a_space_in_which_nothing_fits_is_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="no target set of the space fits the memory budget"):
        SearchSpace(SpaceSection(rank=(256,)), target_sets(), seed=0)


@pytest.mark.parametrize(
    ("alpha", "rank", "ratio"), [(32, 128, 0.25), (32, 4, 8.0), (32, 16, 2.0), (32, 1, 8.0)]
)
def test_the_nearest_ratio_is_nearest_as_a_factor(alpha: float, rank: int, ratio: float) -> None:
    assert make_space().nearest_ratio(alpha, rank) == ratio
