"""Collapsed answers told from ordinary ones: worked examples, and answers that a small model really wrote."""

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.stats.repetition import collapse_reason, repeated_share

REFERENCES = [
    "Return the address family.",
    "Set the URL of the file.",
    "List the groups of a user.",
    "Document any other object.",
    "Tell whether the lock is held.",
]
# Of an untuned model with 135M parameters: greedy decoding, cut at 64 tokens.
LOOP = (
    "The function takes a function `fn` and returns a function `fn` that takes a single argument `fn` "
    "and returns a function `fn` that takes a single argument `fn` and returns a function `fn` that "
    "takes a single argument `fn` and returns a function"
)
ORDINARY = (
    "It is used to find the global indices of a nested list of objects.\n\nIn Python, it is a built-in "
    "function that returns a list of the groups to which the named user belongs."
)
CHINESE = "\u6211\u4eec\u4eca\u5929\u53bb\u516c\u56ed\u3002"  # a short sentence without spaces


def test_a_share_counted_by_hand() -> None:
    text = string.ascii_lowercase * 2  # 33 phrases of 20 letters, 26 of them distinct
    assert repeated_share(text) == pytest.approx(7 / 33)


@pytest.mark.parametrize("text", [LOOP, CHINESE * 8, "no " * 40, "-" * 80, "1\n2\n" * 30])
def test_loops_of_any_script_and_length_are_at_least_half_repeated(text: str) -> None:
    assert repeated_share(text) >= 0.5


@pytest.mark.parametrize("text", ["", "ok", "ok ok ok ok", "x" * 20, ORDINARY])
def test_short_and_ordinary_texts_repeat_next_to_nothing(text: str) -> None:
    assert repeated_share(text) < 0.1


@given(st.text(max_size=300))
def test_a_share_is_one_and_does_not_depend_on_whitespace(text: str) -> None:
    assert 0 <= repeated_share(text) < 1
    assert repeated_share("\n " + "\n\t".join(text.split())) == repeated_share(text)


@given(st.text(alphabet="ab ", min_size=30, max_size=120))
def test_writing_a_text_twice_never_lowers_its_share(text: str) -> None:
    assert repeated_share(text + text) >= repeated_share(text) - 1e-9


def test_most_answers_must_be_at_fault() -> None:
    answers = [LOOP, LOOP, "One.", "Two.", "Three."]
    assert collapse_reason(answers, REFERENCES) is None
    answers[2] = LOOP + "!"
    assert collapse_reason(answers, REFERENCES) == "3 of 5 answers repeat themselves"
    assert collapse_reason(["", " \n", "", "Two.", "Three."], REFERENCES) == (
        "3 of 5 answers are empty"
    )


def test_what_the_data_ask_for_is_no_fault() -> None:
    assert collapse_reason([LOOP, LOOP + "!", "x"], [LOOP, LOOP + "?", "y"]) is None
    assert collapse_reason(["", "", ""], ["", " ", ""]) is None
    assert collapse_reason(["a", "a", "a", "a"], ["a", "b", "a", "b"]) is None  # two labels


def test_the_same_answer_to_every_prompt_is_a_fault_when_the_references_differ() -> None:
    assert collapse_reason(["Yes."] * 5, REFERENCES) == "all 5 answers are the same"
    assert collapse_reason([*["Yes."] * 4, "No."], REFERENCES) is None
    assert collapse_reason(["Yes."], ["No."]) is None  # one answer cannot show it


def test_no_answers_and_good_answers_have_no_reason() -> None:
    assert collapse_reason([], []) is None
    assert collapse_reason(REFERENCES, REFERENCES) is None


def test_the_order_of_the_answers_does_not_matter() -> None:
    pairs = list(zip([LOOP, LOOP + "!", "a", LOOP + "?", ""], REFERENCES, strict=True))
    wanted = collapse_reason(*zip(*pairs, strict=True))
    for seed in range(5):
        random.Random(seed).shuffle(pairs)
        assert collapse_reason(*zip(*pairs, strict=True)) == wanted
