"""One decoder layer of each family, statement by statement as its modeling file runs it.

Each function takes the layer's input and returns its output; names of sites are the suffixes of
``ModelShape.layer_linears``. Local names here live as long as they do there: they hold memory.
"""

from collections.abc import Callable, Mapping

from lora_tune.memory.attention import attention
from lora_tune.memory.experts import sparse_mlp
from lora_tune.memory.ledger import Value
from lora_tune.memory.linears import linear
from lora_tune.memory.ops import Heads, Ops, Site
from lora_tune.memory.shape import ModelShape

Sites = Mapping[str, Site]
Layer = Callable[[Ops, ModelShape, Sites, Value, bool], Value]
"""Of ops, shape, sites, input, and whether the layer's attention gets a mask."""


def llama_layer(ops: Ops, shape: ModelShape, sites: Sites, hidden: Value, masked: bool) -> Value:
    """``LlamaDecoderLayer.forward``: Llama, Mistral, Qwen2, Phi-3; Qwen3 with norms of query and key."""
    h = shape.hidden
    residual = hidden
    normed = ops.norm(hidden, h)
    out = _ATTENTIONS[shape.fused_qkv](ops, shape, sites, normed, masked)
    hidden = ops.add(residual, out, h)
    del normed, out
    residual = hidden
    normed = ops.norm(hidden, h)
    out = _mlp(shape)(ops, shape, sites, normed)
    del normed
    return ops.add(residual, out, h)


def gemma_layer(ops: Ops, shape: ModelShape, sites: Sites, hidden: Value, masked: bool) -> Value:
    """``Gemma2DecoderLayer.forward``: the outputs of attention and MLP are normalized too."""
    h = shape.hidden
    residual = hidden
    hidden = ops.norm(hidden, h)
    hidden = llama_attention(ops, shape, sites, hidden, masked)
    hidden = ops.norm(hidden, h)
    hidden = ops.add(residual, hidden, h)
    residual = hidden
    hidden = ops.norm(hidden, h)
    hidden = gated_mlp(ops, shape, sites, hidden)
    hidden = ops.norm(hidden, h, last=True)
    return ops.add(residual, hidden, h)


def neox_layer(ops: Ops, shape: ModelShape, sites: Sites, hidden: Value, masked: bool) -> Value:
    """``GPTNeoXLayer.forward``: attention and MLP read the same residual, each through its norm."""
    h = shape.hidden
    attended = neox_attention(ops, shape, sites, ops.norm(hidden, h), masked)
    if not shape.parallel_residual:
        attended = ops.add(attended, hidden, h)
        out = plain_mlp(ops, shape, sites, ops.norm(attended, h), NEOX_MLP)
        return ops.add(out, attended, h)
    out = plain_mlp(ops, shape, sites, ops.norm(hidden, h), NEOX_MLP)
    total = ops.add(out, attended, h)
    return ops.add(total, hidden, h)


def gpt2_layer(ops: Ops, shape: ModelShape, sites: Sites, hidden: Value, masked: bool) -> Value:
    """``GPT2Block.forward``."""
    h = shape.hidden
    residual = hidden
    hidden = ops.norm(hidden, h)
    out = gpt2_attention(ops, shape, sites, hidden, masked)
    hidden = ops.add(out, residual, h)
    residual = hidden
    hidden = ops.norm(hidden, h)
    fed = plain_mlp(ops, shape, sites, hidden, GPT2_MLP)
    fed = ops.base_dropout(fed, h, shape.hidden_dropout, last=True)
    return ops.add(residual, fed, h)


def falcon_layer(ops: Ops, shape: ModelShape, sites: Sites, hidden: Value, masked: bool) -> Value:
    """``FalconDecoderLayer.forward`` with attention and MLP side by side, or one after the other."""
    h = shape.hidden
    residual = hidden
    for_attention = ops.norm(hidden, h)
    for_mlp = ops.norm(hidden, h) if shape.parallel_norms == 2 else for_attention
    attended = falcon_attention(ops, shape, sites, for_attention)
    if not shape.parallel_residual:
        residual = ops.add(residual, attended, h)
        for_mlp = ops.norm(residual, h)
    out = plain_mlp(ops, shape, sites, for_mlp, NEOX_MLP)
    if shape.parallel_residual:
        out = ops.add_in_place(out, attended)
    return ops.add(residual, out, h)


def falcon_attention(ops: Ops, shape: ModelShape, sites: Sites, x: Value) -> Value:
    """``FalconAttention.forward``: always with a mask; key and value are copied out of the product.

    The newer architecture repeats them for all heads; one head for all is left to the kernel.
    """
    q_size, kv_size = shape.query_size, shape.kv_size
    fused = linear(ops, x, sites["self_attention.query_key_value"])
    query, key, value = ops.slices(fused, (q_size, kv_size, kv_size))
    several = shape.num_kv_heads > 1
    key, value = ops.copy(key, kv_size), ops.copy(value, kv_size)
    if several:
        key, value = ops.copy(key, q_size), ops.copy(value, q_size)
        query = ops.copy(query, q_size)
    query, key = ops.rotary(query, q_size), ops.rotary(key, q_size if several else kv_size)
    heads = Heads(
        count=shape.num_heads,
        query_size=q_size,
        kv_count=shape.num_heads if several else 1,
        kv_size=q_size if several else kv_size,
        head_dim=shape.head_dim,
        masked=True,
        repeats=False,
    )
    attended = attention(ops, query, key, value, heads)
    return linear(ops, attended, sites["self_attention.dense"])


def llama_attention(ops: Ops, shape: ModelShape, sites: Sites, x: Value, masked: bool) -> Value:
    """``LlamaAttention.forward``."""
    q_size, kv_size = shape.query_size, shape.kv_size
    query = linear(ops, x, sites["self_attn.q_proj"])
    key = value = None
    if shape.qk_norm and not shape.norm_offset:  # Qwen3 normalizes each at once
        query = ops.norm(query, q_size, groups=shape.num_heads)
    key = linear(ops, x, sites["self_attn.k_proj"])
    if shape.qk_norm and not shape.norm_offset:
        key = ops.norm(key, kv_size, groups=shape.num_kv_heads)
    value = linear(ops, x, sites["self_attn.v_proj"])
    if shape.qk_norm and shape.norm_offset:
        query = ops.norm(query, q_size, groups=shape.num_heads)
        key = ops.norm(key, kv_size, groups=shape.num_kv_heads)
    query, key = ops.rotary(query, q_size), ops.rotary(key, kv_size)
    attended = attention(ops, query, key, value, _heads(shape, masked))
    return linear(ops, attended, sites["self_attn.o_proj"])


def phi3_attention(ops: Ops, shape: ModelShape, sites: Sites, x: Value, masked: bool) -> Value:
    """``Phi3Attention.forward``: query, key and value are cut out of one product."""
    q_size, kv_size = shape.query_size, shape.kv_size
    qkv = linear(ops, x, sites["self_attn.qkv_proj"])
    query, key, value = ops.slices(qkv, (q_size, kv_size, kv_size))
    query = ops.partial_rotary(query, shape.num_heads, shape.rotary_dim, shape.head_dim)
    key = ops.partial_rotary(key, shape.num_kv_heads, shape.rotary_dim, shape.head_dim)
    attended = attention(ops, query, key, value, _heads(shape, masked))
    return linear(ops, attended, sites["self_attn.o_proj"])


def neox_attention(ops: Ops, shape: ModelShape, sites: Sites, x: Value, masked: bool) -> Value:
    """``GPTNeoXAttention.forward``: query, key and value are interleaved in one product."""
    width = shape.query_size
    qkv = linear(ops, x, sites["attention.query_key_value"])
    query, key, value = ops.slices(qkv, (width, width, width), chunked=True)
    query = ops.partial_rotary(query, shape.num_heads, shape.rotary_dim, shape.head_dim)
    key = ops.partial_rotary(key, shape.num_heads, shape.rotary_dim, shape.head_dim)
    attended = attention(ops, query, key, value, _heads(shape, masked))
    return linear(ops, attended, sites["attention.dense"])


def gpt2_attention(ops: Ops, shape: ModelShape, sites: Sites, x: Value, masked: bool) -> Value:
    """``GPT2Attention.forward``: no rotation."""
    width = shape.query_size
    query, key, value = ops.slices(
        linear(ops, x, sites["attn.c_attn"]), (width, width, width), chunked=True
    )
    attended = attention(ops, query, key, value, _heads(shape, masked))
    return ops.base_dropout(
        linear(ops, attended, sites["attn.c_proj"]), shape.hidden, shape.hidden_dropout
    )


def gated_mlp(ops: Ops, shape: ModelShape, sites: Sites, x: Value) -> Value:
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""
    f = shape.intermediate
    product = ops.gated_product(
        lambda: linear(ops, x, sites["mlp.gate_proj"]),
        lambda: linear(ops, x, sites["mlp.up_proj"]),
        f,
    )
    return linear(ops, product, sites["mlp.down_proj"])


def fused_gated_mlp(ops: Ops, shape: ModelShape, sites: Sites, x: Value) -> Value:
    """``Phi3MLP.forward``: gate and up are cut out of one product, which both keep whole."""
    f = shape.intermediate
    both = linear(ops, x, sites["mlp.gate_up_proj"])
    gate, up = ops.slices(both, (f, f), chunked=True)
    del both
    up = ops.multiply(up, ops.activation(gate, f), f)
    return linear(ops, up, sites["mlp.down_proj"])


NEOX_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
GPT2_MLP = ("mlp.c_fc", "mlp.c_proj")


def plain_mlp(ops: Ops, shape: ModelShape, sites: Sites, x: Value, names: tuple[str, str]) -> Value:
    """Two linear layers with an activation between them."""
    wide, narrow = names
    hidden = linear(ops, x, sites[wide])
    hidden = ops.activation(hidden, shape.intermediate)
    return linear(ops, hidden, sites[narrow])


def _heads(shape: ModelShape, masked: bool) -> Heads:
    return Heads(
        count=shape.num_heads,
        query_size=shape.query_size,
        kv_count=shape.num_kv_heads,
        kv_size=shape.kv_size,
        head_dim=shape.head_dim,
        masked=masked,
        softcap=shape.attention_softcap,
        float32_softmax=shape.model_type != "gpt2",
        dropout=shape.attention_dropout > 0,
        head_major=shape.fused_qkv and shape.rotary_dim > 0,
    )


_ATTENTIONS = {False: llama_attention, True: phi3_attention}


def _mlp(shape: ModelShape) -> Callable[[Ops, ModelShape, Sites, Value], Value]:
    if shape.num_experts:
        return sparse_mlp
    return fused_gated_mlp if shape.fused_gate_up else gated_mlp


LAYERS: Mapping[str, Layer] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "smollm3",
            "gemma",
            "phi3",
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
        ),
        llama_layer,
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), gemma_layer),
    "gpt_neox": neox_layer,
    "gpt2": gpt2_layer,
    "falcon": falcon_layer,
}
