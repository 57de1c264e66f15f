"""Groups: rows of one conversation or document are never in two splits, and what is refused."""

import hashlib
import json
import random
from array import array

import pytest

from lora_tune.data import prepare_data, row_clusters
from lora_tune.errors import DataError
from lora_tune.study.spec import DataSection

TEMPLATE = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer("<end>", template=TEMPLATE)


def chat(number, **extra):
    turns = (("user", f"What follows {number}?"), ("assistant", f"It is {number + 1}."))
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, **extra}


def talks(num_rows, size):
    """Rows in conversations of ``size`` rows each."""
    return [chat(number, talk=f"talk {number // size}") for number in range(num_rows)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(folder, tokenizer, seed=0, **settings):
    data = DataSection(train="rows.jsonl", **{"group": "talk", **settings})
    return prepare_data(data, tokenizer=tokenizer, seed=seed, base_dir=folder)


def groups(rows):
    return {row.group for row in rows}


def splits_of(prepared):
    return prepared.train, prepared.selection, prepared.confirmation


@pytest.mark.parametrize("size", [1, 3, 7])
def test_no_group_is_in_two_splits_and_no_row_is_lost(tmp_path, tokenizer, size):
    write(tmp_path / "rows.jsonl", talks(420, size))
    prepared = prepare(tmp_path, tokenizer)
    train, selection, confirmation = splits_of(prepared)
    assert not groups(train) & groups(selection)
    assert not groups(train) & groups(confirmation)
    assert not groups(selection) & groups(confirmation)
    assert len(train) + len(selection) + len(confirmation) == 420
    # whole groups: a split is short of its tenth by less than one of them
    for held_out in (selection, confirmation):
        assert 42 - size < len(held_out) <= 42
    assert len(train) >= 0.8 * 420


def test_neither_the_order_of_the_file_nor_later_rows_move_a_group(tmp_path, tokenizer):
    rows = talks(400, 4)
    write(tmp_path / "rows.jsonl", rows)
    before = prepare(tmp_path, tokenizer)
    random.Random(1).shuffle(rows)
    write(tmp_path / "rows.jsonl", rows)
    assert prepare(tmp_path, tokenizer) == before
    write(tmp_path / "rows.jsonl", [*talks(420, 4)])
    after = prepare(tmp_path, tokenizer)
    kept = groups(before.selection) & groups(after.selection)
    assert len(kept) >= 0.8 * len(groups(before.selection))
    assert groups(prepare(tmp_path, tokenizer, seed=1).selection) != groups(after.selection)


def test_rows_know_their_group_and_the_notes_count_them(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", [chat(n, talk=n // 4) for n in range(200)])  # numbers will do
    prepared = prepare(tmp_path, tokenizer)
    assert groups(prepared.train) <= {str(number) for number in range(50)}
    [note] = [note for note in prepared.notes if "stay together" in note]
    assert note == (
        "rows with the same talk stay together; rows and groups: train 160 rows of 40, "
        "selection 20 rows of 5, confirmation 20 rows of 5."
    )
    assert not any("not used" in note for note in prepared.notes)
    clusters = row_clusters(prepared.selection)
    assert sorted(set(clusters)) == [0, 1, 2, 3, 4]
    assert clusters[0] == 0


def test_a_row_twice_has_the_same_group_whatever_the_order_of_the_file(tmp_path, tokenizer):
    rows = [*talks(100, 2), chat(0, talk="another"), chat(1, talk="another")]
    write(tmp_path / "rows.jsonl", rows)
    expected = prepare(tmp_path, tokenizer)
    write(tmp_path / "rows.jsonl", rows[::-1])
    assert prepare(tmp_path, tokenizer) == expected


def test_the_fingerprint_of_data_without_groups_is_that_of_their_tokens_alone(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", talks(100, 4))
    plain, grouped = (prepare(tmp_path, tokenizer, group=group) for group in (None, "talk"))
    digest = hashlib.sha256()
    for split in splits_of(plain):
        digest.update(array("q", [len(split)]).tobytes())
        for row in split:
            digest.update(array("q", [len(row.input_ids), *row.input_ids, *row.labels]).tobytes())
    assert plain.fingerprint.sha256 == digest.hexdigest()
    assert grouped.fingerprint.sha256 != plain.fingerprint.sha256


def test_a_missing_column_is_named_with_those_there_are(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", talks(40, 2))
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, tokenizer, group="talks")
    assert str(caught.value) == (
        "rows.jsonl: data.group is 'talks', but the rows have no such column; did you mean talk? "
        "They have messages, talk."
    )


def test_rows_without_a_group_are_bad_rows(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", [*talks(200, 2), chat(500), chat(501, talk=["x"])])
    prepared = prepare(tmp_path, tokenizer, max_bad_fraction=0.02)
    assert prepared.fingerprint.num_bad_rows == 2
    [note] = [note for note in prepared.notes if "bad rows" in note]
    assert "1 missing field, 1 wrong type" in note


def test_too_few_groups_are_refused_with_numbers(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", talks(200, 50))
    message = "4 groups .* selection gets 0 rows of 0 groups.*raise data.selection_rows"
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, tokenizer)
    with pytest.raises(DataError, match="at least 8 rows of 2 groups"):
        prepare(tmp_path, tokenizer, selection_rows=50, confirmation_rows=50)


def test_groups_of_an_evaluation_file_are_not_trained_on(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", talks(100, 4))
    write(tmp_path / "other.jsonl", [chat(n, talk=f"talk {n // 4}") for n in range(80, 200)])
    prepared = prepare(tmp_path, tokenizer, eval="other.jsonl")
    held_out = groups(prepared.selection) | groups(prepared.confirmation)
    assert not groups(prepared.train) & held_out
    assert len(prepared.train) == 80
    write(tmp_path / "other.jsonl", [chat(n + 1000, talk=f"talk {n // 4}") for n in range(80, 200)])
    again = prepare(tmp_path, tokenizer, eval="other.jsonl")
    assert len(again.train) == 80
    assert any("are of groups that are also in other.jsonl" in note for note in again.notes)
