"""What a mixture of experts keeps, against sums over its operations done by hand, in bytes per token.

The widths are multiples of 512 bytes for all tokens together, so that the allocator's rounding is nothing.
"""

import pytest

from lora_tune.memory.experts import begin_backward, sparse_mlp
from lora_tune.memory.ledger import Block, Gradient, Value
from lora_tune.memory.ops import Ops, Site
from lora_tune.memory.request import LaneShape, resolve_request
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.step import Step

H, F, E, K, SHARED, ROWS, LENGTH = 512, 256, 8, 2, 1024, 2, 128
TOKENS = ROWS * LENGTH

ROUTER = 4 * E + 8 * K + 4 + 4 * K  # softmax, chosen experts, their sum, what it divides
ORDERS = 3 * 8 * K  # permutation, token of each row, inverse permutation
EXPERTS = K * (2 * 2 * F + 2 * F + 2 * H)  # gate and up, silu, output; 16 bit


def moe_shape(model_type: str) -> ModelShape:
    config: dict[str, object] = {
        "model_type": model_type,
        "num_hidden_layers": 4,
        "hidden_size": H,
        "intermediate_size": F,
        "moe_intermediate_size": F,
        "shared_expert_intermediate_size": SHARED,
        "num_attention_heads": 8,
        "vocab_size": 1024,
        "num_experts": E,
        "num_local_experts": E,
        "num_experts_per_tok": K,
    }
    return ModelShape.from_config(config)


def step_ops(*, stack: str = "trainer", dtype: str = "bfloat16") -> Ops:
    """Return the operations of a step with two rows; the decoder that it is made for plays no part."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": H,
        "intermediate_size": F,
        "num_attention_heads": 8,
        "vocab_size": 1024,
    }
    request = resolve_request(
        stack=stack,
        quantization="nf4",
        compute_dtype=dtype,
        lanes=(LaneShape(rank=8, targets=("q_proj",), lora_dropout=0.0),),
        micro_batch_size=ROWS,
        max_length=LENGTH,
        gradient_checkpointing=False,
        gradient_accumulation=False,
    )
    return Step(ModelShape.from_config(config), request).ops


def sites(shape: ModelShape) -> dict[str, Site]:
    """Return the shared expert's linear layers, frozen."""
    return {
        linear.name: Site(inputs=linear.in_features, outputs=linear.out_features, quantized=True)
        for linear in shape.layer_linears
    }


def run(ops: Ops, shape: ModelShape, *, e: int = 2, grads: list[Block] | None = None) -> Value:
    """Run the block on an input that needs a gradient; what reaches it in backward goes to ``grads``."""

    def sink(gradient: Gradient) -> None:
        block = gradient.pop()
        if grads is not None:
            grads.append(block)

    x = Value(ops.book.hold(e * TOKENS * H), e, ops.book.node(sink))
    return sparse_mlp(ops, shape, sites(shape), x)


def kept_per_token(ops: Ops, model_type: str, *, e: int = 2) -> float:
    run(ops, moe_shape(model_type), e=e)
    return ops.book.now / TOKENS


def test_mixtral_keeps_router_orders_and_experts() -> None:
    # routing weights in float32
    by_hand = ROUTER + ORDERS + 4 * K + EXPERTS
    assert kept_per_token(step_ops(), "mixtral") == by_hand


def test_qwen3_routes_in_the_type_of_the_router() -> None:
    by_hand = ROUTER + ORDERS + 2 * K + EXPERTS
    assert kept_per_token(step_ops(), "qwen3_moe") == by_hand


def test_qwen2_does_not_normalize_and_adds_a_shared_expert() -> None:
    # of the shared expert gate, silu and up; its output and the sigmoid, which are multiplied
    shared = 3 * 2 * SHARED + 2 * H + 2
    by_hand = ROUTER - 4 - 4 * K + ORDERS + 2 * K + EXPERTS + shared
    assert kept_per_token(step_ops(), "qwen2_moe") == by_hand


def test_float32_doubles_what_the_experts_keep() -> None:
    by_hand = ROUTER + ORDERS + 4 * K + 2 * EXPERTS
    assert kept_per_token(step_ops(dtype="float32"), "mixtral", e=4) == by_hand


def test_after_kbit_preparation_autocast_keeps_a_copy_of_the_router_weight_once() -> None:
    # experts and input are float32 then, and grouped products are not on autocast's list
    ops = step_ops(stack="trainer-kbit")
    run(ops, moe_shape("mixtral"), e=4)
    by_hand = TOKENS * (ROUTER + ORDERS + 4 * K + 2 * EXPERTS) + 2 * E * H
    assert ops.book.now == by_hand


def test_routed_experts_keep_nothing_without_gradients() -> None:
    ops = step_ops()
    ops.book.grad_enabled = False
    out = run(ops, moe_shape("mixtral"))
    ops.book.tape.clear()
    assert ops.book.now == out.block.size == 2 * TOKENS * H


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_backward_frees_everything_but_one_gradient_of_the_input(model_type: str) -> None:
    ops = step_ops()
    grads: list[Block] = []
    out = run(ops, moe_shape(model_type), grads=grads)
    node = out.node
    assert node is not None
    node.gradient = out.block
    del out
    ops.book.run_backward()
    assert [block.size for block in grads] == [2 * TOKENS * H]
    assert ops.book.now == 2 * TOKENS * H


def test_mixtral_backward_peaks_where_the_routing_weights_get_their_gradient() -> None:
    ops = step_ops()
    out = run(ops, moe_shape("mixtral"))
    node = out.node
    assert node is not None
    kept = ops.book.now - out.block.size
    node.gradient = out.block
    del out
    ops.book.peak = -1
    ops.book.run_backward()
    # three float32 tensors of all rows: the gradient, and its products with weights and outputs; the
    # inverse permutation is gone
    assert ops.book.peak == kept + TOKENS * K * (3 * 4 * H - 8)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_recomputation_keeps_the_same_and_stops_before_the_output(model_type: str) -> None:
    shape = moe_shape(model_type)
    plain, again = step_ops(), step_ops()
    run(plain, shape)
    again.recomputing = True
    out = run(again, shape)
    assert again.book.stopped
    assert out.block.size == 0
    assert again.book.now == plain.book.now


def test_before_a_recomputation_the_gradient_is_spread_over_the_rows() -> None:
    shape = moe_shape("mixtral")
    ops = step_ops()
    gradient = ops.book.hold(2 * TOKENS * H)
    begin_backward(ops, shape, gradient)
    # in float32: of the sums (gone again), and of the k rows of each token
    assert ops.book.now == gradient.size + 4 * TOKENS * K * H
    assert ops.book.peak == gradient.size + 4 * TOKENS * (K + 1) * H
