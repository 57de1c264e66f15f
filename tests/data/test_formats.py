"""Row formats: what each means, against rows written by hand, and which rows are refused."""

import pytest

from lora_tune.data.formats import (
    FORMATS,
    Conversation,
    Message,
    PlainText,
    choose_format,
    convert_row,
    detect_format,
    unused_columns,
)
from lora_tune.data.reading import RowError
from lora_tune.errors import DataError

QUESTION = Message("user", "What is 2 + 2?")
ANSWER = Message("assistant", "4")

SAME_ROW = {
    "messages": {"messages": [QUESTION._asdict(), ANSWER._asdict()]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "What is 2 + 2?"},
            {"from": "gpt", "value": "4"},
        ]
    },
    "alpaca": {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
    "prompt-completion": {"prompt": "What is 2 + 2?", "completion": "4"},
}


@pytest.mark.parametrize(("name", "row"), SAME_ROW.items())
def test_every_conversational_format_says_the_same(name, row):
    assert detect_format(row) == name
    assert convert_row(name, row).messages == (QUESTION, ANSWER)


def test_every_format_but_text_is_among_the_conversational_ones():
    assert set(FORMATS) == {*SAME_ROW, "text"}


def test_text_stays_as_it_is():
    assert convert_row("text", {"text": " a\n"}) == PlainText(text=" a\n")


def test_alpaca_input_follows_the_instruction_after_a_blank_line():
    row = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}
    assert convert_row("alpaca", row).messages[0].content == "Translate.\n\nGuten Tag"


def test_assistant_turns_of_a_conversational_prompt_carry_no_loss():
    row = {
        "prompt": [QUESTION._asdict(), ANSWER._asdict(), {"role": "user", "content": "And 3 + 3?"}],
        "completion": [{"role": "assistant", "content": "6"}],
    }
    example = convert_row("prompt-completion", row)
    assert isinstance(example, Conversation)
    assert (len(example.messages), example.loss_from) == (4, 3)


def test_sharegpt_system_column_becomes_the_first_turn():
    row = {**SAME_ROW["sharegpt"], "system": "Be brief."}
    assert convert_row("sharegpt", row).messages[0] == ("system", "Be brief.")


def _messages(*turns):
    return {"messages": list(turns)}


USER = {"role": "user", "content": "hi"}
BAD_ROWS = [
    ("messages", 17, "not an object: it is a number"),
    ("messages", ["a"], "not an object: it is a list"),
    ("messages", {"text": "a"}, "missing field: messages"),
    ("messages", {"messages": "hi"}, "wrong type: messages is text, not a list of turns"),
    ("messages", _messages("hi"), r"wrong type: messages\[0\] is text, not an object"),
    ("messages", _messages({"role": "user"}), r"missing field: messages\[0\] needs role"),
    ("messages", _messages(USER, {"role": "bot", "content": "a"}), "unknown role: .*'bot'"),
    ("messages", _messages(USER, {"role": ["user"], "content": "a"}), "unknown role"),
    ("messages", _messages(USER), "no assistant turn: roles: user"),
    ("messages", _messages(), "no assistant turn: roles: none"),
    ("messages", _messages(USER, {"role": "assistant", "content": " \n"}), "empty content"),
    ("messages", _messages(USER, {"role": "assistant", "content": 4}), "wrong type: .*a number"),
    ("messages", _messages(USER, {"role": "assistant", "content": [USER]}), "wrong type: .*a list"),
    (
        "messages",
        _messages(USER, {"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}]}),
        "tool calls",
    ),
    ("messages", _messages(USER, {"role": "assistant", "content": "a\0b"}), "NUL character"),
    ("messages", _messages(USER, {"role": "assistant", "content": "\ud800"}), "not UTF-8"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}]}, "no assistant turn"),
    ("alpaca", {"instruction": "", "output": "a"}, "empty content: instruction"),
    ("alpaca", {"instruction": "a", "output": None}, "missing field: output"),
    ("alpaca", {"instruction": "a", "input": 3, "output": "a"}, "wrong type: input is a number"),
    ("prompt-completion", {"prompt": "a", "completion": ""}, "empty content: completion"),
    ("prompt-completion", {"prompt": [USER], "completion": [USER]}, "no assistant turn"),
    ("text", {"text": True}, "wrong type: text is a truth value, not text"),
    ("text", {"text": ""}, "empty content: text"),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD_ROWS)
def test_an_unusable_row_says_why(name, row, message):
    with pytest.raises(RowError, match=message):
        convert_row(name, row)


def test_an_empty_system_turn_is_kept():
    row = _messages({"role": "system", "content": ""}, USER, {"role": "assistant", "content": "a"})
    assert convert_row("messages", row).messages[0] == ("system", "")


def test_unknown_columns_are_named_with_what_each_format_needs():
    with pytest.raises(DataError, match=r"a\.jsonl: no known format has the columns answer, q\."):
        choose_format("a.jsonl", "auto", [{"q": "a", "answer": "b"}])


def test_a_wrong_forced_format_names_the_columns_and_the_format_they_look_like():
    with pytest.raises(DataError) as caught:
        choose_format("a.jsonl", "alpaca", [SAME_ROW["prompt-completion"]])
    assert str(caught.value) == (
        "a.jsonl: data.format is 'alpaca', which needs the columns instruction and output; "
        "the rows have completion, prompt, which look like prompt-completion; "
        "write data.format = 'prompt-completion'."
    )


def test_columns_and_keys_that_are_not_read_are_known():
    row = {"id": 3, "tools": [], **_messages({**USER, "weight": 1})}
    assert unused_columns("messages", row) == {"id", "messages.weight"}


def test_the_sort_key_depends_on_content_and_seed_only():
    first = convert_row("messages", SAME_ROW["messages"])
    same = convert_row("messages", {**SAME_ROW["messages"], "id": 9})
    assert first.sort_key(0) == same.sort_key(0)
    assert first.sort_key(0) != first.sort_key(1)
