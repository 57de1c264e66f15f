"""The anchors: which configurations a study begins with, and that its space has them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_study import RANKS, SEED, make_proposer, make_space, new_study, target_sets

from lora_tune.catalog.targets import FAMILIES
from lora_tune.errors import StudyFileError
from lora_tune.records import TrialConfig
from lora_tune.search.anchors import (
    AnchorPlan,
    folklore_default,
    is_folklore,
    make_anchors,
    plan_anchors,
)
from lora_tune.search.space import SearchSpace, training_key
from lora_tune.study.spec import AnchorSection, SpaceSection

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


# The user's own anchors.


def plan_of(space: SearchSpace, *wanted: object) -> AnchorPlan:
    return plan_anchors(space, wanted, effective_batch_size=16, num_train=5000)  # type: ignore[arg-type]


def test_an_empty_list_means_no_anchors() -> None:
    assert plan_of(make_space()) == ((), ())


def test_anchors_are_tried_in_the_order_as_written() -> None:
    own = AnchorSection(rank=8, learning_rate=5e-4)
    plan = plan_of(make_space(), "A4", own, "A1", AnchorSection(lora_dropout=0.1))
    assert [anchor.name for anchor in plan.anchors] == ["A4", "own 1", "A1", "own 2"]


def test_what_an_own_anchor_does_not_give_is_taken_from_a1() -> None:
    space = make_space()
    plan = plan_of(
        space, "A1", AnchorSection(learning_rate=4e-4), AnchorSection(target_modules="mlp")
    )
    first, faster, mlp = (space.effective(anchor.params) for anchor in plan.anchors)
    assert (faster.rank, faster.lora_alpha, faster.target_set) == (32, 32, "all-linear")
    assert faster.learning_rate == pytest.approx(4e-4)
    assert (mlp.rank, mlp.learning_rate, mlp.target_set) == (32, first.learning_rate, "mlp")
    assert plan.notes == ()


def test_values_that_the_space_does_not_have_are_moved_and_a_note_says_so() -> None:
    space = make_space(rank=[4, 16, 64], alpha_ratio=[1, 2], lora_dropout=[0.0, 0.1])
    own = AnchorSection(rank=24, lora_alpha=64, lora_dropout=0.2, learning_rate=1e-4)
    [anchor], [note] = plan_of(space, own)
    config = space.effective(anchor.params)
    assert (config.rank, config.lora_alpha, config.lora_dropout) == (16, 32, 0.1)
    assert config.learning_rate * config.lora_alpha == pytest.approx(64e-4)  # the step stays
    assert note == (
        "search.anchors[0] is moved to the nearest configuration of the space that fits: "
        "rank 24 to 16, lora_alpha 64 to 32, lora_dropout 0.2 to 0.1, learning_rate 0.0001 to 0.0002."
    )


def test_an_own_anchor_over_the_memory_budget_is_lowered_with_a_note() -> None:
    [anchor], [note] = plan_of(make_space(), AnchorSection(rank=128))
    assert anchor.params.rank == 32
    assert "rank 128 to 32" in note


def test_an_own_anchor_that_repeats_another_is_tried_once() -> None:
    [anchor], [note] = plan_of(make_space(), "A1", AnchorSection(rank=32))
    assert anchor.name == "A1"
    assert note == "search.anchors[1] is the same configuration as anchor A1: it is tried once."


def test_a_target_set_that_the_space_does_not_have_is_the_user_s_to_mend() -> None:
    with pytest.raises(StudyFileError) as caught:
        plan_of(make_space(), "A1", AnchorSection(target_modules="atention"))
    assert str(caught.value) == (
        'search.anchors[1].target_modules is "atention", which the space does not have; did you mean '
        "attention? Choose one of: attention-qv, attention, mlp, all-linear; or add it to "
        "space.target_modules."
    )


def test_an_own_anchor_on_a_set_that_does_not_fit_is_left_out_with_a_note() -> None:
    space = SearchSpace(SpaceSection(rank=(64, 128)), target_sets(), seed=0)  # all-linear fits 32
    plan = plan_of(space, AnchorSection(target_modules="all-linear"), "A1")
    assert [anchor.name for anchor in plan.anchors] == ["A1"]
    assert plan.notes == (
        "search.anchors[0] is left out: all-linear does not fit the memory budget.",
    )


# The folklore default.

LLAMA = tuple(
    f"model.layers.{layer}.{block}.{name}"
    for layer in range(2)
    for block, names in (
        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
    )
    for name in names
)


def test_a6_of_the_space_is_the_folklore_default_of_the_model() -> None:
    space = make_space()
    config = space.effective(anchors_of(space)["A6"])  # type: ignore[arg-type]
    assert is_folklore(config)
    alone = folklore_default(model_type="llama", linears=["q_proj", "k_proj", "v_proj"], seed=SEED)
    assert alone == config


@pytest.mark.parametrize(
    "keys",
    [
        {"rank": [8, 32]},
        {"lora_alpha": 16},
        {"alpha_ratio": [1.0]},
        {"lora_dropout": [0.0, 0.1]},
        {"learning_rate": [3e-4, 1e-3]},
        {"use_rslora": True},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_space_that_cannot_express_the_default_has_no_a6_and_says_so(
    keys: dict[str, object],
) -> None:
    space = make_space(**keys)
    plan = plan_of(space, "A1", "A6")
    assert [anchor.name for anchor in plan.anchors] == ["A1"]
    [note] = plan.notes
    assert note.startswith("anchor A6, the default that gains are measured against")
    assert note.endswith("is not in the space: it is trained in the confirmation alone.")


def test_only_the_folklore_default_is_called_so() -> None:
    config = folklore_default(model_type="llama", linears=LLAMA, seed=0)
    assert config is not None
    assert is_folklore(config)
    changes: list[dict[str, object]] = [
        {"rank": 8},
        {"lora_alpha": 16.0},
        {"lora_dropout": 0.0},
        {"learning_rate": 3e-4},
        {"use_rslora": True},
        {"target_modules": LLAMA},
    ]
    for change in changes:
        assert not is_folklore(TrialConfig(**{**_values(config), **change})), change  # type: ignore[arg-type]
    assert is_folklore(TrialConfig(**{**_values(config), "data_seed": 7}))  # type: ignore[arg-type]


def _values(config: TrialConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in TrialConfig.__dataclass_fields__}


def test_the_default_has_q_and_v_of_every_layer() -> None:
    config = folklore_default(model_type="llama", linears=LLAMA, seed=3)
    assert config is not None
    assert config.target_set == "attention-qv"
    assert [name.rpartition(".")[2] for name in config.target_modules] == ["q_proj", "v_proj"] * 2
    assert {config.init_seed, config.dropout_seed, config.data_seed} == {3}


@pytest.mark.parametrize(
    ("model_type", "fused"),
    [("phi3", "qkv_proj"), ("gpt_neox", "query_key_value"), ("gpt2", "attn.c_attn")],
)
def test_where_query_key_and_value_are_fused_the_default_adapts_that_layer(
    model_type: str, fused: str
) -> None:
    family = FAMILIES[model_type]
    linears = [f"h.{n}.{s}" for n in range(2) for s in (*family.attention, *family.mlp)]
    config = folklore_default(model_type=model_type, linears=linears, seed=0)
    assert config is not None
    assert config.target_modules == (f"h.0.{fused}", f"h.1.{fused}")
    assert config.target_set == fused
    assert is_folklore(config)


def test_the_default_leaves_vision_towers_alone() -> None:
    tower = [f"vision_tower.{name}" for name in LLAMA]
    config = folklore_default(model_type="gemma3", linears=[*tower, *LLAMA], seed=0)
    assert config is not None
    assert all(name in LLAMA for name in config.target_modules)


def test_the_default_s_rank_is_halved_until_it_fits_and_alpha_and_rate_stay() -> None:
    config = folklore_default(
        model_type="llama", linears=LLAMA, seed=0, fits=lambda config: config.rank <= 5
    )
    assert config is not None
    assert (config.rank, config.lora_alpha, config.learning_rate) == (4, 32, 2e-4)
    assert is_folklore(config, rank=4)
    assert not is_folklore(config)
    nothing_fits = folklore_default(
        model_type="llama", linears=LLAMA, seed=0, fits=lambda config: False
    )
    assert nothing_fits is None


def test_a_model_without_such_layers_has_no_default() -> None:
    linears = ["layers.0.mixer.in_proj", "layers.0.mixer.out_proj"]
    assert folklore_default(model_type="mamba", linears=linears, seed=0) is None


def test_a_training_key_tells_trainings_apart_and_not_seeds() -> None:
    config = folklore_default(model_type="llama", linears=LLAMA, seed=0)
    assert config is not None
    same = TrialConfig(
        **{
            **_values(config),
            "init_seed": 1,
            "dropout_seed": 2,
            "data_seed": 3,
            "target_set": "q+v",
        }  # type: ignore[arg-type]
    )
    assert training_key(same) == training_key(config)
    for name, value in _values(config).items():
        if name.endswith("_seed") or name == "target_set":
            continue
        other = {"use_rslora": True, "target_modules": ("x",)}.get(name, 7)
        changed = TrialConfig(**{**_values(config), name: other})  # type: ignore[arg-type]
        assert value != other
        assert training_key(changed) != training_key(config), name
