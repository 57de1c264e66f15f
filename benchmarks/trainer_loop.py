"""The usual way to train a LoRA: PEFT's layers and transformers' own Trainer, timed from outside.

Nothing of the engine is in it. So that losses can be compared, a trial gets the rows of each step in the
engine's order (longest first, which also saves the Trainer padding) and the engine's initial A matrices.
"""

import itertools
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
import transformers
from machine import synchronize
from torch import Tensor, nn

from lora_tune.engine.adapter_files import peft_config
from lora_tune.engine.batches import rows_of_step
from lora_tune.records import TokenizedRow, TrialConfig

_IGNORED = -100
InitialWeights = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """How the Trainer computes. ``autocast``: a 16-bit type by autocast, as ``bf16=True`` does."""

    compute_dtype: str
    autocast: bool
    micro_batch_size: int
    effective_batch_size: int
    max_grad_norm: float = 1.0

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> "TrainerSettings":
        """Return the settings in a result file, which has more about them."""
        return cls(**{field.name: fields[field.name] for field in dataclass_fields(cls)})  # type: ignore[arg-type]

    @property
    def eval_batch_size(self) -> int:
        """Rows of an evaluation pass: the Trainer's default, or more if training has more."""
        return max(8, self.micro_batch_size)

    @property
    def label(self) -> str:
        """Compute type and micro-batch for a table."""
        how = f"{self.compute_dtype}{' autocast' if self.autocast else ''}"
        return f"{how}, micro-batch {self.micro_batch_size}"


def trainer_choices(
    dtypes: Sequence[str], micro_batches: Sequence[int], *, effective_batch_size: int
) -> list[TrainerSettings]:
    """Return every way to compute that is tried: 16 bit as it is and by autocast, all micro-batches."""
    return [
        TrainerSettings(
            compute_dtype=dtype,
            autocast=autocast,
            micro_batch_size=size,
            effective_batch_size=effective_batch_size,
        )
        for dtype in dtypes
        for autocast in ((False, True) if dtype != "float32" else (False,))
        for size in micro_batches
    ]


@dataclass
class StepClock(transformers.TrainerCallback):  # type: ignore[misc]
    """Notes when each optimizer step of a training ends, and its loss."""

    device: str
    ends: list[float] = field(default_factory=list)

    def on_train_begin(self, *arguments: object, **names: object) -> None:
        """Begin with the first step."""
        synchronize(self.device)
        self.ends = [time.perf_counter()]

    def on_step_end(self, *arguments: object, **names: object) -> None:
        """Note the end of a step; the rows' way to the device is in the next one."""
        synchronize(self.device)
        self.ends.append(time.perf_counter())

    @property
    def step_s(self) -> list[float]:
        """Seconds of each step."""
        return [b - a for a, b in itertools.pairwise(self.ends)]


def keep_cpu_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from changing 4-bit weights on a CPU in evaluation; see engine/base.py."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def attach_adapter(
    model: nn.Module, config: TrialConfig, initial: InitialWeights | None
) -> nn.Module:
    """Return PEFT's model around the base, with given initial matrices or PEFT's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between the libraries' versions
        adapted: nn.Module = peft.get_peft_model(
            model, peft_config(config, base_model=None, inference=False)
        )
    if initial is not None:
        set_adapter(adapted, initial)
    return adapted


def set_adapter(adapted: nn.Module, initial: InitialWeights) -> None:
    """Put the same matrices into PEFT's layers that a lane begins with."""
    for name, pair in initial.items():
        layer = adapted.base_model.model.get_submodule(name)  # type: ignore[union-attr]
        for letter, matrix in zip("AB", pair, strict=True):
            getattr(layer, f"lora_{letter}")["default"].weight.data.copy_(matrix)


def detach_adapter(adapted: nn.Module, *, num_parameters: int) -> nn.Module:
    """Return the base without the adapter.

    Raises:
        RuntimeError: Something of the adapter stayed: trials would stack up.
    """
    base: nn.Module = adapted.unload()  # type: ignore[operator]
    left = count_parameters(base)
    if left != num_parameters:
        raise RuntimeError(f"the base has {left} parameters after a trial, {num_parameters} before")
    return base


def count_parameters(model: nn.Module) -> int:
    """Return the elements of all parameters as they are stored; two 4-bit weights are one."""
    return sum(parameter.numel() for parameter in model.parameters())


def rows_in_order(
    rows: Sequence[TokenizedRow], *, steps: int, batch_size: int, data_seed: int
) -> list[TokenizedRow]:
    """Return the rows of all steps in the engine's order, those of a step longest first."""
    ordered: list[TokenizedRow] = []
    for step in range(1, steps + 1):
        numbers = rows_of_step(len(rows), step=step, batch_size=batch_size, data_seed=data_seed)
        ordered += sorted((rows[i] for i in numbers), key=lambda row: -len(row.input_ids))
    return ordered


def new_trainer(
    model: nn.Module,
    train: Sequence[TokenizedRow],
    held_out: Sequence[TokenizedRow],
    settings: TrainerSettings,
    *,
    steps: int,
    learning_rate: float,
    folder: Path,
    clock: StepClock,
) -> transformers.Trainer:
    """Return a Trainer over rows that are in their order already; a constant rate, no logging, no saving."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=settings.micro_batch_size,
            per_device_eval_batch_size=settings.eval_batch_size,
            gradient_accumulation_steps=settings.effective_batch_size // settings.micro_batch_size,
            bf16=settings.autocast and settings.compute_dtype == "bfloat16",
            fp16=settings.autocast and settings.compute_dtype == "float16",
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=clock.device == "cpu",
            dataloader_pin_memory=clock.device == "cuda",
            prediction_loss_only=True,
        )
        trainer = _OrderedTrainer(
            model=model,
            args=arguments,
            train_dataset=_Rows(train),
            eval_dataset=_Rows(held_out),
            data_collator=pad_rows,
            callbacks=[clock],
        )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train_and_evaluate(trainer: transformers.Trainer) -> float:
    """Train to the end; return the loss that ``Trainer.evaluate`` reports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
        return float(trainer.evaluate()["eval_loss"])


def pad_rows(rows: Sequence[TokenizedRow]) -> dict[str, Tensor]:
    """Pad rows on the right to the longest, with a mask, as ``DataCollatorForSeq2Seq`` does."""
    longest = max(len(row.input_ids) for row in rows)

    def padded(values: tuple[int, ...], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([padded(row.input_ids, 0) for row in rows]),
        "labels": torch.tensor([padded(row.labels, _IGNORED) for row in rows]),
        "attention_mask": torch.tensor([padded((1,) * len(row.input_ids), 0) for row in rows]),
    }


class _Rows(torch.utils.data.Dataset[TokenizedRow]):
    def __init__(self, rows: Sequence[TokenizedRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedRow:
        return self.rows[index]


class _OrderedTrainer(transformers.Trainer):  # type: ignore[misc]
    """The Trainer without shuffling: the rows come in the order of the trial."""

    def _get_train_sampler(self, *arguments: object) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)
