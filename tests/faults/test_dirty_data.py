"""Every dirty data set ends as its row of the table says: in one message, or used with a note, and in time.

Twice each: by ``prepare_data``, and by the command ``lora-tune check``, of which exit
code, message and silence are what a person would see.
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from campaign_results import record
from dirty_data_sets import BAD_LINE, BAD_ROWS, SETS, DirtySet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_tune.cli import main
from lora_tune.data import prepare_data
from lora_tune.errors import DataError
from lora_tune.records import PreparedData
from lora_tune.study.spec import DataSection

LIMIT_S = 30  # the slowest set takes about one
SURVIVED: set[int] = set()  # sets of which the command said what it should
STUDY = """\
[study]
name = "dirty"
[model]
base = "model"
[memory]
gpu = "RTX 4090"
[data]
"""
MARKS = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + MARKS + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "refusing": "{% if m.content == 'boom' %}{{ raise_exception('no booms') }}{% endif %}",
    "dividing": "{% if m.content == '7' %}{{ 7 // 0 }}{% endif %}",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """A token for each byte, ChatML with a default system turn, and no pad token but the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    found.chat_template = CHATML
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A base as ``check`` sees it: sizes and tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study's folder with the base beside the rows."""
    (tmp_path / "model").symlink_to(model)
    for name, fault in TEMPLATES.items():
        text = f"{{% for m in messages %}}{fault}{MARKS}{{% endfor %}}"
        (tmp_path / f"{name}.jinja").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """End what hangs by a real alarm."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"not over after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def prepare(dirty: DirtySet, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    data = DataSection.model_validate({"train": dirty.file, **dirty.settings})
    with time_limit(LIMIT_S):
        return prepare_data(data, tokenizer=tokenizer, seed=0, base_dir=folder)


def num_rows(prepared: PreparedData) -> int:
    return len(prepared.train) + len(prepared.selection) + len(prepared.confirmation)


def matches(text: str, alternatives: str) -> bool:
    return any(wanted in text for wanted in alternatives.split("|"))


def check_message(text: str) -> None:
    """A message is short and harmless, wherever it is shown."""
    assert len(text) < 3000
    assert len(text.splitlines()) <= 7
    assert all(c.isprintable() or c == "\n" for c in text)
    text.encode("utf-8")


@pytest.mark.parametrize("dirty", SETS.values(), ids=SETS)
def test_a_dirty_data_set_ends_as_it_should(
    dirty: DirtySet, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    dirty.write(folder)
    if dirty.end in ("refused", "bad rows"):
        with pytest.raises(DataError) as caught:
            prepare(dirty, folder, tokenizer)
        check_message(str(caught.value))
        assert matches(str(caught.value), dirty.says)
        assert dirty.file in str(caught.value)
        if dirty.end == "bad rows":
            assert f"{dirty.file}: 1 of 61 rows are bad (1 " in str(caught.value)
        return
    prepared = prepare(dirty, folder, tokenizer)
    assert num_rows(prepared) == dirty.rows
    about, *others = prepared.notes
    assert about.startswith(f"{dirty.file}: ")
    if dirty.end == "clean":
        assert others == []
    else:
        [said] = [note for note in others if matches(note, dirty.says)]
        check_message(said)


@pytest.mark.parametrize("dirty", BAD_ROWS.values(), ids=BAD_ROWS)
def test_few_bad_rows_are_left_out_and_counted_by_reason(
    dirty: DirtySet, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    dirty.write(folder)
    lenient = replace(dirty, settings={**dirty.settings, "max_bad_fraction": 0.05})
    prepared = prepare(lenient, folder, tokenizer)
    assert (num_rows(prepared), prepared.fingerprint.num_bad_rows) == (60, 1)
    [note] = [note for note in prepared.notes if "1 bad row left out (1 " in note]
    assert matches(note, dirty.says)
    place = f"{dirty.file}:{BAD_LINE}: " if dirty.file == "rows.jsonl" else f"{dirty.file}"
    assert place in note or "rows.jsonl:61: " in note


def run_check(
    folder: Path, dirty: DirtySet, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of the command."""
    settings = {"train": dirty.file, **dirty.settings}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (folder / "dirty.toml").write_text(STUDY + lines, encoding="utf-8")
    capsys.readouterr()
    before, sys.argv = sys.argv, ["lora-tune", "check", "dirty.toml"]
    try:
        with time_limit(LIMIT_S):
            main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("dirty", SETS.values(), ids=SETS)
def test_check_says_it_in_one_message_with_its_exit_code(
    dirty: DirtySet, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dirty.write(folder)
    code, out, err = run_check(folder, dirty, capsys)
    assert "Traceback" not in out + err
    if dirty.end in ("refused", "bad rows"):
        assert code == 3
        assert err.startswith("lora-tune: ")
        assert matches(err, dirty.says)
        check_message(err)
        assert out == ""
    else:
        assert (code, err) == (0, "")
        flat = " ".join(out.split())
        assert dirty.end == "clean" or matches(flat, dirty.says)
    assert not list(folder.glob("reports/*"))
    SURVIVED.add(id(dirty))


def test_there_are_many_dirty_data_sets() -> None:
    assert len(SETS) >= 100
    record("dirty-data-sets", tried=len(SETS), survived=len(SURVIVED))
