"""A ledger of bytes: what a training step books and gives back, without a tensor anywhere.

The closed form writes a step down once per kind of decoder layer, statement by statement as the
modeling code does it. A ``Block`` stands for a storage: it is booked when made and given back when
the last reference to it goes, which is CPython's own rule and therefore that of torch's tensors. A
``Value`` is a block together with the ``Node`` that will receive its gradient; a node is what
autograd keeps of one operation. Backward runs the nodes in reverse order of their making, as autograd's
engine does (by sequence number), and adds gradients in place where the engine does.

Nothing here knows about models; ``ops.py`` has the operations.
"""

from collections.abc import Callable
from sys import getrefcount

ALIGNMENT = 512
"""The CUDA caching allocator rounds every tensor up to this (``c10/core/AllocatorConfig.h``)."""

ACTIVATION, LOGITS, GRADIENT = 0, 1, 2
"""Kinds of blocks, by the term of the estimate that they belong to."""


class Block:
    """One storage: booked while it is referred to."""

    __slots__ = ("book", "kind", "size")

    def __init__(self, book: "Book", size: int, kind: int) -> None:
        self.book = book
        self.size = size
        self.kind = kind

    def __del__(self) -> None:
        book = self.book
        book.now -= self.size
        book.kinds[self.kind] -= self.size


Gradient = list[Block]
"""A gradient handed to a node: one block that the node takes out when it needs it no longer."""


class Node:
    """What autograd keeps of one operation; ``backward`` frees what it captured by ending."""

    __slots__ = ("backward", "gradient")

    def __init__(self, backward: Callable[[Gradient], None]) -> None:
        self.backward = backward
        self.gradient: Block | None = None


class Value:
    """A tensor of the forward pass: its block, element size and, if it needs a gradient, its node."""

    __slots__ = ("block", "e", "node")

    def __init__(self, block: Block, e: int, node: Node | None) -> None:
        self.block = block
        self.e = e
        self.node = node


class Book:
    """The running total and its peak, with the kinds that the peak is made of."""

    def __init__(self) -> None:
        self.now = 0
        self.kinds = [0, 0, 0]
        self.peak = -1
        self.peak_kinds = [0, 0, 0]
        self.phase = ""
        self.peak_phase = ""
        self.grad_enabled = True
        self.stopped = False  # a recomputation has reached what backward needs
        self.tape: list[Node] = []

    def hold(self, size: int, kind: int = ACTIVATION, count: int = 1) -> Block:
        """Book ``count`` storages of ``size`` bytes, each rounded up as the allocator does."""
        size = 0 if self.stopped else -(-size // ALIGNMENT) * ALIGNMENT * count
        self.now += size
        self.kinds[kind] += size
        if self.now > self.peak:
            self._note(0, kind)
        return Block(self, size, kind)

    def touch(self, size: int, kind: int = ACTIVATION) -> None:
        """Note that ``size`` bytes more are held for a moment."""
        if self.now + size > self.peak and not self.stopped:
            self._note(size, kind)

    def node(self, backward: Callable[[Gradient], None]) -> Node:
        """Put an operation on the tape."""
        node = Node(backward)
        self.tape.append(node)
        return node

    def accumulate(self, node: Node, block: Block) -> None:
        """Hand a gradient to a node: in place if nobody else refers to the one that it has.

        Source: torch ``autograd/input_buffer.cpp``, ``accumulate``.
        """
        held = node.gradient
        if held is None:
            node.gradient = block
        elif getrefcount(held) > 3:  # the node, the name here, getrefcount's own
            node.gradient = self.hold(held.size, held.kind)

    def run_backward(self, down_to: int = 0) -> None:
        """Run the nodes of the tape, the last one first, until ``down_to`` are left."""
        tape = self.tape
        while len(tape) > down_to:
            node = tape.pop()
            if node.gradient is not None:
                gradient = [node.gradient]
                node.gradient = None
                node.backward(gradient)

    def _note(self, extra: int, kind: int) -> None:
        self.peak = self.now + extra
        self.peak_kinds = self.kinds.copy()
        self.peak_kinds[kind] += extra
        self.peak_phase = self.phase


class RecordedBlock(Block):
    """A block that also notes its end in the book's events."""

    __slots__ = ("number",)
    number: int

    def __del__(self) -> None:
        super().__del__()
        if self.size:
            events = self.book.events  # type: ignore[attr-defined]
            events.append((False, self.number, 0))


class RecordingBook(Book):
    """A book that keeps every booking as (made, number, bytes), for a replay by the allocator."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[bool, int, int]] = []
        self.numbers = 0

    def hold(self, size: int, kind: int = ACTIVATION, count: int = 1) -> Block:
        """Book as ``Book.hold`` does; several storages at once count as one."""
        size = 0 if self.stopped else -(-size // ALIGNMENT) * ALIGNMENT * count
        self.now += size
        self.kinds[kind] += size
        if self.now > self.peak:
            self._note(0, kind)
        block = RecordedBlock(self, size, kind)
        block.number = self._number(size)
        return block

    def touch(self, size: int, kind: int = ACTIVATION) -> None:
        """Note bytes that are held for a moment."""
        super().touch(size, kind)
        if size and not self.stopped:
            self.events.append((False, self._number(size), 0))

    def _number(self, size: int) -> int:
        self.numbers += 1
        if size:  # the allocator is not asked for nothing
            self.events.append((True, self.numbers, size))
        return self.numbers
