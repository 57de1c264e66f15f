"""What only a measurement can decide: the compute type on a CPU, and how many lanes pay.

The answers are written to ``study.lock.json`` once, so that a resumed study does not decide again.
"""

import time
from collections.abc import Sequence

import torch

from lora_tune.engine.base import DTYPES, BaseModel
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.records import LaneJob, TokenizedRow, TrialConfig

# One more doubling of the lanes has to raise the throughput by at least this share.
WORTHWHILE_GAIN = 0.10


def measure_tokens_per_s(
    base: BaseModel,
    rows: Sequence[TokenizedRow],
    settings: PackSettings,
    config: TrialConfig,
    *,
    lanes: int,
) -> float:
    """Return tokens/s of one optimizer step with ``lanes`` equal lanes, after one to warm up."""
    pack = TrialPack(base, rows, settings)
    job = LaneJob(
        trial=-1,
        rung=0,
        config=config,
        start_step=0,
        hold_step=2,
        end_step=2,
        warmup_steps=0,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )
    members = [pack.new_lane(job) for _ in range(lanes)]
    pack.train_step(members)
    _synchronize(base.device)
    begin = time.perf_counter()
    pack.train_step(members)
    _synchronize(base.device)
    elapsed = time.perf_counter() - begin
    return sum(lane.points[-1].num_tokens for lane in members) / elapsed


def fastest_compute_dtype(
    base: BaseModel, rows: Sequence[TokenizedRow], settings: PackSettings, config: TrialConfig
) -> tuple[str, dict[str, float]]:
    """Return the compute type with the most tokens/s on this device, and all readings.

    The base is left computing in that type.
    """
    readings = {}
    for name, dtype in DTYPES.items():
        base.set_compute_dtype(dtype)
        readings[name] = measure_tokens_per_s(base, rows, settings, config, lanes=1)
    best = max(readings, key=lambda name: readings[name])
    base.set_compute_dtype(DTYPES[best])
    return best, {f"1 lane, {name}": value for name, value in readings.items()}


def worthwhile_lanes(
    base: BaseModel,
    rows: Sequence[TokenizedRow],
    settings: PackSettings,
    config: TrialConfig,
    *,
    most: int,
) -> tuple[int, dict[str, float]]:
    """Return the number of lanes after which tokens/s stops rising by a tenth, and the readings.

    Tries 1, 2, 4, ... up to ``most``, which is what the memory estimate allows.
    """
    readings: dict[int, float] = {}
    lanes, chosen = 1, 1
    while lanes <= most:
        try:
            readings[lanes] = measure_tokens_per_s(base, rows, settings, config, lanes=lanes)
        except Exception as error:
            if not is_out_of_memory(error) or lanes == 1:
                raise
            break  # the estimate was too hopeful: what fitted before is the plan
        if readings[lanes] < (1 + WORTHWHILE_GAIN) * readings[chosen] and lanes > 1:
            break
        chosen, lanes = lanes, lanes * 2
    base.layout.adapters = ()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    return chosen, {f"{count} lanes": value for count, value in readings.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
