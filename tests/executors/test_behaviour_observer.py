"""Prompts chosen evenly and shown as people read them; what fails is a reason and leaves the base whole.

That answers and losses are those of the shipped adapter is checked on whole studies (tests/tuner).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_in_process import SETTINGS
from test_in_process import base as base  # the fixture

from lora_tune.engine.pack import TrialPack
from lora_tune.executors.behaviour import (
    BehaviourObserver,
    BehaviourPlan,
    Subject,
    evenly_spaced,
    readable_prompt,
)
from lora_tune.records import UNTUNED, Behaviour, EvalResult, TokenizedRow

BASE_ALONE = (Subject(UNTUNED, None, None),)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocab = {f"w{number}": number for number in range(131)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="w0", eos_token="w2", additional_special_tokens=["w7"]
    )


def observe(
    base: Any,
    tokenizer: Any,
    rows: Sequence[TokenizedRow],
    *,
    pack: type[TrialPack] = TrialPack,
    num_samples: int = 3,
) -> Behaviour:
    plan = BehaviourPlan(num_samples=num_samples, max_length=64, seed=0)
    observer = BehaviourObserver(pack(base, rows, SETTINGS), tokenizer, plan)
    return observer.observe(BASE_ALONE, rows, chosen="trial 1", default=None)


@given(st.integers(1, 300), st.integers(1, 100), st.integers(0, 1000))
def test_samples_are_distinct_in_order_and_at_equal_distances(
    rows: int, count: int, seed: int
) -> None:
    found = evenly_spaced(range(rows), count, seed=seed)
    assert len(found) == min(rows, count)
    steps = [after - before for before, after in pairwise(found)]
    assert all(step > 0 for step in steps)
    assert max(steps, default=0) - min(steps, default=0) <= 1
    assert found == evenly_spaced(range(rows), count, seed=seed)


def test_the_seed_of_the_study_chooses_where_samples_begin() -> None:
    found = {tuple(evenly_spaced(range(100), 5, seed=seed)) for seed in range(20)}
    assert len(found) > 5


def test_a_prompt_is_shown_without_special_tokens_a_line_for_each_part(tokenizer) -> None:
    ids = tokenizer("w7 w10 w11 w2 w7 w12 w7", add_special_tokens=False)["input_ids"]
    assert readable_prompt(tokenizer, ids) == "w10 w11\nw12"


def test_the_seeds_of_the_adapters_are_noted(base, tokenizer, make_rows) -> None:
    rows = make_rows(2)
    observer = BehaviourObserver(
        TrialPack(base, rows, SETTINGS),
        tokenizer,
        BehaviourPlan(num_samples=1, max_length=64, seed=0),
    )
    # no adapter at all answers as the base does
    subjects = (*BASE_ALONE, Subject("default", None, None, 2), Subject("trial 1", None, None, 1))
    found = observer.observe(subjects, rows, chosen="trial 1", default="default")
    assert (found.chosen_seed, found.default_seed) == (1, 2)
    without = observer.observe(subjects[::2], rows, chosen="trial 1", default=None)
    assert (without.chosen_seed, without.default_seed) == (1, None)


def test_fewer_rows_than_samples_are_all_answered(base, tokenizer, make_rows) -> None:
    rows = make_rows(2)
    found = observe(base, tokenizer, rows, num_samples=5)
    assert [sample.row for sample in found.samples] == [0, 1]
    assert found.reason == ""


def test_prompts_that_leave_no_room_for_an_answer_are_left_out(base, tokenizer, make_rows) -> None:
    assert base.model.config.max_position_embeddings == 256
    short, long = make_rows(1)[0], (5,) * 200
    rows = [
        TokenizedRow(input_ids=(*long, 6), labels=(*([-100] * 200), 6)),
        short,
        TokenizedRow(input_ids=short.input_ids, labels=short.input_ids),  # all carries loss
    ]
    found = observe(base, tokenizer, rows)
    assert [sample.row for sample in found.samples] == [1]
    none = observe(base, tokenizer, [rows[0], rows[2]])
    assert none.samples == ()
    assert none.reason.startswith("no answers to prompts: no held-out row has a prompt to answer")
    assert len(none.general_losses) == 1


class NoMemory(TrialPack):
    """Does not fit."""

    def evaluate(self, *args: Any, **named: Any) -> list[EvalResult]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class NotFinite(TrialPack):
    """Finds a loss that is no number."""

    def evaluate(self, *args: Any, **named: Any) -> list[EvalResult]:
        [found] = super().evaluate(*args, **named)
        return [replace(found, loss_sums=(float("nan"), *found.loss_sums[1:]))]


@pytest.mark.parametrize(
    ("pack", "reason"),
    [
        (NoMemory, "no loss on general text: out of memory"),
        (
            NotFinite,
            "no loss on general text: ArithmeticError: the loss of untuned base is nan",
        ),
    ],
)
def test_a_loss_that_cannot_be_had_is_a_reason_and_costs_no_answers(
    base, tokenizer, make_rows, pack: type[TrialPack], reason: str
) -> None:
    rows = make_rows(6)
    found = observe(base, tokenizer, rows, pack=pack)
    assert found.general_losses == ()
    assert found.reason == reason
    assert found.samples == observe(base, tokenizer, rows).samples


def test_running_out_of_memory_while_writing_is_a_reason_and_leaves_the_base_whole(
    base, tokenizer, make_rows
) -> None:
    rows = make_rows(6)
    pack = TrialPack(base, rows, SETTINGS)
    [before] = pack.evaluate([None], rows, split="test")
    plan = BehaviourPlan(num_samples=3, max_length=64, seed=0)
    observer = BehaviourObserver(pack, tokenizer, plan)

    class NoMemoryToWrite(type(observer.writer)):  # type: ignore[misc]
        def _generate(self, *_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    observer.writer = NoMemoryToWrite(base, max_new_tokens=64)
    found = observer.observe(BASE_ALONE, rows, chosen="trial 1", default=None)
    assert found.samples == ()
    assert found.reason == "no answers to prompts: out of memory"
    assert len(found.general_losses) == 1
    assert pack.evaluate([None], rows, split="test") == [before]
