"""A mixture of experts as it is booked: router, grouped products over all experts, shared expert.

Notation as in ``ops.py``, with E experts, k of them per token, f the width of one. The experts work on
N = T*k rows, sorted by expert; the products take all rows at once, however they are spread over the
experts, so that the routing does not matter. Experts are fused 3-D parameters, never quantized
and no target of LoRA: they keep only their weights. Kept per token for backward, with w bytes per
element of the experts and p of the router's probabilities: gate and up (2fkw), silu's output (fkw), the
experts' outputs (hkw), which the probabilities weight, and of the router softmax (4E) and orders.

Source: transformers 5.23 ``models/mixtral``, ``models/qwen2_moe``, ``models/qwen3_moe``;
``integrations/moe.py`` (``grouped_mm_experts_forward``, the default on CUDA from compute capability 8.0);
torch ``autograd/FunctionsManual.cpp`` (``index_backward`` puts gradients into zeros in place).
"""

from collections.abc import Mapping
from typing import NamedTuple

from lora_tune.memory.ledger import Block, Gradient, Value
from lora_tune.memory.linears import linear
from lora_tune.memory.ops import Ops, Site
from lora_tune.memory.shape import ModelShape


class Routing(NamedTuple):
    """What the router gives the experts."""

    weights: Value  # of the chosen experts, N
    named: list[Block]  # to which the block's forward refers until it returns


def sparse_mlp(ops: Ops, shape: ModelShape, sites: Mapping[str, Site], x: Value) -> Value:
    """``MixtralSparseMoeBlock.forward``, with a shared expert ``Qwen2MoeSparseMoeBlock.forward``.

    Behind a recomputation's last kept tensor nothing is booked: the order of the rows that the experts'
    output is put back by, or what the shared expert's gate multiplies.
    """
    shared = _shared_expert(ops, shape, sites, x) if shape.shared_expert_intermediate else None
    routing = _route(ops, shape, x)
    out = _experts(ops, shape, x, routing.weights, stops=shared is None)
    if shared is None:
        return out
    gate = _sigmoid(ops, linear(ops, x, sites["mlp.shared_expert_gate"]))
    if ops.recomputing:
        ops.book.stopped = True
    shared = _gated(ops, gate, shared, shape.hidden)
    return ops.add(out, shared, shape.hidden)


def begin_backward(ops: Ops, shape: ModelShape, gradient: Block) -> None:
    """Do of the block's backward what needs nothing that was kept, before a recomputation.

    The gradient is cast and spread over the k rows of each token; with a shared expert the first node is
    the product with its gate, which needs both factors.
    """
    if not shape.shared_expert_intermediate:
        e = gradient.size // (ops.n.tokens * shape.hidden)
        ops.begun.append(_spread(ops, shape, [gradient], e))


def _weights_e(ops: Ops, shape: ModelShape, x: Value) -> int:
    """Return the element size of the routing weights: Mixtral leaves them in float32."""
    return 4 if shape.model_type == "mixtral" else _logits_e(ops, x)


def _logits_e(ops: Ops, x: Value) -> int:
    return 2 if ops.n.autocast else x.e


def _route(ops: Ops, shape: ModelShape, x: Value) -> Routing:
    """``MixtralTopKRouter.forward``: logits, float32 softmax, top k, their sum to 1.

    Keeps the softmax (4E), the chosen experts (8k) and, where the k weights are normalized (not in Qwen2;
    of Qwen3 taken as published), what was divided (4k) and by what (4).
    """
    book, n, experts = ops.book, ops.n, shape.num_experts
    tokens, rows = n.tokens, n.tokens * shape.experts_per_token
    e, weights_e = _logits_e(ops, x), _weights_e(ops, shape, x)
    kept = []
    if e != x.e:
        narrow = book.hold(e * tokens * shape.hidden)
    if e != n.weight_e:
        kept.append(book.hold(e * experts * shape.hidden))  # of the router's weight
    logits = book.hold(e * tokens * experts)
    narrow = logits
    wide = logits if e == 4 else book.hold(4 * tokens * experts)
    softmax = book.hold(4 * tokens * experts)
    del wide
    values, chosen = book.hold(4 * rows), book.hold(8 * rows)
    kept += [softmax, chosen]
    if shape.model_type != "qwen2_moe":
        kept += [book.hold(4 * tokens), book.hold(4 * rows)]
    if weights_e != 4:
        values = book.hold(weights_e * rows)
    source, node = x.node, None
    if source is not None and book.grad_enabled:
        x_e = x.e

        def backward(gradient: Gradient) -> None:
            gradient.append(book.hold(4 * rows, count=3))  # through cast and normalization
            del gradient[0]
            full = book.hold(4 * tokens * experts)
            gradient.clear()
            made = book.hold(4 * tokens * experts)
            if n.cuda:
                book.touch(4 * tokens * experts)
            del full
            if e != 4:
                made = book.hold(e * tokens * experts)
            made = book.hold(e * tokens * shape.hidden)
            kept.clear()
            if e != x_e:
                made = book.hold(x_e * tokens * shape.hidden)
            book.accumulate(source, made)

        node = book.node(backward)
    else:
        kept.clear()
    del softmax, narrow
    return Routing(Value(values, weights_e, node), [logits, chosen])


def _spread(ops: Ops, shape: ModelShape, gradient: Gradient, e: int) -> Block:
    """Return the gradient of the weighted outputs of all N rows from that of their sums.

    ``.to`` and ``sum(dim=1)`` backward. Takes the gradient's block out of the list.
    """
    book, n = ops.book, ops.n
    weighted_e = _weighted_e(ops, shape, e)
    sum_e = 4 if n.autocast else weighted_e
    size = n.tokens * shape.hidden
    if sum_e != e:
        gradient.append(book.hold(sum_e * size))
        del gradient[0]
    spread = book.hold(weighted_e * size * shape.experts_per_token)
    gradient.clear()
    return spread


def _weighted_e(ops: Ops, shape: ModelShape, e: int) -> int:
    """Return the element size of the experts' outputs times the routing weights."""
    weights_e = 4 if shape.model_type == "mixtral" else 2 if ops.n.autocast else e
    return max(ops.n.weight_e, weights_e)


def _experts(ops: Ops, shape: ModelShape, x: Value, weights: Value, *, stops: bool) -> Value:
    """``grouped_mm_experts_forward``: sort, gather, gate and up, down, weight, put back, sum.

    Backward ends with zeros of x's size, into which the N rows' gradients are added.
    """
    book, n = ops.book, ops.n
    rows = n.tokens * shape.experts_per_token
    h, f, e = shape.hidden, shape.expert_intermediate, n.weight_e
    weighted_e = _weighted_e(ops, shape, x.e)
    sum_e = 4 if n.autocast else weighted_e
    in_order = book.hold(8 * rows)
    orders = [book.hold(8 * rows), book.hold(8 * rows)]  # permutation, token of each row
    selected = book.hold(x.e * rows * h)
    orders.append(book.hold(weights.e * rows))
    counted = book.hold(4 * rows)
    both = book.hold(2 * e * rows * f)
    silu = book.hold(e * rows * f)
    product = book.hold(e * rows * f)
    saved = [both, silu]
    del both, silu
    if not book.grad_enabled:
        saved.clear()
    down = book.hold(e * rows * h)
    del product
    weighted = book.hold(weighted_e * rows * h)
    if book.grad_enabled:
        saved.append(down)
    orders.append(book.hold(8 * rows))  # the inverse permutation
    book.touch(8 * rows)  # what it is filled with
    if stops and ops.recomputing:
        book.stopped = True
    back = book.hold(weighted_e * rows * h)
    weighted = back
    out = book.hold(sum_e * n.tokens * h)
    total = out
    if sum_e != x.e:
        out = book.hold(x.e * n.tokens * h)
    node = None
    if book.grad_enabled and x.node is not None:
        x_node, x_e, weights_node, weights_e = x.node, x.e, weights.node, weights.e

        def backward(gradient: Gradient) -> None:
            if ops.begun:
                grad = ops.begun.pop()
                gradient.clear()
            else:
                grad = _spread(ops, shape, gradient, x_e)
            grad = book.hold(weighted_e * rows * h)  # back in the order of the experts
            orders.pop()
            made = book.hold(weighted_e * rows * h)
            by_weights = book.hold(weighted_e * rows * h)
            saved.pop()
            if weighted_e != e:
                made = book.hold(e * rows * h)
            to_weights = book.hold(weights_e * rows)
            del by_weights, grad
            made = book.hold(e * rows * f)
            to_silu, to_up = book.hold(e * rows * f), book.hold(e * rows * f)
            del made
            saved.pop()
            to_gate = book.hold(e * rows * f)
            del to_silu
            saved.clear()
            made = book.hold(2 * e * rows * f)
            del to_gate, to_up
            made = book.hold(e * rows * h)
            assert weights_node is not None
            book.accumulate(weights_node, to_weights)
            del to_weights
            to_x = book.hold(x_e * n.tokens * h)
            del made
            orders.clear()
            book.accumulate(x_node, to_x)

        node = book.node(backward)
    else:
        orders.clear()
        saved.clear()
    del selected, in_order, counted, total, weighted, back, down
    return Value(out, x.e, node)


def _shared_expert(ops: Ops, shape: ModelShape, sites: Mapping[str, Site], x: Value) -> Value:
    """``Qwen2MoeMLP.forward`` of the expert that every token passes."""
    width, prefix = shape.shared_expert_intermediate, "mlp.shared_expert."
    product = ops.gated_product(
        lambda: linear(ops, x, sites[prefix + "gate_proj"]),
        lambda: linear(ops, x, sites[prefix + "up_proj"]),
        width,
    )
    return linear(ops, product, sites[prefix + "down_proj"])


def _sigmoid(ops: Ops, x: Value) -> Value:
    """``F.sigmoid`` of one number per token: keeps its result."""
    book = ops.book
    size = x.e * ops.n.tokens
    out = book.hold(size)
    source, node = x.node, None
    if source is not None and book.grad_enabled:
        saved = [out]

        def backward(gradient: Gradient) -> None:
            made = book.hold(size)
            gradient.clear()
            saved.clear()
            book.accumulate(source, made)

        node = book.node(backward)
    return Value(out, x.e, node)


def _gated(ops: Ops, gate: Value, x: Value, width: int) -> Value:
    """``sigmoid(gate) * x``, one number per token times a vector: keeps both.

    The gate's gradient is the product of gradient and x, summed over the width.
    """
    book, tokens = ops.book, ops.n.tokens
    e = max(gate.e, x.e)
    size = e * tokens * width
    out = book.hold(size)
    node = None
    if book.grad_enabled and (gate.node is not None or x.node is not None):
        saved = ([x.block] if gate.node else []) + ([gate.block] if x.node else [])
        gate_node, gate_e, x_node, x_e = gate.node, gate.e, x.node, x.e

        def backward(gradient: Gradient) -> None:
            product = book.hold(size) if gate_node is not None else None
            to_x = book.hold(size) if x_node is not None else None
            gradient.clear()
            saved.clear()
            to_gate = book.hold(gate_e * tokens) if gate_node is not None else None
            del product
            if x_e != e:
                to_x = book.hold(x_e * tokens * width)
            if gate_node is not None and to_gate is not None:
                book.accumulate(gate_node, to_gate)
                del to_gate
            if x_node is not None and to_x is not None:
                book.accumulate(x_node, to_x)

        node = book.node(backward)
    return Value(out, e, node)
