"""What the caching allocator reserves for a step: the ledger's bookings, replayed.

Every layer is gone through and every booking recorded; the static tensors come before, in the order
in which a model is loaded and adapted. The order inside the tensors of a layer, and small tensors that
the ledger books together, are not the real ones. Reserved memory is counted without pressure, on a
device with room to spare: a smaller one makes the allocator give cached segments back.
"""

from collections.abc import Iterator

from lora_tune.memory import terms
from lora_tune.memory.allocator import AllocationEvent, replay
from lora_tune.memory.ledger import RecordingBook
from lora_tune.memory.request import DTYPE_BYTES, MemoryRequest
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.step import Step


def reserved_bytes(shape: ModelShape, request: MemoryRequest) -> int:
    """Return the peak of reserved memory (``torch.cuda.max_memory_reserved``) of a step."""
    return replay(_events(shape, request), capacity_bytes=None).peak_reserved_bytes


def reserved_within(shape: ModelShape, request: MemoryRequest, capacity_bytes: int) -> int | None:
    """Return the peak of reserved memory on a device with so much room; None when it runs out.

    Out of room, the allocator gives cached segments back and tries again.
    """
    found = replay(_events(shape, request), capacity_bytes=capacity_bytes)
    return found.peak_reserved_bytes if found.fits else None


def _events(shape: ModelShape, request: MemoryRequest) -> Iterator[AllocationEvent]:
    number = 0
    for size in _static_sizes(shape, request):
        number -= 1  # below the ledger's numbers
        if size:
            yield AllocationEvent(True, number, size)
    book = RecordingBook()
    step = Step(shape, request, book)
    step.run()
    yield from (AllocationEvent(*event) for event in book.events)


def _static_sizes(shape: ModelShape, request: MemoryRequest) -> Iterator[int]:
    """Yield the bytes of every tensor that lies there before a step."""
    tensors = list(terms.base_tensors(shape, request))
    once = [size for size, count in tensors if count < shape.num_layers]
    each = [size for size, count in tensors if count >= shape.num_layers]
    yield from once
    for _ in range(shape.num_layers):
        yield from each
    e = DTYPE_BYTES[request.adapter_dtype]
    adapters = list(terms.adapter_tensors(shape, request))
    for elements, count in adapters:
        yield from [e * elements] * count
    for size, count in terms.optimizer_tensors(adapters, request):
        yield from [size] * count
    if request.keeps_gradients:
        for elements, count in adapters:
            yield from [e * elements] * count
    yield from terms.cublas_workspaces(request.compute_capability)
