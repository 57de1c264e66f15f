"""Linear layers with their adapters, as PEFT's layers and as ours book them.

Notation as in ``ops.py``; n weights of a layer, r rank, K lanes.
"""

from collections import Counter
from collections.abc import Callable

from lora_tune.memory.ledger import GRADIENT, Block, Gradient, Node, Value
from lora_tune.memory.ops import Ops, Site
from lora_tune.memory.terms import NF4_BLOCK


def linear(ops: Ops, x: Value, site: Site) -> Value:
    """A frozen linear layer with whatever adapters it has."""
    if not site.adapted:
        return frozen(ops, x, site)
    return packed_linear(ops, x, site) if ops.n.packed else peft_linear(ops, x, site)


def begin_backward(ops: Ops, site: Site, gradient: Block) -> None:
    """Do of the last linear layer's backward what needs nothing that was kept.

    A checkpointed layer is computed again when the first kept tensor is asked for. Before that
    PEFT's layer multiplies by the scaling, a grouped product gathers its lanes' gradients, and
    a 4-bit product, which keeps only its weight, is differentiated altogether.
    """
    book, n = ops.book, ops.n
    tokens = n.tokens
    e = gradient.size // (tokens * site.outputs)
    if not site.adapted:
        if site.quantized:
            ops.begun.append(_frozen_gradient(ops, site, gradient, e))
        return
    if n.packed:
        with_it = sum(rank > 0 for rank in site.ranks)
        if n.grouped and with_it > 1:
            ops.begun.append(_gathered(ops, site, e, with_it))
        return
    low_e = 2 if n.autocast else n.adapter_e
    grad = gradient
    if low_e != e:
        grad = book.hold(low_e * tokens * site.outputs)
    ops.begun.append(book.hold(low_e * tokens * site.outputs))
    del grad


def _gathered(ops: Ops, site: Site, e: int, count: int) -> Block:
    """Return the lanes' gradients in one block: each lane's lies in zeros of the whole size."""
    size = e * (ops.n.tokens // ops.n.lanes) * site.outputs * count
    gathered = ops.book.hold(size)
    ops.book.touch(size)
    return gathered


def _frozen_gradient(ops: Ops, site: Site, gradient: Block | None, e: int) -> Block:
    """Return the input's gradient through a frozen weight, in the compute type.

    Source: bitsandbytes ``autograd/_functions.py``, ``MatMul4Bit.backward``.
    """
    book, tokens = ops.book, ops.n.tokens
    own = ops.n.compute_e if site.quantized else e
    if e != own:
        gradient = book.hold(own * tokens * site.outputs)
    made = book.hold(own * tokens * site.inputs)
    if site.quantized:
        absmax = 4 * site.num_weights // NF4_BLOCK if site.nested else 0
        book.touch(own * site.num_weights + absmax)
    del gradient
    return made


def frozen(ops: Ops, x: Value, site: Site) -> Value:
    """A frozen linear layer keeps no input.

    bitsandbytes' MatMul4Bit and a linear layer without weight gradient need only the weight.

    4 bit: the whole weight is dequantized, ``e*n`` and two float32 absmax vectors, in forward (above
    some hundred tokens) and in backward (always); the input is cast to the compute type and
    the output back (``Linear4bit.forward``).
    """
    out, node = _product(ops, x, site)
    return Value(out, x.e if site.quantized else _dense_e(ops, x), node)


def _dense_e(ops: Ops, x: Value) -> int:
    return 2 if ops.n.autocast else x.e


def _product(ops: Ops, x: Value, site: Site) -> tuple[Block, Node | None]:
    """Return the frozen product and its node."""
    book, n = ops.book, ops.n
    e = n.compute_e if site.quantized else _dense_e(ops, x)
    tokens = n.tokens
    if ops.recomputing and site.last and not site.adapted:
        book.stopped = True
    casts = x.e != e
    inner = book.hold(e * tokens * site.inputs) if casts else x.block
    saved: list[Block] = []
    weight = None
    if not site.quantized and n.autocast and n.weight_e == 4:
        weight = book.hold(2 * site.num_weights)
    out = book.hold(e * tokens * site.outputs)
    if site.quantized:
        absmax = 8 * site.num_weights // NF4_BLOCK if site.nested else 0
        book.touch(e * site.num_weights + absmax)
    del inner
    out_e = e
    if site.quantized and casts:
        out = book.hold(x.e * tokens * site.outputs)
        out_e = x.e
    source, node = x.node, None
    if source is not None and book.grad_enabled:
        if weight is not None:
            saved.append(weight)

        def backward(gradient: Gradient) -> None:
            if ops.begun and site.last:
                made = ops.begun.pop()
            else:
                made = _frozen_gradient(ops, site, gradient.pop(), out_e)
            saved.clear()
            if casts:
                made = book.hold(x_e * tokens * site.inputs)
            book.accumulate(source, made)

        x_e = x.e
        node = book.node(backward)
    return out, node


def peft_linear(ops: Ops, x: Value, site: Site) -> Value:
    """PEFT's ``Linear4bit.forward`` or ``Linear.forward`` with one adapter.

    Keeps per token the adapter's input (with dropout a private copy and a one-byte mask; without it
    x itself where the type fits) and the rank-r product; and the copies of A and B that
    autocast makes of float32 adapters.
    """
    book, n = ops.book, ops.n
    tokens, rank = n.tokens, max(site.ranks)
    out, base_node = _product(ops, x, site)
    if site.quantized:
        out = book.hold(x.e * tokens * site.outputs)  # result.clone()
    out_e = x.e if site.quantized else _dense_e(ops, x)
    low_e = 2 if n.autocast else n.adapter_e
    casts = not site.quantized or not n.autocast
    given = x.block
    given_e = x.e
    if casts and (x.e != n.adapter_e or n.other_half):
        given_e = n.adapter_e
        given = book.hold(given_e * tokens * site.inputs)
    dropout = any(site.dropouts)
    mask = None
    dropped = given
    if dropout:
        dropped = book.hold(given_e * tokens * site.inputs)
        mask = book.hold(tokens * site.inputs)
    kept = dropped
    if low_e != given_e:
        kept = book.hold(low_e * tokens * site.inputs)
    del dropped
    copies = []
    copied = low_e != n.adapter_e or (n.autocast and n.other_half)
    if copied:
        copies.append(book.hold(low_e * rank * site.inputs))
    low = book.hold(low_e * tokens * rank)
    if copied:
        copies.append(book.hold(low_e * rank * site.outputs))
    if ops.recomputing and site.last:
        book.stopped = True
    raw = book.hold(low_e * tokens * site.outputs)
    share = book.hold(low_e * tokens * site.outputs)  # times the scaling
    del raw
    if casts and site.quantized and low_e != x.e:
        share = book.hold(x.e * tokens * site.outputs)
    sum_e = max(out_e, low_e if not site.quantized else out_e)
    result = book.hold(max(sum_e, out_e) * tokens * site.outputs)
    del share, out
    if not site.quantized and sum_e != out_e:
        result = book.hold(out_e * tokens * site.outputs)
    if ops.cache is not None:
        ops.cache += copies
    node = None
    if book.grad_enabled:
        source = x.node
        saved = [kept, low, None if source is None else mask, *copies]
        x_e = x.e

        def backward(gradient: Gradient) -> None:
            if not ops.begun:
                begin_backward(ops, site, gradient[0])
            scaled = ops.begun.pop()
            to_low = book.hold(low_e * tokens * rank)
            _gradient(ops, low_e, rank * site.outputs)
            del scaled
            made = book.hold(low_e * tokens * site.inputs) if source is not None else None
            _gradient(ops, low_e, rank * site.inputs)
            del to_low
            saved[0] = saved[1] = None
            if source is not None:
                if low_e != given_e:
                    made = book.hold(given_e * tokens * site.inputs)
                if dropout:
                    made = book.hold(given_e * tokens * site.inputs)
                saved.clear()
                if given_e != x_e:
                    made = book.hold(x_e * tokens * site.inputs)
                assert made is not None
                book.accumulate(source, made)
                del made
                assert base_node is not None
                book.accumulate(base_node, gradient.pop())
            saved.clear()

        node = book.node(backward)
    del kept, low, mask, copies, given
    return Value(result, out_e, node)


def _gradient(ops: Ops, made_e: int, elements: int) -> None:
    """Book an adapter matrix's gradient, cast to the adapter's type; added up if one exists."""
    book, e = ops.book, ops.n.adapter_e
    made = book.hold(made_e * elements, GRADIENT)
    if made_e != e or (ops.n.autocast and ops.n.other_half):
        made = book.hold(e * elements, GRADIENT)
    if not ops.n.accumulates:
        ops.gradients.append(made)


def packed_linear(ops: Ops, x: Value, site: Site) -> Value:
    """Our layer: the frozen product once, and every lane's share added to its own rows.

    Source: ``engine/lora.py``, ``PackedLinear.forward``.
    """
    book, n = ops.book, ops.n
    e, tokens = x.e, n.tokens
    out, base_node = _product(ops, x, site)
    with_it = [k for k, rank in enumerate(site.ranks) if rank]
    if n.grouped and len(with_it) > 1:
        deltas, product = _grouped_deltas(ops, x, site, with_it)
    else:
        deltas, product = _lane_deltas(ops, x, site, with_it)
    lane_size = e * tokens // n.lanes * site.outputs
    parts = [book.hold(lane_size) for _ in range(n.lanes - len(with_it))]
    delta = deltas if n.lanes == 1 else [book.hold(e * tokens * site.outputs)]
    result = book.hold(e * tokens * site.outputs)
    del out, parts, delta
    deltas.clear()
    node = None
    if book.grad_enabled:

        def backward(gradient: Gradient) -> None:
            product(gradient[0])
            if base_node is not None:
                book.accumulate(base_node, gradient.pop())

        node = book.node(backward)
    return Value(result, e, node)


def _lane_deltas(
    ops: Ops, x: Value, site: Site, lanes: list[int]
) -> tuple[list[Block], Callable[[Block], None]]:
    """One ``_LowRankProduct`` a lane."""
    book, n = ops.book, ops.n
    e, tokens = x.e, n.tokens
    own = tokens // n.lanes
    source = x.node
    kept: list[list[Block]] = []
    deltas = []
    for k in lanes:
        rank = site.ranks[k]
        saved = [x.block]
        masked = None
        if site.dropouts[k]:
            saved.append(book.hold(own * site.inputs))
        if e < n.adapter_e:
            saved += [book.hold(e * rank * size) for size in (site.inputs, site.outputs)]
        if site.dropouts[k]:
            masked = book.hold(e * own * site.inputs)
        low = book.hold(e * own * rank)
        low = book.hold(e * own * rank)  # times the scaling
        saved.append(low)
        deltas.append(book.hold(e * own * site.outputs))
        del masked, low
        if ops.recomputing and site.last and k == lanes[-1]:
            book.stopped = True
        kept.append(saved)
    if not book.grad_enabled:
        kept.clear()

    def backward(grad: Block) -> None:
        for k in reversed(lanes):
            rank = site.ranks[k]
            low = book.hold(e * own * rank)
            low = book.hold(e * own * rank)
            masked = book.hold(e * own * site.inputs) if site.dropouts[k] else None
            made = None
            if source is not None:
                made = book.hold(e * own * site.inputs)
                if site.dropouts[k]:
                    made = book.hold(e * own * site.inputs)
            by_a = book.hold(e * rank * site.inputs, GRADIENT)
            by_b = book.hold(e * rank * site.outputs, GRADIENT)
            del masked, low
            kept.pop()
            for matrix, size in ((by_b, site.outputs), (by_a, site.inputs)):
                _own_gradient(ops, matrix, e, rank * size)
            del matrix, by_a, by_b
            if source is not None and made is not None:
                if len(lanes) > 1 or n.lanes > 1:
                    made = book.hold(e * tokens * site.inputs)  # of the slice
                book.accumulate(source, made)

    return deltas, backward


def _grouped_deltas(
    ops: Ops, x: Value, site: Site, lanes: list[int]
) -> tuple[list[Block], Callable[[Block], None]]:
    """One ``_LowRankProduct`` over all lanes, padded to the largest rank."""
    book, n = ops.book, ops.n
    e, tokens, count = x.e, n.tokens, len(lanes)
    own = tokens // n.lanes
    rank = max(site.ranks)
    source = x.node
    inputs, outputs = site.inputs, site.outputs
    saved = []
    for size in (inputs, outputs):
        padded = book.hold(e * rank * size, count=count)
        saved.append(book.hold(e * rank * size * count))
        del padded
    stacked = book.hold(e * own * inputs * count)
    dropout = any(site.dropouts)
    masks: list[Block] = []
    if dropout:
        drawn = sum(site.dropouts)
        masks.append(book.hold(own * inputs, count=drawn))
        ones = book.hold(own * inputs, count=count - drawn)
        saved.append(book.hold(own * inputs * count))
        del ones
    masked = book.hold(e * own * inputs * count) if dropout else None
    low = book.hold(e * own * rank * count)
    wide = book.hold(4 * own * rank * count)
    low = book.hold(e * own * rank * count) if e < 4 else wide
    del wide
    deltas = [book.hold(e * own * outputs * count)]
    del masked
    masks.clear()
    if ops.recomputing and site.last:
        book.stopped = True
    saved += [stacked, low]
    del stacked, low
    if not book.grad_enabled:
        saved.clear()

    def backward(grad: Block) -> None:
        by_lane = ops.begun.pop() if ops.begun else _gathered(ops, site, e, count)
        low = book.hold(e * own * rank * count)
        if e < 4:
            low = book.hold(4 * own * rank * count)
        low = book.hold(e * own * rank * count)
        masked = book.hold(e * own * inputs * count) if dropout else None
        made = None
        if source is not None:
            made = book.hold(e * own * inputs * count)
            if dropout:
                made = book.hold(e * own * inputs * count)
        by_a = book.hold(e * rank * inputs * count, GRADIENT)
        by_b = book.hold(e * rank * outputs * count, GRADIENT)
        del masked, low, by_lane
        saved.clear()
        if source is not None:
            whole = book.hold(e * tokens * inputs)
            book.touch(e * tokens * inputs)
            del made
            book.accumulate(source, whole)
            del whole
        for rank_k, lanes_k in Counter(site.ranks[k] for k in lanes).items():
            _cut_gradients(ops, e, rank_k * outputs, lanes_k)
        del by_b
        for rank_k, lanes_k in Counter(site.ranks[k] for k in lanes).items():
            _cut_gradients(ops, e, rank_k * inputs, lanes_k)
        del by_a

    return deltas, backward


def _own_gradient(ops: Ops, made: Block, made_e: int, elements: int) -> None:
    """Book the gradient of a float32 master matrix, made in ``made_e`` bytes an element."""
    if made_e != ops.n.adapter_e:
        made = ops.book.hold(ops.n.adapter_e * elements, GRADIENT)
    if not ops.n.accumulates:
        ops.gradients.append(made)


def _cut_gradients(ops: Ops, made_e: int, elements: int, count: int) -> None:
    """Book the gradients of ``count`` matrices, cut out of a padded group's and cast one by one."""
    book, e = ops.book, ops.n.adapter_e
    if made_e == e:
        made = book.hold(e * elements, GRADIENT, count)
    else:
        book.touch(made_e * elements + e * elements * count, GRADIENT)
        made = book.hold(e * elements, GRADIENT, count)
    if not ops.n.accumulates:
        ops.gradients.append(made)
