"""Eager attention as it is booked: the whole matrix of scores at once.

Notation as in ``ops.py``, with H heads: scores have T*H*S elements, so that a token's share grows with S.
Kept per token for backward: the softmax in float32 (4HS) and the 16-bit copy that is multiplied with the
values (2HS; in float32 it is the softmax itself); with a soft cap the tanh in the type of the products;
and query, key and value of all heads, as copies where the product wants them contiguous.

Source: transformers 5.23 ``eager_attention_forward`` of ``models/llama`` (the same in Mistral, Qwen, Gemma
3, Phi-3, Mixtral), ``models/gemma2``, ``models/gpt_neox`` and ``models/gpt2``; torch
``native/LinearAlgebra.cpp`` (``matmul``), ``native/SoftMax.cpp``, ``native/cuda/SoftMax.cu``.
"""

from lora_tune.memory.ledger import Block, Gradient, Value
from lora_tune.memory.ops import Heads, Ops


def eager_attention(
    ops: Ops,
    q: Value,
    k: Value,
    v: Value,
    heads: Heads,
    *,
    softcap: bool = False,
    float32_softmax: bool = True,
    dropout: bool = False,
    named: list[Block] | None = None,
) -> Value:
    """Return attention's output, tokens before heads in memory.

    The mask that is added is the step's, of the type of the embeddings' output.

    Args:
        ops: The operations of the step.
        q: Queries, rotated.
        k: Keys, rotated.
        v: Values.
        heads: Widths; ``head_major`` queries and keys come contiguous out of ``torch.cat``.
        softcap: Gemma 2: the scores are divided, go through tanh and are multiplied.
        float32_softmax: Whether the modeling code asks for it; where it does not (GPT-2) only autocast does.
        dropout: The probabilities go through the base model's dropout.
        named: Gets the probabilities, to which the decoder layer refers until it returns
            (``hidden_states, _ = self.self_attn(...)``).
    """
    rows = ops.n.rows > 1  # one row is contiguous as far as a batched product cares
    repeated = heads.kv_size < heads.query_size
    if repeated and (rows or heads.kv_count > 1):
        k, v = ops.repeat(k, heads), ops.repeat(v, heads)
    elif repeated:
        k, v = _expanded(ops, k, heads), _expanded(ops, v, heads)
    turned = rows and not heads.head_major
    scores = _scores(ops, q, k, heads, copied=(turned, turned and not repeated), softcap=softcap)
    wide_e = 4 if float32_softmax or ops.n.autocast else scores.e
    weights = _probabilities(ops, scores, heads, wide_e=wide_e, e=q.e if float32_softmax else v.e)
    del scores
    if dropout:
        weights = _dropped(ops, weights, heads)
    if named is not None:
        named.append(weights.block)
    return _weighted(ops, weights, v, heads, copied=rows and not repeated)


def _score_elements(ops: Ops, heads: Heads) -> int:
    """Return T*H*S."""
    return ops.n.tokens * heads.count * ops.n.length


def _expanded(ops: Ops, x: Value, heads: Heads) -> Value:
    """``repeat_kv`` of a single head in a single row: a view; backward sums over the heads."""
    book, source, node = ops.book, x.node, None
    if source is not None and book.grad_enabled:
        size = x.e * ops.n.tokens * heads.kv_size

        def backward(gradient: Gradient) -> None:
            made = book.hold(size)
            gradient.clear()
            book.accumulate(source, made)

        node = book.node(backward)
    return Value(x.block, x.e, node)


def _scores(
    ops: Ops, q: Value, k: Value, heads: Heads, *, copied: tuple[bool, bool], softcap: bool
) -> Value:
    """``torch.matmul(query, key.transpose(2, 3)) * scaling``, the soft cap, ``+ attention_mask``.

    Keeps query and key, each for the other's gradient, and the tanh. A float32 mask (k-bit
    preparation) makes the sum float32.
    """
    book, n = ops.book, ops.n
    e = 2 if n.autocast else q.e
    size, scores = e * n.tokens * heads.query_size, _score_elements(ops, heads)
    narrow = [x.block if x.e == e else book.hold(size) for x in (q, k)]
    given = [book.hold(size) if copies else narrow[i] for i, copies in enumerate(copied)]
    raw = book.hold(e * scores)
    del narrow
    keeps = book.grad_enabled and (q.node is not None or k.node is not None)
    saved = (([given[1]] if q.node else []) + ([given[0]] if k.node else [])) if keeps else []
    del given
    made = book.hold(e * scores)  # times the scaling
    del raw
    if softcap:
        divided = book.hold(e * scores)
        del made
        made = book.hold(e * scores)
        del divided
        if q.node or k.node:
            saved.append(made)
        made = book.hold(e * scores)
    out_e = max(e, n.weight_e)
    made = book.hold(out_e * scores)
    node = None
    if book.grad_enabled and (q.node is not None or k.node is not None):
        targets = [(x.node, x.e) for x in (k, q) if x.node is not None]

        def backward(gradient: Gradient) -> None:
            if out_e != e:
                gradient.append(book.hold(e * scores))
                del gradient[0]
            for i in range(4 if softcap else 1):  # scaling; multiplication, tanh and division
                gradient.append(book.hold(e * scores))
                del gradient[0]
                if softcap and i == 1:
                    saved.pop()
            parts = [book.hold(size) for _ in targets]
            gradient.clear()
            saved.clear()
            for target, own in targets:
                part = parts.pop(0)
                if own != e:
                    part = book.hold(own * n.tokens * heads.query_size)
                book.accumulate(target, part)

        node = book.node(backward)
    else:
        saved.clear()
    return Value(made, out_e, node)


def _probabilities(ops: Ops, scores: Value, heads: Heads, *, wide_e: int, e: int) -> Value:
    """``softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)``: keeps the softmax.

    A bfloat16 input is copied to float32 first; for float16 CUDA has a kernel that does without, in
    backward too (``half_to_float``). Backward on CUDA makes the product of gradient and softmax for a
    moment, beside gradient, softmax and result: 16 bytes an element.
    """
    book, elements = ops.book, _score_elements(ops, heads)
    fused = ops.n.half_softmax and scores.e != wide_e
    wide = scores.block if fused or scores.e == wide_e else book.hold(wide_e * elements)
    softmax = book.hold(wide_e * elements)
    del wide
    out = softmax if e == wide_e else book.hold(e * elements)
    source, node, own = scores.node, None, scores.e
    if source is not None and book.grad_enabled:
        saved = [softmax]

        def backward(gradient: Gradient) -> None:
            if e != wide_e:
                gradient.append(book.hold(wide_e * elements))
                del gradient[0]
            made = book.hold((own if fused else wide_e) * elements)
            if ops.n.cuda:
                book.touch(wide_e * elements)
            gradient.clear()
            saved.clear()
            if own != wide_e and not fused:
                made = book.hold(own * elements)
            book.accumulate(source, made)

        node = book.node(backward)
    return Value(out, e, node)


def _dropped(ops: Ops, x: Value, heads: Heads) -> Value:
    """Dropout of the probabilities: keeps a mask of one byte an element."""
    book, elements = ops.book, _score_elements(ops, heads)
    size = x.e * elements
    out, mask = book.hold(size), book.hold(elements)
    source, node = x.node, None
    if source is not None and book.grad_enabled:
        saved = [mask]

        def backward(gradient: Gradient) -> None:
            made = book.hold(size)
            gradient.clear()
            saved.clear()
            book.accumulate(source, made)

        node = book.node(backward)
    return Value(out, x.e, node)


def _weighted(ops: Ops, weights: Value, v: Value, heads: Heads, *, copied: bool) -> Value:
    """``torch.matmul(attn_weights, value).transpose(1, 2).contiguous()``.

    Keeps the values for the gradient of the probabilities, and these for that of the values.
    """
    book, n = ops.book, ops.n
    e = 2 if n.autocast else weights.e
    size, scores = e * n.tokens * heads.query_size, _score_elements(ops, heads)
    probabilities = weights.block if weights.e == e else book.hold(e * scores)
    narrow = v.block if v.e == e else book.hold(size)
    given = book.hold(size) if copied else narrow
    raw = book.hold(size)
    saved = ([probabilities] if v.node else []) + ([given] if weights.node else [])
    del narrow, given, probabilities
    out = book.hold(size)
    del raw
    node = None
    if book.grad_enabled and (weights.node is not None or v.node is not None):
        v_node, v_e, weights_node, weights_e = v.node, v.e, weights.node, weights.e

        def backward(gradient: Gradient) -> None:
            if n.rows > 1:  # heads before tokens again
                gradient.append(book.hold(size))
                del gradient[0]
            to_v = book.hold(size) if v_node is not None else None
            to_weights = book.hold(e * scores) if weights_node is not None else None
            gradient.clear()
            saved.clear()
            if v_node is not None and to_v is not None:
                if v_e != e:
                    to_v = book.hold(v_e * n.tokens * heads.query_size)
                book.accumulate(v_node, to_v)
            if weights_node is not None and to_weights is not None:
                if weights_e != e:
                    to_weights = book.hold(weights_e * scores)
                book.accumulate(weights_node, to_weights)

        node = book.node(backward)
    else:
        saved.clear()
    return Value(out, e, node)
