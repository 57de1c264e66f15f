"""Linear layers with their adapters, as PEFT's layers and as ours book them.

Notation as in ``ops.py``; n weights of a layer, r rank, R ranks of a group of lanes added up.
"""

from lora_tune.memory.groups import Group
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
    PEFT's layer multiplies by the scaling, and a 4-bit product, which keeps only its weight, is
    differentiated altogether; ours begins with what it kept.
    """
    book, n = ops.book, ops.n
    tokens = n.tokens
    e = gradient.size // (tokens * site.outputs)
    if not site.adapted:
        if site.quantized:
            ops.begun.append(_frozen_gradient(ops, site, gradient, e))
        return
    if n.packed:
        return
    low_e = 2 if n.autocast else n.adapter_e
    grad = gradient
    if low_e != e:
        grad = book.hold(low_e * tokens * site.outputs)
    ops.begun.append(book.hold(low_e * tokens * site.outputs))
    del grad


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
    tokens, rank = n.tokens, site.rank
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
    dropout = site.dropout
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
    """Our layer: the frozen product once, to which every group of lanes adds its share in place.

    Keeps its input and what ``_share`` keeps. The gradient of the output passes through.
    Source: ``engine/lora.py``, ``PackedLinear.forward`` and ``_LowRankUpdate``.
    """
    book, e = ops.book, x.e
    out, base_node = _product(ops, x, site)
    if site.is_view:
        out = book.hold(out.size)
    saved = [x.block]
    for group in site.groups:
        saved += _share(ops, site, group, e)
    if ops.recomputing and site.last:
        book.stopped = True
    node = None
    if book.grad_enabled:
        source = x.node

        def backward(gradient: Gradient) -> None:
            made = _share_gradients(ops, site, e, to_input=source is not None)
            saved.clear()
            if base_node is not None:
                book.accumulate(base_node, gradient.pop())
            gradient.clear()
            if source is not None and made is not None:
                book.accumulate(source, made)

        node = book.node(backward)
    return Value(out, e, node)


def _share(ops: Ops, site: Site, group: Group, e: int) -> list[Block]:
    """``scaling * (mask * x) @ A.T @ B.T`` of a group; return what backward needs beside x.

    A and B in the compute type, those of several lanes under each other (in float32 before they are cast; a
    lone one in float32 is the adapter itself); with dropout a mask of one byte an input; the rank-R
    product. The scaling of several lanes is a float32 matrix, and so is their product before it is cast.
    """
    book = ops.book
    saved = []
    rank, several = sum(group.ranks), len(group.ranks) > 1
    for size in (site.inputs, site.outputs):
        stacked = book.hold(4 * rank * size) if several and e < 4 else None
        if several or e < 4:
            saved.append(book.hold(e * rank * size))
        del stacked
    masked = None
    if group.dropout:
        saved.append(book.hold(group.tokens * site.inputs))
        masked = book.hold(e * group.tokens * site.inputs)
    saved.append(_scaled(ops, group, e))
    del masked
    return saved


def _scaled(ops: Ops, group: Group, e: int) -> Block:
    """Return a rank-R product, times the scaling."""
    book, elements = ops.book, group.tokens * sum(group.ranks)
    low = book.hold(e * elements)
    if len(group.ranks) > 1 and e < 4:
        low = book.hold(4 * elements)
    low = book.hold(e * elements)
    return low


def _share_gradients(ops: Ops, site: Site, e: int, *, to_input: bool) -> Block | None:
    """Book the way back through all groups; return the input's gradient if it is asked for.

    Gradients of A and B are made in the compute type and added to the float32 ones, which are always
    there; those of several lanes are cast first. Groups that leave out tokens write into zeros.
    """
    book = ops.book
    tokens = ops.n.tokens
    whole = [group.tokens for group in site.groups] == [tokens]
    made = book.hold(e * tokens * site.inputs) if to_input and not whole else None
    low = None
    for group in site.groups:
        low = _scaled(ops, group, e)
        made_e = e + 4 if len(group.ranks) > 1 and e < 4 else e
        rank = sum(group.ranks)
        book.touch(made_e * rank * site.outputs)
        masked = book.hold(e * group.tokens * site.inputs) if group.dropout else None
        book.touch(made_e * rank * site.inputs)
        del masked
        if to_input and made is None:
            made = book.hold(e * tokens * site.inputs)
    del low
    return made
