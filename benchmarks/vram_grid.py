"""The configurations that ``vram_truth.py`` trains, fixed beforehand: a function of their number alone.

Every four points have all models and all stacks, every 32 all their combinations with and without
checkpointing, so that a run that is cut short is still balanced; the rest is drawn from a seeded
generator.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_tune.memory.request import GROUP_RANK_OF_CPUS, LaneShape, MemoryRequest, resolve_request

NUM_POINTS = 72
_SEED = 20
_MOST_TOKENS = 8192  # of a micro-batch
_MOST_TOKENS_KEPT = 4096  # without checkpointing
_PADDED_LABELS = 13 / 16  # at most, of a row whose last eighth may be padding

_STACKS = ("lora-tune", "trainer", "trl", "trainer-kbit")
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {
    "attention-qv": ("q_proj", "v_proj"),
    "attention": _QKVO,
    "mlp": _MLP,
    "all-linear": _QKVO + _MLP,
}

Config = dict[str, object]

# Sizes from the config.json files on the hub; weights are random.
MODELS: dict[str, Config] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
}

TINY: Config = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPoint:
    """One configuration: a model and how it is trained."""

    number: int
    model: str
    config: Config
    request: MemoryRequest
    accumulation_steps: int

    @property
    def labels_per_row(self) -> int:
        """Tokens of a row that carry loss; the first token never does."""
        return round(self.request.label_fraction * self.request.max_length)


def grid(compute_capability: str | None) -> Iterator[GridPoint]:
    """Yield all points in the order in which they are run."""
    generator = random.Random(_SEED)
    models = tuple(MODELS)
    for number in range(NUM_POINTS):
        block, column = divmod(number, 4)
        yield _draw(
            generator,
            number=number,
            model=models[(column + block) % 4],
            stack=_STACKS[column],
            checkpointing=(column + block // 4) % 2 == 0,
            compute_capability=compute_capability,
        )


def shrunk(point: GridPoint) -> GridPoint:
    """Return the point with a tiny model, short rows and small ranks, for a run without a GPU."""
    request = point.request
    lanes = tuple(replace(lane, rank=min(lane.rank, 4)) for lane in request.lanes)
    request = replace(
        request,
        lanes=lanes,
        micro_batch_size=min(request.micro_batch_size, 2),
        max_length=32,
        optimizer="adamw",
        compute_capability=None,
        group_rank=GROUP_RANK_OF_CPUS,
        label_fraction=0.5,
    )
    return replace(point, model="tiny", config=TINY, request=request)


def _draw(
    generator: random.Random,
    *,
    number: int,
    model: str,
    stack: str,
    checkpointing: bool,
    compute_capability: str | None,
) -> GridPoint:
    pick = generator.choice
    own = stack == "lora-tune"
    length, rows, count = pick((256, 512, 1024, 2048)), pick((1, 2, 4)), pick((1, 2, 4))
    quantization = pick(("nf4", "nf4", "none") if own else ("nf4", "nf4", "nf4-single", "none"))
    targets, dropout = pick(tuple(TARGETS.values())), pick((0.0, 0.05))
    ranks = [pick((4, 8, 16, 32, 64, 128)) for _ in range(count if own else 1)]
    optimizer = pick(("adamw", "adamw", "adamw-8bit", "paged-adamw-8bit"))
    attention, padded = pick(("sdpa", "sdpa", "sdpa", "eager")), pick((False, False, True))
    autocast, accumulation = pick((True, True, False)), pick((1, 1, 2))
    labels = pick((1.0, 0.3))
    # Kept activations of float32 k-bit runs or of eager scores would be most of a large card.
    most = _MOST_TOKENS if checkpointing else _MOST_TOKENS_KEPT
    while length * rows * len(ranks) > most:
        rows, length = (rows // 2, length) if rows > 1 else (rows, length // 2)
    # What the rows really carry: a row's first token has no label, padding has none.
    padded = padded and rows > 1 and not own
    labels = min(labels, _PADDED_LABELS if padded else (length - 1) / length)
    peft_options = {
        "attention": "eager" if attention == "eager" and length <= 512 else "sdpa",
        "optimizer": optimizer,
        "padded": padded,
    }
    if stack == "trainer":
        peft_options["autocast"] = autocast
    request = resolve_request(
        stack=stack,
        quantization=quantization,
        compute_dtype="bfloat16",
        lanes=tuple(LaneShape(rank=rank, targets=targets, lora_dropout=dropout) for rank in ranks),
        micro_batch_size=rows,
        max_length=length,
        gradient_checkpointing=checkpointing,
        gradient_accumulation=accumulation > 1,
        label_fraction=labels,
        compute_capability=compute_capability,
        **({} if own else peft_options),  # type: ignore[arg-type]
    )
    return GridPoint(
        number=number,
        model=model,
        config=MODELS[model],
        request=request,
        accumulation_steps=accumulation,
    )
