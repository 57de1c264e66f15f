"""Proposals against a real Optuna study: what it is told, and that a killed process changes nothing."""

import math
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from table_study import (
    SEED,
    Killed,
    make_proposer,
    make_space,
    new_study,
)

from lora_tune.records import SuggestedParams, TrialState
from lora_tune.search.anchors import make_anchors
from lora_tune.search.proposals import VRAM_CONSTRAINT, Proposer

OPTUNA = optuna.trial.TrialState


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


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_proposes_the_same(sampler: str) -> None:
    first = propose_and_tell(proposer_of(new_study(), sampler=sampler), 12)
    again = propose_and_tell(proposer_of(new_study(), sampler=sampler), 12)
    other = propose_and_tell(proposer_of(new_study(), sampler=sampler, seed=SEED + 1), 12)
    assert first == again
    assert first[:2] == other[:2]  # the anchors do not depend on the seed
    assert first[2:] != other[2:]


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
    }


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (TrialState.COMPLETE, OPTUNA.COMPLETE),
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


def go_on(study: optuna.Study, count: int) -> list[SuggestedParams]:
    """Propose and tell as a process does that finds the study as it is; every third diverges."""
    proposer = proposer_of(study, startup_trials=3)
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


def test_a_process_killed_before_any_write_of_optuna_s_changes_no_proposal() -> None:
    count = 7
    storage = FailingStorage()
    whole = go_on(new_study(storage), count)
    wanted = [(t.params, t.values, t.constraints) for t in new_study(storage).get_trials()]
    for write in range(storage.writes):
        broken = FailingStorage()
        broken.killed_at = write
        with pytest.raises(Killed):
            go_on(new_study(broken), count)
        broken.killed_at = None
        assert go_on(new_study(broken), count) == whole, f"killed before write {write}"
        trials = new_study(broken).get_trials()
        assert [(t.params, t.values, t.constraints) for t in trials] == wanted, f"write {write}"
