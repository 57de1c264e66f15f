"""Every storage of a step, counted: when it is made, when it dies, and what it is.

``StorageTracker`` is a dispatch mode. For each output of each operation it looks at the storage; a
new one is booked at its size rounded up to 512 bytes, and a weak reference books it out when the C++
storage dies, so that what autograd saves is seen dying too. Views and in-place operations cost
nothing by themselves. The history is a list of events in blocks (one per decoder layer and
direction), from which ``repeat.py`` makes the history of a deeper model and ``memory/allocator.py``
what the caching allocator would reserve.

Not seen here: what a CUDA kernel allocates inside itself; ``temporaries.py`` names those bytes.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_tune.memory.terms import rounded


class BlockName(NamedTuple):
    """Where in the step an event belongs: a decoder layer's forward or backward, or between."""

    kind: str  # "forward", "backward", or "outside"
    layer: int  # of the decoder; outside the layers a running number


class StorageKey(NamedTuple):
    """A storage by where it was made: the n-th of its block; of ``STATIC`` if it was there before."""

    block: BlockName
    number: int


STATIC = BlockName("static", 0)


@dataclass(slots=True)
class Storage:
    """One storage of the step: unrounded bytes, and what it is.

    ``layer`` is the decoder layer that owns a static storage, None outside the layers. ``lane`` is there
    where a static storage has one float32 element for each of the lane's parameters in all layers.
    """

    key: StorageKey
    num_bytes: int
    category: str
    op: str
    layer: int | None = None
    lane: int | None = None

    @property
    def booked_bytes(self) -> int:
        """Bytes that the allocator books."""
        return rounded(self.num_bytes)


@dataclass(slots=True)
class Block:
    """The events of one block in order: (True, made) or (False, died)."""

    name: BlockName
    phase: str
    events: list[tuple[bool, Storage]] = field(default_factory=list)
    num_made: int = 0


@dataclass(slots=True)
class History:
    """What was there before the step, and the blocks of the step in order."""

    static: list[Storage] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


Temporaries = Callable[[str, Sequence[object], Mapping[str, object]], int]


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of one device kind that operations make under it.

    Args:
        device_type: ``meta`` or ``cpu``; storages elsewhere are not counted.
        vocab_size: A new storage whose tensor has this last dimension is logits.
        temporaries: Returns the bytes that an operation holds while it runs on CUDA; None
            counts only what is visible.
    """

    def __init__(
        self, *, device_type: str, vocab_size: int, temporaries: Temporaries | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.history = History()
        self._device_type = device_type
        self._vocab_size = vocab_size
        self._temporaries = temporaries
        self._alive: dict[int, tuple[Storage, weakref.ref[torch.UntypedStorage]]] = {}
        self._category = ""
        self._outside = 0
        self._closed = False
        self.default_category = "activations"
        self.phase = "forward"
        self.enter_block("outside")

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run the operation and book what it made."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.add.Tensor and adds_up_gradients(args):
            return args[0]
        out = func(*args, **kwargs)
        name: str = func.name()  # type: ignore[no-untyped-call]
        if self._is_from_host(func, args):
            with self.category("inputs"):
                self._see(out, name)
        elif isinstance(out, Tensor):
            self._see(out, name)
        elif isinstance(out, (tuple, list)):
            for leaf in _tensors(out):
                self._see(leaf, name)
        if self._temporaries is not None and (extra := self._temporaries(name, args, kwargs)):
            self.hold_briefly(extra, name)
        return out

    def __exit__(self, *error: object) -> None:
        """End the history: what dies with the model is not part of the step."""
        self._closed = True
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def register(
        self, tensor: Tensor, category: str, *, layer: int | None = None, lane: int | None = None
    ) -> None:
        """Book a tensor that is there before the step; a second time it changes nothing."""
        known = len(self.history.static)
        self._book(tensor, STATIC, category, "")
        if len(self.history.static) > known:
            self.history.static[-1].layer, self.history.static[-1].lane = layer, lane

    def register_bytes(
        self, num_bytes: int, category: str, *, layer: int | None = None, lane: int | None = None
    ) -> None:
        """Book bytes that are there before the step and of which no tensor is at hand."""
        key = StorageKey(STATIC, len(self.history.static))
        self.history.static.append(Storage(key, num_bytes, category, "", layer, lane))

    def hold_briefly(self, num_bytes: int, op: str) -> None:
        """Book bytes that are given back at once."""
        storage = self._new_storage(num_bytes, self._category or self.default_category, op)
        self._block.events += [(True, storage), (False, storage)]

    def relabel(self, tensor: Tensor, category: str) -> None:
        """Say what a tensor that was booked before really is, from the start."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        if found is not None:
            found[0].category = category

    def enter_block(self, kind: str, layer: int | None = None) -> None:
        """Let what follows belong to a new block."""
        if layer is None:
            layer, self._outside = self._outside, self._outside + 1
        self._block = Block(BlockName(kind, layer), self.phase)
        self.history.blocks.append(self._block)

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Book everything that is made inside as ``name``."""
        before, self._category = self._category, name
        try:
            yield
        finally:
            self._category = before

    def _is_from_host(self, func: torch._ops.OpOverload, args: Sequence[object]) -> bool:
        """Say whether the operation copies a tensor to the device, or makes one of numbers."""
        if func is torch.ops.aten.lift_fresh.default:
            return True
        source = args[0] if func is torch.ops.aten._to_copy.default else None
        return isinstance(source, Tensor) and source.device.type != self._device_type

    def _see(self, tensor: Tensor, op: str) -> None:
        if tensor.device.type != self._device_type:
            return
        if self._category:
            category = self._category
        elif tensor.dim() and tensor.shape[-1] == self._vocab_size:
            category = "loss"
        else:
            category = self.default_category
        self._book(tensor, self._block.name, category, op)

    def _book(self, tensor: Tensor, block: BlockName, category: str, op: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive or not storage.nbytes():
            return
        if block is STATIC:
            key = StorageKey(STATIC, len(self.history.static))
            booked = Storage(key, storage.nbytes(), category, op)
            self.history.static.append(booked)
        else:
            booked = self._new_storage(storage.nbytes(), category, op)
            self._block.events.append((True, booked))

        def died(_: object, address: int = address, booked: Storage = booked) -> None:
            del self._alive[address]
            if not self._closed:
                self._block.events.append((False, booked))

        self._alive[address] = (booked, weakref.ref(storage, died))

    def _new_storage(self, num_bytes: int, category: str, op: str) -> Storage:
        block = self._block
        block.num_made += 1
        return Storage(StorageKey(block.name, block.num_made - 1), num_bytes, category, op)


def adds_up_gradients(args: Sequence[object]) -> bool:
    """Say whether autograd's engine adds to a gradient that nobody else refers to.

    Without a dispatch mode it then adds in place (``autograd/input_buffer.cpp``,
    ``can_accumulate_inplace``); under one it never does, because every tensor then counts as
    a subclass. The sum's numbers do not matter here: the first tensor stands for it. Recomputed
    forward passes run with gradients enabled. The counts are those of an otherwise unreferred tensor
    inside a dispatch mode: the engine's, the wrapper's, and the names of the call.
    """
    held = args[0]
    return (
        not torch.is_grad_enabled()
        and isinstance(held, Tensor)
        and isinstance(args[1], Tensor)
        and held.shape == args[1].shape
        and held.dtype == args[1].dtype
        and held._use_count() == 4  # type: ignore[attr-defined]
        and torch._C._storage_Use_Count(held.untyped_storage()._cdata) == 2
    )


def _tensors(values: Sequence[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
