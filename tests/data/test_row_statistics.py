"""What ``check`` says of rows: counted again here from rows whose doubles and lengths are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from lora_tune.data.encode import EncodedRow
from lora_tune.data.estimate import TextEncoder
from lora_tune.data.formats import PlainText
from lora_tune.data.prepare import prepare_with
from lora_tune.data.statistics import MeasuredEncoder, RowStatistics, length_bins
from lora_tune.records import PreparedData
from lora_tune.study.spec import DataSection


def measured(
    folder: Path, texts: list[str], held_out: list[str] | None = None, **settings: object
) -> tuple[PreparedData, RowStatistics]:
    """Return the splits and the statistics of rows of plain text, four characters a token."""
    files = {"train": texts, "eval": held_out}
    values: dict[str, object] = dict(settings)
    for name, lines in files.items():
        if lines is not None:
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
            values[name] = str(path)
    data = DataSection.model_validate(values)
    encoder = MeasuredEncoder(TextEncoder(data))
    prepared = prepare_with(encoder, data, tokenizer=None, seed=0, base_dir=folder)
    return prepared, encoder.statistics(prepared, max_length=data.max_length)


def test_lengths_are_those_before_the_cut(tmp_path: Path) -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(2, 120, size=90)]
    texts = [f"{i:03d} " + "x" * (4 * n - 4) for i, n in enumerate(lengths)]
    _, seen = measured(tmp_path, texts, max_length=50)
    assert seen.num_rows == 90
    assert (seen.longest, seen.num_tokens) == (max(lengths), sum(lengths))
    for share, found in ((50, seen.median), (95, seen.percentile_95), (99, seen.percentile_99)):
        assert found == np.percentile(lengths, share, method="inverted_cdf")
    assert seen.num_cut == sum(n > 50 for n in lengths)
    assert seen.num_cut_tokens == sum(n - 50 for n in lengths if n > 50)


def test_bins_hold_every_row_once_and_one_ends_at_the_cut() -> None:
    lengths = [int(n) for n in np.random.default_rng(1).integers(1, 5000, size=500)]
    for max_length in (8, 96, 1024, 5000, 100_000):
        bins = length_bins(lengths, max_length=max_length)
        assert sum(found.rows for found in bins) == 500
        assert all(a.high + 1 == b.low for a, b in zip(bins, bins[1:], strict=False))
        if max_length < max(lengths):
            cut = sum(found.rows for found in bins if found.low > max_length)
            assert cut == sum(n > max_length for n in lengths)


NEAR = [
    ("Add the numbers.", "add  the numbers"),
    ('Say "yes", please!', "say yes please"),
    ("caf\u00e9 \u2014 open", "CAF\u00c9 open"),
]
FAR = [("3 - 1 is", "3 + 1 is"), ("is 3*1", "is 3/1"), ("1.5 kg", "15 kg"), ("say no", "say on")]


@pytest.mark.parametrize(("one", "other"), NEAR)
def test_case_punctuation_and_white_space_make_no_other_row(
    tmp_path: Path, one: str, other: str
) -> None:
    rows = [f"row {i}" for i in range(40)]
    data, _ = measured(tmp_path, [*rows, one], held_out=[*[f"held {i}" for i in range(30)], other])
    assert len(data.train) == len(rows)
    assert any("1 rows of" in note and "not trained on" in note for note in data.notes)


@pytest.mark.parametrize(("one", "other"), FAR)
def test_other_words_numbers_and_operators_do(tmp_path: Path, one: str, other: str) -> None:
    rows = [f"row {i}" for i in range(40)]
    data, _ = measured(tmp_path, [*rows, one], held_out=[*[f"held {i}" for i in range(30)], other])
    assert len(data.train) == len(rows) + 1


def test_rows_that_look_alike_are_in_one_split_and_counted(tmp_path: Path) -> None:
    texts = [f"row {i // 2}{'!' * (i % 2)}" for i in range(400)]
    data, seen = measured(tmp_path, texts)
    places: dict[int, list[str]] = {}
    splits = ("train", "selection", "confirmation")
    order = {row.input_ids: name for name in splits for row in getattr(data, name)}
    encoder = TextEncoder(DataSection(train="x"))
    for i, text in enumerate(texts):
        [encoded] = encoder.encode([PlainText(text=text)])
        assert isinstance(encoded, EncodedRow)
        places.setdefault(i // 2, []).append(order[encoded.row.input_ids])
    assert all(len(set(found)) == 1 for found in places.values())
    assert seen.num_alike == [*places.values()].count(["train", "train"]) == 160
    assert any("200 rows look like another one" in note for note in data.notes)


def test_roles_tell_conversations_apart(tmp_path: Path) -> None:
    def row(first: str, second: str) -> str:
        turns = [{"role": first, "content": "Hello"}, {"role": second, "content": "there"}]
        return json.dumps({"prompt": turns, "completion": "Yes."})

    lines = [row("system", "user"), row("user", "user")]
    lines += [json.dumps({"prompt": f"{i}?", "completion": f"{i}"}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = DataSection(train=str(tmp_path / "rows.jsonl"))
    encoder = MeasuredEncoder(TextEncoder(data))
    prepared = prepare_with(encoder, data, tokenizer=None, seed=0, base_dir=tmp_path)
    seen = encoder.statistics(prepared, max_length=data.max_length)
    assert seen.num_alike == 0
    assert not [note for note in prepared.notes if "look like" in note]
