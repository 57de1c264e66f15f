"""Real optimizer steps of each training stack on random weights, with a hook around the measured ones.

The Trainer stacks are transformers' own ``Trainer`` on PEFT's model, the ``trl`` stack TRL's own
``SFTTrainer``, ours the engine's ``TrialPack``. Random weights are made and quantized tensor by tensor on the
device, so that an 8B model needs no 16 GB on the way.
"""

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import Protocol

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from vram_grid import GridPoint

from lora_tune.engine.base import BaseModel, linear_shapes
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.records import LaneJob, LinearShape, TokenizedRow, TrialConfig

WARM_STEPS = 1  # makes the optimizer's state, loads kernels, fills caches
MEASURED_STEPS = 2
_STEPS = WARM_STEPS + MEASURED_STEPS
_IGNORED = -100


class Observer(Protocol):
    """Is told when the tensors that stay are there, and after each optimizer step."""

    def begin(self, *, base_weights: int, adapters: int) -> None:
        """Take the bytes of the base's tensors and of the adapters, before the first step."""
        ...

    def step(self, finished_steps: int) -> None:
        """Take the number of finished optimizer steps."""
        ...


class StackMissingError(Exception):
    """The packages of a stack are not installed here."""


def run_point(point: GridPoint, device: torch.device, observer: Observer) -> None:
    """Build the model and run the point's optimizer steps.

    Raises:
        StackMissingError: TRL or datasets is not installed.
    """
    if point.request.stack == "trl" and not (find_spec("trl") and find_spec("datasets")):
        raise StackMissingError("trl and datasets are not installed")
    model = build_model(point, device)
    if point.request.stack == "lora-tune":
        _run_engine(point, model, observer)
    else:
        _run_trainer(point, model, device, observer)


def build_model(point: GridPoint, device: torch.device) -> nn.Module:
    """Return the base model with random weights on the device, quantized as the point asks."""
    request = point.request
    dtype = torch.bfloat16
    settings = dict(point.config)
    config = transformers.AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    config.use_cache = False
    attention = "eager" if request.attention == "eager" else "sdpa"
    with torch.device("meta"), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    model.tie_weights()
    if request.quantization != "none":
        _make_linear4bit(model, double=request.quantization == "nf4", dtype=dtype)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    for module in list(model.modules()):
        _materialize(module, device, skip=tied and module is head)
    if tied:
        head.weight = model.get_input_embeddings().weight
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):  # its frequencies are buffers computed when it is made
            model.set_submodule(name, type(module)(config).to(device))
    return model.requires_grad_(False)


def frozen_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor of the base: frozen parameters, and what quantization keeps beside them."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            yield parameter.data
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            nested = (state.state2.absmax, state.state2.code) if state.state2 is not None else ()
            parts = (state.absmax, state.code, state.offset, *nested)
            yield from (part for part in parts if part is not None)


def _total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _make_linear4bit(model: nn.Module, *, double: bool, dtype: torch.dtype) -> None:
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    replace_with_bnb_linear(
        model,
        modules_to_not_convert=get_keys_to_not_convert(model),
        quantization_config=settings,
    )
    model.is_loaded_in_4bit = True  # PEFT and TRL ask for it


def _materialize(module: nn.Module, device: torch.device, *, skip: bool) -> None:
    """Give a module's own parameters random values on the device; a 4-bit weight is quantized there."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if skip or not parameter.is_meta:
            continue
        if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
            shape = (module.out_features, module.in_features)
            values = torch.empty(shape, dtype=module.compute_dtype, device=device).normal_(std=0.02)
            old = module.weight
            module.weight = bnb.nn.Params4bit(
                values,
                requires_grad=False,
                compress_statistics=old.compress_statistics,
                quant_type=old.quant_type,
                module=module,
            ).to(device)
            module.support_avx512bf16_for_cpu = False  # see engine/base.py
        else:
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            values.normal_(std=0.02) if values.dim() > 1 else values.fill_(1.0)
            setattr(module, name, nn.Parameter(values, requires_grad=False))


def _rows(point: GridPoint, count: int) -> list[TokenizedRow]:
    """Return random rows; if padded, all end a sixteenth or an eighth before the batch does.

    The Trainer shuffles rows: a batch without any padding would be computed in another way.
    """
    request = point.request
    generator = torch.Generator().manual_seed(point.number)
    rows = []
    for number in range(count):
        length = request.max_length
        if request.padded:
            length -= length // (8 if number % 2 else 16)
        tokens = torch.randint(
            3, int(str(point.config["vocab_size"])), (length,), generator=generator
        )
        ids = tuple(tokens.tolist())
        masked = length - point.labels_per_row
        rows.append(TokenizedRow(input_ids=ids, labels=(_IGNORED,) * masked + ids[masked:]))
    return rows


def _run_engine(point: GridPoint, model: nn.Module, observer: Observer) -> None:
    request = point.request
    base = BaseModel(model, compute_dtype=torch.bfloat16)
    base.set_gradient_checkpointing(request.gradient_checkpointing)
    batch = request.micro_batch_size * point.accumulation_steps
    settings = PackSettings(
        effective_batch_size=batch,
        micro_batch_size=request.micro_batch_size,
        max_grad_norm=1.0,
        weight_decay=0.0,
        group_rank=request.group_rank,
    )
    pack = TrialPack(base, _rows(point, batch), settings)
    lanes = [
        pack.new_lane(_lane_job(point, base.linears, number))
        for number in range(len(request.lanes))
    ]
    adapters = [lane.adapter.flat for lane in lanes if lane.adapter]
    observer.begin(
        base_weights=_total_bytes(frozen_tensors(base.model)), adapters=_total_bytes(adapters)
    )
    for step in range(1, _STEPS + 1):
        pack.train_step(lanes)
        observer.step(step)


def _lane_job(point: GridPoint, linears: Sequence[LinearShape], number: int) -> LaneJob:
    lane = point.request.lanes[number]
    modules = tuple(s.name for s in linears if s.name.rpartition(".")[2] in lane.targets)
    config = TrialConfig(
        rank=lane.rank,
        lora_alpha=2.0 * lane.rank,
        lora_dropout=lane.lora_dropout,
        target_set="measured",
        target_modules=modules,
        learning_rate=1e-5,
        init_seed=number,
        dropout_seed=number,
    )
    return LaneJob(
        trial=number,
        rung=0,
        config=config,
        start_step=0,
        hold_step=_STEPS + 1,
        end_step=_STEPS + 1,
        warmup_steps=1,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows as the Trainer's default collator takes them: of equal length, with a mask if asked."""

    def __init__(self, rows: Sequence[TokenizedRow], *, length: int, masked: bool) -> None:
        self.rows, self.length, self.masked = rows, length, masked

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        missing = self.length - len(row.input_ids)
        item = {
            "input_ids": torch.tensor(row.input_ids + (0,) * missing),
            "labels": torch.tensor(row.labels + (_IGNORED,) * missing),
        }
        if self.masked:
            item["attention_mask"] = torch.tensor((1,) * len(row.input_ids) + (0,) * missing)
        return item


class _Steps(transformers.TrainerCallback):
    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.observer.step(state.global_step)


def _run_trainer(
    point: GridPoint, model: nn.Module, device: torch.device, observer: Observer
) -> None:
    request = point.request
    rows = _rows(point, request.micro_batch_size * point.accumulation_steps * _STEPS)
    # TRL's trainer wants a mask also where it hides nothing.
    masked = request.padded or request.stack == "trl"
    data = _Rows(rows, length=request.max_length, masked=masked)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the libraries
        model = _with_peft(point, model)
        if request.stack == "trl":
            trainer = _sft_trainer(point, model, data, _arguments(point, device, folder), observer)
        else:
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(**_arguments(point, device, folder)),
                train_dataset=data,
                data_collator=transformers.default_data_collator,
                callbacks=[_Steps(observer)],
            )
        trainer.remove_callback(transformers.PrinterCallback)
        observer.begin(
            base_weights=_total_bytes(frozen_tensors(model)),
            adapters=_total_bytes(p for p in model.parameters() if p.requires_grad),
        )
        trainer.train()


def _with_peft(point: GridPoint, model: nn.Module) -> nn.Module:
    request = point.request
    (lane,) = request.lanes
    if request.stack == "trainer-kbit":
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=request.gradient_checkpointing
        )
    names = [s.name for s in linear_shapes(model) if s.name.rpartition(".")[2] in lane.targets]
    config = peft.LoraConfig(
        r=lane.rank,
        lora_alpha=2 * lane.rank,
        lora_dropout=lane.lora_dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def _arguments(point: GridPoint, device: torch.device, folder: str) -> dict[str, object]:
    """Return the arguments that a user would give to Trainer; what is not named keeps its default."""
    request = point.request
    known = {field.name for field in fields(transformers.TrainingArguments)}
    checkpointing = "gradient_checkpointing"
    if "activation_checkpointing" in known:  # its name since transformers 5.2x
        checkpointing = "activation_checkpointing"
    names = {"adamw-8bit": "adamw_bnb_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}
    return {
        "output_dir": folder,
        "max_steps": _STEPS,
        "per_device_train_batch_size": request.micro_batch_size,
        "gradient_accumulation_steps": point.accumulation_steps,
        "bf16": request.autocast,
        checkpointing: request.gradient_checkpointing,
        "optim": names.get(request.optimizer, "adamw_torch_fused"),
        "learning_rate": 1e-5,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
    }


def _sft_trainer(
    point: GridPoint,
    model: nn.Module,
    data: _Rows,
    arguments: dict[str, object],
    observer: Observer,
) -> transformers.Trainer:
    """Return TRL's trainer on rows that are tokens already; a small tokenizer stands in."""
    import datasets
    import tokenizers
    import trl

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"
    )
    rows = [{key: value.tolist() for key, value in data[i].items()} for i in range(len(data))]
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            **arguments,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
        callbacks=[_Steps(observer)],
    )
