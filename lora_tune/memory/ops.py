"""The operations of a decoder layer as they are booked: what each keeps, makes and gives back.

Notation: e bytes per element of a value, T tokens of the whole pack, S tokens per row, h hidden,
f MLP width, D head size, r rank. Sizes in comments are bytes per token. Each operation stands
for the statements of the modeling code that it names and for their backward; what is held only
between two of those statements is "touched". Sources: transformers 5.23.0, peft 0.21.2,
bitsandbytes 0.50.2, torch 2.13 (``tools/autograd/derivatives.yaml`` for what a backward keeps).
"""

from collections.abc import Callable
from dataclasses import dataclass

from lora_tune.memory.groups import Group
from lora_tune.memory.ledger import Block, Book, Gradient, Node, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A linear layer with its adapters, as the operations need it."""

    inputs: int
    outputs: int
    quantized: bool
    nested: bool = False  # double quantization: the statistics are dequantized first
    rank: int = 0  # of PEFT's adapter; 0: none
    dropout: bool = False  # whether PEFT's adapter has it
    lanes: tuple[bool, ...] = ()  # which of our lanes adapt it
    groups: tuple[Group, ...] = ()  # of our lanes that adapt it
    is_view: bool = False  # the frozen product comes out as a view, which ours copies
    last: bool = False  # the last linear layer of a decoder layer: a recomputation stops in it

    @property
    def num_weights(self) -> int:
        """Elements of the frozen weight."""
        return self.inputs * self.outputs

    @property
    def adapted(self) -> bool:
        """Whether it has an adapter."""
        return self.rank > 0 or bool(self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of an attention."""

    count: int
    query_size: int  # widths of all heads together
    kv_count: int
    kv_size: int
    head_dim: int
    masked: bool  # the kernel gets a mask: padded rows, or a window that the rows exceed
    repeats: bool = True  # transformers repeats keys and values where there is a mask
    softcap: bool = False  # scores through tanh, so that no fused kernel can be used
    float32_softmax: bool = True  # asked for by the modeling code of eager attention
    dropout: bool = False  # of the probabilities, while a trainer trains
    head_major: bool = False  # heads before tokens in memory: the output is copied to turn it round


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What all operations of a step have in common."""

    rows: int  # of all lanes
    length: int  # S, tokens per row
    lanes: int
    label_tokens: int
    chunk_tokens: int
    compute_e: int  # of the compute type: 2 or 4
    weight_e: int  # of weights that are not quantized: compute_e, or 4 after k-bit preparation
    adapter_e: int
    other_half: bool  # adapters in another 16-bit type than the compute type
    bfloat16: bool  # what is 16-bit is bfloat16
    half_softmax: bool  # float16 on CUDA: softmax reads it and writes float32 in one kernel
    autocast: bool
    packed: bool  # our layers rather than PEFT's
    in_line: bool  # all rows in one line, so that positions and what is made of them have N entries
    attention: str
    padded: bool
    norm: str  # "rms", "gemma" or "layer"
    activation: str  # name in transformers' ACT2FN
    compute_capability: str | None  # None on a CPU
    accumulates: bool  # gradients of an earlier micro-batch exist
    outputs_held: bool

    @property
    def tokens(self) -> int:
        """T, of all lanes."""
        return self.rows * self.length

    @property
    def positions(self) -> int:
        """Entries of the position ids: one a token where rows lie in one line, else those of a row."""
        return self.tokens if self.in_line else self.length

    @property
    def cuda(self) -> bool:
        """Whether the step runs on a GPU."""
        return self.compute_capability is not None

    @property
    def has_efficient(self) -> bool:
        """Whether the device's memory-efficient kernel takes this step's 16-bit type.

        bfloat16 from capability 8.0 on. Source: torch ``cuda/sdp_utils.cpp``.
        """
        major = (self.compute_capability or "").partition(".")[0]
        return not self.bfloat16 or major not in ("5", "6", "7")

    def has_flash(self, e: int, head_dim: int) -> bool:
        """Say whether the device's flash kernel trains with such heads.

        On CUDA: 16 bit, capability 8.0 on, heads up to 256, on 8.6, 8.9 and 12.0 none between 192
        and 224. AMD's architectures ("gfx942") are taken to be like it. Source: torch
        ``cuda/sdp_utils.cpp``, ``can_use_flash_attention``.
        """
        if self.compute_capability is None:
            return True
        if e == 4 or head_dim > 256:
            return False
        major, _, minor = self.compute_capability.partition(".")
        if major in ("5", "6", "7"):
            return False
        small = (major == "8" and minor in ("6", "7", "8", "9")) or major == "12"
        return not small or not 192 < head_dim <= 224


FUSED_ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")
"""Names in transformers' ACT2FN of what ``engine/fused.py`` knows."""


class Ops:
    """The operations on one book."""

    def __init__(self, book: Book, numbers: Numbers) -> None:
        self.book = book
        self.n = numbers
        self.cache: list[Block] | None = None  # autocast's copies, while its context lasts
        self.gradients: list[Block] = []
        self.recomputing = False
        self.named: list[Block] = []  # what a decoder layer refers to until it returns
        self.embeddings: list[Block] = []  # which the decoder's forward refers to until it returns
        self.held: list[Block] = []  # what lives to the end of the step
        self.begun: list[
            Block
        ] = []  # what the last linear layer's backward did before a recomputation

    def end_autocast(self) -> None:
        """Leave autocast's context: the copies that nothing else refers to go."""
        if self.cache is not None:
            self.cache.clear()
            self.cache = None

    # Elementwise

    def to(self, x: Value, e: int, width: int) -> Value:
        """``x.to(dtype)``: a copy, and in backward another, unless the type is the same."""
        if x.e == e:
            return x
        block = self.book.hold(e * self.n.tokens * width)
        return Value(block, e, self._passing(x, width))

    def _passing(self, x: Value, width: int) -> Node | None:
        """Return the node of an operation whose backward makes one gradient like x and keeps nothing."""
        source = x.node
        if source is None or not self.book.grad_enabled:
            return None
        size = x.e * self.n.tokens * width
        book = self.book

        def backward(gradient: Gradient) -> None:
            made = book.hold(size)
            gradient.pop()
            book.accumulate(source, made)

        return book.node(backward)

    def add(self, x: Value, y: Value, width: int) -> Value:
        """``x + y`` of two values; the gradient goes to both as it is, or cast to the narrower type."""
        book, tokens = self.book, self.n.tokens
        e = max(x.e, y.e)
        block = book.hold(e * tokens * width)
        node = None
        if book.grad_enabled and (x.node is not None or y.node is not None):
            targets = [(v.node, v.e) for v in (x, y) if v.node is not None]

            def backward(gradient: Gradient) -> None:
                grad = gradient.pop()
                parts = [
                    (target, grad if own == e else book.hold(own * tokens * width))
                    for target, own in targets
                ]
                del grad
                while parts:
                    target, part = parts.pop(0)
                    book.accumulate(target, part)

            node = book.node(backward)
        return Value(block, e, node)

    def add_in_place(self, x: Value, y: Value) -> Value:
        """``x += y``: the gradient goes to both as it is."""
        book = self.book
        targets = [v.node for v in (x, y) if v.node is not None]
        node = None
        if targets and book.grad_enabled:

            def backward(gradient: Gradient) -> None:
                grad = gradient.pop()
                for target in targets:
                    book.accumulate(target, grad)

            node = book.node(backward)
        return Value(x.block, x.e, node)

    def gather(self, x: Value, width: int) -> Value:
        """``x[indices]``: a copy; backward puts the gradient into zeros."""
        block = self.book.hold(x.e * self.n.tokens * width)
        return Value(block, x.e, self._passing(x, width))

    def copy(self, x: Value, width: int) -> Value:
        """A copy of another shape or order; the gradient goes back as it is."""
        source = x.node
        block = self.book.hold(x.e * self.n.tokens * width)
        return Value(block, x.e, source)

    def activation(self, x: Value, width: int) -> Value:
        """``act_fn(x)`` as one kernel (silu, gelu): keeps x. GPT-2's form is written out."""
        if self.n.activation == "gelu_new":
            return self._written_gelu(x, width)
        book = self.book
        size = x.e * self.n.tokens * width
        block = book.hold(size)
        source, node = x.node, None
        if source is not None and book.grad_enabled:
            saved = [x.block]

            def backward(gradient: Gradient) -> None:
                made = book.hold(size)
                gradient.pop()
                saved.clear()
                book.accumulate(source, made)

            node = book.node(backward)
        return Value(block, x.e, node)

    def _written_gelu(self, x: Value, width: int) -> Value:
        """``0.5 x (1 + tanh(c (x + 0.044715 x^3)))`` as eight operations (``NewGELUActivation``).

        Keeps x, half of it, the tanh, and one plus the tanh. Autocast takes the power in float32, and
        all that follows from it.
        """
        book = self.book
        wide_e = 4 if self.n.autocast else x.e
        own, wide = x.e * self.n.tokens * width, wide_e * self.n.tokens * width
        half = book.hold(own)
        power_of = x.block if wide_e == x.e else book.hold(wide)
        total = book.hold(wide)
        for _ in range(3):  # the power times a factor, the sum, the sum times a factor
            total = book.hold(wide)
        bent = book.hold(wide)
        del total
        one_more = book.hold(wide)
        out = book.hold(wide)
        source, node = x.node, None
        if source is not None and book.grad_enabled:
            saved = [half, one_more, bent, power_of]

            def backward(gradient: Gradient) -> None:
                by_half = book.hold(wide)
                grad = book.hold(wide)
                gradient.pop()
                if own != wide:
                    by_half = book.hold(own)
                saved.pop(0)
                saved.pop(0)
                grad = book.hold(wide)  # of the tanh
                saved.pop(0)
                grad = book.hold(wide)  # of the factor
                direct = grad if own == wide else book.hold(own)
                book.accumulate(source, direct)
                del direct
                grad = book.hold(wide)  # of the factor
                square = book.hold(wide)
                book.touch(2 * wide)  # three times it, and the product
                grad = book.hold(wide)
                del square
                saved.clear()
                if own != wide:
                    grad = book.hold(own)
                book.accumulate(source, grad)
                del grad
                by_half = book.hold(own)
                book.accumulate(source, by_half)

            node = book.node(backward)
        return Value(out, wide_e, node)

    def multiply(self, x: Value, y: Value, width: int) -> Value:
        """``x * y`` of two values of one type: keeps each for the other's gradient."""
        book = self.book
        size = x.e * self.n.tokens * width
        block = book.hold(size)
        node = None
        if book.grad_enabled and (x.node is not None or y.node is not None):
            # y is kept for the gradient of x, and x for that of y
            saved = ([y.block] if x.node else []) + ([x.block] if y.node else [])
            targets = [v.node for v in (x, y) if v.node is not None]

            def backward(gradient: Gradient) -> None:
                made = [book.hold(size) for _ in targets]
                gradient.pop()
                saved.clear()
                for target in targets:
                    book.accumulate(target, made.pop(0))

            node = book.node(backward)
        return Value(block, x.e, node)

    def gated_product(
        self, gate_of: Callable[[], Value], up_of: Callable[[], Value], width: int
    ) -> Value:
        """``act_fn(gate_proj(x)) * up_proj(x)``.

        Ours (``engine/fused.py``) keeps what the two layers give (2fe) and takes the activation again in
        backward; autograd keeps the activation's result as well.
        """
        if not (self.n.packed and self.n.activation in FUSED_ACTIVATIONS):
            active = self.activation(gate_of(), width)
            return self.multiply(active, up_of(), width)
        gate, up = gate_of(), up_of()
        book = self.book
        size = gate.e * self.n.tokens * width
        block = book.hold(size)
        node = None
        if book.grad_enabled and (gate.node is not None or up.node is not None):
            saved = [gate.block, up.block]
            gate_node, up_node = gate.node, up.node

            def backward(gradient: Gradient) -> None:
                product = book.hold(size)
                to_gate = book.hold(size)
                del product
                to_up = book.hold(size)
                gradient.clear()
                saved.clear()
                if gate_node is not None:
                    book.accumulate(gate_node, to_gate)
                del to_gate
                if up_node is not None:
                    book.accumulate(up_node, to_up)

            node = book.node(backward)
        return Value(block, gate.e, node)

    # Norms

    def rms_norm(self, x: Value, width: int, *, groups: int = 1) -> Value:
        """Llama's RMSNorm: keeps the input in float32 (4h) and the reciprocal root (4 a group).

        Forward: float32 copy, its square, the product with the root, the cast back, the product with
        the weight. Backward ends five float32 tensors wide (20h with the kept input): the gradient's
        products with root and input, and the square's derivative, which makes ``x.pow(1)`` and twice it.
        """
        if self.n.packed:
            return self._frozen_rms_norm(x, width, groups=groups)
        book, tokens = self.book, self.n.tokens
        full, own = 4 * tokens * width, x.e * tokens * width
        wide = x.block if x.e == 4 else book.hold(full)
        book.touch(full)  # the square
        root = book.hold(4 * tokens * groups)
        normed = book.hold(full)
        back = normed if x.e == 4 else book.hold(own)
        out = book.hold(own)
        source, node = x.node, None
        if source is not None and book.grad_enabled:
            saved = [wide, root]
            half = x.e != 4

            def backward(gradient: Gradient) -> None:
                grad = book.hold(own)  # through the weight
                gradient.pop()
                if half:
                    grad = book.hold(full)
                gradient.append(grad)
                del grad
                self._norm_backward(gradient, saved, source, full=full, own=own)

            node = book.node(backward)
        del back
        return Value(out, x.e, node)

    def _frozen_rms_norm(self, x: Value, width: int, *, groups: int) -> Value:
        """Ours (``engine/fused.py``): keeps the input as it is (2h) and the reciprocal root.

        Backward ends with the gradient and the input in float32 and the product of both (12h, 4 of which go
        at once), beside the gradient that came in.
        """
        book, tokens = self.book, self.n.tokens
        full, own, each = 4 * tokens * width, x.e * tokens * width, 4 * tokens * groups
        half = x.e != 4
        wide = book.hold(full) if half else x.block
        book.touch(full)  # the square
        root = book.hold(each)
        normed = wide if half else book.hold(full)
        back = book.hold(own) if half else normed
        out = book.hold(own)
        source, node = x.node, None
        if source is not None and book.grad_enabled:
            saved = [x.block, root]

            def backward(gradient: Gradient) -> None:
                grad = book.hold(own)  # through the weight
                if half:
                    grad = book.hold(full)
                wide = book.hold(full) if half else grad
                book.touch(full)  # their product, summed at once
                along = book.hold(each)
                made = book.hold(own) if half else grad
                del grad, wide, along
                gradient.clear()
                saved.clear()
                book.accumulate(source, made)

            node = book.node(backward)
        del wide, root, normed, back
        return Value(out, x.e, node)

    def norm(self, x: Value, width: int, *, groups: int = 1, last: bool = False) -> Value:
        """The model's own kind of norm; ``last`` where a recomputation stops in it."""
        if self.n.norm == "layer":
            return self.layer_norm(x, width)
        if self.n.norm == "gemma":
            return self.gemma_norm(x, width, groups=groups, last=last)
        return self.rms_norm(x, width, groups=groups)

    def gemma_norm(self, x: Value, width: int, *, groups: int, last: bool) -> Value:
        """Gemma's RMSNorm: in float32 to the end, times (1 + weight), then cast.

        Keeps what Llama's keeps, and 1 + weight in float32.
        """
        book, tokens = self.book, self.n.tokens
        full, own = 4 * tokens * width, x.e * tokens * width
        half = x.e != 4
        wide = book.hold(full) if half else x.block
        book.touch(full)  # the square
        root = book.hold(4 * tokens * groups)
        normed = book.hold(full)
        factor = book.hold(4 * width // groups)
        if last and self.recomputing:
            book.stopped = True
        scaled = book.hold(full)
        del normed
        out = book.hold(own) if half else scaled
        source, node = x.node, None
        if source is not None and book.grad_enabled:
            saved = [wide, root, factor]

            def backward(gradient: Gradient) -> None:
                grad = gradient.pop()
                if half:
                    grad = self.begun.pop() if last and self.begun else book.hold(full)
                gradient.append(book.hold(full))  # through the factor
                del grad
                self._norm_backward(gradient, saved, source, full=full, own=own)

            node = book.node(backward)
        del wide, root, factor, scaled
        return Value(out, x.e, node)

    def _norm_backward(
        self, gradient: Gradient, saved: list[Block], source: Node, *, full: int, own: int
    ) -> None:
        """The way back through ``x * rsqrt(mean(x ** 2) + eps)``, all in float32.

        Widest with the gradient through the root, the mean's, ``x.pow(1)``, twice it, and the
        square's (20 h with the kept input).
        """
        book = self.book
        times_root = book.hold(full)
        book.touch(full)  # the product with the input, summed at once
        if self.n.packed:  # the trainers' stacks are still counted as if it lived to the end
            gradient.clear()
        spread = book.hold(full)  # the mean's gradient
        power = book.hold(full)
        twice = book.hold(full)
        made = book.hold(full)
        del spread, power, twice, made
        saved.clear()
        if own != full:
            times_root = book.hold(own)
        book.accumulate(source, times_root)

    def layer_norm(self, x: Value, width: int) -> Value:
        """``nn.LayerNorm``: keeps its input, the mean and the reciprocal root (8 a token).

        Under autocast it runs in float32 and stays there: keeps a float32 copy, gives a float32 output.
        """
        book, tokens = self.book, self.n.tokens
        e = 4 if self.n.autocast else x.e
        size = e * tokens * width
        wide = x.block if x.e == e else book.hold(size)
        out = book.hold(size)
        means, roots = book.hold(4 * tokens), book.hold(4 * tokens)
        source, node = x.node, None
        if source is not None and book.grad_enabled:
            saved = [wide, means, roots]
            own = x.e

            def backward(gradient: Gradient) -> None:
                made = book.hold(size)
                gradient.pop()
                saved.clear()
                if own != e:
                    made = book.hold(own * tokens * width)
                book.accumulate(source, made)

            node = book.node(backward)
        del wide, means, roots
        return Value(out, e, node)

    # Attention

    def rotary(self, x: Value, width: int) -> Value:
        """``x * cos + rotate_half(x) * sin``: keeps nothing of its own.

        Five tensors for a moment: the two products, the negated half, the rotation, the sum; backward the
        same widths. Float32 tables (k-bit preparation) make the result float32.
        """
        book, tokens = self.book, self.n.tokens
        e = max(x.e, self.n.weight_e)
        own, size = x.e * tokens * width, e * tokens * width
        first = book.hold(size)
        book.touch(own // 2 + own)  # -x2 and the rotation
        rotated = book.hold(own)
        second = book.hold(size)
        del rotated
        out = book.hold(size)
        del first, second
        source, node = x.node, None
        if source is not None and book.grad_enabled:

            def backward(gradient: Gradient) -> None:
                by_sine = book.hold(size)
                if own != size:
                    by_sine = book.hold(own)
                halves = book.hold(own)  # of the rotation, put back
                del by_sine
                by_cosine = book.hold(size)
                gradient.pop()
                if own != size:
                    by_cosine = book.hold(own)
                del halves
                book.accumulate(source, by_cosine)

            node = book.node(backward)
        return Value(out, e, node)

    def partial_rotary(self, x: Value, heads: int, rotary_dim: int, head_dim: int) -> Value:
        """The rotation of a head's first dimensions, and the rest put behind them again."""
        book, tokens = self.book, self.n.tokens
        part, size = x.e * tokens * heads * rotary_dim, x.e * tokens * heads * head_dim
        turned = self.rotary(Value(x.block, x.e, None), heads * rotary_dim)
        e, own = turned.e, size
        size = e * tokens * heads * head_dim
        out = book.hold(size)
        del turned
        source, node = x.node, None
        if source is not None and book.grad_enabled:

            def backward(gradient: Gradient) -> None:
                by_sine = book.hold(part)
                halves = book.hold(part)
                del by_sine
                by_cosine = book.hold(part)
                del halves
                made = book.hold(own)
                book.touch(own)
                gradient.pop()
                del by_cosine
                book.accumulate(source, made)

            node = book.node(backward)
        return Value(out, e, node)

    def slices(self, x: Value, widths: tuple[int, ...], *, chunked: bool = False) -> list[Value]:
        """Views of a product's parts; they keep it whole.

        Backward of ``chunk`` and ``split`` puts the parts' gradients together in one tensor; of single
        slices each makes zeros of the whole size, which are added up.
        """
        book, tokens = self.book, self.n.tokens
        size = x.e * tokens * sum(widths)
        source = x.node
        if source is None or not book.grad_enabled:
            return [Value(x.block, x.e, None) for _ in widths]
        if chunked:
            gathered: list[Block] = []

            def gather(gradient: Gradient) -> None:
                gradient.pop()
                made = book.hold(size)
                gathered.clear()
                book.accumulate(source, made)

            whole = book.node(gather)

            def collect(gradient: Gradient) -> None:
                part = gradient.pop()
                gathered.append(part)
                whole.gradient = part

            return [Value(x.block, x.e, book.node(collect)) for _ in widths]

        def backward(gradient: Gradient) -> None:
            made = book.hold(size)
            gradient.pop()
            book.accumulate(source, made)

        return [Value(x.block, x.e, book.node(backward)) for _ in widths]

    def base_dropout(
        self, x: Value, width: int, probability: float, *, last: bool = False
    ) -> Value:
        """The base model's own dropout, active when a trainer trains; keeps a one-byte mask.

        ``last``: nothing after it keeps anything, so that a recomputation stops behind it.
        """
        book, n = self.book, self.n
        if n.packed or not probability:
            return x
        size = x.e * n.tokens * width
        out, mask = book.hold(size), book.hold(n.tokens * width)
        if last and self.recomputing:
            book.stopped = True
        source, node = x.node, None
        if source is not None and book.grad_enabled:
            saved = [mask]

            def backward(gradient: Gradient) -> None:
                made = book.hold(size)
                gradient.pop()
                saved.clear()
                book.accumulate(source, made)

            node = book.node(backward)
        del mask
        return Value(out, x.e, node)

    def repeat(self, x: Value, heads: Heads) -> Value:
        """``repeat_kv``: a copy with every query head's key or value; backward sums them."""
        book, n = self.book, self.n
        small, block = x.e * n.tokens * heads.kv_size, book.hold(x.e * n.tokens * heads.query_size)
        source, node = x.node, None
        if source is not None and book.grad_enabled:

            def backward(gradient: Gradient) -> None:
                made = book.hold(small)
                gradient.pop()
                book.accumulate(source, made)

            node = book.node(backward)
        return Value(block, x.e, node)
