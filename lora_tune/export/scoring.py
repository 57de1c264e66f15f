"""Losses on the confirmation rows: of the adapter as it was trained, and of a model that was made from it.

Both are computed by the engine as the study computed them, so that the rows compare one by one.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from lora_tune.engine.adapter_files import load_adapter
from lora_tune.engine.base import DTYPES, BaseModel, load_base_model
from lora_tune.engine.lora import LaneAdapter
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.errors import MachineError
from lora_tune.export.adapter import adapter_folder, chosen_candidate
from lora_tune.records import EvalResult, StudySnapshot, TokenizedRow
from lora_tune.search.plan import confirmation_dtype
from lora_tune.store.origin import spec_of
from lora_tune.units import format_bytes

SPARE = 1.1  # of a model's memory, for what is held beside its weights


def check_device(snapshot: StudySnapshot) -> None:
    """Refuse to score on a CPU what was trained on a GPU: it could take days, and rounds otherwise.

    On a CPU the memory has to hold the model too, since the system ends a process that takes too much.

    Raises:
        MachineError: The study's device is not here, or has too little memory.
    """
    device = snapshot.lock.plan.device
    if device != "cpu":
        if not torch.cuda.is_available():
            raise MachineError(f"the study ran on {device}, and torch can use no GPU here")
        return
    dtype = _eval_dtype(snapshot)
    needed = int(SPARE * DTYPES[dtype].itemsize * snapshot.lock.model.num_parameters)
    free = psutil.virtual_memory().available
    if free < needed:
        raise MachineError(
            f"the merged model does not fit the memory for scoring, which takes {format_bytes(needed)} in "
            f"{dtype}; {format_bytes(free)} are free"
        )


@contextmanager
def _within_memory(what: str) -> Iterator[None]:
    """Say what did not fit when the device's memory runs out."""
    try:
        yield
    except Exception as error:
        cause = (
            error.__cause__ if isinstance(error, MachineError) else error
        )  # as of loading a base
        if cause is None or not is_out_of_memory(cause):
            raise
        raise MachineError(f"{what} not fit the memory for scoring") from None


def score_as_trained(
    snapshot: StudySnapshot, base_folder: Path, rows: Sequence[TokenizedRow]
) -> EvalResult:
    """Return the losses of the study's adapter on the base it was trained on, quantized as there.

    Raises:
        MachineError: The device's memory does not suffice.
    """
    with _within_memory("the base and its adapter do"):
        base = load_base_model(
            base_folder,
            quantization=snapshot.lock.model.quantization,
            compute_dtype=_load_dtype(snapshot),
            device=snapshot.lock.plan.device,
            check_rows=rows,
        )
        adapter = load_adapter(
            chosen_candidate(snapshot).config, adapter_folder(snapshot), base.linears, base.device
        )
        return _score(snapshot, base, adapter, rows)


def score_model(snapshot: StudySnapshot, folder: Path, rows: Sequence[TokenizedRow]) -> EvalResult:
    """Return the losses of the model in ``folder``, computed in the type of the confirmation.

    Raises:
        MachineError: The device's memory does not suffice.
    """
    with _within_memory("the merged model does"):
        base = load_base_model(
            folder,
            quantization="none",
            compute_dtype=_eval_dtype(snapshot),
            device=snapshot.lock.plan.device,
            check_rows=rows,
        )
        return _score(snapshot, base, None, rows)


def _score(
    snapshot: StudySnapshot,
    base: BaseModel,
    adapter: LaneAdapter | None,
    rows: Sequence[TokenizedRow],
) -> EvalResult:
    base.set_compute_dtype(DTYPES[_eval_dtype(snapshot)])
    plan, train = snapshot.lock.plan, spec_of(snapshot).train
    settings = PackSettings(
        effective_batch_size=train.effective_batch_size,
        micro_batch_size=plan.micro_batch_size,
        max_grad_norm=train.max_grad_norm,
        weight_decay=train.weight_decay,
        group_rank=plan.group_rank,
    )
    [found] = TrialPack(base, (), settings).evaluate([adapter], rows, split="confirmation")
    del base, adapter
    free_memory()
    return found


def free_memory() -> None:
    """Give back what a model that is no longer used has held: modules refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _eval_dtype(snapshot: StudySnapshot) -> str:
    plan = snapshot.lock.plan
    wanted = confirmation_dtype(spec_of(snapshot), plan.device)
    return plan.compute_dtype if wanted == "train" else wanted


def _load_dtype(snapshot: StudySnapshot) -> str:
    """Return the type that the study loaded its base in; 4-bit weights may depend on it."""
    plan = snapshot.lock.plan
    measured = spec_of(snapshot).model.compute_dtype == "auto" and plan.device == "cpu"
    return "float32" if measured else plan.compute_dtype
