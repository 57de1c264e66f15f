"""Models with random weights in the shapes of real ones, and random rows: speed does not depend on values.

Weights are drawn from N(0, 0.02) and norms are one, so hidden states and losses are finite; a loss of such a
model says nothing.
"""

from collections.abc import Mapping
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
import transformers
from machine import read_result
from torch import nn
from vram_grid import Config, GridPoint
from vram_stacks import build_model

from lora_tune.catalog.models import load_models
from lora_tune.memory.request import LaneShape, resolve_request
from lora_tune.records import TokenizedRow

LABEL_SHARE = 0.3  # of a row's tokens carry loss, as in the rows of the first study


def shape_config(name: str) -> Config:
    """Return the config of a catalogue model, or that in a config.json.

    Raises:
        SystemExit: The catalogue has no such model, or there is no such file.
    """
    if name.endswith(".json"):
        found: Config = read_result(Path(name))
        return found
    for model in load_models():
        if model.name == name:
            return dict(model.config)
    names = ", ".join(model.name for model in load_models() if "llama" in model.name)
    raise SystemExit(f'no shape "{name}" in the catalogue; some of those there are: {names}')


def random_model(config: Mapping[str, object], *, quantization: str, device: str) -> nn.Module:
    """Return a causal language model in bfloat16 with random weights, made and quantized on the device."""
    request = resolve_request(
        stack="trainer",
        quantization=quantization,
        compute_dtype="bfloat16",
        lanes=(LaneShape(rank=1, targets=("q_proj",), lora_dropout=0.0),),
        micro_batch_size=1,
        max_length=1,
        gradient_checkpointing=False,
        gradient_accumulation=False,
    )
    point = GridPoint(
        number=0, model="random", config=dict(config), request=request, accumulation_steps=1
    )
    return build_model(point, torch.device(device))


def save_random_model(config: Mapping[str, object], folder: Path) -> None:
    """Write config and bfloat16 safetensors with random weights, as a folder that any arm can load."""
    fields = dict(config)
    built = transformers.AutoConfig.for_model(str(fields.pop("model_type")), **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def cast_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a model compute in another type; 4-bit weights stay as they are."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.weight.quant_state.dtype = dtype
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def random_rows(
    count: int,
    *,
    length: int,
    vocab_size: int,
    length_sd: float = 0.0,
    labels: int | None = None,
    seed: int = 0,
) -> tuple[TokenizedRow, ...]:
    """Return rows of random tokens; the last ``labels`` of each carry loss.

    Args:
        count: Rows.
        length: Mean tokens of a row; all have just as many with ``length_sd`` zero.
        vocab_size: Token ids are from 3 to below it.
        length_sd: Standard deviation of the length; lengths are kept within four of them.
        labels: Label tokens of each row; None: ``LABEL_SHARE`` of it.
        seed: The same seed gives the same rows.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        drawn = generator.normal(length, length_sd) if length_sd else length
        least, most = max(4, length - 4 * length_sd), length + 4 * length_sd
        size = round(min(max(drawn, least), most))
        ids = tuple(int(i) for i in generator.integers(3, vocab_size, size=size))
        labelled = round(LABEL_SHARE * size) if labels is None else labels
        masked = size - min(max(labelled, 1), size - 1)
        rows.append(TokenizedRow(input_ids=ids, labels=(-100,) * masked + ids[masked:]))
    return tuple(rows)
