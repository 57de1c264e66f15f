"""No row that is held out is trained on, whatever its dress; what cannot be kept apart is said.

Each test plants doubles at places that it knows, so the count to be found is no result of the code.
"""

import json
import random
from collections import Counter

import pytest

from lora_tune.data import prepare_data
from lora_tune.study.spec import DataSection

TEMPLATE = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>\n' }}{% endfor %}"
DISGUISES = {
    "none": str,
    "capitals": str.upper,
    "white space": lambda text: "  " + text.replace(" ", "\n\t "),
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "punctuation": lambda text: text.rstrip(".?") + " ... !",
    "quotes": lambda text: f"\u201c{text}\u201d",
    "wide letters": lambda text: "".join(
        chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text
    ),
    "ligatures": lambda text: text.replace("fi", "\ufb01"),
}


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer("<end>", template=TEMPLATE)


def pair(question, answer, **columns):
    return {"prompt": question, "completion": answer, **columns}


def row(number, dress=str):
    return pair(dress(f"What is the field number {number}?"), dress(f"Find {number * 7} there."))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(folder, tokenizer, **settings):
    data = DataSection(train="rows.jsonl", **settings)
    return prepare_data(data, tokenizer=tokenizer, seed=0, base_dir=folder)


def splits_of(prepared):
    return prepared.train, prepared.selection, prepared.confirmation


def numbers_of(rows, tokenizer):
    """The numbers of the questions, in whatever dress."""
    texts = (tokenizer.decode(row.input_ids) for row in rows)
    return {int("".join(filter(str.isdigit, text.split("<assistant>")[0]))) for text in texts}


@pytest.mark.parametrize("dress", DISGUISES.values(), ids=DISGUISES)
def test_50_leaks_planted_in_1000_rows_are_found(tmp_path, tokenizer, dress):
    planted = random.Random(1).sample(range(5000, 5200), 50)
    rows = [row(number) for number in range(950)] + [row(number, dress) for number in planted]
    random.Random(2).shuffle(rows)
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "held.jsonl", [row(number) for number in range(5000, 5200)])
    prepared = prepare(tmp_path, tokenizer, eval="held.jsonl")
    assert numbers_of(prepared.train, tokenizer) == set(range(950))
    assert len(prepared.train) == 950
    [note] = [note for note in prepared.notes if "not trained on" in note]
    assert note.startswith("50 rows of rows.jsonl are also in held.jsonl")
    assert prepared.fingerprint.num_duplicates == 50
    assert len(prepared.selection) + len(prepared.confirmation) == 200


@pytest.mark.parametrize("dress", [*DISGUISES.values()][1:], ids=[*DISGUISES][1:])
def test_50_near_doubles_in_one_file_never_straddle_the_splits(tmp_path, tokenizer, dress):
    doubled = random.Random(3).sample(range(950), 50)
    rows = [row(number) for number in range(950)] + [row(number, dress) for number in doubled]
    random.Random(4).shuffle(rows)
    write(tmp_path / "rows.jsonl", rows)
    prepared = prepare(tmp_path, tokenizer)
    places = Counter()
    for split in splits_of(prepared):
        places.update(numbers_of(split, tokenizer))
    assert set(places.values()) == {1}
    assert [len(split) for split in splits_of(prepared)] == [800, 100, 100]
    assert any(note.startswith("50 rows look like another one") for note in prepared.notes)


def test_rows_of_one_prompt_are_in_one_split_whatever_the_order(tmp_path, tokenizer):
    rows = [pair(f"Who is number {n // 4}?", f"Answer {n}.") for n in range(800)]
    write(tmp_path / "rows.jsonl", rows)
    prepared = prepare(tmp_path, tokenizer)
    found = [numbers_of(split, tokenizer) for split in splits_of(prepared)]
    assert sum(map(len, found)) == len(set().union(*found)) == 200
    assert [len(split) for split in splits_of(prepared)] == [640, 80, 80]
    assert not [note for note in prepared.notes if "the prompt of" in note]
    random.Random(5).shuffle(rows)
    write(tmp_path / "rows.jsonl", rows)
    assert prepare(tmp_path, tokenizer) == prepared


def test_an_instruction_to_all_rows_is_no_leak_that_stops_and_is_said(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", [pair("Write a poem.", f"Poem number {n}.") for n in range(300)])
    prepared = prepare(tmp_path, tokenizer)
    assert [len(split) for split in splits_of(prepared)] == [240, 30, 30]
    assert any(
        note.startswith("60 held-out rows have the prompt of a training row")
        for note in prepared.notes
    )


def test_a_prompt_of_another_file_with_another_answer_is_said(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", [row(number) for number in range(100)])
    held_out = [pair(row(number)["prompt"], f"Otherwise {number}.") for number in range(90, 130)]
    write(tmp_path / "held.jsonl", held_out)
    prepared = prepare(tmp_path, tokenizer, eval="held.jsonl")
    assert len(prepared.train) == 100
    assert any(
        note.startswith("10 held-out rows have the prompt of a training row")
        for note in prepared.notes
    )


def test_the_last_question_of_a_talk_counts_with_all_that_was_said_before(tmp_path, tokenizer):
    def talk(number, first):
        turns = [
            ("user", first),
            ("assistant", "Hello."),
            ("user", "Next?"),
            ("assistant", f"{number}"),
        ]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    write(tmp_path / "rows.jsonl", [talk(n, f"I am {n}.") for n in range(200)])
    assert not [note for note in prepare(tmp_path, tokenizer).notes if "the prompt of" in note]
    write(tmp_path / "rows.jsonl", [talk(n, "I am here.") for n in range(200)])
    assert [note for note in prepare(tmp_path, tokenizer).notes if "the prompt of" in note]


def test_rows_alike_in_different_groups_are_left_out_of_training(tmp_path, tokenizer):
    rows = [{**row(number), "talk": f"t{number // 3}"} for number in range(600)]
    rows += [{**row(number, str.upper), "talk": f"copy {number}"} for number in range(0, 600, 12)]
    write(tmp_path / "rows.jsonl", rows)
    prepared = prepare(tmp_path, tokenizer, group="talk")
    train, selection, confirmation = (numbers_of(split, tokenizer) for split in splits_of(prepared))
    assert not train & (selection | confirmation)
    assert not selection & confirmation
    kept = sum(map(len, splits_of(prepared)))
    [note] = [note for note in prepared.notes if "in another group" in note]
    assert note.startswith(f"{650 - kept} rows are also in another split")
    assert train | selection | confirmation == set(range(600))


def test_numbers_and_operators_still_tell_rows_apart(tmp_path, tokenizer):
    rows = [
        pair(f"What is {a} {op} {b}?", "?") for a in range(12) for b in range(12) for op in "+-*/<="
    ]
    write(tmp_path / "rows.jsonl", rows)
    prepared = prepare(tmp_path, tokenizer)
    assert sum(map(len, splits_of(prepared))) == len(rows)
    assert not [note for note in prepared.notes if "look like" in note]
