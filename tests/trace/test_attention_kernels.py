"""Which attention kernel is traced, by mask, type, heads and card, against torch's own rules.

The expected kernels are read off ``sdp_utils.cpp`` of torch 2.13; what they keep is counted.
"""

import pytest
import torch
from torch import Tensor

from lora_tune.trace.attention import AttentionKernels
from lora_tune.trace.tracker import StorageTracker

FLASH = "aten::_scaled_dot_product_flash_attention"
EFFICIENT = "aten::_scaled_dot_product_efficient_attention"
WRITTEN_OUT = "aten::_safe_softmax"
HALF = torch.bfloat16


def heads(count: int, width: int = 64, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty((1, count, 32, width), dtype=dtype, device="meta").requires_grad_()


def kernels_run(
    query: Tensor,
    key: Tensor,
    *,
    mask: bool = False,
    card: str | None = "8.9",
    dropout: float = 0.0,
) -> set[str]:
    tracker = StorageTracker(device_type="meta", vocab_size=0)
    attn_mask = torch.ones((1, 1, 32, 32), dtype=torch.bool, device="meta") if mask else None
    with tracker:
        AttentionKernels(compute_capability=card).attention(
            query, key, key, attn_mask, dropout, not mask, enable_gqa=key.shape[1] != query.shape[1]
        )
    return {s.op for made, s in tracker.history.blocks[0].events if made}


@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [
        (FLASH, {"query": heads(4), "key": heads(2)}),
        (FLASH, {"query": heads(4, 256), "key": heads(4, 256)}),
        (EFFICIENT, {"query": heads(4, 256), "key": heads(4, 256), "dropout": 0.1}),
        (FLASH, {"query": heads(4, 256), "key": heads(4, 256), "dropout": 0.1, "card": "8.0"}),
        (EFFICIENT, {"query": heads(4, 224), "key": heads(4, 224), "card": "12.0"}),
        (EFFICIENT, {"query": heads(4, 512), "key": heads(4, 512)}),
        (EFFICIENT, {"query": heads(4), "key": heads(4), "mask": True}),
        (EFFICIENT, {"query": heads(4, dtype=torch.float32), "key": heads(4, dtype=torch.float32)}),
        # torch 2.13 has no memory-efficient kernel for fewer key heads
        (
            WRITTEN_OUT,
            {"query": heads(4, dtype=torch.float32), "key": heads(2, dtype=torch.float32)},
        ),
        (WRITTEN_OUT, {"query": heads(4), "key": heads(4), "card": "7.5"}),
        (
            EFFICIENT,
            {
                "query": heads(4, dtype=torch.float16),
                "key": heads(4, dtype=torch.float16),
                "card": "7.5",
            },
        ),
    ],
)
def test_the_kernel_is_the_one_that_the_card_would_choose(
    kernel: str, arguments: dict[str, object]
) -> None:
    run = kernels_run(**arguments)
    assert kernel in run
    assert not ({FLASH, EFFICIENT, WRITTEN_OUT} - {kernel}) & run


def test_a_mask_becomes_a_bias_in_the_type_of_the_query() -> None:
    tracker = StorageTracker(device_type="meta", vocab_size=0)
    mask = torch.ones((2, 1, 32, 32), dtype=torch.bool, device="meta")
    query = torch.empty((2, 4, 32, 64), dtype=HALF, device="meta").requires_grad_()
    with tracker:
        out = AttentionKernels(compute_capability="8.9").attention(query, query, query, mask)
        sizes = [s.num_bytes for made, s in tracker.history.blocks[0].events if made]
    assert 2 * 32 * 32 * 2 in sizes  # one matrix per row of the batch, not per head
    assert out.shape == query.shape


def test_heads_of_odd_width_are_padded_for_flash_attention() -> None:
    tracker = StorageTracker(device_type="meta", vocab_size=0)
    query = heads(4, 60)
    with tracker:
        out = AttentionKernels(compute_capability="8.9").attention(query, query, query)
    padded = [s for made, s in tracker.history.blocks[0].events if made and "pad" in s.op]
    assert len(padded) == 3
    assert padded[0].num_bytes == 2 * 4 * 32 * 64
    assert out.shape == query.shape
