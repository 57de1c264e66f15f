"""Label masks, read back: the labelled tokens decoded against the assistant's text.

Witnesses: the messages themselves, transformers' own assistant mask, and the two ways of finding
spans (generation marks and prefixes) against each other on the templates that trl ships.
"""

import re

import pytest

from lora_tune.data.chat import ChatRenderer, ChosenTemplate, choose_template, template_names
from lora_tune.data.encode import NO_LOSS, RowEncoder, label_tokens
from lora_tune.data.formats import Conversation, Message, PlainText
from lora_tune.data.reading import RowError
from lora_tune.errors import DataError
from lora_tune.study.spec import DataSection

TWO_TURNS = Conversation(
    messages=(
        Message("user", "Hi?"),
        Message("assistant", "Yes  sir."),
        Message("user", "And\nnow?"),
        Message("assistant", "No.\n\nNever: \u00e9\u4e2d\U0001f600"),
    )
)
CHATML = template_names()["chatml"].read_text(encoding="utf-8")
# The tokens that the shipped templates write, as a real tokenizer of the family would know them.
_CONTROL = re.compile(r"<[|\uff5c/a-z_A-Z0-9\u2581]+[|\uff5c]?>|\[/?[A-Z_]+\]")


def encode(tokenizer, example, tmp_path, **settings):
    data = DataSection(train="x.jsonl", **settings)
    (result,) = RowEncoder(data, tokenizer=tokenizer, base_dir=tmp_path).encode([example])
    if isinstance(result, RowError):
        raise result
    return result.row


def labelled_texts(row, tokenizer):
    texts, ids = [], []
    for label in (*row.labels, NO_LOSS):
        if label != NO_LOSS:
            ids.append(label)
        elif ids:
            texts.append(tokenizer.decode(ids))
            ids = []
    return texts


def answers(end):
    return [m.content + end for m in TWO_TURNS.messages if m.role == "assistant"]


def test_smollm2_labels_are_the_answers_and_their_end_tokens(smollm2, tmp_path):
    row = encode(smollm2, TWO_TURNS, tmp_path)
    assert labelled_texts(row, smollm2) == answers("<|im_end|>")
    assert smollm2.eos_token_id in row.labels
    assert smollm2.decode(row.input_ids) == smollm2.apply_chat_template(
        [m._asdict() for m in TWO_TURNS.messages], tokenize=False
    )


def test_only_the_last_answer_is_labelled_on_request(smollm2, tmp_path):
    row = encode(smollm2, TWO_TURNS, tmp_path, train_on="last-assistant")
    assert labelled_texts(row, smollm2) == answers("<|im_end|>")[1:]


def test_answers_in_a_prompt_are_not_labelled(smollm2, tmp_path):
    later = Conversation(messages=TWO_TURNS.messages, loss_from=2)
    row = encode(smollm2, later, tmp_path)
    assert labelled_texts(row, smollm2) == answers("<|im_end|>")[1:]


def test_a_system_turn_replaces_the_default_one(smollm2, tmp_path):
    turns = (Message("system", "Be brief."), *TWO_TURNS.messages)
    row = encode(smollm2, Conversation(messages=turns), tmp_path)
    text = smollm2.decode(row.input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "SmolLM" not in text


def test_marks_give_the_mask_that_transformers_computes(byte_tokenizer, tmp_path):
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", template=CHATML)
    turns = (*TWO_TURNS.messages[:3], Message("assistant", "No."))
    row = encode(tokenizer, Conversation(messages=turns), tmp_path)
    expected = tokenizer.apply_chat_template(
        [m._asdict() for m in turns],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert list(row.input_ids) == expected["input_ids"]
    assert [int(label != NO_LOSS) for label in row.labels] == expected["assistant_masks"]


@pytest.mark.parametrize("name", template_names())
def test_marks_and_prefixes_agree_on_every_shipped_template(name, byte_tokenizer):
    text = template_names()[name].read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(*sorted(set(_CONTROL.findall(text))))
    tokenizer.bos_token = "<bos>"
    found = {}
    for use_marks in (True, False):
        renderer = ChatRenderer(
            ChosenTemplate(name, text), tokenizer=tokenizer, last_only=False, use_marks=use_marks
        )
        try:
            found[use_marks] = renderer.render(TWO_TURNS)
        except RowError as error:
            found[use_marks] = error.reason
    for rendered, open_turns in ((found[True], 0), (found[False], 2 * (name == "glm4moe"))):
        if isinstance(rendered, str):
            assert rendered in {
                "assistant turn not found",  # the template rewrites earlier turns
                "assistant text not rendered",  # made for messages with images
                "refused by the chat template",
            }
            continue
        assert rendered.num_open_turns == open_turns
        for (start, end), answer in zip(rendered.spans, answers(""), strict=True):
            assert answer in rendered.text[start:end]
            assert "sistant" not in rendered.text[start:end]
    # GLM-4 ends a turn with the next role's token, which only trl's marks give to the answer.
    if not isinstance(found[False], str) and name != "glm4moe":
        assert found[True] == found[False]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "phi3", "gemma", "qwen3", "deepseekv3"])
def test_templates_of_well_known_families_find_every_answer(name, byte_tokenizer):
    text = template_names()[name].read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(*sorted(set(_CONTROL.findall(text))), template=text)
    tokenizer.bos_token = "<bos>"
    renderer = ChatRenderer(ChosenTemplate(name, text), tokenizer=tokenizer, last_only=False)
    rendered = renderer.render(TWO_TURNS)
    assert (len(rendered.spans), rendered.num_open_turns) == (2, 0)
    assert any("training variant" in note for note in renderer.notes)


HEADERS = (
    """{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + '<end>\n' }}{% endfor %}"""
)
PROMPTED = HEADERS + "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"


def test_the_role_header_is_not_learned_from_a_template_without_generation_prompt(
    byte_tokenizer, tmp_path
):
    tokenizer = byte_tokenizer("<end>", template=HEADERS)
    row = encode(tokenizer, TWO_TURNS, tmp_path)
    assert labelled_texts(row, tokenizer) == answers("<end>")


def test_a_tokenizer_whose_pad_is_its_end_token_still_learns_to_end(byte_tokenizer, tmp_path):
    tokenizer = byte_tokenizer(eos="<end>", template=PROMPTED)
    tokenizer.pad_token = "<end>"
    row = encode(tokenizer, TWO_TURNS, tmp_path)
    assert row.labels.count(tokenizer.eos_token_id) == 2


def test_a_template_without_end_token_is_noted_and_nothing_is_invented(byte_tokenizer, tmp_path):
    tokenizer = byte_tokenizer(template=PROMPTED.replace("<end>", ""))
    data = DataSection(train="x.jsonl")
    encoder = RowEncoder(data, tokenizer=tokenizer, base_dir=tmp_path)
    (result,) = encoder.encode([TWO_TURNS])
    assert labelled_texts(result.row, tokenizer) == answers("\n")
    assert encoder.notes[-1].startswith("2 assistant turns have no end-of-turn token")


def test_a_token_that_straddles_the_prompt_and_the_answer_is_learned(smollm2, tmp_path):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    (tmp_path / "plain.jinja").write_text(template)
    row = encode(smollm2, TWO_TURNS, tmp_path, chat_template="plain.jinja")
    assert labelled_texts(row, smollm2)[0] == " Yes  sir.<|im_end|>"


def test_empty_ranges_of_whitespace_tokens_belong_to_the_span_they_end_in():
    offsets = [(0, 2), (3, 3), (3, 5), (6, 6), (6, 7), (8, 8)]
    assert label_tokens([1, 2, 3, 4, 5, 6], offsets, [(3, 7)]) == [-100, -100, 3, 4, 5, -100]


def test_a_template_that_rewrites_earlier_turns_is_refused_row_by_row(byte_tokenizer, tmp_path):
    forgetful = "{% for m in messages[-2:] %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    tokenizer = byte_tokenizer(template=forgetful)
    with pytest.raises(RowError, match="rewrites what comes before turn 2 of 4"):
        encode(tokenizer, TWO_TURNS, tmp_path)


def test_a_template_that_leaves_the_answer_out_is_refused(byte_tokenizer, tmp_path):
    tokenizer = byte_tokenizer(template="{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(RowError, match="assistant text not rendered"):
        encode(tokenizer, TWO_TURNS, tmp_path)


def test_a_template_that_raises_is_refused_row_by_row(byte_tokenizer, tmp_path):
    tokenizer = byte_tokenizer(template="{{ raise_exception('only tools here') }}")
    with pytest.raises(RowError, match="refused by the chat template: only tools here"):
        encode(tokenizer, TWO_TURNS, tmp_path)


def test_dates_in_a_template_do_not_change_from_day_to_day(byte_tokenizer, tmp_path):
    tokenizer = byte_tokenizer(template="{{ strftime_now('%d %b %Y') }}" + PROMPTED)
    row = encode(tokenizer, TWO_TURNS, tmp_path)
    assert tokenizer.decode(row.input_ids).startswith("26 Jul 2024<user>")


def test_a_missing_template_names_the_key_and_what_to_write(byte_tokenizer, tmp_path):
    with pytest.raises(DataError, match=r'Write data\.chat_template = "chatml"') as caught:
        encode(byte_tokenizer(), TWO_TURNS, tmp_path)
    assert "llama3" in str(caught.value)


def test_a_named_template_is_used_in_place_of_the_tokenizers_own(byte_tokenizer, tmp_path):
    tokenizer = byte_tokenizer("<|im_end|>", template=PROMPTED)
    data = DataSection(train="x.jsonl", chat_template="chatml")
    encoder = RowEncoder(data, tokenizer=tokenizer, base_dir=tmp_path)
    (result,) = encoder.encode([TWO_TURNS])
    assert labelled_texts(result.row, tokenizer) == answers("<|im_end|>")
    assert encoder.chat_template == "chatml"
    assert any("in place of the model's own" in note for note in encoder.notes)
    assert tokenizer.chat_template == PROMPTED


def test_template_names_are_those_of_the_shipped_files():
    names = template_names()
    assert {"chatml", "llama3", "qwen3", "phi3"} <= set(names)
    assert not any(name.endswith("_training") for name in names)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("lama3", "'lama3', which is no known template; did you mean llama3"),
        ("mine.jinja", r"mine\.jinja cannot be read: No such file or directory"),
        ("latin.jinja", r"latin\.jinja cannot be read: it is not UTF-8"),
    ],
)
def test_a_template_that_cannot_be_found_is_named(wanted, message, byte_tokenizer, tmp_path):
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(DataError, match=message):
        choose_template(wanted, tokenizer=byte_tokenizer(), base_dir=tmp_path)


def test_a_template_that_is_not_jinja_names_the_line(byte_tokenizer, tmp_path):
    (tmp_path / "bad.jinja").write_text("ok\n{% for m in %}")
    with pytest.raises(DataError, match="not valid Jinja: line 2"):
        encode(byte_tokenizer(), TWO_TURNS, tmp_path, chat_template="bad.jinja")


def test_plain_text_carries_loss_throughout_and_ends_with_the_end_token(byte_tokenizer, tmp_path):
    tokenizer = byte_tokenizer()
    row = encode(tokenizer, PlainText(text="Once upon"), tmp_path)
    assert row.labels == row.input_ids
    assert tokenizer.decode(row.input_ids) == "Once upon<eos>"
