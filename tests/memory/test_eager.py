"""What eager attention keeps and holds, against sums over its operations done by hand.

Each sum is bytes per token: q the width of all query heads, ``scores`` the heads times the tokens of a row.
"""

from dataclasses import replace

import pytest

from lora_tune.memory.eager import eager_attention
from lora_tune.memory.ledger import Block, Gradient, Value
from lora_tune.memory.ops import Heads, Ops
from lora_tune.memory.request import LaneShape, resolve_request
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.step import Step

HEADS, HEAD_DIM, LENGTH = 8, 64, 128
Q, SCORES = HEADS * HEAD_DIM, HEADS * LENGTH


def step_ops(*, stack: str = "trainer", dtype: str = "bfloat16", rows: int = 2) -> Ops:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": Q,
        "intermediate_size": 1024,
        "num_attention_heads": HEADS,
        "vocab_size": 1024,
    }
    request = resolve_request(
        stack=stack,
        quantization="nf4",
        compute_dtype=dtype,
        lanes=(LaneShape(rank=8, targets=("q_proj",), lora_dropout=0.0),),
        micro_batch_size=rows,
        max_length=LENGTH,
        gradient_checkpointing=False,
        gradient_accumulation=False,
    )
    request = replace(request, attention="eager")  # which our engine runs for some models only
    return Step(ModelShape.from_config(config), request).ops


def heads(kv_heads: int = 2) -> Heads:
    return Heads(
        count=HEADS,
        query_size=Q,
        kv_count=kv_heads,
        kv_size=kv_heads * HEAD_DIM,
        head_dim=HEAD_DIM,
        masked=True,
    )


def attend(
    ops: Ops,
    *,
    e: int = 2,
    kv_heads: int = 2,
    softcap: bool = False,
    float32_softmax: bool = True,
    dropout: bool = False,
    grads: list[Block] | None = None,
) -> Value:
    """Run it on fresh query, key and value; what reaches them in backward goes into ``grads``."""

    def sink(gradient: Gradient) -> None:
        block = gradient.pop()
        if grads is not None:
            grads.append(block)

    tokens = ops.n.tokens
    values = [
        Value(ops.book.hold(e * tokens * width), e, ops.book.node(sink))
        for width in (Q, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM)
    ]
    return eager_attention(
        ops,
        *values,
        heads(kv_heads),
        softcap=softcap,
        float32_softmax=float32_softmax,
        dropout=dropout,
    )


def kept_per_token(ops: Ops, **kwargs: object) -> float:
    attend(ops, **kwargs)  # type: ignore[arg-type]
    return ops.book.now / ops.n.tokens


@pytest.mark.parametrize("kv_heads", [2, HEADS])
@pytest.mark.parametrize("rows", [1, 2])
def test_half_precision_keeps_query_key_value_and_two_copies_of_the_softmax(
    rows: int, kv_heads: int
) -> None:
    # q, k, v of all heads 2 each; softmax in float32, its copy in 16 bit
    expected = 3 * 2 * Q + (4 + 2) * SCORES
    assert kept_per_token(step_ops(rows=rows), kv_heads=kv_heads) == expected


def test_a_single_key_head_in_a_single_row_is_not_copied_for_every_query_head() -> None:
    ops = step_ops(rows=1)
    assert kept_per_token(ops, kv_heads=1) == 2 * Q + 2 * 2 * HEAD_DIM + (4 + 2) * SCORES


def test_float32_keeps_one_softmax() -> None:
    assert kept_per_token(step_ops(dtype="float32"), e=4) == 3 * 4 * Q + 4 * SCORES


def test_after_kbit_preparation_autocast_keeps_16_bit_operands_and_both_softmaxes() -> None:
    # float32 q, k, v are cast for the products; the probabilities are float32 until the second
    expected = 3 * 2 * Q + (4 + 2) * SCORES
    assert kept_per_token(step_ops(stack="trainer-kbit"), e=4) == expected


def test_a_soft_cap_keeps_the_tanh_as_well() -> None:
    plain, capped = (kept_per_token(step_ops(), softcap=cap) for cap in (False, True))
    assert capped - plain == 2 * SCORES


def test_softmax_of_no_stated_type_is_float32_under_autocast_only() -> None:
    expected = {"trainer": 3 * 2 * Q + 6 * SCORES, "lora-tune": 3 * 2 * Q + 2 * SCORES}
    for stack, sum_by_hand in expected.items():
        ops = step_ops(stack=stack)
        assert kept_per_token(ops, kv_heads=HEADS, float32_softmax=False) == sum_by_hand


def test_dropout_keeps_the_softmax_the_mask_and_what_is_left() -> None:
    # softmax 4; dropped probabilities 2 and their mask 1, in place of the 16-bit copy
    assert kept_per_token(step_ops(), dropout=True) == 3 * 2 * Q + (4 + 2 + 1) * SCORES


def test_without_gradients_nothing_is_kept_but_the_named_probabilities() -> None:
    ops = step_ops()
    ops.book.grad_enabled = False
    named: list[Block] = []
    values = [Value(ops.book.hold(2 * ops.n.tokens * Q), 2, None) for _ in range(3)]
    out = eager_attention(ops, *values, heads(HEADS), named=named)
    values.clear()
    assert ops.book.now == ops.n.tokens * (2 * Q + 2 * SCORES)
    named.clear()
    del out
    assert ops.book.now == 0


@pytest.mark.parametrize("cuda", [True, False])
def test_softmax_backward_holds_sixteen_bytes_a_score_on_cuda(cuda: bool) -> None:
    ops = step_ops(stack="lora-tune")
    if not cuda:
        ops = Ops(ops.book, replace(ops.n, compute_capability=None))
    grads: list[Block] = []
    out = attend(ops, grads=grads)
    node = out.node
    assert node is not None
    tokens = ops.n.tokens
    node.gradient = out.block
    del out
    ops.book.peak = -1
    ops.book.run_backward()
    # gradient, softmax, result, and on CUDA the product of the first two; q and k are still kept, and
    # the gradient of v waits
    softmax = (16 if cuda else 12) * SCORES
    assert ops.book.peak == tokens * (softmax + 2 * 2 * Q + 2 * Q)
    assert [block.size for block in grads] == [2 * tokens * w for w in (128, 128, Q)]
    node.gradient = None
    grads.clear()
    assert ops.book.now == 0
