"""The static terms of the memory estimate: what lies on the GPU before a step begins, in bytes.

Notation: e bytes per element, n elements of a weight, h hidden, V vocabulary, r rank, T tokens.
What a step itself books is in ``step.py``; fragmentation and the CUDA context are in ``verdict.py``.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lora_tune.memory.ledger import ALIGNMENT
from lora_tune.memory.request import DTYPE_BYTES, STACKS, MemoryRequest
from lora_tune.memory.shape import ModelShape, adapted_copies
from lora_tune.records import LinearShape

NF4_BLOCK = 64
NF4_BLOCKS_PER_STATE = 256

SMALLEST_8BIT_TENSOR = 4096  # elements; smaller ones keep float32 states
OPTIMIZER_8BIT_BLOCK = 256


class Booked(NamedTuple):
    """The bytes of some tensors, and what the allocator's rounding adds to them."""

    size: int
    rounding: int


def rounded(num_bytes: int) -> int:
    """Return the bytes that the CUDA allocator books for a tensor.

    >>> rounded(1), rounded(512), rounded(513)
    (512, 512, 1024)
    """
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def book(tensors: Iterable[tuple[int, int]]) -> Booked:
    """Add up (bytes, how many) of tensors.

    >>> book([(100, 2), (512, 1)])
    Booked(size=712, rounding=824)
    """
    size = rounding = 0
    for num_bytes, count in tensors:
        size += num_bytes * count
        rounding += (rounded(num_bytes) - num_bytes) * count
    return Booked(size, rounding)


def adapter_param_count(linears: Iterable[LinearShape], rank: int) -> int:
    """Count the trainable parameters that LoRA adds to these linear layers.

    A is (rank, in_features) and B is (out_features, rank): ``rank * (in_features + out_features)``.

    Source: LoRA, arXiv 2106.09685, section 4.2.

    >>> c_attn = LinearShape(name="attn.c_attn", in_features=768, out_features=2304)
    >>> adapter_param_count([c_attn] * 12, rank=8)  # GPT-2
    294912
    """
    return sum(rank * (linear.in_features + linear.out_features) for linear in linears)


def nf4_tensor_bytes(num_weights: int, *, nested: bool = True) -> tuple[int, ...]:
    """Return the bytes of each tensor that holds one NF4 weight.

    Packed codes n/2 and the 16-entry code; with double quantization one absmax byte per block of 64,
    a float32 absmax per 256 blocks, the offset and the 256-entry code of the absmax; without it one
    float32 absmax per block. Codes and offset are copies per weight.

    Source: ``bitsandbytes/functional.py``, ``quantize_4bit`` with and without ``compress_statistics``.

    >>> f"{sum(nf4_tensor_bytes(4096 * 14336)) / (4096 * 14336):.4f}"  # bytes per parameter
    '0.5159'
    >>> f"{sum(nf4_tensor_bytes(4096 * 14336, nested=False)) / (4096 * 14336):.4f}"
    '0.5625'
    """
    blocks = math.ceil(num_weights / NF4_BLOCK)
    if not nested:
        return math.ceil(num_weights / 2), 4 * blocks, 4 * 16
    second = 4 * math.ceil(blocks / NF4_BLOCKS_PER_STATE)
    return math.ceil(num_weights / 2), blocks, second, 4 * 16, 4, 4 * 256


def weight_bytes(request: MemoryRequest) -> int:
    """Return e of weights that are not quantized: the compute type's, or 4 after k-bit preparation.

    Source: ``peft/utils/other.py``, ``prepare_model_for_kbit_training`` casts every 16-bit parameter
    that is not a ``Params4bit``.
    """
    return 4 if request.stack == "trainer-kbit" else DTYPE_BYTES[request.compute_dtype]


def base_tensors(shape: ModelShape, request: MemoryRequest) -> Iterator[tuple[int, int]]:
    """Yield (bytes, how many) of the base's parameters.

    Linear layers inside and outside the decoder layers are NF4 or in the compute type; embeddings,
    norms, biases, an untied head and the fused experts of a mixture are never quantized. A 4-bit
    layer casts its bias to the compute type in its first pass (bitsandbytes ``nn/modules.py``).
    """
    e = weight_bytes(request)
    quantized = request.quantization != "none" and shape.quantizable
    bias_e = DTYPE_BYTES[request.compute_dtype] if quantized else e
    for linear, count in zip(shape.linears, shape.copies, strict=True):
        n = linear.in_features * linear.out_features
        if not quantized:
            yield e * n, count
        else:
            for part in nf4_tensor_bytes(n, nested=request.quantization == "nf4"):
                yield part, count
    first_bias = len(shape.layer_tensors) - shape.num_biases
    for i, n in enumerate(shape.layer_tensors):
        yield (bias_e if i >= first_bias else e) * n, shape.num_layers
    for n in shape.outer_tensors:
        yield e * n, 1


def adapter_tensors(shape: ModelShape, request: MemoryRequest) -> Iterator[tuple[int, int]]:
    """Yield (elements, how many) of the tensors that hold the adapters.

    PEFT's are two matrices a layer; ours is one flat tensor a lane (``engine/lora.py``, ``LaneAdapter``).
    """
    for lane in request.lanes:
        copies = adapted_copies(shape, lane.targets)
        matrices = [
            (lane.rank * size, count)
            for linear, count in zip(shape.linears, copies, strict=True)
            for size in (linear.in_features, linear.out_features)
            if count
        ]
        if STACKS[request.stack].own_engine:
            yield sum(elements * count for elements, count in matrices), 1
        else:
            yield from matrices


def optimizer_tensors(
    adapters: Iterable[tuple[int, int]], request: MemoryRequest
) -> Iterator[tuple[int, int]]:
    """Yield (bytes, how many) of AdamW's two states for tensors of these (elements, how many).

    torch: two states in the parameter's type. bitsandbytes 8 bit: a byte each and a float32 absmax
    per 256 elements; tensors below 4096 elements keep float32. Paged states count in full, though
    tensors from 100,000 elements on may leave the GPU.

    Source: torch ``optim/adam.py``; bitsandbytes ``optim/optimizer.py``, ``init_state``.
    """
    e = DTYPE_BYTES[request.adapter_dtype]
    for elements, count in adapters:
        if request.optimizer == "adamw":
            yield e * elements, 2 * count
        elif elements < SMALLEST_8BIT_TENSOR:
            yield 4 * elements, 2 * count
        else:
            yield elements, 2 * count
            yield 4 * math.ceil(elements / OPTIMIZER_8BIT_BLOCK), 2 * count


def step_counter_bytes(num_tensors: int, request: MemoryRequest) -> int:
    """Return what AdamW's step counters take: one block a tensor, since torch's fused form counts on the GPU.

    bitsandbytes counts on the host, and keeps the two 256-entry float32 codes of its states.
    """
    if request.optimizer == "adamw":
        return ALIGNMENT * num_tensors
    return 2 * rounded(4 * 256)


def input_bytes(
    shape: ModelShape, request: MemoryRequest, *, tokens: int, label_tokens: int
) -> int:
    """Return the batch: token ids, labels and attention mask, 8 bytes a token each, positions 8 S.

    Ours has no mask and one tensor of ids, of positions where rows lie in one line, and of two words
    a label position; and the positions' float32 weights (``engine/batches.py``, ``engine/pack.py``).
    """
    positions = rounded(8 * request.max_length)
    if not STACKS[request.stack].own_engine:
        return 3 * rounded(8 * tokens) + positions
    words = (2 if shape.takes_rows_in_line else 1) * tokens + 2 * label_tokens
    weights = 2 if request.compute_dtype == "float16" else 1  # the loss scale multiplies a copy
    own = rounded(8 * words) + weights * rounded(4 * label_tokens)
    return own if shape.takes_rows_in_line else own + positions


def cublas_workspaces(compute_capability: str | None) -> tuple[int, ...]:
    """Return the cuBLAS and cuBLASLt workspaces that the allocator holds from the first product on.

    None stands for a CPU, which has none. Two handles (autograd's thread has its own) of
    8,519,680 bytes, or 32 MiB on compute capability 9, 10 and 12, and 1 MiB for cuBLASLt. Source:
    torch 2.13 ``CublasHandlePool.cpp``, ``CUDABlas.cpp``.
    """
    if compute_capability is None:
        return ()
    large = compute_capability.partition(".")[0] in ("9", "10", "12")
    handle = 32 * 1024**2 if large else 8_519_680
    return handle, handle, 1024**2


def cublas_workspace_bytes(compute_capability: str | None) -> int:
    """Return the bytes of all library workspaces.

    >>> cublas_workspace_bytes("8.9"), cublas_workspace_bytes("9.0")
    (18087936, 68157440)
    """
    return sum(cublas_workspaces(compute_capability))
