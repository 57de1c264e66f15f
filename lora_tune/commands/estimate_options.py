"""The options of ``lora-tune estimate`` as one checked value.

What a training stack cannot have is refused where a request is resolved (``memory/request.py``);
here are the ranges and choices that belong to a single option.
"""

from dataclasses import dataclass

from lora_tune.errors import StudyFileError, nearest
from lora_tune.memory.request import (
    ATTENTIONS,
    DTYPES,
    OPTIMIZERS,
    QUANTIZATIONS,
    STACKS,
    LaneShape,
    MemoryRequest,
    resolve_request,
)
from lora_tune.memory.solve import LIMITS, SOLVABLE
from lora_tune.memory.verdict import DEFAULT_CAPABILITY

ADAPTER_DTYPES = ("float32", "bfloat16")
OUTPUTS = ("dropped", "held")


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateOptions:
    """What the user wrote; None where the stack decides."""

    model: str
    rank: int
    targets: str
    dropout: float
    quantization: str
    dtype: str
    batch_size: int
    max_length: int
    gradient_accumulation_steps: int
    label_fraction: float
    lanes: int
    gradient_checkpointing: bool
    optimizer: str
    adapter_dtype: str | None
    autocast: bool | None
    attention: str
    padded: bool
    outputs: str
    stack: str
    gpus: tuple[str, ...]
    all_gpus: bool
    solve: str | None
    exact: bool
    full_depth: bool
    tokens: int | None
    prices: tuple[str, ...]
    written: frozenset[str] = frozenset()  # parameters that are not defaults but the user's words

    def __post_init__(self) -> None:
        """Check every option on its own.

        Raises:
            StudyFileError: An option is out of range; the message says what it may be.
        """
        _at_least_one("--rank", self.rank, "ranks are")
        _at_least_one("--batch-size", self.batch_size, "rows of a micro-batch are")
        _at_least_one("--max-length", self.max_length, "tokens of a row are")
        _at_least_one(
            "--gradient-accumulation-steps",
            self.gradient_accumulation_steps,
            "micro-batches per optimizer step are",
        )
        _at_least_one("--lanes", self.lanes, "lanes are")
        if self.tokens is not None:
            _at_least_one("--tokens", self.tokens, "tokens to train are")
        if not 0 <= self.dropout < 1:
            raise StudyFileError(
                f"--dropout is {self.dropout:g}; dropout is a share from 0 to below 1."
            )
        if not 0 < self.label_fraction <= 1:
            raise StudyFileError(
                f"--label-fraction is {self.label_fraction:g}; the share of the tokens that carry a "
                "label is above 0 and at most 1."
            )
        _one_of("--quantization", self.quantization, QUANTIZATIONS)
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--optimizer", self.optimizer, OPTIMIZERS)
        _one_of("--attention", self.attention, ATTENTIONS)
        _one_of("--outputs", self.outputs, OUTPUTS)
        _one_of("--stack", self.stack, tuple(STACKS))
        if self.adapter_dtype is not None:
            _one_of("--adapter-dtype", self.adapter_dtype, ADAPTER_DTYPES)
        if self.solve is not None:
            _one_of("--solve", self.solve, SOLVABLE)
        if self.full_depth and not self.exact:
            raise StudyFileError(
                "--full-depth traces every layer and has no meaning for the closed form; add --exact."
            )

    def request(self, targets: tuple[str, ...]) -> MemoryRequest:
        """Return the pack that the options ask for, on a device of which nothing is known.

        Raises:
            StudyFileError: The stack cannot have the combination.
        """
        lane = LaneShape(rank=self.rank, targets=targets, lora_dropout=self.dropout)
        return resolve_request(
            stack=self.stack,
            quantization=self.quantization,
            compute_dtype=self.dtype,
            lanes=(lane,) * self.lanes,
            micro_batch_size=self.batch_size,
            max_length=self.max_length,
            gradient_checkpointing=self.gradient_checkpointing,
            gradient_accumulation=self.gradient_accumulation_steps > 1,
            adapter_dtype=self.adapter_dtype,
            autocast=self.autocast,
            attention=self.attention,
            optimizer=self.optimizer,
            padded=self.padded,
            outputs_held=self.outputs == "held",
            label_fraction=self.label_fraction,
            compute_capability=DEFAULT_CAPABILITY,
        )


MOST_TOKENS = 10**18
_LIMITED = {
    "--rank": "max-rank",
    "--max-length": "max-length",
    "--batch-size": "max-batch",
    "--lanes": "max-lanes",
}


def _at_least_one(option: str, value: int, what: str) -> None:
    if value < 1:
        raise StudyFileError(f"{option} is {value}; {what} whole numbers from 1 on.")
    most = LIMITS.get(_LIMITED.get(option, ""), MOST_TOKENS)
    if value > most:
        shown = f"{value:,}" if value < 10**15 else f"a number of {len(str(value))} digits"
        raise StudyFileError(f"{option} is {shown}; more than {most:,} is beyond any use.")


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = nearest(value, choices) or "."
        raise StudyFileError(f'{option} is "{value}"{hint} Choices: {", ".join(choices)}.')


def refuse_others(given: set[str], *, allowed: set[str], why: str) -> None:
    """Refuse options that would have no effect.

    Args:
        given: Parameters of the command that the user wrote.
        allowed: Those that have an effect.
        why: What the command does instead, for the message.

    Raises:
        StudyFileError: Another one was given.
    """
    others = sorted(given - allowed)
    if others:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise StudyFileError(f"{why}; {shown} would have no effect. Leave it out.")
