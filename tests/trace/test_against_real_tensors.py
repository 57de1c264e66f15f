"""The step on the meta device against the same step on real tensors, to the byte.

A model of four layers runs once on the meta device and once on the CPU, with weights that
bitsandbytes really quantized and with real arithmetic in forward and backward. Both are counted by
the same tracker; what is compared is the total after every block of the step and the largest
total inside it. What kernels hold inside themselves is left out on both sides, since
only its CUDA kind is known. Attention is the eager one, or the kernel that a CPU runs.
"""

from itertools import accumulate

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import lora_tune.engine.attention
from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.trace.attention import AttentionKernels
from lora_tune.trace.model import attention_name, build_base, read_config, target_modules
from lora_tune.trace.run import linear_shapes, run_model
from lora_tune.trace.tracker import Block, History, StorageTracker

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*QKVO, "gate_proj", "up_proj", "down_proj")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
GPT2 = {"model_type": "gpt2", "n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 640}
CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
MIXED = (
    LaneShape(rank=4, targets=QKVO, lora_dropout=0.0),
    LaneShape(rank=16, targets=ALL, lora_dropout=0.1),
)


def request(**changes: object) -> MemoryRequest:
    given = {
        "stack": "trainer",
        "quantization": "nf4",
        "compute_dtype": "bfloat16",
        "lanes": (LaneShape(rank=8, targets=ALL, lora_dropout=0.1),),
        "micro_batch_size": 2,
        "max_length": 64,
        "gradient_checkpointing": True,
        "gradient_accumulation": False,
        "autocast": True,
        "attention": "eager",
        "compute_capability": None,
    }
    return MemoryRequest(**(given | changes))


def without_dropout(targets: tuple[str, ...] = ALL) -> tuple[LaneShape, ...]:
    return (LaneShape(rank=8, targets=targets, lora_dropout=0.0),)


def engine(**changes: object) -> MemoryRequest:
    return request(stack="lora-tune", autocast=False, attention="sdpa", **changes)


CASES = {
    "checkpointed": (LLAMA, request()),
    "kept": (LLAMA, request(gradient_checkpointing=False)),
    "no dropout": (LLAMA, request(lanes=without_dropout(), gradient_checkpointing=False)),
    "query and value only": (
        LLAMA,
        request(lanes=without_dropout(("q_proj", "v_proj")), gradient_checkpointing=False),
    ),
    "no autocast": (LLAMA, request(autocast=False)),
    "no autocast, kept": (LLAMA, request(autocast=False, gradient_checkpointing=False)),
    "outputs held": (LLAMA, request(outputs_held=True)),
    "accumulated": (LLAMA, request(gradient_accumulation=True)),
    "padded": (LLAMA, request(padded=True, gradient_checkpointing=False)),
    "one level of quantization": (LLAMA, request(quantization="nf4-single")),
    "not quantized": (LLAMA, request(quantization="none")),
    "float32, the kernel of a CPU": (
        LLAMA,
        request(compute_dtype="float32", autocast=False, attention="sdpa"),
    ),
    "k-bit preparation": (LLAMA, request(stack="trainer-kbit")),
    "k-bit preparation, kept": (
        LLAMA,
        request(stack="trainer-kbit", gradient_checkpointing=False, outputs_held=True),
    ),
    "trl": (LLAMA, request(stack="trl", adapter_dtype="bfloat16")),
    "trl, kept": (
        LLAMA,
        request(stack="trl", adapter_dtype="bfloat16", gradient_checkpointing=False),
    ),
    "engine": (LLAMA, engine()),
    "engine, kept": (LLAMA, engine(gradient_checkpointing=False)),
    "engine, two lanes": (LLAMA, engine(lanes=MIXED, group_rank=0)),
    "engine, two lanes grouped": (LLAMA, engine(lanes=MIXED, gradient_checkpointing=False)),
    "engine, two groups": (LLAMA, engine(lanes=MIXED * 2, group_rank=20)),
    "engine, float32": (LLAMA, engine(lanes=MIXED, compute_dtype="float32")),
    "engine, GPT-2": (GPT2, engine(lanes=without_dropout(CONV1D))),
    "engine, not quantized, with biases": (
        QWEN2,
        engine(quantization="none", gradient_checkpointing=False),
    ),
    "GPT-2": (GPT2, request(lanes=without_dropout(CONV1D))),
    "GPT-2, kept": (GPT2, request(lanes=without_dropout(CONV1D), gradient_checkpointing=False)),
}


def materialize(model: nn.Module, asked: MemoryRequest) -> nn.Module:
    """Put real tensors into a model that was built on the meta device; 4-bit ones by quantizing."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = torch.randn(module.out_features, module.in_features).mul_(0.02)
            module.weight = bnb.nn.Params4bit(
                values.to(getattr(torch, asked.compute_dtype)),
                requires_grad=False,
                compress_statistics=asked.quantization == "nf4",
                quant_type="nf4",
                module=module,
            ).to("cpu")
            module.support_avx512bf16_for_cpu = False
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                values = torch.randn(parameter.shape).mul_(0.02).to(parameter.dtype)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device.type == "meta":
                setattr(module, name, torch.ones(buffer.shape, dtype=buffer.dtype))
    model.tie_weights()
    return model


def traced(config: dict[str, object], asked: MemoryRequest, *, real: bool) -> History:
    text = read_config(config)
    model = build_base(text, asked, attention=attention_name(text, asked))
    targets = [target_modules(linear_shapes(model), lane) for lane in asked.lanes]
    if real:
        model = materialize(model, asked)
    return run_model(model, asked, targets=targets, temporaries=None).history


def totals(block: Block) -> list[int]:
    """Return the running total of a block after each of its events, the batch's tensors aside.

    The engine collates on the host, whose tensors a CPU can not tell from those of the device.
    """
    events = [(made, s) for made, s in block.events if s.category != "inputs"]
    changes = (s.booked_bytes if made else -s.booked_bytes for made, s in events)
    return list(accumulate(changes, initial=0))


def readings(history: History) -> list[tuple[object, int, int]]:
    """Return of every block its name, its largest running total, and its last."""
    return [(b.name, max(totals(b)), totals(b)[-1]) for b in history.blocks]


def static_bytes(history: History) -> dict[str, int]:
    found: dict[str, int] = {}
    for storage in history.static:
        found[storage.category] = found.get(storage.category, 0) + storage.booked_bytes
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_step_without_data_makes_what_a_real_step_makes(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_tune.engine.attention, "SHORT", 0)  # a CPU's own form in 16 bit
    monkeypatch.setattr(AttentionKernels, "_has_flash", lambda *_: False)  # CUDA's, in 16 bit
    config, asked = CASES[case]
    meta, real = traced(config, asked, real=False), traced(config, asked, real=True)
    assert static_bytes(meta) == static_bytes(real)
    assert readings(meta) == readings(real)
    assert len(meta.blocks) > 8  # four layers, both ways: the step was really divided


def test_a_tracker_that_misses_an_operation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = CASES["kept"]
    real = traced(config, asked, real=True)
    see = StorageTracker._see

    def blind(self: StorageTracker, tensor: torch.Tensor, op: str) -> None:
        if op != "aten::silu":
            see(self, tensor, op)

    monkeypatch.setattr(StorageTracker, "_see", blind)
    assert readings(traced(config, asked, real=False)) != readings(real)
