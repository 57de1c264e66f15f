"""The base model and its adapters on the meta device: real classes, no weights.

The decoder is transformers' own class built from the config; linear layers are bitsandbytes' own
``Linear4bit`` with the tensors that quantization leaves; adapters are PEFT's own layers, or our
engine's. Every decision that the libraries take by module type or name is taken by them.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import bitsandbytes as bnb
import peft
import torch
import transformers
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from lora_tune.catalog.targets import matches_suffix
from lora_tune.errors import ModelError, TargetModulesError
from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.memory.terms import NF4_BLOCK, NF4_BLOCKS_PER_STATE
from lora_tune.records import LinearShape
from lora_tune.trace.attention import FLASH_ATTENTION_2

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(config: Mapping[str, object]) -> transformers.PreTrainedConfig:
    """Return transformers' config object of a decoder; of a multimodal model its text part.

    Raises:
        ModelError: The config names no model type, or one that is no causal language model.
    """
    fields = {key: value for key, value in config.items() if key not in _IGNORED_KEYS}
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ModelError(
            "config.json: model_type is missing; the trace builds the model's class from it. "
            "Is this the config.json of a causal language model?"
        )
    try:
        whole = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(fields))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"config.json: no model can be made of it ({error})") from error
    text = whole.get_text_config(decoder=True)
    if type(text) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f'config.json: model_type "{model_type}" is no causal language model of '
            f"transformers {transformers.__version__}."
        )
    return text


# What says how weights are stored or loaded; the request decides both here.
_IGNORED_KEYS = frozenset({"quantization_config", "torch_dtype", "dtype", "auto_map"})


def shortened(
    config: transformers.PreTrainedConfig, num_layers: int
) -> transformers.PreTrainedConfig:
    """Return the config of the same model with its first layers only."""
    whole = config.num_hidden_layers
    if num_layers == whole:
        return config
    short = copy.deepcopy(config)
    for name, value in vars(short).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(short, name, value[:num_layers])
    short.num_hidden_layers = num_layers
    return short


def attention_name(config: transformers.PreTrainedConfig, request: MemoryRequest) -> str:
    """Return transformers' name of the attention that the model runs with.

    Models whose attention SDPA can not compute (the soft cap of Gemma-2) run the eager one, which
    is what transformers chooses for them.

    Raises:
        ModelError: FlashAttention is asked of a model that has none.
    """
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if request.attention == "flash":
        if not model._supports_flash_attn:
            raise ModelError(
                f"{model.__name__} has no FlashAttention. Use attention sdpa or eager."
            )
        return FLASH_ATTENTION_2
    return "sdpa" if request.attention == "sdpa" and model._supports_sdpa else "eager"


def build_base(
    config: transformers.PreTrainedConfig, request: MemoryRequest, *, attention: str
) -> nn.Module:
    """Return the base model on the meta device, quantized as asked, in the compute type."""
    dtype = DTYPES[request.compute_dtype]
    config = copy.deepcopy(config)
    config.use_cache = False  # as the Trainer sets it
    with torch.device("meta"), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    if request.quantization != "none":
        _quantize(model, request, dtype)
    frozen: nn.Module = model.requires_grad_(False)
    return frozen


def _quantize(
    model: transformers.PreTrainedModel, request: MemoryRequest, dtype: torch.dtype
) -> None:
    double = request.quantization == "nf4"
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
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight = _meta_weight(module, double=double, dtype=dtype)
    _cast_biases(model, dtype)
    model.is_loaded_in_4bit = True
    model.is_quantized = True
    model.quantization_method = (
        transformers.utils.quantization_config.QuantizationMethod.BITS_AND_BYTES
    )


def _meta_weight(
    module: bnb.nn.Linear4bit, *, double: bool, dtype: torch.dtype
) -> bnb.nn.Params4bit:
    """Return the packed weight with the tensors of its quant state, all on the meta device.

    Source: bitsandbytes ``functional.py``, ``quantize_4bit``.
    """
    shape = torch.Size((module.out_features, module.in_features))
    n = math.prod(shape)
    blocks = math.ceil(n / NF4_BLOCK)

    def empty(count: int | tuple[int, ...], of: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=of, device="meta")

    offset, nested = None, None
    if double:
        offset = empty((), torch.float32)
        nested = QuantState(
            absmax=empty(math.ceil(blocks / NF4_BLOCKS_PER_STATE), torch.float32),
            code=empty(256, torch.float32),
            blocksize=NF4_BLOCKS_PER_STATE,
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=empty(blocks, torch.uint8 if double else torch.float32),
        shape=shape,
        code=empty(16, torch.float32),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=offset,
        state2=nested,
    )
    module.quant_state = state
    return bnb.nn.Params4bit(
        empty((math.ceil(n / 2), 1), torch.uint8),
        requires_grad=False,
        quant_state=state,
        blocksize=NF4_BLOCK,
        compress_statistics=double,
        quant_type="nf4",
        bnb_quantized=True,
        module=module,
    )


def base_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor of the base: frozen parameters, and those of the quant states."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            yield parameter.data
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            parts = (state.absmax, state.code, state.offset)
            nested = () if state.state2 is None else (state.state2.absmax, state.state2.code)
            yield from (part for part in (*parts, *nested) if part is not None)


def target_modules(linears: tuple[LinearShape, ...], lane: LaneShape) -> tuple[str, ...]:
    """Return the full names of the modules that a lane adapts, in module order.

    Raises:
        TargetModulesError: A target is none of the model's linear layers.
    """
    for target in lane.targets:
        if not any(matches_suffix(linear.name, target) for linear in linears):
            kinds = ", ".join(sorted({linear.name.rpartition(".")[2] for linear in linears}))
            raise TargetModulesError(
                f'target module "{target}" is no linear layer of this model. '
                f"Its linear layers: {kinds}."
            )
    return tuple(
        linear.name
        for linear in linears
        if any(matches_suffix(linear.name, target) for target in lane.targets)
    )


def add_peft_adapters(
    model: nn.Module, request: MemoryRequest, modules: Sequence[str], *, device: str
) -> nn.Module:
    """Return the model with PEFT's adapters on these modules, prepared as the stack does it."""
    (lane,) = request.lanes
    if request.stack == "trainer-kbit":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        _cast_biases(model, DTYPES[request.compute_dtype])
    config = peft.LoraConfig(
        r=lane.rank,
        lora_alpha=2 * lane.rank,
        lora_dropout=lane.lora_dropout,
        target_modules=list(modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.device(device), quiet_libraries():
        wrapped = peft.get_peft_model(model, config)
    if request.adapter_dtype != "float32":
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[request.adapter_dtype])
    result: nn.Module = wrapped
    return result


def _cast_biases(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the biases of 4-bit layers as their first forward pass does, for good.

    Source: bitsandbytes ``nn/modules.py``, ``Linear4bit.forward``.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' warnings back: they are about names, training and missing token ids.

    PEFT says that it changes ``fan_in_fan_out`` by itself, transformers that a function will be
    renamed, that a loss type is the default one, that Falcon has no layer to quantize.
    """
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
