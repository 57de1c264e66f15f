"""The frozen base: changing the compute type loses nothing, and evaluation leaves NF4 weights alone."""

import torch

from lora_tune.engine.base import DTYPES, load_base_model
from lora_tune.engine.pack import PackSettings, TrialPack

SETTINGS = PackSettings(
    effective_batch_size=4, micro_batch_size=4, max_grad_norm=1.0, weight_decay=0.0, group_rank=64
)


def test_computing_in_bfloat16_and_then_in_float32_again_is_exact(tiny_llama, make_rows):
    rows = make_rows(6)
    base = load_base_model(tiny_llama, quantization="nf4", compute_dtype="float32", device="cpu")
    pack = TrialPack(base, rows, SETTINGS)
    [before] = pack.evaluate([None], rows, split="selection")
    base.set_compute_dtype(DTYPES["bfloat16"])
    [rounded] = pack.evaluate([None], rows, split="selection")
    base.set_compute_dtype(DTYPES["float32"])
    [after] = pack.evaluate([None], rows, split="selection")
    assert after == before
    assert rounded.loss_sums != before.loss_sums
    assert rounded.compute_dtype == "bfloat16"


def test_evaluation_does_not_repack_quantized_weights(tiny_llama, make_rows):
    rows = make_rows(4)
    base = load_base_model(tiny_llama, quantization="nf4", compute_dtype="bfloat16", device="cpu")
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    TrialPack(base, rows, SETTINGS).evaluate([None], rows, split="selection")
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
