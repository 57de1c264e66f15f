"""An adapter in PEFT's own format, written and read by PEFT's and safetensors' own code."""

from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file

from lora_tune.engine.lora import LaneAdapter
from lora_tune.records import LinearShape, TrialConfig

WEIGHTS_FILE = peft.utils.constants.SAFETENSORS_WEIGHTS_NAME
CONFIG_FILE = peft.utils.constants.CONFIG_NAME
_PREFIX = "base_model.model."


def peft_config(config: TrialConfig, *, base_model: str | None, inference: bool) -> peft.LoraConfig:
    """Return PEFT's config of a trial.

    ``target_modules`` are the full module names, so that the adapter lands on exactly the layers
    that were trained, whatever names a later version of the model repeats elsewhere.
    """
    alpha = config.lora_alpha
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=inference,
    )


def save_adapter(adapter: LaneAdapter, folder: Path, *, base_model: str | None) -> None:
    """Write adapter_model.safetensors and adapter_config.json into a folder being published."""
    tensors = {}
    for name, pair in adapter.weights.items():
        for letter, matrix in zip("AB", pair, strict=True):
            tensors[f"{_PREFIX}{name}.lora_{letter}.weight"] = matrix.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    peft_config(adapter.config, base_model=base_model, inference=True).save_pretrained(folder)


def load_adapter(
    config: TrialConfig, folder: Path, shapes: Sequence[LinearShape], device: torch.device
) -> LaneAdapter:
    """Return the adapter saved in ``folder`` for a lane of this configuration that is not trained."""
    tensors = load_file(folder / WEIGHTS_FILE)
    adapter = LaneAdapter(config, shapes, device, trained=False)
    for name, pair in adapter.weights.items():
        for letter, matrix in zip("AB", pair, strict=True):
            matrix.copy_(tensors[f"{_PREFIX}{name}.lora_{letter}.weight"])
    return adapter
