"""The exact tier as a whole: published readings, hand sums, depth, families, terms, bad input.

The readings of Llama-3.1-8B are those of an earlier trace by other code (the notes' table of sanity
targets, in GiB to three digits); static bytes and parameter counts are worked out by hand there.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from lora_tune.errors import ModelError, TargetModulesError
from lora_tune.memory.request import LaneShape, MemoryRequest, resolve_request
from lora_tune.records import MemoryEstimate
from lora_tune.trace.estimate import trace_memory
from lora_tune.trace.tracker import StorageTracker

GIB = 1 << 30
QV = ("q_proj", "v_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*QKVO, "gate_proj", "up_proj", "down_proj")
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
SMALL = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# config, targets; depths and periods such that some layers are really repeated
FAMILIES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "llama": ({"model_type": "llama", **SMALL}, ALL),
    "mistral": ({"model_type": "mistral", **SMALL, "sliding_window": 16}, ALL),
    "qwen2": ({"model_type": "qwen2", **SMALL, "tie_word_embeddings": True}, ALL),
    "qwen3": ({"model_type": "qwen3", **SMALL, "head_dim": 64}, ALL),
    "gemma2": ({"model_type": "gemma2", **SMALL, "num_hidden_layers": 8, "head_dim": 48}, ALL),
    "gemma3_text": (
        {
            "model_type": "gemma3_text",
            **SMALL,
            "num_hidden_layers": 16,
            "head_dim": 48,
            "sliding_window": 16,
        },
        ALL,
    ),
    "phi3": ({"model_type": "phi3", **SMALL}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 192, "n_layer": 7, "n_head": 4, "vocab_size": 1000},
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
    "gpt_neox": ({"model_type": "gpt_neox", **SMALL}, NEOX),
    "falcon": ({"model_type": "falcon", **SMALL, "bias": False, "alibi": False}, NEOX),
    "mixtral": ({"model_type": "mixtral", **SMALL, "num_local_experts": 4}, QKVO),
    "qwen2_moe": (
        {"model_type": "qwen2_moe", **SMALL, **EXPERTS, "shared_expert_intermediate_size": 64},
        QKVO,
    ),
    "qwen3_moe": ({"model_type": "qwen3_moe", **SMALL, **EXPERTS, "head_dim": 48}, QKVO),
}
STACKS = ("lora-tune", "trainer", "trainer-kbit", "trl")


def request(
    stack: str = "trainer",
    *,
    targets: tuple[str, ...] = ALL,
    dropout: float = 0.05,
    rank: int = 16,
    rows: int = 2,
    length: int = 32,
    checkpointing: bool = True,
    lanes: int = 1,
    capability: str | None = None,
    **changes: object,
) -> MemoryRequest:
    asked = resolve_request(
        stack=stack,
        quantization="nf4",
        compute_dtype="bfloat16",
        lanes=(LaneShape(rank=rank, targets=targets, lora_dropout=dropout),) * lanes,
        micro_batch_size=rows,
        max_length=length,
        gradient_checkpointing=checkpointing,
        gradient_accumulation=False,
        compute_capability=capability,
    )
    return replace(asked, **changes)


# checkpointing, targets, tokens per row, rows, peak in GiB with the outputs held
READINGS = [
    (True, QV, 512, 1, 6.377),
    (True, QV, 512, 4, 9.344),
    (True, QV, 2048, 1, 9.344),
    (True, QV, 2048, 4, 21.213),
    (True, ALL, 512, 1, 6.769),
    (True, ALL, 512, 4, 9.736),
    (True, ALL, 2048, 1, 9.737),
    (True, ALL, 2048, 4, 21.605),
    (False, QV, 512, 1, 8.755),
    (False, QV, 512, 4, 18.821),
    (False, QV, 2048, 1, 18.822),
    (False, QV, 2048, 4, 59.087),
    (False, ALL, 512, 1, 10.620),
    (False, ALL, 512, 4, 24.906),
    (False, ALL, 2048, 1, 24.907),
    (False, ALL, 2048, 4, 82.052),
]


@pytest.mark.parametrize(("checkpointing", "targets", "length", "rows", "gib"), READINGS)
def test_the_readings_of_the_8b_model_come_out_again(
    checkpointing: bool, targets: tuple[str, ...], length: int, rows: int, gib: float
) -> None:
    asked = request(
        targets=targets,
        length=length,
        rows=rows,
        checkpointing=checkpointing,
        outputs_held=True,
    )
    estimate = trace_memory(LLAMA_8B, asked)
    # three digits were written down, and this is exact: half a unit of the last one
    assert estimate.peak_allocated_bytes / GIB == pytest.approx(gib, abs=0.0006)
    assert estimate.terms["base_weights"] == 5_702_540_160
    assert estimate.peak_phase == "loss"
    assert estimate.terms["gradients"] == 0


@pytest.mark.parametrize(
    ("gib", "changes"),
    [
        (19.649, {"outputs_held": False}),
        (26.543, {"stack": "trainer-kbit"}),
        (27.521, {"stack": "trainer-kbit", "autocast": False}),
        (21.908, {"quantization": "nf4-single"}),
        (31.252, {"quantization": "none"}),
        (21.372, {"optimizer": "adamw-8bit"}),
        (21.621, {"padded": True}),
        (86.052, {"checkpointing": False, "padded": True}),
        (64.646, {"checkpointing": False, "dropout": 0.0}),
        (101.029, {"checkpointing": False, "autocast": False}),
        (105.989, {"checkpointing": False, "stack": "trainer-kbit"}),
    ],
)
def test_what_moves_the_number_moves_it_as_written_down(
    gib: float, changes: dict[str, object]
) -> None:
    asked = request(**{"length": 2048, "rows": 4, "outputs_held": True, **changes})
    assert trace_memory(LLAMA_8B, asked).peak_allocated_bytes / GIB == pytest.approx(
        gib, abs=0.0011
    )


def test_the_hand_sum_of_the_logits_comes_out() -> None:
    held = trace_memory(LLAMA_8B, request(length=512, rows=1, outputs_held=True))
    # k = 14: log-softmax, its gradient, that of the loss, and the bf16 logits; two small labels beside
    assert held.terms["logits_and_loss"] == 512 * 128256 * 14
    assert held.terms["adapters"] == 4 * 41_943_040
    assert held.terms["optimizer"] == 8 * 41_943_040


@pytest.mark.parametrize(
    ("config", "rank", "targets", "count"),
    [
        (LLAMA_8B, 16, QKVO, 13_631_488),
        (LLAMA_8B, 16, ALL, 41_943_040),
        ({"model_type": "gpt2"}, 8, ("c_attn",), 294_912),
    ],
)
def test_trainable_parameters_are_counted(
    config: dict[str, object], rank: int, targets: tuple[str, ...], count: int
) -> None:
    estimate = trace_memory(config, request(rank=rank, targets=targets, length=16, rows=1))
    assert estimate.trainable_parameters == count
    assert estimate.method == "trace"


def test_the_base_parameters_of_the_8b_model_are_counted() -> None:
    assert trace_memory(LLAMA_8B, request(length=16, rows=1)).base_parameters == 8_030_261_248


def grid() -> Iterator[object]:
    """Yield families, stacks, checkpointing; two stacks of each family in the normal run."""
    for number, family in enumerate(FAMILIES):
        for offset, stack in enumerate(STACKS):
            normal = (number + offset) % len(STACKS) in (0, 3)
            for checkpointing in (True, False):
                marks = () if normal and checkpointing == (offset % 2 == 0) else pytest.mark.slow
                yield pytest.param(family, stack, checkpointing, marks=marks)


@pytest.mark.parametrize(("family", "stack", "checkpointing"), list(grid()))
def test_repeated_layers_give_what_all_layers_give(
    family: str, stack: str, checkpointing: bool
) -> None:
    config, targets = FAMILIES[family]
    asked = request(stack, targets=targets, checkpointing=checkpointing, capability="8.9")
    short = trace_memory(config, asked)
    assert short == trace_memory(config, asked, full_depth=True)
    assert sum(short.terms.values()) == short.peak_allocated_bytes
    assert short.peak_reserved_bytes >= short.peak_allocated_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"lanes": 3},
        {"lanes": 3, "group_rank": 0, "checkpointing": False},
        {"gradient_accumulation": True},
        {"label_fraction": 0.25},
        {"compute_dtype": "float32"},
        {"quantization": "none"},
    ],
)
def test_repeated_layers_give_what_all_layers_give_in_the_engine(
    changes: dict[str, object],
) -> None:
    asked = request("lora-tune", capability="8.9", **changes)
    config, _ = FAMILIES["llama"]
    assert trace_memory(config, asked) == trace_memory(config, asked, full_depth=True)


def test_a_multimodal_config_is_its_text_part() -> None:
    text, targets = FAMILIES["gemma3_text"]
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 32}}
    asked = request(targets=targets)
    assert trace_memory(whole, asked) == trace_memory(text, asked)


def test_an_adapter_in_one_layer_is_traced_in_full() -> None:
    config, _ = FAMILIES["llama"]
    one = trace_memory(config, request(targets=("model.layers.3.mlp.up_proj",)))
    # rank 16 times (192 + 384)
    assert one.trainable_parameters == 16 * (192 + 384)
    every = tuple(f"model.layers.{i}.mlp.up_proj" for i in range(7))
    by_name = trace_memory(config, request(targets=every))
    assert by_name == trace_memory(config, request(targets=("up_proj",)))


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6])
def test_shallow_models_are_traced_too(layers: int) -> None:
    config = {**FAMILIES["llama"][0], "num_hidden_layers": layers}
    estimate = trace_memory(config, request())
    assert estimate.trainable_parameters == layers * 16 * sum(
        (192 + 192, 192 + 96, 192 + 96, 192 + 192, 192 + 384, 192 + 384, 384 + 192)
    )


def peak(**changes: object) -> MemoryEstimate:
    return trace_memory(FAMILIES["llama"][0], request(**changes))


def test_cuda_workspaces_are_on_top() -> None:
    without, with_card = peak(), peak(capability="8.9")
    added = with_card.peak_allocated_bytes - without.peak_allocated_bytes
    assert added == 2 * 8_519_680 + (1 << 20)
    assert with_card.terms["workspace"] - without.terms["workspace"] == added


def test_more_of_anything_never_takes_less() -> None:
    base = peak().peak_allocated_bytes
    assert peak(rank=32).peak_allocated_bytes > base
    assert peak(length=64).peak_allocated_bytes > base
    assert peak(rows=3).peak_allocated_bytes > base
    assert peak(checkpointing=False).peak_allocated_bytes > base
    assert peak(outputs_held=True).peak_allocated_bytes > base
    assert peak(quantization="none").peak_allocated_bytes > base


def test_eager_attention_keeps_its_matrices() -> None:
    kernel = peak(checkpointing=False, length=128, dropout=0.0)
    eager = peak(checkpointing=False, length=128, dropout=0.0, attention="eager")
    more = eager.peak_allocated_bytes - kernel.peak_allocated_bytes
    # 2 rows, 4 heads of 48, 2 key heads, bf16: float32 softmax and bf16 probabilities, two more
    # heads of key and value; instead of the kernel's log-sum-exp and its two random states
    scores = 6 * 2 * 4 * 128 * 128
    repeated = 2 * 2 * 2 * 128 * 48 * 2
    assert more == 7 * (scores + repeated - 4 * 2 * 4 * 128 - 2 * 512)


def test_flash_attention_is_unpadded_with_copies() -> None:
    flash = peak(attention="flash", checkpointing=False)
    assert flash == peak(attention="sdpa", checkpointing=False)
    padded = peak(attention="flash", checkpointing=False, padded=True)
    assert padded.peak_allocated_bytes > flash.peak_allocated_bytes


def test_8_bit_states_are_two_bytes_a_parameter_in_matrices_that_are_large_enough() -> None:
    small, large = peak(optimizer="adamw-8bit", rank=4), peak(optimizer="adamw-8bit", rank=64)
    # rank 4: no matrix has 4096 elements, so that the states are float32
    assert small.terms["optimizer"] == 8 * small.trainable_parameters
    assert large.terms["optimizer"] == 2 * large.trainable_parameters + 2 * 4 * (
        large.trainable_parameters // 256
    )


def test_gradients_of_earlier_micro_batches_count_at_the_loss() -> None:
    accumulated, alone = peak(gradient_accumulation=True, length=256), peak(length=256)
    assert (accumulated.peak_phase, alone.peak_phase) == ("loss", "loss")
    assert accumulated.terms["gradients"] == 4 * accumulated.trainable_parameters
    assert alone.terms["gradients"] == 0


def test_adapters_of_trl_are_half_as_large() -> None:
    trl, trainer = peak(stack="trl"), peak()
    assert 2 * trl.terms["adapters"] == trainer.terms["adapters"]
    assert 2 * trl.terms["optimizer"] == trainer.terms["optimizer"]


def test_a_gradient_that_nobody_else_has_is_added_to_in_place() -> None:
    x = torch.empty(1024, device="meta").requires_grad_()
    tracker = StorageTracker(device_type="meta", vocab_size=0)
    with tracker:
        loss = (x * 2 + x * 3 + x * 5).sum()
        tracker.enter_block("outside")
        loss.backward()
        added = [s.op for made, s in tracker.history.blocks[-1].events if made]
    assert added.count("aten::add.Tensor") == 0
    assert added.count("aten::mul.Tensor") == 3


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"hidden_size": 8}, ModelError, "model_type is missing"),
        ({"model_type": "nonsense"}, ModelError, "no model can be made of it"),
        ({"model_type": "vit"}, ModelError, '"vit" is no causal language model'),
    ],
)
def test_a_config_of_no_language_model_is_refused(
    config: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trace_memory(config, request())


def test_a_target_that_the_model_has_not_is_refused_with_the_real_names() -> None:
    with pytest.raises(TargetModulesError, match=r'"c_attn" is no linear layer .* q_proj'):
        trace_memory(FAMILIES["llama"][0], request(targets=("c_attn",)))
