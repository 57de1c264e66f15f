"""The bundled general text in rows: all of it, in order, with loss on all tokens but each row's first."""

from pathlib import Path

import pytest
import tokenizers
import transformers

from lora_tune.data.general_text import describe_general_text, general_rows, general_text


@pytest.fixture(params=[False, True], ids=["plain", "with a begin token"])
def tokenizer(request: pytest.FixtureRequest) -> transformers.PreTrainedTokenizerFast:
    words = dict.fromkeys(["<unk>", "<s>", *general_text().split()])
    vocab = {word: number for number, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if request.param:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>"
    )


@pytest.mark.parametrize("max_length", [8, 96, 1024, 100_000])
def test_the_rows_are_the_whole_text_in_order(tokenizer, max_length: int) -> None:
    rows = general_rows(tokenizer, max_length=max_length)
    begin = 1 if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else 0
    assert all(len(row.input_ids) <= max_length for row in rows)
    assert all(row.input_ids[:begin] == (1,) * begin for row in rows)
    words = [tokenizer.decode([i]) for row in rows for i in row.input_ids[begin:]]
    assert words == general_text().split()[: len(words)]
    assert len(general_text().split()) - len(words) <= 1  # a last row of one word has no target


def test_all_tokens_but_the_first_of_a_row_carry_loss(tokenizer) -> None:
    for row in general_rows(tokenizer, max_length=50):
        assert row.labels == (-100, *row.input_ids[1:])
        assert row.num_labels == len(row.input_ids) - 1


def test_the_text_is_what_it_is_called_and_travels_with_the_package() -> None:
    assert describe_general_text() == f"{len(general_text().split()):,} words of plain English"
    assert 1000 < len(general_text().split()) < 2000
    assert general_text().isascii()
    manifest = Path(__file__).parents[2] / "pyproject.toml"
    assert '"**/*.txt"' in manifest.read_text(encoding="utf-8")
