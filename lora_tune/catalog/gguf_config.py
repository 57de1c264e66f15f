"""The config.json that a GGUF file's header stands for, without loading tensors or torch.

The header is read directly: ``gguf.GGUFReader`` builds an array object for every token of the
vocabulary, which takes seconds. Layout: the GGUF specification, versions 2 and 3 (ggml-org/ggml,
``docs/gguf.md``). Keys and tensor names: ``gguf/constants.py`` of the package gguf 0.19.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora_tune.errors import ModelError

# Value types of the specification that have a fixed size, as struct formats.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
# No vocabulary, tensor list or string of a real file is longer; a damaged length is.
_MOST_ENTRIES = 1 << 26
_MOST_SCALARS = 4096  # longer arrays are scores and token types of the vocabulary: skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What stands before the tensors' data."""

    values: Mapping[str, object]  # metadata; of long arrays and arrays of text only the length
    tensors: Mapping[str, tuple[int, ...]]  # sizes by tensor name, fastest dimension first


def read_gguf_header(path: Path) -> GgufHeader:
    """Return metadata and tensor sizes of a GGUF file; the tensors' data are not read.

    Raises:
        ModelError: The file is no GGUF file, of an unknown version, or ends too early.
    """
    with path.open("rb") as file:
        magic, version = file.read(4), file.read(4)
        if magic != b"GGUF":
            raise ModelError(f'"{path}" is no GGUF file: it does not begin with GGUF.')
        if len(version) < 4 or (number := struct.unpack("<I", version)[0]) not in _VERSIONS:
            seen = number if len(version) == 4 else "missing"
            raise ModelError(f'"{path}": GGUF version {seen} cannot be read; known: 2 and 3.')
        try:
            num_tensors, num_values = _count(file), _count(file)
            values = dict(_read_entry(file) for _ in range(num_values))
            tensors = dict(_read_tensor(file) for _ in range(num_tensors))
        except (EOFError, ValueError) as error:
            raise ModelError(
                f'"{path}" is a damaged GGUF file: {error}. Download it again.'
            ) from error
    return GgufHeader(values=values, tensors=tensors)


def read_gguf_config(path: Path) -> dict[str, object]:
    """Return the config.json of the model in a GGUF file, as far as it decides sizes.

    Biases and an untied head are seen from the tensors, the rest from the metadata.

    Raises:
        ModelError: The file cannot be read, lacks a value, or holds an architecture that is not
            known here.
    """
    header = read_gguf_header(path)
    architecture = header.values.get("general.architecture")
    build = _ARCHITECTURES.get(str(architecture))
    if build is None:
        raise ModelError(
            f'"{path}": the architecture "{architecture}" of a GGUF file is not known here '
            f"(known: {', '.join(_ARCHITECTURES)}). Give the folder or hub id of the original model."
        )
    return build(_Metadata(path, str(architecture), header))


class _Metadata:
    """The metadata of one architecture."""

    def __init__(self, path: Path, architecture: str, header: GgufHeader) -> None:
        self.path, self.architecture, self.header = path, architecture, header

    def size(self, key: str) -> int:
        """Return a whole number that must be there."""
        value = self.optional(key)
        if value is None:
            name = f"{self.architecture}.{key}"
            raise ModelError(f'"{self.path}": the GGUF metadata lack a whole number {name}.')
        return value

    def optional(self, key: str) -> int | None:
        """Return a whole number, None where the file does not have it.

        An array has one number a layer; unequal ones are refused.
        """
        value = self.header.values.get(f"{self.architecture}.{key}")
        if isinstance(value, tuple):
            if len(set(value)) != 1:
                raise ModelError(
                    f'"{self.path}": {self.architecture}.{key} differs between layers. '
                    "Give the folder or hub id of the original model."
                )
            value = value[0]
        return value if isinstance(value, int) else None

    def has(self, tensor: str) -> bool:
        """Say whether the file has a tensor of that name."""
        return tensor in self.header.tensors

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        sizes = self.header.tensors.get("token_embd.weight", ())
        if len(sizes) != 2:
            raise ModelError(f'"{self.path}": the GGUF file has no embedding token_embd.weight.')
        return sizes[1]

    def common(self, model_type: str) -> dict[str, object]:
        """Return the keys that nearly all decoders have."""
        heads = self.size("attention.head_count")
        config: dict[str, object] = {
            "model_type": model_type,
            "hidden_size": self.size("embedding_length"),
            "intermediate_size": self.size("feed_forward_length"),
            "num_hidden_layers": self.size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.optional("attention.head_count_kv") or heads,
            "vocab_size": self.vocab_size,
        }
        if (length := self.optional("context_length")) is not None:
            config["max_position_embeddings"] = length
        return config

    def rotary_share(self) -> float:
        """Return which share of a head's dimensions is rotated."""
        head_dim = self.size("embedding_length") // max(self.size("attention.head_count"), 1)
        return (self.optional("rope.dimension_count") or head_dim) / max(head_dim, 1)


def _llama(meta: _Metadata) -> dict[str, object]:
    # Mistral and Mixtral are converted under the name llama too.
    experts = meta.optional("expert_count")
    config = meta.common("mixtral" if experts else "llama")
    config["tie_word_embeddings"] = not meta.has("output.weight")
    head_dim = meta.optional("attention.key_length") or meta.optional("rope.dimension_count")
    if head_dim:
        config["head_dim"] = head_dim
    if experts:
        config["num_local_experts"] = experts
        config["num_experts_per_tok"] = meta.size("expert_used_count")
    else:
        config["attention_bias"] = meta.has("blk.0.attn_output.bias")
        config["mlp_bias"] = meta.has("blk.0.ffn_down.bias")
    return config


def _qwen2(meta: _Metadata) -> dict[str, object]:
    config = meta.common("qwen2")
    config["tie_word_embeddings"] = not meta.has("output.weight")
    return config


def _qwen3(meta: _Metadata) -> dict[str, object]:
    config = meta.common("qwen3")
    config["tie_word_embeddings"] = not meta.has("output.weight")
    config["head_dim"] = meta.size("attention.key_length")
    config["attention_bias"] = meta.has("blk.0.attn_output.bias")
    return config


def _qwen_moe(meta: _Metadata, model_type: str) -> dict[str, object]:
    config = meta.common(model_type)
    config["tie_word_embeddings"] = not meta.has("output.weight")
    config["num_experts"] = meta.size("expert_count")
    config["num_experts_per_tok"] = meta.size("expert_used_count")
    config["moe_intermediate_size"] = meta.size("expert_feed_forward_length")
    return config


def _qwen2_moe(meta: _Metadata) -> dict[str, object]:
    config = _qwen_moe(meta, "qwen2_moe")
    config["shared_expert_intermediate_size"] = meta.size("expert_shared_feed_forward_length")
    return config


def _qwen3_moe(meta: _Metadata) -> dict[str, object]:
    config = _qwen_moe(meta, "qwen3_moe")
    config["head_dim"] = meta.size("attention.key_length")
    return config


def _gemma(meta: _Metadata) -> dict[str, object]:
    model_type = {"gemma3": "gemma3_text"}.get(meta.architecture, meta.architecture)
    config = meta.common(model_type)
    config["head_dim"] = meta.size("attention.key_length")
    if (window := meta.optional("attention.sliding_window")) is not None:
        config["sliding_window"] = window
    return config


def _phi3(meta: _Metadata) -> dict[str, object]:
    config = meta.common("phi3")
    config["tie_word_embeddings"] = not meta.has("output.weight")
    config["partial_rotary_factor"] = meta.rotary_share()
    config["sliding_window"] = meta.optional("attention.sliding_window")
    return config


def _smollm3(meta: _Metadata) -> dict[str, object]:
    config = meta.common("smollm3")
    config["tie_word_embeddings"] = not meta.has("output.weight")
    return config


def _gpt2(meta: _Metadata) -> dict[str, object]:
    return {
        "model_type": "gpt2",
        "n_embd": meta.size("embedding_length"),
        "n_inner": meta.size("feed_forward_length"),
        "n_layer": meta.size("block_count"),
        "n_head": meta.size("attention.head_count"),
        "n_positions": meta.size("context_length"),
        "vocab_size": meta.vocab_size,
    }


def _gpt_neox(meta: _Metadata) -> dict[str, object]:
    config = meta.common("gpt_neox")
    del config["num_key_value_heads"]
    config["tie_word_embeddings"] = not meta.has("output.weight")
    config["rotary_pct"] = meta.rotary_share()
    parallel = meta.header.values.get("gptneox.use_parallel_residual", True)
    config["use_parallel_residual"] = parallel
    return config


def _falcon(meta: _Metadata) -> dict[str, object]:
    kv_heads = meta.optional("attention.head_count_kv") or 1
    new = meta.has("blk.0.attn_norm_2.weight")
    return {
        "model_type": "falcon",
        "hidden_size": meta.size("embedding_length"),
        "ffn_hidden_size": meta.size("feed_forward_length"),
        "num_hidden_layers": meta.size("block_count"),
        "num_attention_heads": meta.size("attention.head_count"),
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": new,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "vocab_size": meta.vocab_size,
    }


_ARCHITECTURES: dict[str, Callable[[_Metadata], dict[str, object]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "gpt2": _gpt2,
    "gptneox": _gpt_neox,
    "falcon": _falcon,
}


def _read_entry(file: BinaryIO) -> tuple[str, object]:
    key = _text(file)
    return key, _value(file, _number(file, "I"))


def _read_tensor(file: BinaryIO) -> tuple[str, tuple[int, ...]]:
    name = _text(file)
    sizes = tuple(_number(file, "Q") for _ in range(_within(_number(file, "I"), 8)))
    _take(file, 4 + 8)  # number format and offset of the data
    return name, sizes


def _value(file: BinaryIO, kind: int) -> object:
    """Return a metadata value; of an array its numbers as a tuple, or only its length."""
    if kind == _STRING:
        return _text(file)
    if kind in _SCALARS:
        return struct.unpack(f"<{_SCALARS[kind]}", _take(file, _size(kind)))[0]
    if kind != _ARRAY:
        raise ValueError(f"a value of unknown type {kind}")
    item, length = _number(file, "I"), _count(file)
    if item == _STRING:
        for _ in range(length):
            _text(file)
        return length
    if item not in _SCALARS:
        raise ValueError(f"an array of unknown type {item}")
    data = _take(file, length * _size(item))
    return struct.unpack(f"<{length}{_SCALARS[item]}", data) if length <= _MOST_SCALARS else length


def _size(kind: int) -> int:
    return struct.calcsize(f"<{_SCALARS[kind]}")


def _text(file: BinaryIO) -> str:
    return _take(file, _count(file)).decode("utf-8", errors="replace")


def _count(file: BinaryIO) -> int:
    return _within(_number(file, "Q"), _MOST_ENTRIES)


def _within(number: int, most: int) -> int:
    if number > most:
        raise ValueError(f"a length of {number}")
    return number


def _number(file: BinaryIO, code: str) -> int:
    number: int = struct.unpack(f"<{code}", _take(file, struct.calcsize(f"<{code}")))[0]
    return number


def _take(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise EOFError("it ends before its header does")
    return data
