"""What the estimate is asked: a trial pack, or one run of another stack, and how it is trained.

A training stack is an input, since the same LoRA needs other bytes under each:

    lora-tune     our engine: float32 adapters, no autocast, head on label positions in chunks, lanes
                  whose low-rank products are joined in groups
    trainer       transformers' Trainer with PEFT, without k-bit preparation: autocast, full logits
    trainer-kbit  the same after ``prepare_model_for_kbit_training``: norms, embeddings and head in
                  float32, and with them the residual stream
    trl           TRL's SFTTrainer from 1.16 on: bfloat16 adapters on a quantized base, head in
                  chunks over the label positions
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lora_tune.errors import StudyFileError

QUANTIZATIONS = ("nf4", "nf4-single", "none")
DTYPES = ("bfloat16", "float16", "float32")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit")
ATTENTIONS = ("sdpa", "flash", "eager")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GROUP_RANK_OF_GPUS, GROUP_RANK_OF_CPUS = 128, 64
"""Up to which sum of ranks lanes of the engine share a product: ``engine.lora.default_group_rank``."""
WORTHWHILE_GAIN = 0.10
"""Share by which a plan of more rows or lanes, or another compute type, has to raise the tokens/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What a training stack settles unless it is asked otherwise, and what it can not have."""

    name: str
    autocast: bool  # its own habit in 16 bit; in float32 there is none
    quantized_adapter_dtype: str | None  # None: the adapters are float32 on any base
    packs_lanes: bool
    own_engine: bool  # our layers and our optimizer rather than PEFT and Trainer


STACKS: Mapping[str, Stack] = MappingProxyType(
    {
        stack.name: stack
        for stack in (
            Stack(
                name="lora-tune",
                autocast=False,
                quantized_adapter_dtype=None,
                packs_lanes=True,
                own_engine=True,
            ),
            Stack(
                name="trainer",
                autocast=True,
                quantized_adapter_dtype=None,
                packs_lanes=False,
                own_engine=False,
            ),
            Stack(
                name="trainer-kbit",
                autocast=True,
                quantized_adapter_dtype=None,
                packs_lanes=False,
                own_engine=False,
            ),
            Stack(
                name="trl",
                autocast=True,
                quantized_adapter_dtype="bfloat16",
                packs_lanes=False,
                own_engine=False,
            ),
        )
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneShape:
    """The adapter of one lane, as far as memory goes."""

    rank: int
    targets: tuple[str, ...]  # module suffixes, or full module names
    lora_dropout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """A trial pack and how it is trained; for stacks other than ours, a pack of one lane."""

    quantization: str  # one of QUANTIZATIONS; nf4 is with double quantization, nf4-single without
    compute_dtype: str  # one of DTYPES: hidden states, and weights that are not quantized
    lanes: tuple[LaneShape, ...]
    micro_batch_size: int  # rows per lane
    max_length: int  # tokens per row, padding included
    gradient_checkpointing: bool
    gradient_accumulation: bool  # several micro-batches per optimizer step
    stack: str = "lora-tune"
    adapter_dtype: str = "float32"
    autocast: bool = False
    attention: str = "sdpa"
    optimizer: str = "adamw"
    padded: bool = False  # rows of unequal length in a batch, so that attention gets a mask
    outputs_held: bool = False  # the caller keeps the model's outputs through backward
    group_rank: int = GROUP_RANK_OF_GPUS  # largest sum of ranks in one product; 0: one a lane
    label_fraction: float = 1.0  # share of the tokens that carry a label; 1 is the worst case
    chunk_tokens: int = 512  # label positions per chunk of our loss
    compute_capability: str | None = "8.9"  # decides cuBLAS' workspaces; None on a CPU

    @property
    def keeps_gradients(self) -> bool:
        """Whether all gradients exist throughout: our engine's always, else while they add up."""
        return self.gradient_accumulation or STACKS[self.stack].own_engine


def resolve_request(
    *,
    stack: str,
    quantization: str,
    compute_dtype: str,
    lanes: tuple[LaneShape, ...],
    micro_batch_size: int,
    max_length: int,
    gradient_checkpointing: bool,
    gradient_accumulation: bool,
    adapter_dtype: str | None = None,
    autocast: bool | None = None,
    attention: str = "sdpa",
    optimizer: str = "adamw",
    padded: bool = False,
    outputs_held: bool = False,
    label_fraction: float = 1.0,
    compute_capability: str | None = "8.9",
) -> MemoryRequest:
    """Return the request with what the stack settles filled in; an explicit choice wins.

    Raises:
        StudyFileError: The stack cannot have the combination; the message says which part and why.

    >>> lane = LaneShape(rank=16, targets=("q_proj",), lora_dropout=0.0)
    >>> request = resolve_request(
    ...     stack="trl", quantization="nf4", compute_dtype="bfloat16", lanes=(lane,),
    ...     micro_batch_size=1, max_length=2048, gradient_checkpointing=True,
    ...     gradient_accumulation=False,
    ... )
    >>> request.adapter_dtype, request.autocast
    ('bfloat16', True)
    """
    row = STACKS[stack]
    quantized = quantization != "none"
    half = compute_dtype != "float32"
    if adapter_dtype is None:
        own = row.quantized_adapter_dtype
        adapter_dtype = own if own is not None and quantized and half else "float32"
    if autocast is None:
        autocast = row.autocast and half
    request = MemoryRequest(
        stack=stack,
        quantization=quantization,
        compute_dtype=compute_dtype,
        lanes=lanes,
        micro_batch_size=micro_batch_size,
        max_length=max_length,
        gradient_checkpointing=gradient_checkpointing,
        gradient_accumulation=gradient_accumulation,
        adapter_dtype=adapter_dtype,
        autocast=autocast,
        attention=attention,
        optimizer=optimizer,
        padded=padded,
        outputs_held=outputs_held,
        group_rank=GROUP_RANK_OF_CPUS if compute_capability is None else GROUP_RANK_OF_GPUS,
        label_fraction=label_fraction,
        compute_capability=compute_capability,
    )
    if problem := _impossible(request, row):
        raise StudyFileError(f"stack {stack}: {problem}")
    return request


def _impossible(request: MemoryRequest, stack: Stack) -> str:
    """Return why the stack cannot train so, as a sentence, or an empty string."""
    others = ", ".join(name for name, row in STACKS.items() if row != stack)
    if len(request.lanes) > 1 and not stack.packs_lanes:
        return f"it trains one adapter at a time, {len(request.lanes)} lanes need stack lora-tune."
    if request.autocast and request.compute_dtype == "float32":
        return "autocast computes in 16 bit; with dtype float32 leave it out."
    if request.attention == "flash" and request.compute_dtype == "float32":
        return "FlashAttention has no float32 kernel. Use attention sdpa, or a 16-bit dtype."
    widened = request.stack == "trainer-kbit" and request.quantization == "none"
    if widened and request.attention == "flash" and not request.autocast:
        return (
            "FlashAttention's 16-bit output does not go into float32 weights without autocast. "
            "Use attention sdpa, or autocast."
        )
    if stack.own_engine:
        if request.autocast:
            return (
                f"the engine computes in one type, without autocast. Stacks that use it: {others}."
            )
        if request.adapter_dtype != "float32":
            return "its adapters are float32 master weights. Leave the adapter type out."
        if request.optimizer != "adamw":
            return f"its optimizer is AdamW with float32 states, not {request.optimizer}."
        if request.attention != "sdpa":
            return (
                "it uses torch's SDPA, which runs the flash kernel by itself. Use attention sdpa."
            )
        if request.outputs_held:
            return "it makes no logits that a caller could hold. Leave the outputs dropped."
        if request.quantization == "nf4-single":
            return "it quantizes with double quantization. Use nf4 or none."
        return ""
    if request.stack == "trl" and request.outputs_held:
        return "its head runs in chunks and leaves no logits to hold. Leave the outputs dropped."
    return ""
