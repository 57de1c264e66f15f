"""Files to splits, end to end: dirty files, duplicates, truncation, and what the notes say."""

import json
import random

import pandas
import pytest

from lora_tune.data import describe_rows, prepare_data
from lora_tune.errors import DataError
from lora_tune.study.spec import DataSection

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer("<end>", template=TEMPLATE)


def chat(number):
    return {
        "messages": [
            {"role": "user", "content": f"What follows {number}?"},
            {"role": "assistant", "content": f"It is {number + 1}."},
        ]
    }


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def prepare(folder, tokenizer, name="rows.jsonl", seed=0, **settings):
    data = DataSection(train=name, **settings)
    return prepare_data(data, tokenizer=tokenizer, seed=seed, base_dir=folder)


def texts(rows, tokenizer):
    return [tokenizer.decode(row.input_ids) for row in rows]


def all_rows(prepared):
    return (*prepared.train, *prepared.selection, *prepared.confirmation)


def test_a_clean_file_gives_three_splits_and_a_fingerprint(tmp_path, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", map(chat, range(100)))
    prepared = prepare(tmp_path, tokenizer)
    fingerprint = prepared.fingerprint
    assert (fingerprint.num_train, fingerprint.num_selection, fingerprint.num_confirmation) == (
        (80, 10, 10)
    )
    assert fingerprint.source == "rows.jsonl"
    assert (fingerprint.format, fingerprint.chat_template) == ("messages", "model")
    assert fingerprint.num_train_labels == sum(row.num_labels for row in prepared.train)
    assert fingerprint.max_tokens == max(len(row.input_ids) for row in all_rows(prepared))
    assert prepared.notes == ("rows.jsonl: 100 rows, format messages (detected).",)


def test_the_order_of_the_file_changes_nothing(tmp_path, tokenizer):
    rows = [chat(number) for number in range(200)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    expected = prepare(tmp_path, tokenizer)
    random.Random(3).shuffle(rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert prepare(tmp_path, tokenizer) == expected


def test_another_seed_deals_other_splits(tmp_path, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", map(chat, range(200)))
    first, second = (prepare(tmp_path, tokenizer, seed=seed) for seed in (0, 1))
    assert set(first.selection) != set(second.selection)
    assert first.fingerprint.sha256 != second.fingerprint.sha256
    assert set(all_rows(first)) == set(all_rows(second))


def test_planted_duplicates_never_straddle_the_splits(tmp_path, tokenizer):
    rows = [chat(number) for number in range(950)]
    rows += random.Random(5).sample(rows, 50)
    random.Random(6).shuffle(rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare(tmp_path, tokenizer)
    assert prepared.fingerprint.num_duplicates == 50
    assert "rows.jsonl: 50 exact duplicates left out." in prepared.notes
    found = texts(all_rows(prepared), tokenizer)
    assert len(found) == len(set(found)) == 950


def test_rows_of_the_evaluation_file_are_not_trained_on(tmp_path, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", map(chat, range(100)))
    write_jsonl(tmp_path / "eval.jsonl", map(chat, range(90, 120)))
    prepared = prepare(tmp_path, tokenizer, eval="eval.jsonl")
    sizes = [len(prepared.train), len(prepared.selection), len(prepared.confirmation)]
    assert sizes == [90, 15, 15]
    assert prepared.fingerprint.num_duplicates == 10
    assert prepared.fingerprint.source == "rows.jsonl + eval.jsonl"
    assert any("10 rows of rows.jsonl are also in eval.jsonl" in note for note in prepared.notes)
    held_out = texts((*prepared.selection, *prepared.confirmation), tokenizer)
    assert not set(held_out) & set(texts(prepared.train, tokenizer))


def write_pairs(folder, kind):
    pairs = pandas.DataFrame(
        {
            "prompt": [f'Say "{n}",\ntwice' for n in range(40)],
            "completion": [f"{n}, {n}, caf\u00e9" for n in range(40)],
        }
    )
    path = folder / f"pairs.{kind}"
    if kind == "csv":
        pairs.to_csv(path, index=False)
    elif kind == "parquet":
        pairs.to_parquet(path)
    else:
        pairs.to_json(path, orient="records", lines=kind == "jsonl")
    return path.name


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path, tokenizer):
    expected = prepare(tmp_path, tokenizer, write_pairs(tmp_path, "jsonl"))
    found = prepare(tmp_path, tokenizer, write_pairs(tmp_path, kind))
    assert all_rows(found) == all_rows(expected)
    assert found.fingerprint.sha256 == expected.fingerprint.sha256
    assert found.fingerprint.format == "prompt-completion"


def test_formats_of_the_same_content_give_the_same_rows(tmp_path, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", map(chat, range(40)))
    expected = prepare(tmp_path, tokenizer)
    alpaca = [{"instruction": f"What follows {n}?", "output": f"It is {n + 1}."} for n in range(40)]
    write_jsonl(tmp_path / "rows.jsonl", alpaca)
    assert all_rows(prepare(tmp_path, tokenizer)) == all_rows(expected)


GOOD_LINE = json.dumps(chat(-1)).encode()
BAD_LINES = {
    "not JSON": (b'{"messages": [', "not JSON"),
    "cut off": (GOOD_LINE[:-3], "not JSON"),
    "a bare word": (b"hello", "not JSON"),
    "NUL bytes": (b"\0\0\0", "not JSON"),
    "NUL inside": (GOOD_LINE.replace(b"It", b"\0"), "not JSON"),
    "escaped NUL": (GOOD_LINE.replace(b"It", b"\\u0000"), "NUL character"),
    "lone surrogate": (GOOD_LINE.replace(b"It", b"\\ud83d"), "not UTF-8"),
    "Latin-1 byte": (GOOD_LINE.replace(b"It", b"\xe9"), "not UTF-8: byte 0xe9"),
    "deep nesting": (b"[" * 100_000, "not JSON"),
    "an endless number": (b'{"messages": ' + b"1" * 5000 + b"}", "not JSON"),
    "a list": (b"[1, 2]", "not an object"),
    "a number": (b"17", "not an object"),
    "null": (b"null", "not an object"),
    "an empty object": (b"{}", "missing field: messages"),
    "null field": (b'{"messages": null}', "missing field: messages"),
    "text for a list": (b'{"messages": "hi"}', "wrong type"),
    "no turns": (b'{"messages": []}', "no assistant turn"),
    "unknown role": (GOOD_LINE.replace(b"assistant", b"narrator"), "unknown role"),
    "only a question": (GOOD_LINE.replace(b"assistant", b"user"), "no assistant turn"),
    "empty answer": (GOOD_LINE.replace(b"It is 0.", b""), "empty content"),
    "mark mid-file": (b"\xef\xbb\xbf" + GOOD_LINE, "not JSON"),
}


def write_with_bad_line(path, bad):
    lines = [json.dumps(chat(number)).encode() for number in range(60)]
    lines.insert(16, bad)
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_row_stops_the_study_with_file_line_and_reason(bad, reason, tmp_path, tokenizer):
    write_with_bad_line(tmp_path / "rows.jsonl", bad)
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, tokenizer)
    message = str(caught.value)
    assert message.startswith("rows.jsonl: 1 of 61 rows are bad (1 ")
    assert "data.max_bad_fraction allows 0.01" in message
    assert f"{tmp_path / 'rows.jsonl'}:17: {reason}" in message


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_few_bad_rows_are_left_out_and_counted(bad, reason, tmp_path, tokenizer):
    write_with_bad_line(tmp_path / "rows.jsonl", bad)
    prepared = prepare(tmp_path, tokenizer, max_bad_fraction=0.05)
    assert prepared.fingerprint.num_bad_rows == 1
    assert len(all_rows(prepared)) == 60
    assert any(f"rows.jsonl:17: {reason}" in note for note in prepared.notes)


def test_only_the_first_three_bad_rows_are_shown_and_all_are_counted(tmp_path, tokenizer):
    rows = [*map(chat, range(90)), *[{"messages": []}] * 4, *[7] * 6]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, tokenizer)
    message = str(caught.value)
    assert "10 of 100 rows are bad (6 not an object, 4 no assistant turn)" in message
    assert message.count("rows.jsonl:") == 1 + 3
    assert "rows.jsonl:93" in message


def _dirty(path, content):
    path.write_bytes(content)
    return path.name


DIRTY_FILES = {
    "empty": ("a.jsonl", b"", "a.jsonl has no rows"),
    "blank lines only": ("a.jsonl", b"\n \n\n", "a.jsonl has no rows"),
    "byte order mark only": ("a.jsonl", b"\xef\xbb\xbf", "a.jsonl has no rows"),
    "UTF-16": ("a.jsonl", "{}".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    "binary": ("a.jsonl", bytes(range(256)) * 4, "rows are bad"),
    "unknown columns": ("a.jsonl", b'{"q": 1}\n', "no known format has the columns q"),
    "empty JSON": ("a.json", b"", "a.json has no rows"),
    "empty array": ("a.json", b"[]", "a.json has no rows"),
    "broken array": ("a.json", b'[{"text": "a"},\n{"text": ]', "a.json:2 is not JSON"),
    "array not UTF-8": ("a.json", b'["\xff"]', "is not UTF-8 text"),
    "array of numbers": ("a.json", b"[1, 2]", "2 of 2 rows are bad"),
    "empty CSV": ("a.csv", b"", "a.csv has no rows"),
    "CSV header only": ("a.csv", b"prompt,completion\n", "a.csv has no rows"),
    "CSV open quote": ("a.csv", b'text\n"abc\n', "a.csv:2: not CSV"),
    "CSV cell missing": ("a.csv", b"prompt,completion\na\n", "1 cells, the header has 2"),
    "CSV not UTF-8": ("a.csv", b"text\n\xff\n", "a.csv:2: not UTF-8"),
    "CSV UTF-16": ("a.csv", "text\n".encode("utf-16"), "is UTF-16 text"),
    "parquet that is text": ("a.parquet", b"hello", "a.parquet is not a readable parquet file"),
    "empty parquet": ("a.parquet", b"", "a.parquet is not a readable parquet file"),
    "unknown kind": ("a.xlsx", b"x", r"end with .jsonl, .json, .csv, .parquet"),
    "no extension": ("rows", b"x", "ends with 'no extension'"),
}


@pytest.mark.parametrize(("name", "content", "message"), DIRTY_FILES.values(), ids=DIRTY_FILES)
def test_a_dirty_file_is_refused_in_one_message(name, content, message, tmp_path, tokenizer):
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, tokenizer, _dirty(tmp_path / name, content))


@pytest.mark.parametrize(
    "dress",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\n\n  \n"),
        lambda text: text.rstrip("\n"),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "no last newline"],
)
def test_harmless_differences_of_files_change_nothing(dress, tmp_path, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", map(chat, range(30)))
    expected = prepare(tmp_path, tokenizer)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dress(path.read_text()).encode())
    assert prepare(tmp_path, tokenizer) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.jsonk", "neither a file nor a hub data set"),
        ("row.jsonl", r"file not found: .*row\.jsonl; did you mean rows\.jsonl\?"),
        ("./nothing", "file not found"),
        ("deep/er/path", "file not found"),
        (".", "is a folder; name one file in it"),
        ("no-such/data-set", "'no-such/data-set' is neither a file nor a hub data set"),
    ],
)
def test_a_source_that_is_not_there_is_named(name, message, tmp_path, tokenizer, monkeypatch):
    # The hub is out of reach: the same message as for a data set that does not exist.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, tokenizer, name)


def test_long_rows_are_cut_and_counted(tmp_path, tokenizer):
    rows = [chat(number) for number in range(40)]
    rows[7]["messages"][1]["content"] = "very " * 100
    write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare(tmp_path, tokenizer, max_length=80)
    assert prepared.fingerprint.num_truncated == 1
    assert prepared.fingerprint.max_tokens == 80
    assert "rows.jsonl: 1 row cut to 80 tokens." in prepared.notes


def test_rows_that_lose_every_label_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [chat(number) for number in range(40)]
    rows[7]["messages"][0]["content"] = "very " * 100
    write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare(tmp_path, tokenizer, max_length=80)
    assert prepared.fingerprint.num_unlabelled == 1
    assert len(all_rows(prepared)) == 39
    assert all(row.num_labels for row in all_rows(prepared))


def test_no_label_at_all_is_refused_with_an_example_and_the_cause(tmp_path, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", map(chat, range(40)))
    with pytest.raises(DataError, match=r"cut to data.max_length = 12 tokens") as caught:
        prepare(tmp_path, tokenizer, max_length=12)
    assert "<user>What f" in str(caught.value)


def test_a_template_that_refuses_every_row_is_one_message(tmp_path, byte_tokenizer):
    tokenizer = byte_tokenizer(template="{{ raise_exception('no user turns, please') }}")
    write_jsonl(tmp_path / "rows.jsonl", map(chat, range(40)))
    with pytest.raises(DataError, match="40 refused by the chat template") as caught:
        prepare(tmp_path, tokenizer)
    assert "rows.jsonl:1: refused by the chat template: no user turns, please" in str(caught.value)


def test_text_rows_need_no_template_and_settings_without_effect_are_noted(tmp_path, byte_tokenizer):
    tokenizer = byte_tokenizer()
    write_jsonl(tmp_path / "rows.jsonl", ({"text": f"Line {n}."} for n in range(40)))
    prepared = prepare(tmp_path, tokenizer, chat_template="chatml", split="validation")
    assert prepared.fingerprint.chat_template == "none"
    assert set(texts(all_rows(prepared), tokenizer)) == {f"Line {n}.<eos>" for n in range(40)}
    assert any("data.chat_template = 'chatml'" in note for note in prepared.notes)
    assert any("data.split = 'validation' is without effect" in note for note in prepared.notes)


def test_columns_that_are_not_used_are_noted(tmp_path, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", ({**chat(n), "source": "web"} for n in range(40)))
    assert "rows.jsonl: not used: source." in prepare(tmp_path, tokenizer).notes


def test_a_described_row_marks_exactly_the_text_that_carries_loss(tmp_path, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", map(chat, range(40)))
    lines = describe_rows(prepare(tmp_path, tokenizer), tokenizer, n=2)
    assert len(lines) == 2
    head, _, tail = lines[0].partition("<assistant>")
    assert "{+" not in head
    assert tail.startswith("{+It is ")
    assert tail.endswith(".<end>+}\n")


def test_labels_repeat_the_ids_and_splits_are_the_same_again(tmp_path, smollm2):
    write_jsonl(tmp_path / "rows.jsonl", map(chat, range(300)))
    first, second = (prepare(tmp_path, smollm2) for _ in range(2))
    assert first == second
    for row in all_rows(first):
        assert all(
            label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True)
        )
