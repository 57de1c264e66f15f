"""Attention as it is booked: which kernel the device would choose, and what that kernel keeps.

Notation as in ``ops.py``; H heads. Eager attention is in ``eager.py``.
"""

from dataclasses import replace

from lora_tune.memory.eager import eager_attention
from lora_tune.memory.ledger import Block, Gradient, Value
from lora_tune.memory.ops import Heads, Ops


def attention(ops: Ops, q: Value, k: Value, v: Value, heads: Heads) -> Value:
    """Attention of a batch of rows; the engine cuts the line of all rows into one by views.

    Source: ``engine/attention.py``, ``_attend``.
    """
    mask = _sliding_mask(ops) if ops.n.in_line and heads.masked else None
    out = _attention(ops, q, k, v, heads)
    del mask
    return out


def _sliding_mask(ops: Ops) -> Block:
    """Which keys a query sees in its window: a byte a pair, from two comparisons."""
    book, length = ops.book, ops.n.length
    keys = book.hold(8 * length)
    before = book.hold(length**2)
    edges = book.hold(8 * length)
    within = book.hold(length**2)
    mask = book.hold(length**2)
    del keys, before, edges, within
    return mask


def _attention(ops: Ops, q: Value, k: Value, v: Value, heads: Heads) -> Value:
    """Attention by the kernel that this step's device would choose.

    Flash attention without a mask where the device has it (on a CPU always); else the memory-efficient
    kernel, which takes no grouped queries: with a mask transformers repeats keys and values for
    it, without one torch writes the attention out. Source: torch ``cuda/sdp_utils.cpp``;
    transformers ``integrations/sdpa_attention.py``, ``use_gqa_in_sdpa``.
    """
    n = ops.n
    if n.attention == "eager" or (heads.softcap and n.attention != "flash"):
        return eager_attention(
            ops,
            q,
            k,
            v,
            heads,
            softcap=heads.softcap,
            float32_softmax=heads.float32_softmax,
            dropout=heads.dropout and not n.packed,
            named=ops.named,
        )
    if n.autocast or n.attention == "flash":
        q, k, v = (
            ops.to(x, 2, width)
            for x, width in (
                (q, heads.query_size),
                (k, heads.kv_size),
                (v, heads.kv_size),
            )
        )
    if n.attention == "flash":
        return _fused_attention(ops, q, k, v, heads, flash=True)
    if not heads.masked and n.has_flash(q.e, heads.head_dim):
        return _fused_attention(ops, q, k, v, heads, flash=True)
    grouped = heads.kv_count < heads.count
    if grouped and not (heads.masked and heads.repeats):
        return _math_attention(ops, q, k, v, heads)
    if q.e == 2 and not n.has_efficient:
        if grouped:
            k, v = ops.repeat(k, heads), ops.repeat(v, heads)
            heads = replace(heads, kv_count=heads.count, kv_size=heads.query_size)
        return _math_attention(ops, q, k, v, heads)
    if heads.masked and 1 < heads.kv_count < heads.count:  # one head is repeated as a view
        k, v = ops.repeat(k, heads), ops.repeat(v, heads)
    return _fused_attention(ops, q, k, v, heads, flash=False)


def _fused_attention(ops: Ops, q: Value, k: Value, v: Value, heads: Heads, *, flash: bool) -> Value:
    """Flash or memory-efficient: keeps query, key, value, output and the log-sum-exp (4 a head).

    A mask becomes a bias in the compute type, one matrix a row and layer. Backward of flash:
    float32 accumulator of the query's gradient and the row sums, and under grouped queries
    gradients of all heads of key and value before they are summed; lengths and head sizes
    rounded up to 128 and 32. Of the memory-efficient kernel: float32 accumulators of query, key
    and value. Source: torch ``flash_attn/flash_api.cpp``, ``attention_backward.cu``.
    """
    book, n = ops.book, ops.n
    tokens, e = n.tokens, q.e
    q_bytes = e * tokens * heads.query_size
    kv_bytes, given = k.block.size, heads.kv_size
    repeated = heads.masked and 1 < heads.kv_count < heads.count
    made_kv = q_bytes if repeated or not flash else e * tokens * given
    unpadded = n.attention == "flash" and n.padded and not n.packed
    if unpadded:  # rows without their padding, copied one behind the other
        q, k, v = (
            ops.gather(x, width)
            for x, width in ((q, heads.query_size), (k, heads.kv_size), (v, heads.kv_size))
        )
    mask_rows = 1 if n.in_line else n.rows
    bias = book.hold(e * mask_rows * n.length**2) if heads.masked else None
    out = book.hold(q_bytes)
    lse = book.hold(4 * tokens * heads.count)
    node = None
    if book.grad_enabled and any(x.node is not None for x in (q, k, v)):
        saved = [q.block, k.block, v.block, out, lse, bias]
        if n.cuda:
            saved += [book.hold(16), book.hold(16)]  # the dropout's seed and offset
        targets = [x.node for x in (q, k, v)]
        work = _attention_work(ops, heads, flash=flash, e=e)
        viewed = not repeated and not flash and heads.kv_count < heads.count

        def backward(gradient: Gradient) -> None:
            made = [book.hold(q_bytes), book.hold(made_kv), book.hold(made_kv)]
            book.touch(work)
            gradient.pop()
            saved.clear()
            for target in targets:
                part = made.pop(0)
                if target is None:
                    continue
                if viewed and target is not targets[0]:
                    part = book.hold(kv_bytes)  # the repeated heads' gradients, summed
                book.accumulate(target, part)

        node = book.node(backward)
    del lse, bias
    if heads.head_major and flash and not unpadded:
        out = book.hold(q_bytes)
    attended = Value(out, e, node)
    del out
    return ops.gather(attended, heads.query_size) if unpadded else attended


def _attention_work(ops: Ops, heads: Heads, *, flash: bool, e: int) -> int:
    n = ops.n
    if not n.cuda:
        return 0
    if not flash:
        return 4 * n.tokens * (3 * heads.query_size + heads.count)
    length = -(-n.length // 128) * 128
    work = 4 * n.rows * length * heads.count * (-(-heads.head_dim // 32) * 32 + 1)
    if heads.kv_size < heads.query_size:
        work += 2 * e * n.tokens * heads.query_size
    return work


def _math_attention(ops: Ops, q: Value, k: Value, v: Value, heads: Heads) -> Value:
    """Attention written out in float32: keeps query, key and value of all heads and the S x S matrices.

    Scores, scores with the causal bias, softmax: two of ``4 H S`` a token at once; the softmax is kept.
    Its backward makes the product with the gradient as a tensor of its own on CUDA. Source:
    torch ``native/transformers/attention.cpp``, ``_scaled_dot_product_attention_math``;
    ``SoftMax.cu``.
    """
    book, n = ops.book, ops.n
    e, tokens = q.e, n.tokens
    q, k, v = (
        ops.to(x, 4, width)
        for x, width in ((q, heads.query_size), (k, heads.kv_size), (v, heads.kv_size))
    )
    full, scores = 4 * tokens * heads.query_size, 4 * tokens * heads.count * n.length
    scaled = book.hold(full)
    bias = book.hold(4 * n.length**2 * (n.rows if heads.masked else 1))
    several = 1 < heads.kv_count < heads.count
    repeated = [book.hold(full), book.hold(full)] if several else []
    key, query = book.hold(full), book.hold(full)
    raw = book.hold(scores)
    raw = book.hold(scores)  # with the bias
    softmax = book.hold(scores)
    del raw
    narrow = None if e == 4 else book.hold(e * tokens * heads.count * n.length)
    value = repeated.pop() if repeated else book.hold(full)
    out = book.hold(full)
    if e != 4:
        out = book.hold(e * tokens * heads.query_size)
    del scaled, bias, narrow
    repeated.clear()
    node = None
    if book.grad_enabled and any(x.node is not None for x in (q, k, v)):
        saved = [value, softmax, query, key]
        targets = ((q.node, heads.query_size), (k.node, heads.kv_size), (v.node, heads.kv_size))

        def backward(gradient: Gradient) -> None:
            if e != 4:
                gradient[0] = book.hold(full)
            by_softmax = book.hold(scores)
            by_value = book.hold(full)
            gradient.pop()
            saved.pop(0)
            if heads.kv_count == 1:  # one head that was spread out: summed at once
                by_value = book.hold(4 * tokens * heads.kv_size)
            by_scores = book.hold(scores)
            book.touch(scores)
            del by_softmax
            saved.pop(0)
            made = [book.hold(full), book.hold(full), by_value]
            del by_scores, by_value
            saved.clear()
            for target, width in targets:
                part = made.pop(0)
                if width < heads.query_size:
                    part = book.hold(4 * tokens * width)
                if target is not None:
                    book.accumulate(target, part)

        node = book.node(backward)
    del value, softmax, query, key
    out = book.hold(e * tokens * heads.query_size)  # heads behind tokens again
    return Value(out, e, node)
