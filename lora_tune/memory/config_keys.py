"""A config.json by the families' names for the same thing, with the errors for what is missing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_tune.errors import ModelError

# Keys by which config.json files name the same size.
_KEYS = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "gpt2_intermediate": ("n_inner",),  # the only key that GPT2Config and FalconConfig read
    "falcon_intermediate": ("ffn_hidden_size",),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "positions": ("n_positions", "max_position_embeddings", "n_ctx"),
    "num_experts": ("num_experts", "num_local_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "expert_intermediate": ("moe_intermediate_size",),
    "shared_expert_intermediate": ("shared_expert_intermediate_size",),
}
# What the config classes of transformers 5.23.0 take for a key that is not there.
_KV_HEADS_DEFAULTS = {
    "mistral": 8,
    "mixtral": 8,
    "qwen2": 32,
    "qwen3": 32,
    "smollm3": 4,
    "gemma": 16,
    "gemma2": 4,
    "gemma3_text": 4,
    "qwen2_moe": 16,
    "qwen3_moe": 4,
}
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "smollm3", "gpt2", "falcon")


MOST_LAYERS = 10_000


class ConfigKeys:
    """A config.json with its families' names for the same thing."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.config = config
        self.model_type = str(config.get("model_type") or _missing(("model_type",)))

    def size(self, field: str, default: int | None = None) -> int:
        """Return a size of ``_KEYS``; a null counts as missing.

        Raises:
            ModelError: It is missing without a default, or no positive whole number.
        """
        for key in _KEYS[field]:
            value = self.config.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(
                    f"config.json: {key} is {value!r}; it must be a whole number from 1."
                )
            if field == "num_layers" and value > MOST_LAYERS:
                raise ModelError(f"config.json: {key} is {value}; no model has so many layers.")
            return value
        return _missing(_KEYS[field]) if default is None else default

    def flag(self, key: str, default: bool) -> bool:
        """Return a switch; a null counts as missing."""
        value = self.config.get(key)
        return default if value is None else bool(value)

    def number(self, key: str, default: float) -> float:
        """Return a number; a null counts as missing.

        Raises:
            ModelError: It is not finite.
        """
        value = self.config.get(key)
        if not isinstance(value, int | float):
            return default
        if not math.isfinite(value):
            raise ModelError(f"config.json: {key} is {value!r}; it must be a finite number.")
        return float(value)

    def count(self, key: str, default: int) -> int:
        """Return a whole number from 1 on; a null counts as missing.

        Raises:
            ModelError: It is none.
        """
        value = self.number(key, default)
        if value < 1 or value != int(value):
            raise ModelError(f"config.json: {key} is {value:g}; it must be a whole number from 1.")
        return int(value)

    def text(self, keys: Sequence[str], default: str) -> str:
        """Return the first text among the keys."""
        return next((v for key in keys if isinstance(v := self.config.get(key), str)), default)

    def rope_share(self, default: float) -> float:
        """Return which share of a head is rotated.

        The key stands on its own, or in one of the two mappings that have held it over time.
        """
        holders = (self.config.get("rope_parameters"), self.config.get("rope_scaling"), self.config)
        for holder in holders:
            value = holder.get("partial_rotary_factor") if isinstance(holder, Mapping) else None
            if isinstance(value, int | float):
                return float(value)
        return default

    def num_kv_heads(self, num_heads: int) -> int:
        """Return the key heads: null means one a query head, a missing key the family's default."""
        absent = not any(key in self.config for key in _KEYS["num_kv_heads"])
        default = _KV_HEADS_DEFAULTS.get(self.model_type, num_heads) if absent else num_heads
        return self.size("num_kv_heads", default)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.flag("tie_word_embeddings", self.model_type in _TIED_BY_DEFAULT)


def _missing(keys: tuple[str, ...]) -> Any:
    others = f" (nor {', '.join(keys[1:])})" if len(keys) > 1 else ""
    raise ModelError(
        f"config.json: {keys[0]} is missing{others}; the memory estimate needs it. "
        "Is this the config.json of a causal language model?"
    )
