"""The process that trains a trial again by plain PEFT and torch: ``python -m lora_tune.verification.plain``.

It shares nothing with the process that asks for it. Its one argument is a ``PlainRequest`` as JSON; it
reads the study folder, the rows and the base model itself, and writes one JSON object a line to
standard output: ``step`` and ``run`` while it works, then ``result`` or ``error``.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_tune.engine.base import DTYPES, quantization_config, quiet_transformers, read_meta_model
from lora_tune.engine.lora import LaneAdapter, keyed_seed
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.engine.reference import ReferenceTrial
from lora_tune.errors import DataError, InfeasibleError, LoraTuneError
from lora_tune.planning import Inputs, read_inputs
from lora_tune.records import TokenizedRow, TrialConfig
from lora_tune.store.folder import StudyFolder
from lora_tune.verification.process import PlainRequest, PlainResult, PlainRun
from lora_tune.verification.task import VerifyTask, verify_task

Emit = Callable[[str, dict[str, object]], None]


def train_plainly(task: VerifyTask, *, num_seeds: int, emit: Emit) -> PlainResult:
    """Evaluate the stored adapter, then train the trial again, and ``num_seeds`` times with other seeds.

    Raises:
        LoraTuneError: Rows or base model are not those of the study, or do not fit.
    """
    inputs = read_inputs(task.spec, base_dir=task.base_dir, lock=task.lock)
    if inputs.data.fingerprint.sha256 != task.lock.data.sha256:
        raise DataError(
            f"{task.spec.data.train}: the rows differ from those that {task.lock.name} was trained on. "
            "Bring them back; other rows cannot give the same losses."
        )
    rows = inputs.data.selection[: len(task.result.evaluation.label_counts)]  # those of its rung
    adapter_loss_sums = _loss_sums(_load_adapter(task, inputs), rows)
    config = task.record.config
    runs = [_train(task, inputs, config, rows, run=0, emit=emit)]
    for number in range(1, num_seeds + 1):
        seed = keyed_seed(config.init_seed, "verify", number)
        other = replace(config, init_seed=seed, dropout_seed=seed, data_seed=seed)
        runs.append(_train(task, inputs, other, rows, run=number, emit=emit))
    return PlainResult(adapter_loss_sums=adapter_loss_sums, runs=tuple(runs))


def _train(
    task: VerifyTask,
    inputs: Inputs,
    config: TrialConfig,
    rows: Sequence[TokenizedRow],
    *,
    run: int,
    emit: Emit,
) -> PlainRun:
    plan, job = task.lock.plan, replace(task.job(), config=config)
    device = torch.device(plan.device)
    linears = read_meta_model(inputs.folder).linears
    _free_memory()  # of the run before
    trial = ReferenceTrial(
        inputs.folder,
        job,
        inputs.data.train,
        initial=LaneAdapter.initialize(config, linears, device).weights,
        quantization=task.spec.model.quantization,
        compute_dtype=_load_dtype(task),
        effective_batch_size=task.spec.train.effective_batch_size,
        micro_batch_size=plan.micro_batch_size,
        max_grad_norm=task.spec.train.max_grad_norm,
        weight_decay=task.spec.train.weight_decay,
        device=plan.device,
    )
    _compute_in(trial.model, DTYPES[plan.compute_dtype])
    if plan.gradient_checkpointing:
        _checkpoint_layers(trial.model)
    losses = []
    for step in range(1, job.end_step + 1):
        losses.append(trial.train_step(step))
        emit("step", {"run": run, "step": step, "end_step": job.end_step, "loss": losses[-1]})
    found = PlainRun(train_losses=tuple(losses), loss_sums=tuple(trial.evaluate(rows)))
    emit("end", {"run": run, "loss": sum(found.loss_sums) / sum(row.num_labels for row in rows)})
    return found


def _load_adapter(task: VerifyTask, inputs: Inputs) -> nn.Module:
    """Return the base with the adapter that the study published, both loaded by their own libraries."""
    dtype = DTYPES[_load_dtype(task)]
    base = transformers.AutoModelForCausalLM.from_pretrained(
        inputs.folder,
        dtype=dtype,
        quantization_config=quantization_config(task.spec.model.quantization, dtype),
        device_map={"": task.lock.plan.device},
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # see engine/base.py
    model: nn.Module = peft.PeftModel.from_pretrained(base, task.adapter_folder).eval()
    _compute_in(model, DTYPES[task.lock.plan.compute_dtype])
    return model


@torch.no_grad()
def _loss_sums(model: nn.Module, rows: Sequence[TokenizedRow]) -> tuple[float, ...]:
    """Return each row's summed loss in nats from the model's full logits, one row at a time."""
    device = next(model.parameters()).device
    sums = []
    for row in rows:
        logits = model(
            input_ids=torch.tensor([row.input_ids], device=device), use_cache=False
        ).logits
        targets = torch.tensor(row.labels[1:], device=device)
        loss = nn.functional.cross_entropy(
            logits[0, :-1].float(), targets, ignore_index=-100, reduction="sum"
        )
        sums.append(float(loss))
    return tuple(sums)


def _load_dtype(task: VerifyTask) -> str:
    """Return the type that the study loaded its base in; 4-bit weights may depend on it.

    With ``compute_dtype = "auto"`` on a CPU that is float32, whatever the probe then chose.
    """
    plan = task.lock.plan
    measured = task.spec.model.compute_dtype == "auto" and plan.device == "cpu"
    return "float32" if measured else plan.compute_dtype


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the frozen base compute in ``dtype``; adapters and 4-bit weights stay as they are."""
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.weight.quant_state.dtype = dtype
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and not isinstance(parameter, bnb.nn.Params4bit):
                parameter.data = parameter.data.to(dtype)


def _checkpoint_layers(model: nn.Module) -> None:
    """Keep only each layer's input for backward, as the study did; dropout modules stay off."""
    model.base_model.model.activation_checkpointing_enable(  # type: ignore[operator, union-attr]
        {"use_reentrant": False}
    )
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Answer the request in the first argument; errors that the user can mend are answers too."""
    # Whatever a library prints must not end up between the lines of the answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: str, values: dict[str, object]) -> None:
        answer.write(json.dumps({"event": event, **values}) + "\n")
        answer.flush()

    request = PlainRequest(**json.loads(sys.argv[1]))
    quiet_transformers()
    try:
        task = verify_task(StudyFolder(Path(request.folder)).snapshot(), request.trial)
        emit("result", asdict(_answer(task, request.num_seeds, emit)))
    except LoraTuneError as error:
        emit("error", {"kind": type(error).__name__, "message": str(error)})
    except KeyboardInterrupt:
        sys.exit(130)


def _answer(task: VerifyTask, num_seeds: int, emit: Emit) -> PlainResult:
    try:
        return train_plainly(task, num_seeds=num_seeds, emit=emit)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InfeasibleError(
            f"plain PEFT ran out of memory with trial {task.record.number}: unlike a trial pack it holds "
            "the logits of every token of a micro-batch. Free memory, verify a trial of lower rank with "
            "--trial, or verify where there is more memory."
        ) from error


if __name__ == "__main__":
    main()
