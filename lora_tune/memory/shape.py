"""ModelShape: a base model as sizes, which is all that the memory estimate needs.

Two ways to one: from a config.json, for the decoders whose closed form is known (``COVERED``), or
from linear layers that the caller counted on the real model, for all others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lora_tune.catalog.targets import layer_suffix, matches_suffix
from lora_tune.errors import ModelError, TargetModulesError
from lora_tune.records import LinearShape

COVERED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types with a closed form: RMSNorm, rotary attention, SwiGLU, no other parts."""

# Keys by which transformers' config.json files name the same size.
_KEYS = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
}
# Qwen3Config's own default, where the others take hidden_size / num_attention_heads.
_HEAD_DIM_DEFAULTS = {"qwen3": 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder. Hashable, so that what is derived from it can be cached."""

    model_type: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool  # the head is the embedding
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool  # queries and keys are normalized per head
    layer_linears: tuple[LinearShape, ...]  # of one layer, named inside it: self_attn.q_proj
    outer_linears: tuple[LinearShape, ...] = ()  # outside the layers, full names; no head
    layer_tensors: tuple[int, ...] = ()  # elements of a layer's other parameters: norms, biases
    outer_tensors: tuple[int, ...] = ()  # elements of embedding, final norm, untied head
    covered: bool = True

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; the values have the same."""
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """The linear layers of one decoder layer, then those outside the layers."""
        return self.layer_linears + self.outer_linears

    @property
    def copies(self) -> tuple[int, ...]:
        """How often the model has each of ``linears``."""
        return (self.num_layers,) * len(self.layer_linears) + (1,) * len(self.outer_linears)

    @property
    def num_parameters(self) -> int:
        """All parameters of the base model; a tied head counts once."""
        linear = sum(
            count * shape.in_features * shape.out_features
            for shape, count in zip(self.linears, self.copies, strict=True)
        )
        return linear + self.num_layers * sum(self.layer_tensors) + sum(self.outer_tensors)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "ModelShape":
        """Return the shape of a covered decoder from its config.json.

        Raises:
            ModelError: A key is missing, or the model type has no closed form and needs
                ``from_linears``.
        """
        model_type = str(config.get("model_type") or _missing(("model_type",)))
        if model_type not in COVERED:
            raise ModelError(
                f'config.json: model_type "{model_type}" has no closed form '
                f"(known: {', '.join(COVERED)}); its linear layers must be counted on the model."
            )
        hidden, heads = _size(config, "hidden"), _size(config, "num_heads")
        kv_heads = _size(config, "num_kv_heads", heads)
        head_dim = _size(
            config, "head_dim", _HEAD_DIM_DEFAULTS.get(model_type, hidden // max(heads, 1))
        )
        tied = bool(config.get("tie_word_embeddings", False))
        attention_bias = model_type == "qwen2" or bool(config.get("attention_bias", False))
        mlp_bias = model_type == "llama" and bool(config.get("mlp_bias", False))
        intermediate, vocab = _size(config, "intermediate"), _size(config, "vocab_size")
        linears = _swiglu_linears(
            hidden, intermediate, query_size=heads * head_dim, kv_size=kv_heads * head_dim
        )
        qk_norm = model_type == "qwen3"
        # Qwen2's output projection has no bias although its query, key and value have one.
        biased = linears[: 3 if model_type == "qwen2" else 4] if attention_bias else ()
        biased += linears[4:] if mlp_bias else ()
        biases = tuple(linear.out_features for linear in biased)
        norms = (hidden, hidden) + ((head_dim, head_dim) if qk_norm else ())
        embeddings = (vocab * hidden,) * (1 if tied else 2)
        return cls(
            model_type=model_type,
            num_layers=_size(config, "num_layers"),
            hidden=hidden,
            intermediate=intermediate,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab,
            tied=tied,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
            qk_norm=qk_norm,
            layer_linears=linears,
            layer_tensors=norms + biases,
            outer_tensors=(*embeddings, hidden),
        )

    @classmethod
    def from_linears(
        cls,
        config: Mapping[str, object],
        linears: Sequence[LinearShape],
        num_other_parameters: int,
    ) -> "ModelShape":
        """Return the shape of a decoder without a closed form, from its counted linear layers.

        Layers that differ are all taken to be like the largest one, an overestimate.

        Args:
            config: The model's config.json.
            linears: Every linear layer by full name with its layer index, output head excluded.
            num_other_parameters: All other parameters: embeddings, norms, biases, untied head.

        Raises:
            ModelError: A size is missing from the config, or there are no layers.
        """
        layers: dict[str, list[LinearShape]] = {}
        outer = []
        for linear in linears:
            suffix = layer_suffix(linear.name)
            if suffix == linear.name:
                outer.append(linear)
                continue
            layer = linear.name.removesuffix(suffix)
            layers.setdefault(layer, []).append(_renamed(linear, suffix))
        if not layers:
            raise ModelError("the model has no linear layer inside numbered decoder layers")
        largest = max(layers.values(), key=_num_weights)
        hidden, heads = _size(config, "hidden"), _size(config, "num_heads")
        return cls(
            model_type=str(config.get("model_type") or _missing(("model_type",))),
            num_layers=len(layers),
            hidden=hidden,
            intermediate=_size(
                config, "intermediate", max(linear.out_features for linear in largest)
            ),
            num_heads=heads,
            num_kv_heads=_size(config, "num_kv_heads", heads),
            head_dim=_size(config, "head_dim", hidden // max(heads, 1)),
            vocab_size=_size(config, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=False,
            mlp_bias=False,
            qk_norm=False,
            layer_linears=tuple(largest),
            outer_linears=tuple(outer),
            outer_tensors=(num_other_parameters,),
            covered=False,
        )


@lru_cache(maxsize=4096)
def adapted_copies(shape: ModelShape, targets: tuple[str, ...]) -> tuple[int, ...]:
    """Return how many copies of each of ``shape.linears`` the targets adapt.

    Args:
        shape: The base model.
        targets: Module suffixes (every layer) or full module names (that layer only).

    Raises:
        TargetModulesError: A target is none of the model's linear layers.

    >>> shape = ModelShape.from_config(
    ...     {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
    ...      "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    ... )
    >>> adapted_copies(shape, ("q_proj", "model.layers.1.mlp.up_proj"))
    (2, 0, 0, 0, 0, 1, 0)
    """
    names = [linear.name for linear in shape.linears]
    copies = [0] * len(names)
    everywhere = [False] * len(names)
    for target in dict.fromkeys(targets):
        inside = layer_suffix(target)
        found = [i for i, name in enumerate(names) if matches_suffix(name, inside)]
        if not found:
            known = ", ".join(names)
            raise TargetModulesError(
                f'target module "{target}" is no linear layer of this {shape.model_type} model. '
                f"Its linear layers: {known}."
            )
        for i in found:
            if inside == target:
                everywhere[i] = True
            else:
                copies[i] += 1
    limits = zip(copies, everywhere, shape.copies, strict=True)
    return tuple(limit if all_layers else min(n, limit) for n, all_layers, limit in limits)


def _swiglu_linears(
    hidden: int, intermediate: int, *, query_size: int, kv_size: int
) -> tuple[LinearShape, ...]:
    sizes = {
        "self_attn.q_proj": (hidden, query_size),
        "self_attn.k_proj": (hidden, kv_size),
        "self_attn.v_proj": (hidden, kv_size),
        "self_attn.o_proj": (query_size, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    return tuple(
        LinearShape(name=name, in_features=ins, out_features=outs)
        for name, (ins, outs) in sizes.items()
    )


def _size(config: Mapping[str, object], field: str, default: int | None = None) -> int:
    for key in _KEYS[field]:
        value = config.get(key)
        if isinstance(value, int):
            return value
    return _missing(_KEYS[field]) if default is None else default


def _missing(keys: tuple[str, ...]) -> int:
    others = f" (nor {', '.join(keys[1:])})" if len(keys) > 1 else ""
    raise ModelError(
        f"config.json: {keys[0]} is missing{others}; the memory estimate needs it. "
        "Is this the config.json of a causal language model?"
    )


def _num_weights(linears: Sequence[LinearShape]) -> int:
    return sum(linear.in_features * linear.out_features for linear in linears)


def _renamed(linear: LinearShape, name: str) -> LinearShape:
    return LinearShape(name=name, in_features=linear.in_features, out_features=linear.out_features)
