"""A whole training step on a ledger: layers, head, loss, backward, optimizer, by stack.

Of L layers only the first, the second and the last are gone through; what those between keep is
booked at once. Memory rises to the loss and falls after it, and between layers that are alike
every reading is linear in the layer's number, so that the largest is at an end.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from lora_tune.errors import UncoveredModelError
from lora_tune.memory import experts, terms
from lora_tune.memory.groups import in_order, lane_groups
from lora_tune.memory.heads import HEADS
from lora_tune.memory.layers import LAYERS
from lora_tune.memory.ledger import GRADIENT, Block, Book, Gradient, RecordingBook, Value
from lora_tune.memory.linears import begin_backward
from lora_tune.memory.ops import Numbers, Ops, Site
from lora_tune.memory.request import DTYPE_BYTES, MemoryRequest
from lora_tune.memory.shape import ModelShape, adapted_copies


class Peak(NamedTuple):
    """The most that a step holds beside the static bytes, and what it is made of."""

    phase: str
    activations: int
    logits_and_loss: int
    gradients: int


class _Stretch(NamedTuple):
    """Layers in a row that are like the one before them."""

    end: int  # length of the tape after that one
    kept: list[Block]
    layers: int


class Kinds(NamedTuple):
    """Whether the layers' attention gets a mask: the first, those between by kind, the last."""

    first: bool
    middle: tuple[tuple[bool, int], ...]
    last: bool | None  # None: there is one layer only


def layer_kinds(shape: ModelShape, request: MemoryRequest, *, each: bool = False) -> Kinds:
    """Return which layers' attention gets a mask: those between counted by kind, or ``each``.

    FlashAttention itself takes lengths and windows.

    Padded rows do in the trainers (ours pads on the right, where the causal mask is enough), and
    rows that reach a layer's sliding window. Source: transformers ``masking_utils.py``,
    ``_ignore_causal_mask_sdpa``.
    """
    takes_masks = request.attention != "flash"
    always = shape.model_type == "falcon"
    padded = always or (takes_masks and request.padded and request.stack != "lora-tune")
    window = shape.sliding_window
    own = request.stack == "lora-tune"
    reach = request.max_length - 1 if own and shape.takes_rows_in_line else request.max_length
    slides = takes_masks and window is not None and reach >= window
    layers = [padded] * shape.num_layers
    if slides and not padded:
        layers = list(shape.sliding_layers)
    middle = layers[1:-1]
    if each:
        counts = [(masked, 1) for masked in middle]
    elif own:
        counts = _by_kind(middle)
    else:
        counts = sorted(Counter(middle).items())
    return Kinds(
        first=layers[0],
        middle=tuple(counts),
        last=layers[-1] if len(layers) > 1 else None,
    )


def _by_kind(layers: Sequence[bool]) -> list[tuple[bool, int]]:
    """Return layers counted by kind, but from where one kind comes for the last time as they are.

    Of the layers of a kind the last one holds most.
    """
    if not layers:
        return []
    end = min(max(i for i, masked in enumerate(layers) if masked == kind) for kind in set(layers))
    runs = [(masked, len(list(run))) for masked, run in groupby(layers[end:])]
    return sorted(Counter(layers[:end]).items()) + runs


class Step:
    """One micro-batch forward and backward."""

    def __init__(self, shape: ModelShape, request: MemoryRequest, book: Book | None = None) -> None:
        """Prepare the step on a book; with a ``RecordingBook`` every layer is gone through."""
        if shape.model_type == "falcon" and request.attention == "eager":
            raise UncoveredModelError("Falcon's own eager attention has no closed form.")
        self.shape, self.request = shape, request
        e = DTYPE_BYTES[request.compute_dtype]
        rows = request.micro_batch_size * len(request.lanes)
        labels = min(round(request.label_fraction * request.max_length), request.max_length - 1)
        self.numbers = Numbers(
            rows=rows,
            length=request.max_length,
            lanes=len(request.lanes),
            label_tokens=rows * max(1, labels),  # the first token of a row is never one
            chunk_tokens=request.chunk_tokens,
            compute_e=e,
            weight_e=terms.weight_bytes(request),
            adapter_e=DTYPE_BYTES[request.adapter_dtype],
            other_half=sorted((request.adapter_dtype, request.compute_dtype))
            == ["bfloat16", "float16"],
            bfloat16=request.compute_dtype == "bfloat16",
            half_softmax=request.compute_dtype == "float16"
            and request.compute_capability is not None,
            autocast=request.autocast,
            packed=request.stack == "lora-tune",
            in_line=request.stack == "lora-tune" and shape.takes_rows_in_line,
            attention=request.attention,
            padded=request.padded,
            norm="gemma" if shape.norm_offset else shape.norm,
            activation=shape.activation,
            compute_capability=request.compute_capability,
            accumulates=request.gradient_accumulation,
            outputs_held=request.outputs_held,
        )
        self.book = Book() if book is None else book
        self.ops = Ops(self.book, self.numbers)
        self.layer = LAYERS[shape.model_type]
        self.head = HEADS[request.stack]
        self.sites = self._sites()
        self.kinds = layer_kinds(shape, request, each=isinstance(book, RecordingBook))
        self.last = next((site for site in self.sites.values() if site.last), None)

    def run(self) -> Peak:
        """Go through the step and return its peak."""
        book = self.book
        book.phase = "forward"
        table = self.numbers.weight_e * self.numbers.positions * self.shape.rotary_dim
        pairs = self.shape.num_rotary_tables  # of cosines and sines, shared by the layers
        tables = [book.hold(table) for _ in range(2 * pairs)]
        scalings = self._scalings()
        masks = self._masks()
        if not self.request.gradient_checkpointing:
            self.ops.embeddings += masks
            masks.clear()
        if self.request.gradient_checkpointing:
            self._checkpointed()
        else:
            self._kept()
        tables.clear()
        scalings.clear()
        activation, logits, gradient = book.peak_kinds
        return Peak(book.peak_phase, activation, logits, gradient)

    def _scalings(self) -> list[Block]:
        """Book the scaling of each group of several lanes, a float32 matrix shared by all modules.

        Source: ``engine/lora.py``, ``PackLayout.groups``.
        """
        distinct = {site.lanes: site.groups for site in self.sites.values()}
        return [
            self.book.hold(4 * group.tokens * sum(group.ranks))
            for groups in distinct.values()
            for group in groups
            if len(group.ranks) > 1
        ]

    def _masks(self) -> list[Block]:
        """Book the masks: a byte per pair of positions, per row when rows are padded.

        Eager attention adds a mask in the embeddings' type, one per row and kind of layer, always.
        """
        n, kinds, shape = self.numbers, self.kinds, self.shape
        if n.attention == "eager" or (shape.attention_softcap and n.attention != "flash"):
            mixed = 0 < shape.num_sliding_layers < shape.num_layers
            size = n.weight_e * n.rows * n.length**2
            return [self.book.hold(size) for _ in range(2 if mixed else 1)]
        if n.in_line:  # each layer makes its own
            return []
        if not any((kinds.first, kinds.last, *(masked for masked, _ in kinds.middle))):
            return []
        rows = n.rows if self.request.padded and not n.packed else 1
        return [self.book.hold(rows * n.length**2)]

    def _ends_in_linear(self) -> bool:
        """Say whether nothing but a sum follows the last linear layer of a decoder layer."""
        shape = self.shape
        drops = shape.hidden_dropout > 0 and not self.numbers.packed
        return not shape.sandwich_norms and not drops and not shape.num_experts

    def _sites(self) -> Mapping[str, Site]:
        shape, request = self.shape, self.request
        packed = self.numbers.packed
        lanes = in_order(shape, request.lanes) if packed else request.lanes
        copies = [adapted_copies(shape, lane.targets) for lane in lanes]
        quantized = request.quantization != "none" and shape.quantizable
        last = shape.layer_linears[-1].name if self._ends_in_linear() else ""
        sites = {}
        for i, linear in enumerate(shape.layer_linears):
            adapts = [counts[i] > 0 for counts in copies]
            adapter = None if packed or not adapts[0] else lanes[0]
            sites[linear.name] = Site(
                inputs=linear.in_features,
                outputs=linear.out_features,
                quantized=quantized,
                nested=request.quantization == "nf4",
                rank=adapter.rank if adapter else 0,
                dropout=adapter is not None and adapter.lora_dropout > 0,
                lanes=tuple(adapts),
                groups=lane_groups(lanes, adapts, request) if packed else (),
                is_view=shape.model_type == "gpt2",
                last=linear.name == last,
            )
        return sites

    def _kept(self) -> None:
        """Everything is kept until its backward."""
        book, kinds = self.book, self.kinds
        hidden = [self._layer(self._embedding(), kinds.first)]
        between = []
        for masked, count in kinds.middle:
            before = book.now
            hidden = [self._layer(hidden.pop(), masked)]
            bulk = [book.hold((book.now - before) * (count - 1))]
            between.append(_Stretch(len(book.tape), bulk, count - 1))
        if kinds.last is not None:
            hidden = [self._layer(hidden.pop(), kinds.last)]
        self.head(self.ops, self.shape, hidden)
        self._back(between)

    def _checkpointed(self) -> None:
        """Each layer keeps its input and is computed again in backward.

        Source: torch ``utils/checkpoint.py``, the non-reentrant form.
        """
        book, ops, kinds = self.book, self.ops, self.kinds
        ops.cache = [] if self.numbers.autocast else None
        # Forward holds most in the last layer. The others are gone through only for what they leave:
        # their output, and under autocast copies of their adapters, which the first one shows.
        brief = not isinstance(book, RecordingBook)
        shown = ops.cache is not None or kinds.last is None
        hidden = self._checkpointed_layer(
            self._embedding(), kinds.first, forward=shown or not brief
        )
        copies = sum(block.size for block in ops.cache or ())
        between = []
        for masked, count in kinds.middle:
            hidden = self._checkpointed_layer(hidden, masked, forward=not brief)
            bulk = [book.hold(hidden.block.size * (count - 1))]
            between.append(_Stretch(len(book.tape), bulk, count - 1))
            if ops.cache is not None:
                ops.cache.append(book.hold(copies * (count if brief else count - 1)))
        out = [hidden]
        if kinds.last is not None:
            out = [self._checkpointed_layer(hidden, kinds.last)]
        del hidden
        self.head(ops, self.shape, out)
        self._back(between)

    def _back(self, between: list["_Stretch"]) -> None:
        """Run backward; layers that were not gone through leave their gradients and what they kept."""
        book = self.book
        book.phase = "backward"
        rest, per_layer = [], 0
        for stretch in reversed(between):
            book.run_backward(stretch.end)
            per_layer = per_layer or sum(block.size for block in self.ops.gradients)
            stretch.kept.clear()
            rest.append(book.hold(per_layer * stretch.layers, GRADIENT))
        book.run_backward()

    def _embedding(self) -> Value:
        n = self.numbers
        shape, book, ops, request = self.shape, self.book, self.ops, self.request
        size = n.weight_e * n.tokens * shape.hidden
        block = book.hold(size)
        node = None
        if request.gradient_checkpointing and request.stack in ("trl", "trainer-kbit"):
            node = book.node(_stop)  # enable_input_require_grads
        ops.embeddings.append(block)
        if shape.embed_scale:
            block = book.hold(size)
            ops.embeddings = [block]
        if shape.learned_positions:
            ops.embeddings.append(book.hold(n.weight_e * n.positions * shape.hidden))
            if request.gradient_checkpointing:
                ops.held.append(block)  # traced: GPT-2's stays referred to
            block = book.hold(size)
        hidden = Value(block, n.weight_e, node)
        del block
        return ops.base_dropout(hidden, shape.hidden, shape.embedding_dropout)

    def _layer(self, hidden: Value, masked: bool) -> Value:
        out = self.layer(self.ops, self.shape, self.sites, hidden, masked)
        self.ops.named.clear()
        return out

    def _checkpointed_layer(self, hidden: Value, masked: bool, *, forward: bool = True) -> Value:
        """Return a layer's output, with or without going through its forward pass."""
        book, ops = self.book, self.ops
        if forward:
            book.grad_enabled = False
            out = self._layer(hidden, masked)
            book.grad_enabled = True
        else:
            out = Value(book.hold(hidden.block.size), hidden.e, None)
        out_e = out.e

        def backward(gradient: Gradient) -> None:
            mark = len(book.tape)
            if self.shape.num_experts:
                experts.begin_backward(ops, self.shape, gradient[0])
            elif self.shape.sandwich_norms and out_e != 4:
                ops.begun.append(book.hold(2 * gradient[0].size))  # cast back to the norm's float32
            elif self.last is not None:
                begin_backward(ops, self.last, gradient[0])
            # The sums at the layer's end need nothing kept either: under autocast the attention's
            # share of the gradient is cast before the layer is computed again.
            narrows = self.shape.parallel_residual and ops.n.autocast and out_e == 4
            early = book.hold(gradient[0].size // 2) if narrows else None
            ops.recomputing = True
            again = self._layer(hidden, masked)
            ops.recomputing = book.stopped = False
            del early
            node = again.node
            assert node is not None
            again.block = gradient[0]
            node.gradient = gradient.pop()
            del again
            book.run_backward(mark)

        out.node = book.node(backward)
        return out


def _stop(gradient: Gradient) -> None:
    """Take the gradient of the embedding's output, which goes nowhere."""
    gradient.clear()
