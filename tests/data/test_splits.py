"""Splits: exact sizes, independence of the file's order, stability, and what is refused."""

import random

import pytest

from lora_tune.data.likeness import Likeness
from lora_tune.data.splits import (
    KeyedRow,
    default_split_rows,
    split_rows,
    split_with_eval,
    token_key,
)
from lora_tune.errors import DataError
from lora_tune.records import TokenizedRow


def make_rows(numbers, prompt=lambda number: number, whole=lambda number: number):
    rows = {}
    for number in numbers:
        ids = (number, number + 1)
        key = random.Random(number).randbytes(16)
        alike = Likeness(b"%d" % whole(number), b"%d" % prompt(number))
        row = TokenizedRow(input_ids=ids, labels=ids)
        rows[token_key(row)] = KeyedRow(key, row, alike)
    return rows


def split(rows, selection=None, confirmation=None):
    return split_rows(rows, selection_rows=selection, confirmation_rows=confirmation)


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(24, 8), (89, 8), (90, 9), (3400, 340), (9999, 999), (40_000, 1000)]
)
def test_default_splits_take_a_tenth_between_8_and_1000(num_rows, expected):
    assert default_split_rows(num_rows) == expected
    splits = split(make_rows(range(num_rows)))
    assert (len(splits.selection), len(splits.confirmation)) == (expected, expected)
    assert len(splits.train) == num_rows - 2 * expected


def test_splits_share_no_row_and_lose_none():
    splits = split(make_rows(range(500)), 70, 30)
    rows = [row.input_ids for part in splits for row in part]
    assert len(rows) == len(set(rows)) == 500
    assert (len(splits.selection), len(splits.confirmation)) == (70, 30)


def test_the_order_of_the_file_does_not_matter():
    numbers = list(range(300))
    expected = split(make_rows(numbers))
    random.Random(1).shuffle(numbers)
    assert split(make_rows(numbers)) == expected


def test_adding_rows_moves_few_of_the_others():
    before, after = split(make_rows(range(1000))), split(make_rows(range(1050)))
    for old, new in zip(before, after, strict=True):
        assert len(set(old) & set(new)) >= 0.9 * len(old)


@pytest.mark.parametrize(
    ("num_rows", "sizes", "message"),
    [
        (23, (None, None), "23 usable rows; 8 for selection and 8 for confirmation leave 7 for"),
        (100, (50, 50), "leave 0 for training, at least 8 are needed"),
        (100, (500, 8), "100 usable rows; 500 for selection"),
    ],
)
def test_too_few_rows_for_three_splits_are_refused_with_numbers(num_rows, sizes, message):
    with pytest.raises(DataError, match=message):
        split(make_rows(range(num_rows)), *sizes)


def test_rows_of_their_own_make_half_of_each_held_out_split():
    splits = split_with_eval(
        make_rows(range(50)),
        make_rows(range(100, 141)),
        selection_rows=None,
        confirmation_rows=None,
    )
    assert [len(part) for part in splits] == [50, 20, 20]
    held_out = {row.input_ids[0] for part in splits[1:] for row in part}
    assert held_out <= set(range(100, 141))


@pytest.mark.parametrize(
    ("num_train", "num_eval", "sizes", "message"),
    [
        (50, 15, (None, None), "data.eval has 15 usable rows; selection and confirmation need"),
        (50, 30, (20, 20), "fewer than 20 for selection and 20 for confirmation"),
        (7, 30, (None, None), "data.train has 7 usable rows that are not in data.eval"),
    ],
)
def test_too_few_rows_beside_an_evaluation_file_are_refused(num_train, num_eval, sizes, message):
    with pytest.raises(DataError, match=message):
        split_with_eval(
            make_rows(range(num_train)),
            make_rows(range(100, 100 + num_eval)),
            selection_rows=sizes[0],
            confirmation_rows=sizes[1],
        )
