"""From a config.json to sizes: which tensors the layers of each model family have.

Every family of ``COVERED`` is read in its modeling file of transformers 5.23.0, and the result is
tested against the model that transformers builds: names, sizes and order of the linear layers, and
the elements of every other parameter. Elements, never bytes: the number formats come later.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_tune.errors import UncoveredModelError
from lora_tune.memory.config_keys import ConfigKeys
from lora_tune.records import LinearShape

# Head sizes that config classes of transformers 5.23.0 have without the key; the others divide hidden
# by heads.
_HEAD_DIM_DEFAULTS = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
# The text_config of the published Gemma 3 models names only what differs from these.
_GEMMA3_HEADS, _GEMMA3_VOCAB = 8, 262_208

_GEMMAS = ("gemma", "gemma2", "gemma3_text")
_SANDWICHED = ("gemma2", "gemma3_text")


def shape_fields(config: Mapping[str, object]) -> dict[str, Any]:
    """Return the fields of ``ModelShape`` for a config.json of a covered family.

    Raises:
        UncoveredModelError: The model type has no closed form, or its layers differ.
        ModelError: A key is missing or is no size.
    """
    keys = ConfigKeys(config)
    read = _READERS.get(keys.model_type)
    if read is None:
        raise UncoveredModelError(
            f'config.json: model_type "{keys.model_type}" has no closed form '
            f"(known: {', '.join(COVERED)}); its memory must be counted on the model."
        )
    return read(keys)


def _llama_like(keys: ConfigKeys) -> dict[str, Any]:
    """Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 1 to 3, and the mixtures of experts."""
    fields = _common(keys)
    kind, hidden, head_dim = keys.model_type, fields["hidden"], fields["head_dim"]
    query, kv = fields["num_heads"] * head_dim, fields["num_kv_heads"] * head_dim
    attention = _linears(
        "self_attn.",
        {
            "q_proj": (hidden, query),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (query, hidden),
        },
    )
    fields["attention_bias"], biased = _attention_biases(keys, attention)
    fields["qk_norm"] = kind in ("qwen3", "qwen3_moe", "gemma3_text")
    fields["sandwich_norms"] = kind in _SANDWICHED
    fields["norm_offset"] = fields["embed_scale"] = kind in _GEMMAS
    norms = [hidden] * (4 if fields["sandwich_norms"] else 2) + [head_dim] * 2 * fields["qk_norm"]
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        mlp, others = _experts(keys, fields)
    else:
        mlp = _gated_mlp("mlp.", hidden, keys.size("intermediate"))
        others = []
        fields["intermediate"] = keys.size("intermediate")
        fields["mlp_bias"] = kind in ("llama", "smollm3") and keys.flag("mlp_bias", False)
        biased += mlp if fields["mlp_bias"] else ()
    return fields | {
        "layer_linears": attention + mlp,
        "layer_tensors": (*norms, *others, *(linear.out_features for linear in biased)),
        "num_biases": len(biased),
        "activation": _gated_activation(keys),
        "attention_softcap": _softcap(keys, "attn_logit_softcapping"),
        "final_softcap": _softcap(keys, "final_logit_softcapping"),
        "attention_dropout": keys.number("attention_dropout", 0.0),
        **_outer(fields),
        **_sliding(keys),
        **_rotary(fields, keys, head_dim),
    }


def _phi3(keys: ConfigKeys) -> dict[str, Any]:
    fields = _common(keys)
    hidden, head_dim, f = fields["hidden"], fields["head_dim"], keys.size("intermediate")
    query, kv = fields["num_heads"] * head_dim, fields["num_kv_heads"] * head_dim
    # Phi3Attention and Phi3MLP make their modules in this order.
    linears = _linears(
        "self_attn.", {"o_proj": (query, hidden), "qkv_proj": (hidden, query + 2 * kv)}
    ) + _linears("mlp.", {"gate_up_proj": (hidden, 2 * f), "down_proj": (f, hidden)})
    rotary = int(head_dim * keys.rope_share(1.0))
    return fields | {
        "intermediate": f,
        "layer_linears": linears,
        "layer_tensors": (hidden, hidden),
        "fused_qkv": True,
        "fused_gate_up": True,
        "activation": keys.text(("hidden_act",), "silu"),
        "embedding_dropout": 0.0,  # Phi3Model has none, although the config has embd_pdrop
        "hidden_dropout": keys.number("resid_pdrop", 0.0),
        "attention_dropout": keys.number("attention_dropout", 0.0),
        **_outer(fields),
        **_sliding(keys),
        **_rotary(fields, keys, rotary),
    }


def _gpt2(keys: ConfigKeys) -> dict[str, Any]:
    fields = _common(keys)
    hidden = fields["hidden"]
    f = keys.size("gpt2_intermediate", 4 * hidden)
    positions = keys.size("positions", 1024)
    # Conv1D: a linear layer whose weight is stored as (in_features, out_features).
    linears = _linears("attn.", {"c_attn": (hidden, 3 * hidden), "c_proj": (hidden, hidden)})
    linears += _linears("mlp.", {"c_fc": (hidden, f), "c_proj": (f, hidden)})
    if keys.flag("add_cross_attention", False):
        raise UncoveredModelError("config.json: add_cross_attention is true; no closed form.")
    return fields | {
        "intermediate": f,
        "num_kv_heads": fields["num_heads"],
        "attention_bias": True,
        "mlp_bias": True,
        "layer_linears": linears,
        "layer_tensors": (*[hidden] * 4, *(linear.out_features for linear in linears)),
        "num_biases": len(linears),
        "layer_prefix": "transformer.h.",
        "norm": "layer",
        "fused_qkv": True,
        "gated_mlp": False,
        "activation": keys.text(("activation_function",), "gelu_new"),
        "learned_positions": positions,
        "embedding_dropout": keys.number("embd_pdrop", 0.1),
        "hidden_dropout": keys.number("resid_pdrop", 0.1),
        "attention_dropout": keys.number("attn_pdrop", 0.1),
        **_outer(fields, norm_tensors=2, others=(positions * hidden,)),
    }


def _gpt_neox(keys: ConfigKeys) -> dict[str, Any]:
    fields = _common(keys)
    hidden, f = fields["hidden"], keys.size("intermediate")
    parallel, bias = keys.flag("use_parallel_residual", True), keys.flag("attention_bias", True)
    attention = _linears(
        "attention.", {"query_key_value": (hidden, 3 * hidden), "dense": (hidden, hidden)}
    )
    mlp = _linears("mlp.", {"dense_h_to_4h": (hidden, f), "dense_4h_to_h": (f, hidden)})
    biased = attention * bias + mlp
    share = keys.rope_share(keys.number("rotary_pct", 0.25))
    return fields | {
        "intermediate": f,
        "num_kv_heads": fields["num_heads"],
        "attention_bias": bias,
        "mlp_bias": True,
        "layer_linears": attention + mlp,
        "layer_tensors": (*[hidden] * 4, *(linear.out_features for linear in biased)),
        "num_biases": len(biased),
        "layer_prefix": "gpt_neox.layers.",
        "norm": "layer",
        "parallel_residual": parallel,
        "parallel_norms": 2 if parallel else 0,
        "fused_qkv": True,
        "gated_mlp": False,
        "activation": keys.text(("hidden_act",), "gelu"),
        "embedding_dropout": keys.number("hidden_dropout", 0.0),
        "hidden_dropout": keys.number("hidden_dropout", 0.0),
        "attention_dropout": keys.number("attention_dropout", 0.0),
        **_outer(fields, norm_tensors=2),
        **_rotary(fields, keys, int(fields["head_dim"] * share)),
    }


def _falcon(keys: ConfigKeys) -> dict[str, Any]:
    fields = _common(keys)
    hidden, head_dim = fields["hidden"], fields["head_dim"]
    f = keys.size("falcon_intermediate", 4 * hidden)
    new, parallel = keys.flag("new_decoder_architecture", False), keys.flag("parallel_attn", True)
    if not new:
        fields["num_kv_heads"] = 1 if keys.flag("multi_query", True) else fields["num_heads"]
    bias = keys.flag("bias", False)
    norms = keys.config.get("num_ln_in_parallel_attn")
    two = norms == 2 or (norms is None and new)
    if keys.flag("alibi", False) or (parallel and two and not new):
        raise UncoveredModelError("config.json: this kind of Falcon layer has no closed form.")
    linears = _linears(
        "self_attention.",
        {
            "query_key_value": (hidden, hidden + 2 * fields["num_kv_heads"] * head_dim),
            "dense": (hidden, hidden),
        },
    ) + _linears("mlp.", {"dense_h_to_4h": (hidden, f), "dense_4h_to_h": (f, hidden)})
    num_norms = 2 if two or not parallel else 1
    return fields | {
        "intermediate": f,
        "attention_bias": bias,
        "mlp_bias": bias,
        "layer_linears": linears,
        "layer_tensors": (*[hidden] * 2 * num_norms, *(x.out_features for x in linears if bias)),
        "num_biases": len(linears) * bias,
        "quantizable": False,
        "layer_prefix": "transformer.h.",
        "norm": "layer",
        "parallel_residual": parallel,
        "parallel_norms": num_norms if parallel else 0,
        "fused_qkv": True,
        "gated_mlp": False,
        "activation": keys.text(("activation",), "gelu"),
        "hidden_dropout": keys.number("hidden_dropout", 0.0),
        "attention_dropout": keys.number("attention_dropout", 0.0),
        **_outer(fields, norm_tensors=2),
        **_rotary(fields, keys, head_dim),
    }


_READERS: dict[str, Callable[[ConfigKeys], dict[str, Any]]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"),
        _llama_like,
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _llama_like),
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
}

COVERED = tuple(_READERS)
"""Model types with a closed form."""


def _common(keys: ConfigKeys) -> dict[str, Any]:
    """Return the sizes that all families have, with the plain values of the rest."""
    gemma3 = keys.model_type == "gemma3_text"
    heads = keys.size("num_heads", _GEMMA3_HEADS if gemma3 else None)
    hidden = keys.size("hidden")
    default = _HEAD_DIM_DEFAULTS.get(keys.model_type, max(hidden // heads, 1))
    fixed = keys.model_type in ("gpt2", "gpt_neox", "falcon")  # these ignore a head_dim key
    return {
        "model_type": keys.model_type,
        "num_layers": keys.size("num_layers"),
        "hidden": hidden,
        "num_heads": heads,
        "num_kv_heads": keys.num_kv_heads(heads),
        "head_dim": hidden // heads if fixed else keys.size("head_dim", default),
        "vocab_size": keys.size("vocab_size", _GEMMA3_VOCAB if gemma3 else None),
        "tied": keys.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
    }


def _attention_biases(
    keys: ConfigKeys, attention: tuple[LinearShape, ...]
) -> tuple[bool, tuple[LinearShape, ...]]:
    """Return whether the projections have biases, and those that do."""
    kind = keys.model_type
    if kind in ("mistral", "mixtral"):
        return False, ()
    if kind in ("qwen2", "qwen2_moe"):  # the output projection has none
        biased = kind == "qwen2" or keys.flag("qkv_bias", True)
        return biased, attention[:3] if biased else ()
    biased = keys.flag("attention_bias", False)
    return biased, attention if biased else ()


def _experts(keys: ConfigKeys, fields: dict[str, Any]) -> tuple[tuple[LinearShape, ...], list[int]]:
    """Set the fields of a mixture of experts; return its linears and its other parameters.

    Routed experts are two 3-D parameters, (experts, 2*width, hidden) and (experts, hidden, width);
    the router is a bare weight, the gate of the shared expert a linear layer of width 1.
    """
    kind, hidden = keys.model_type, fields["hidden"]
    num = keys.size("num_experts")
    width = keys.size("intermediate" if kind == "mixtral" else "expert_intermediate")
    if kind != "mixtral" and (
        keys.config.get("mlp_only_layers") or keys.number("decoder_sparse_step", 1) != 1
    ):
        raise UncoveredModelError(
            "config.json: mlp_only_layers or decoder_sparse_step mixes dense layers with experts; "
            "layers that differ have no closed form."
        )
    fields |= {
        "intermediate": keys.size("intermediate", width),
        "num_experts": num,
        "experts_per_token": keys.size("experts_per_token"),
        "expert_intermediate": width,
    }
    others = [num * hidden, num * 2 * width * hidden, num * hidden * width]
    if kind != "qwen2_moe":
        return (), others
    shared = keys.size("shared_expert_intermediate")
    fields["shared_expert_intermediate"] = shared
    gate = _linears("mlp.", {"shared_expert_gate": (hidden, 1)})
    return _gated_mlp("mlp.shared_expert.", hidden, shared) + gate, others


def _outer(
    fields: dict[str, Any], *, norm_tensors: int = 1, others: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Return the parameters outside the layers: embedding, final norm, head unless tied."""
    hidden = fields["hidden"]
    embeddings = (fields["vocab_size"] * hidden,) * (1 if fields["tied"] else 2)
    return {"outer_tensors": (*embeddings, *others, *(hidden,) * norm_tensors)}


def _rotary(fields: dict[str, Any], keys: ConfigKeys, dim: int) -> dict[str, Any]:
    """Return the rotary fields and the buffers: frequencies and a copy of them for each table.

    The embedding's scale is a buffer of one element. Gemma 3 has a table for each of its two
    layer types (``Gemma3RotaryEmbedding``), whether or not it has layers of both.
    """
    tables = 1
    if keys.model_type == "gemma3_text":
        tables = len(set(_layer_types(keys)))
    without = 0
    if keys.model_type == "smollm3":
        interval = keys.count("no_rope_layer_interval", 4)
        listed = keys.config.get("no_rope_layers")
        every = [int((i + 1) % interval != 0) for i in range(fields["num_layers"])]
        used = listed if isinstance(listed, Sequence) else every
        without = fields["num_layers"] - sum(bool(rotated) for rotated in used)
    scale = (1,) if keys.model_type in _GEMMAS else ()
    return {
        "rotary_dim": dim,
        "num_rotary_layers": fields["num_layers"] - without,
        "num_rotary_tables": tables,
        "buffers": (*scale, *(dim // 2,) * 2 * tables),
    }


def _sliding(keys: ConfigKeys) -> dict[str, Any]:
    """Return the fields of sliding-window attention."""
    sliding = tuple(kind == "sliding_attention" for kind in _layer_types(keys))
    if not any(sliding):
        return {}
    window = keys.count("sliding_window", 4096)
    return {"sliding_window": window, "sliding_layers": sliding}


def _layer_types(keys: ConfigKeys) -> tuple[str, ...]:
    """Return each layer's kind of attention, as the config classes fill it in."""
    kind, layers = keys.model_type, keys.size("num_layers")
    full, sliding = "full_attention", "sliding_attention"
    listed = keys.config.get("layer_types")
    if isinstance(listed, Sequence) and kind not in ("mistral", "mixtral", "phi3", "qwen3_moe"):
        return tuple(str(item) for item in listed)
    if kind in ("gemma2", "gemma3_text"):
        pattern = keys.count("sliding_window_pattern", 6) if kind == "gemma3_text" else 2
        return tuple(sliding if (i + 1) % pattern else full for i in range(layers))
    if kind in ("mistral", "mixtral", "phi3"):
        default = 4096 if kind == "mistral" and "sliding_window" not in keys.config else 0
        return (sliding if keys.number("sliding_window", default) else full,) * layers
    if not keys.flag("use_sliding_window", False):
        return (full,) * layers
    last = int(keys.number("max_window_layers", 28))
    if kind == "qwen2_moe":
        return tuple(sliding if (i + 1) % 2 and i < last else full for i in range(layers))
    if kind == "qwen3_moe":
        return (sliding,) * layers
    if kind in ("qwen2", "qwen3"):
        return tuple(sliding if i >= last else full for i in range(layers))
    raise UncoveredModelError(f"config.json: use_sliding_window of {kind} has no closed form.")


def _gated_activation(keys: ConfigKeys) -> str:
    # Gemma 1 reads hidden_act and takes the tanh form for "gelu"; Gemma 2 and 3 hidden_activation.
    if keys.model_type == "gemma":
        name = keys.text(("hidden_act",), "gelu_pytorch_tanh")
        return "gelu_pytorch_tanh" if name == "gelu" else name
    if keys.model_type in _GEMMAS:
        return keys.text(("hidden_activation",), "gelu_pytorch_tanh")
    return keys.text(("hidden_act",), "silu")


def _softcap(keys: ConfigKeys, key: str) -> bool:
    if keys.model_type not in _SANDWICHED:
        return False
    return keys.config[key] is not None if key in keys.config else keys.model_type == "gemma2"


def _gated_mlp(prefix: str, hidden: int, width: int) -> tuple[LinearShape, ...]:
    sizes = {
        "gate_proj": (hidden, width),
        "up_proj": (hidden, width),
        "down_proj": (width, hidden),
    }
    return _linears(prefix, sizes)


def _linears(prefix: str, sizes: Mapping[str, tuple[int, int]]) -> tuple[LinearShape, ...]:
    return tuple(
        LinearShape(name=prefix + name, in_features=ins, out_features=outs)
        for name, (ins, outs) in sizes.items()
    )
