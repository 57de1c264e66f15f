"""The anchors: which configurations a study begins with, and that its space has them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_study import RANKS, make_proposer, make_space, new_study

from lora_tune.search.anchors import make_anchors
from lora_tune.search.space import SearchSpace

KNOWN_RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def anchors_of(space: SearchSpace, *, batch: int = 16, rows: int = 5000) -> dict[str, object]:
    found = make_anchors(space, effective_batch_size=batch, num_train=rows)
    return {anchor.name: anchor.params for anchor in found}


def test_the_default_space_has_six_anchors_in_their_order() -> None:
    anchors = anchors_of(make_space())
    assert list(anchors) == ["A1", "A2", "A3", "A4", "A5", "A6"]
    assert [(a.rank, a.target_set, a.lora_dropout) for a in anchors.values()] == [
        (32, "all-linear", 0.0),  # the largest rank that fits the largest set
        (32, "all-linear", 0.0),
        (32, "all-linear", 0.0),
        (8, "all-linear", 0.0),
        (32, "mlp", 0.0),
        (16, "attention-qv", 0.05),
    ]
    steps = [anchor.effective_step for anchor in anchors.values()]
    assert steps == pytest.approx([2e-4, 6e-4, 2e-4 / 3, 2e-4, 2e-4, 2e-4])


def test_alpha_of_an_anchor_is_32_where_the_space_has_the_ratio() -> None:
    space = make_space()
    for anchor in anchors_of(space).values():
        assert space.effective(anchor).lora_alpha == 32


def test_large_batches_begin_with_a_larger_step() -> None:
    assert anchors_of(make_space(), batch=64)["A1"].effective_step == 3e-4


def test_small_data_begin_at_rank_16_or_less() -> None:
    anchors = anchors_of(make_space(), rows=500)
    assert max(anchor.rank for anchor in anchors.values()) == 16


def test_anchors_that_the_bounds_make_equal_are_kept_once() -> None:
    anchors = anchors_of(make_space(learning_rate=[2e-4, 2e-4]))
    assert list(anchors) == ["A1", "A4", "A5", "A6"]


@given(
    ranks=st.sets(st.sampled_from(RANKS)).map(lambda ranks: {1, *ranks}),  # rank 1 fits every set
    ratios=st.one_of(st.none(), st.sets(st.sampled_from(KNOWN_RATIOS), min_size=1)),
    dropouts=st.sets(st.sampled_from((0.0, 0.05, 0.1, 0.3)), min_size=1),
    bounds=st.lists(st.floats(1e-6, 1e-1), min_size=2, max_size=2).map(sorted),
    batch=st.sampled_from((1, 16, 64)),
    rows=st.sampled_from((100, 5000)),
)
def test_every_anchor_is_a_point_of_its_space(
    ranks: set[int],
    ratios: set[float] | None,
    dropouts: set[float],
    bounds: list[float],
    batch: int,
    rows: int,
) -> None:
    keys: dict[str, object] = {"rank": ranks, "lora_dropout": dropouts, "learning_rate": bounds}
    keys |= {"lora_alpha": 32} if ratios is None else {"alpha_ratio": ratios}
    space = make_space(**keys)
    anchors = make_anchors(space, effective_batch_size=batch, num_train=rows)
    assert len({anchor.params for anchor in anchors}) == len(anchors)
    for anchor in anchors:
        params = anchor.params
        assert params.rank in space.ranks
        assert params.lora_dropout in space.dropouts
        assert params.target_set in [target.name for target in space.target_sets]
        assert (params.alpha_ratio is None) == (ratios is None)
        assert space.step_bounds[0] <= params.effective_step <= space.step_bounds[1]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"learning_rate": [2e-4, 2e-4]},
        {"learning_rate": [3e-4, 5e-4]},  # the centre is outside
        {"rank": [8], "alpha_ratio": [1.0], "lora_dropout": [0.3]},
        {"lora_alpha": 16},
    ],
    ids=["default", "one-step", "narrow", "single-values", "fixed-alpha"],
)
def test_optuna_takes_every_anchor_as_it_is(keys: dict[str, object]) -> None:
    # Optuna warns of an enqueued value outside its range and draws another; warnings are errors here.
    space = make_space(**keys)
    anchors = make_anchors(space, effective_batch_size=16, num_train=5000)
    study = new_study()
    proposer = make_proposer(study, space, anchors)
    proposed = [proposer.propose(number) for number in range(len(anchors) + 1)]
    assert proposed[:-1] == [anchor.params for anchor in anchors]
    origins = [proposer.origin(number) for number in range(len(anchors) + 1)]
    assert origins == [*(f"anchor {anchor.name}" for anchor in anchors), "tpe"]
    for trial, anchor in zip(study.get_trials(), anchors, strict=False):
        assert trial.params == space.as_optuna(anchor.params)
