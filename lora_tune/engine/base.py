"""The frozen base model: loaded once, every linear layer wrapped so that lanes can adapt it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import bitsandbytes as bnb
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lora_tune.engine.attention import attend_as_loaded, attend_by_rows
from lora_tune.engine.batches import Batch, as_arrays, collate
from lora_tune.engine.fused import fuse_frozen_parts
from lora_tune.engine.lora import PackedLinear, new_layout
from lora_tune.engine.loss import label_losses
from lora_tune.engine.memory_errors import is_out_of_memory
from lora_tune.errors import MachineError, ModelError
from lora_tune.records import LinearShape, TokenizedRow

# Relative distance of hidden states that rounding in another order explains.
ROWS_AGREE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BaseModel:
    """A causal language model whose parameters are frozen and whose linear layers are packed.

    Attributes:
        layout: Who owns which rows of the running batch; ``TrialPack`` sets it before each pass.
        linears: Every linear layer that LoRA can adapt, the output head excluded.
        flat: Whether the rows of a pass lie in one line without padding (engine/attention.py).
        mean_linear_size: Multiply-adds of a token in one of ``linears``, on average.
        is_thread_safe: Whether passes in several threads at once leave each other alone.
    """

    def __init__(self, model: nn.Module, *, compute_dtype: torch.dtype) -> None:
        self.model = model.requires_grad_(False).eval()
        self.layout = new_layout(self.device)
        self.linears = linear_shapes(model)
        self.mean_linear_size = fmean(s.in_features * s.out_features for s in self.linears)
        self.is_thread_safe = not (
            getattr(model, "_is_stateful", False) or any(map(_follows_lengths, model.modules()))
        )
        self.decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
        self.head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        for shape in self.linears:
            layer = model.get_submodule(shape.name)
            model.set_submodule(shape.name, PackedLinear(layer, shape.name, self.layout))
        fuse_frozen_parts(model)
        self.flat = attend_by_rows(model, self.layout)
        # bitsandbytes swaps the weights of a CPU layer for a bfloat16-only packing the first time it
        # runs without gradients, which changes losses by tenths of a percent: keep the real ones.
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
        self._originals: dict[nn.Parameter, Tensor] = {}
        self.set_compute_dtype(compute_dtype)

    @property
    def device(self) -> torch.device:
        """Device of the embeddings, where token ids go."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type in which hidden states are computed."""
        return self._compute_dtype

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute in ``dtype`` from now on; quantized weights stay as they are.

        Parameters that are not quantized are cast. Where that loses digits, the original is kept, so
        that computing in the wider type again is exact.
        """
        self._compute_dtype = dtype
        for module in self.model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.compute_dtype = dtype
                module.compute_type_is_set = True
                # backward dequantizes to the quant state's own type before it casts
                module.weight.quant_state.dtype = dtype
                if module.bias is not None:
                    module.bias.data = module.bias.data.to(dtype)
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and not isinstance(parameter, bnb.nn.Params4bit):
                    exact = self._originals.pop(parameter, parameter.data)
                    parameter.data = exact.to(dtype)
                    same_type = exact.dtype == dtype  # then there is nothing to compare
                    if not same_type and not torch.equal(parameter.data.to(exact.dtype), exact):
                        self._originals[parameter] = exact

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Keep only each decoder layer's input for backward, or everything.

        Only the layers' own flag is set: dropout modules inside them stay in eval mode, so that the
        base never draws from a global generator, whose state then need not be kept either.
        """
        if enabled:
            kept = {"use_reentrant": False, "preserve_rng_state": False}
            self.model.activation_checkpointing_enable(kept)  # type: ignore[operator]
        else:
            self.model.activation_checkpointing_disable()  # type: ignore[operator]
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = enabled

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the decoder's last hidden states, (*batch.ids.shape, H), after the final norm.

        The layout must have been told of the batch (``PackLayout.set_pass``).
        """
        positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        found = self.decoder(input_ids=batch.ids, use_cache=False, **positions)
        hidden: Tensor = found.last_hidden_state
        return hidden


def load_base_model(
    folder: Path,
    *,
    quantization: str,
    compute_dtype: str,
    device: str,
    check_rows: Sequence[TokenizedRow] = (),
) -> BaseModel:
    """Load the base once, in NF4 with double quantization or in the compute type.

    Args:
        folder: config.json and safetensors.
        quantization: ``nf4`` or ``none``.
        compute_dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu`` or ``cuda``.
        check_rows: A few rows on which the labels-only loss is compared with the model's own.

    Raises:
        ModelError: The files cannot be loaded, or the model's head is more than a linear layer.
        MachineError: There is not memory enough for the model alone.
    """
    dtype = DTYPES[compute_dtype]
    if device.startswith("cuda"):
        # torch would prefer it on new GPUs; it builds a graph for every new row length, tens of milliseconds
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization_config(quantization, dtype),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise MachineError(_does_not_fit(folder, device, quantization)) from error
        if not isinstance(error, (OSError, ValueError, KeyError)):
            raise
        raise ModelError(f"{folder}: the base model cannot be loaded ({error})") from error
    base = BaseModel(model, compute_dtype=dtype)
    if check_rows:
        by_length = sorted(check_rows, key=lambda row: len(row.input_ids))
        if base.flat and not _rows_agree(base, [by_length[0], by_length[-1]]):
            attend_as_loaded(base.model)
            base.flat = False
        _check_head(base, by_length[0])
    return base


def _does_not_fit(folder: Path, device: str, quantization: str) -> str:
    whose, larger = "this machine's", "a machine with more"
    if device.startswith("cuda"):
        whose, larger = "the GPU's", "a larger GPU"
    smaller = ', or set model.quantization = "nf4"' if quantization == "none" else ""
    return (
        f"{folder}: {whose} memory ran out while the base model was loaded. Free what other processes hold, "
        f"or take {larger}{smaller}."
    )


def quantization_config(
    quantization: str, dtype: torch.dtype
) -> transformers.BitsAndBytesConfig | None:
    """Return transformers' settings for ``nf4`` (with double quantization); None for ``none``."""
    if quantization == "none":
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def linear_shapes(model: nn.Module) -> tuple[LinearShape, ...]:
    """Return the linear layers that LoRA can adapt, in module order, the output head excluded."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return tuple(
        LinearShape(name=name, in_features=sizes[0], out_features=sizes[1])
        for name, module in model.named_modules()
        if module is not head and (sizes := _in_out(module)) is not None
    )


class MetaModel(NamedTuple):
    """A model built from its config alone: what LoRA can adapt, and the size of all the rest."""

    linears: tuple[LinearShape, ...]
    num_other_parameters: int


def read_meta_model(folder: Path) -> MetaModel:
    """Return what ``BaseModel.linears`` will be, from the config alone: no weights are read."""
    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    linears = linear_shapes(model)
    adaptable = sum(shape.in_features * shape.out_features for shape in linears)
    return MetaModel(linears, sum(p.numel() for p in model.parameters()) - adaptable)


def _follows_lengths(module: nn.Module) -> bool:
    """Return whether rotary embeddings exchange their frequencies, in place, by the rows of a pass.

    Source of the names: ``transformers.modeling_rope_utils.dynamic_rope_update``.
    """
    kinds = vars(module).get("rope_type", "")
    return any(
        "dynamic" in kind or kind == "longrope"
        for kind in (kinds.values() if isinstance(kinds, dict) else [str(kinds)])
    )


def _in_out(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


@torch.no_grad()
def _rows_agree(base: BaseModel, rows: Sequence[TokenizedRow]) -> bool:
    """Return whether rows in one line get the hidden states that they get alone, as the model was loaded."""
    batch = collate([[as_arrays(row) for row in rows]], base.device, flat=True)
    base.layout.set_pass(batch.tokens, batch.real, batch.cut)
    found = base.hidden_states(batch).flatten(0, 1)[batch.positions_L].float()
    base.layout.clear()
    attend_as_loaded(base.model)
    alone = []
    for row in rows:
        ids = torch.tensor([row.input_ids], device=base.device)
        hidden = base.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        alone.append(hidden[torch.from_numpy(as_arrays(row).positions).to(base.device)])
    attend_by_rows(base.model, base.layout)
    wanted = torch.cat(alone).float()
    error = torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted)
    return bool(error < ROWS_AGREE[base.compute_dtype])


def _check_head(base: BaseModel, row: TokenizedRow) -> None:
    batch = collate([[as_arrays(row)]], base.device, flat=base.flat)
    ids = torch.tensor([row.input_ids], device=base.device)
    with torch.no_grad():
        base.layout.set_pass(batch.tokens, batch.real, batch.cut)
        hidden = base.hidden_states(batch).flatten(0, 1)[batch.positions_L]
        base.layout.clear()
        ours = label_losses(hidden, base.head, batch.targets_L, None).losses_N.mean()
        logits = base.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        theirs = nn.functional.cross_entropy(logits[batch.positions_L].float(), batch.targets_L)
    if not torch.isclose(ours, theirs, rtol=1e-2):
        raise ModelError(
            f"{type(base.model).__name__} computes its logits in another way than by one linear layer "
            f"(loss {ours:.4f} against {theirs:.4f}): this architecture is not supported yet."
        )


def quiet_transformers() -> None:
    """Let transformers report errors only, and draw no progress bars over the live view."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
