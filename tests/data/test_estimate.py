"""Rows without a tokenizer: the same splits' sizes, and lengths near those of a real tokenizer."""

import json
import runpy
from pathlib import Path

import pytest

from lora_tune.data import prepare_data
from lora_tune.data.estimate import estimate_data
from lora_tune.data.tokenizer import local_tokenizer
from lora_tune.errors import DataError
from lora_tune.study.spec import DataSection

SCRIPT = Path(__file__).parents[2] / "studies" / "pydoc_data.py"


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory):
    script = runpy.run_path(str(SCRIPT))
    folder = tmp_path_factory.mktemp("docstrings")
    with script["silence"]():
        rows = script["collect_rows"]()
    script["write_rows"](rows[::5], folder / "rows.jsonl")
    return folder


def test_counts_are_exact_and_lengths_are_near(docstrings, smollm2):
    data = DataSection(train="rows.jsonl")
    real = prepare_data(data, tokenizer=smollm2, seed=0, base_dir=docstrings)
    guess = estimate_data(data, seed=0, base_dir=docstrings)
    for split in ("train", "selection", "confirmation"):
        assert len(getattr(guess, split)) == len(getattr(real, split))
    mean = guess.fingerprint.num_train_tokens / real.fingerprint.num_train_tokens
    assert 0.9 < mean < 1.3
    assert 0.7 < guess.fingerprint.num_train_labels / real.fingerprint.num_train_labels < 1.4
    assert guess.notes == real.notes


def test_bad_data_are_refused_as_ever(tmp_path):
    with pytest.raises(DataError, match="file not found"):
        estimate_data(DataSection(train="none.jsonl"), seed=0, base_dir=tmp_path)
    rows = [{"messages": [{"role": "user", "content": "only a question"}]}] * 50
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="50 of 50 rows are bad"):
        estimate_data(DataSection(train="rows.jsonl"), seed=0, base_dir=tmp_path)


def test_rows_cut_before_their_labels_are_refused_without_a_tokenizer(tmp_path):
    turns = [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": "Yes."}]
    rows = [{"messages": [*turns[:1], {**turns[1], "content": f"Yes {n}."}]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"Raise data\.max_length\.$"):
        estimate_data(DataSection(train="rows.jsonl", max_length=32), seed=0, base_dir=tmp_path)


def test_only_a_tokenizer_that_is_here_is_found(tmp_path):
    found = local_tokenizer("smollm2-135m-instruct", revision=None, base_dir=tmp_path)
    assert found is not None
    assert found.chat_template
    assert local_tokenizer("org/nowhere", revision=None, base_dir=tmp_path) is None
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert local_tokenizer("empty", revision=None, base_dir=tmp_path) is None
