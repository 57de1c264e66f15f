"""Proposals against a real Optuna study: what it is told, and that a killed process changes nothing."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_study import (
    RANKS,
    SEED,
    Killed,
    make_proposer,
    make_space,
    new_study,
    suggestion,
)

from lora_tune.records import SuggestedParams, TrialState
from lora_tune.search.anchors import make_anchors
from lora_tune.search.grid import grid_cells, step_ladder
from lora_tune.search.line_search import next_step
from lora_tune.search.proposals import LINE_SEARCH, VRAM_CONSTRAINT, Proposer
from lora_tune.search.space import training_key

OPTUNA = optuna.trial.TrialState
SAMPLERS = ("tpe", "gp", "random", "grid")


def proposer_of(study: optuna.Study, **keys: Any) -> Proposer:
    space = make_space()
    anchors = make_anchors(space, effective_batch_size=16, num_train=5000)[:2]
    return make_proposer(study, space, anchors, **keys)


def loss_of(params: SuggestedParams) -> float:
    return 2.0 + math.log10(params.effective_step / 2e-4) ** 2 + 1 / params.rank


def propose_and_tell(proposer: Proposer, count: int) -> list[SuggestedParams]:
    found = []
    for number in range(count):
        params = proposer.propose(number)
        proposer.tell(
            number, state=TrialState.COMPLETE, value=loss_of(params), vram_excess_bytes=-1
        )
        found.append(params)
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_proposes_the_same(sampler: str) -> None:
    first = propose_and_tell(proposer_of(new_study(), sampler=sampler), 8)
    again = propose_and_tell(proposer_of(new_study(), sampler=sampler), 8)
    other = propose_and_tell(proposer_of(new_study(), sampler=sampler, seed=SEED + 1), 8)
    assert first == again
    assert first[:2] == other[:2]  # the anchors do not depend on the seed
    assert first[2:] != other[2:]


TENSORS_OF_A_PROPOSAL = """
import gc, sys
sys.path.insert(0, sys.argv[1])
import torch
from table_study import new_study
from test_proposals import propose_and_tell, proposer_of

def held():
    gc.collect()
    return sum(type(found) is torch.Tensor for found in gc.get_objects())

proposer = proposer_of(new_study(), sampler="gp", startup_trials=4)
before = held()
propose_and_tell(proposer, 7)
print(held() - before)
"""


def test_proposals_of_a_gaussian_process_leave_no_tensors_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TENSORS_OF_A_PROPOSAL, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0
    assert "greenlet" not in done.stderr


def test_a_global_random_state_has_no_say() -> None:
    import random

    import numpy as np

    random.seed(1)
    np.random.seed(1)
    first = propose_and_tell(proposer_of(new_study()), 8)
    random.seed(2)
    np.random.seed(2)
    assert propose_and_tell(proposer_of(new_study()), 8) == first


def test_a_proposal_depends_on_what_was_told() -> None:
    def after(value: Callable[[SuggestedParams], float]) -> list[SuggestedParams]:
        proposer = proposer_of(new_study(), startup_trials=4)
        found = []
        for number in range(12):
            params = proposer.propose(number)
            state = TrialState.COMPLETE
            proposer.tell(number, state=state, value=value(params), vram_excess_bytes=-1)
            found.append(params)
        return found

    up, down = after(loss_of), after(lambda params: 10 - loss_of(params))
    assert up[:4] == down[:4]
    assert up[4:] != down[4:]


def test_the_sampler_s_own_values_stay_with_the_trial() -> None:
    study = new_study()
    proposer = proposer_of(study)
    params = [proposer.propose(number) for number in range(3)][2]
    attrs = study.get_trials()[2].user_attrs
    assert attrs == {
        "rank": params.rank,
        "alpha_ratio": params.alpha_ratio,
        "lora_dropout": params.lora_dropout,
        "target_set": params.target_set,
        "effective_step": params.effective_step,
        "origin": "tpe",
    }


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (TrialState.COMPLETE, OPTUNA.COMPLETE),
        (TrialState.CACHED, OPTUNA.COMPLETE),
        (TrialState.DIVERGED, OPTUNA.PRUNED),
        (TrialState.INFEASIBLE, OPTUNA.PRUNED),
        (TrialState.FAILED, OPTUNA.FAIL),
    ],
)
def test_states_are_told_in_optuna_s_words(state: TrialState, told: OPTUNA) -> None:
    study = new_study()
    proposer = proposer_of(study)
    proposer.propose(0)
    assert not proposer.is_told(0)
    proposer.tell(0, state=state, value=2.5, vram_excess_bytes=7)
    assert proposer.is_told(0)
    [trial] = study.get_trials()
    assert trial.state is told
    assert trial.constraints == {VRAM_CONSTRAINT: 7.0}
    assert trial.user_attrs["state"] == str(state)
    assert trial.value == (None if state is TrialState.FAILED else 2.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.DIVERGED])
def test_a_value_that_is_not_finite_is_never_told(value: float, state: TrialState) -> None:
    study = new_study()
    proposer = proposer_of(study)
    proposer.propose(0)
    with pytest.raises(AssertionError):
        proposer.tell(0, state=state, value=value, vram_excess_bytes=0)
    assert study.get_trials()[0].state is OPTUNA.RUNNING


class FailingStorage(optuna.storages.InMemoryStorage):  # type: ignore[misc]
    """A storage whose process is killed just before its n-th write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.killed_at: int | None = None

    def _count(self) -> None:
        if self.writes == self.killed_at:
            raise Killed
        self.writes += 1

    def create_new_trial(self, *args: Any, **kwargs: Any) -> int:
        self._count()
        return int(super().create_new_trial(*args, **kwargs))

    def set_trial_param(self, *args: Any, **kwargs: Any) -> None:
        self._count()
        super().set_trial_param(*args, **kwargs)

    def set_trial_state_values(self, *args: Any, **kwargs: Any) -> bool:
        self._count()
        return bool(super().set_trial_state_values(*args, **kwargs))

    def set_trial_intermediate_value(self, *args: Any, **kwargs: Any) -> None:
        self._count()
        super().set_trial_intermediate_value(*args, **kwargs)

    def set_trial_user_attr(self, *args: Any, **kwargs: Any) -> None:
        self._count()
        super().set_trial_user_attr(*args, **kwargs)

    def set_trial_system_attr(self, *args: Any, **kwargs: Any) -> None:
        self._count()
        super().set_trial_system_attr(*args, **kwargs)


def go_on(study: optuna.Study, count: int, sampler: str) -> list[SuggestedParams]:
    """Propose and tell as a process does that finds the study as it is; every third diverges."""
    proposer = proposer_of(study, startup_trials=3, sampler=sampler)
    found = []
    for number in range(count):
        if proposer.is_told(number):
            found.append(proposer.space.suggest(study.get_trials()[number]))
            continue
        params = proposer.propose(number)
        diverged = number % 3 == 2
        proposer.tell(
            number,
            state=TrialState.DIVERGED if diverged else TrialState.COMPLETE,
            value=9.0 if diverged else loss_of(params),
            vram_excess_bytes=-5,
        )
        found.append(params)
    return found


@pytest.mark.parametrize(
    ("sampler", "count", "first_write"),
    [("tpe", 8, 0), ("gp", 4, 24), ("random", 4, 0), ("grid", 4, 0)],  # gp models from write 30 on
)
def test_a_process_killed_before_any_write_of_optuna_s_changes_no_proposal(
    sampler: str, count: int, first_write: int
) -> None:
    storage = FailingStorage()
    whole = go_on(new_study(storage), count, sampler)
    wanted = [(t.params, t.values, t.constraints) for t in new_study(storage).get_trials()]
    assert storage.writes > first_write + 12
    for write in range(first_write, storage.writes):
        broken = FailingStorage()
        broken.killed_at = write
        with pytest.raises(Killed):
            go_on(new_study(broken), count, sampler)
        broken.killed_at = None
        assert go_on(new_study(broken), count, sampler) == whole, f"killed before write {write}"
        trials = new_study(broken).get_trials()
        assert [(t.params, t.values, t.constraints) for t in trials] == wanted, f"write {write}"
        origins = [t.user_attrs["origin"] for t in trials]
        assert origins == ["anchor A1", "anchor A2", *[sampler] * (count - 3), origins[-1]]


# The line search.


def test_every_sixth_proposal_of_a_model_is_the_best_with_another_step() -> None:
    study = new_study()
    proposer = proposer_of(study)
    found = propose_and_tell(proposer, 20)
    assert [n for n in range(20) if proposer.origin(n) == LINE_SEARCH] == [7, 13, 19]
    for number in (7, 13, 19):
        best = min(found[:number], key=loss_of)
        params = found[number]
        assert (params.rank, params.alpha_ratio) == (best.rank, best.alpha_ratio)
        assert (params.lora_dropout, params.target_set) == (best.lora_dropout, best.target_set)
        factor = params.effective_step / best.effective_step
        assert max(factor, 1 / factor) == pytest.approx(1.6) or params.effective_step in (
            proposer.space.step_bounds
        )


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_yardsticks_have_no_line_search(sampler: str) -> None:
    proposer = proposer_of(new_study(), sampler=sampler)
    propose_and_tell(proposer, 14)
    assert {proposer.origin(number) for number in range(2, 14)} == {sampler}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_alone_can_be_asked_for_at_any_time(sampler: str) -> None:
    proposer = proposer_of(new_study(), sampler=sampler)
    found = propose_and_tell(proposer, 3)
    params = proposer.propose(3, step_only=True)
    assert proposer.origin(3) == LINE_SEARCH
    best = min(found, key=loss_of)
    assert params.effective_step != best.effective_step
    assert params.rank == best.rank


def test_without_a_best_trial_the_sampler_proposes_instead_of_a_step() -> None:
    proposer = proposer_of(new_study())
    for number in range(3):
        proposer.propose(number)
        proposer.tell(number, state=TrialState.DIVERGED, value=9.0, vram_excess_bytes=-1)
    proposer.propose(3, step_only=True)
    assert proposer.origin(3) == "tpe"


@given(
    step=st.floats(3e-5, 2e-3),
    others=st.lists(st.floats(3e-5, 2e-3), max_size=6),
    upward=st.booleans(),
)
def test_a_line_search_tries_new_steps_within_the_bounds_and_ends(
    step: float, others: list[float], upward: bool
) -> None:
    space = make_space()
    best = suggestion(effective_step=step)
    tried = [best, *(suggestion(effective_step=other) for other in others)]
    for _ in range(20):
        params = next_step(space, best, tried, upward=upward)
        if params is None:
            return
        assert params.effective_step not in [other.effective_step for other in tried]
        assert space.step_bounds[0] <= params.effective_step <= space.step_bounds[1]
        tried.append(params)
    pytest.fail("the steps around one configuration never end")


def test_the_untried_side_comes_first_and_then_a_finer_factor() -> None:
    space = make_space()
    best = suggestion(effective_step=3e-4)
    other_rank = suggestion(effective_step=3e-4 / 1.6, rank=8)
    tried = [best, suggestion(effective_step=3e-4 * 1.6), other_rank]
    found = []
    while (params := next_step(space, best, tried, upward=True)) is not None:
        found.append(params.effective_step / 3e-4)
        tried.append(params)
    assert found[:3] == pytest.approx([1 / 1.6, 1.6**0.5, 1.6**-0.5])


def test_ranks_that_a_clamp_makes_equal_share_a_line() -> None:
    space = make_space()
    best = suggestion(effective_step=3e-4, rank=32, target_set="all-linear")
    clamped = suggestion(effective_step=3e-4 * 1.6, rank=128, target_set="all-linear")
    params = next_step(space, best, [best, clamped], upward=True)
    assert params is not None
    assert params.effective_step < 3e-4


# The grid.


def test_a_grid_has_every_cell_once_and_only_what_is_different_once_trained() -> None:
    space = make_space(rank=[16, 32, 64, 128], alpha_ratio=[1, 2], lora_dropout=[0])
    cells = list(grid_cells(space, seed=1))
    keys = [training_key(space.effective(cell)) for cell in cells]
    assert len(set(keys)) == len(keys)
    steps = step_ladder(*space.step_bounds)
    wanted = {
        (min(rank, target.max_rank), ratio, target.name, step)
        for rank in space.ranks
        for ratio in (1.0, 2.0)
        for target in space.target_sets
        for step in steps
    }
    assert {(c.rank, c.alpha_ratio, c.target_set, c.effective_step) for c in cells} == wanted


@pytest.mark.parametrize("seed", range(5))
def test_a_grid_that_is_cut_short_has_met_every_choice_about_equally_often(seed: int) -> None:
    cells = list(grid_cells(make_space(), seed=seed))[:60]
    for value in ("effective_step", "lora_dropout", "alpha_ratio", "target_set"):
        seen = [getattr(cell, value) for cell in cells]
        counts = [seen.count(choice) for choice in set(seen)]
        assert max(counts) <= 2 * min(counts), value
    first = [cell.effective_step for cell in cells[:5]]
    assert len(set(first)) == 5  # every step once before any twice
    assert {cell.rank for cell in cells} == set(RANKS)


def test_a_grid_skips_what_anchors_have_trained_and_goes_on_at_random_when_exhausted() -> None:
    space = make_space(
        rank=[8],
        alpha_ratio=[4],
        lora_dropout=[0],
        target_modules=["mlp"],
        learning_rate=[2e-4, 6e-4],
    )
    anchors = make_anchors(space, effective_batch_size=16, num_train=5000)[
        :2
    ]  # both ends of the ladder
    proposer = make_proposer(new_study(), space, anchors, sampler="grid")
    found = propose_and_tell(proposer, 10)
    origins = [proposer.origin(number) for number in range(10)]
    num_cells = 4 * 2  # target sets and steps
    assert origins == ["anchor A1", "anchor A2", *["grid"] * (num_cells - 2), *["random"] * 2]
    keys = {training_key(space.effective(params)) for params in found}
    assert len(keys) == 10
