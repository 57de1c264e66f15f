"""Floating-point operations of a LoRA step, and how fast this device multiplies matrices at all.

Per token of a Llama decoder with T tokens a row, P weights in the frozen linear layers, P_lora in an adapter:

    frozen linears   2 P forward, 2 P backward (inputs only: frozen weights get no gradient)
    adapter          2 P_lora forward, 4 P_lora backward (inputs and weights)
    attention        2 T D forward, 4 T D backward a layer; D = heads * head size, half of T x T is masked
    head             2 V H forward, 2 V H backward, for each label token alone

Not counted, so that the utilisation is of useful work: dequantizing 4-bit weights, norms, the optimizer,
what a checkpointed layer computes again. The inputs of the first layer need no gradient; their share,
below one part in the number of layers, is counted all the same.
"""

from collections.abc import Mapping
from statistics import median

import torch
from machine import seconds_of

CEILING_TOKENS = 8192
_REPEATS = 5
_IN_A_ROW = 10


def linear_sizes(config: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of one decoder layer's linear layers."""
    hidden, inner = _number(config, "hidden_size"), _number(config, "intermediate_size")
    head = _head_size(config)
    queries = _number(config, "num_attention_heads") * head
    keys = _number(config, "num_key_value_heads") * head
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def step_flops(
    config: Mapping[str, object], *, rank: int, length: int, tokens: int, labels: int
) -> int:
    """Return the useful operations of forward and backward with adapters on all linear layers.

    Args:
        config: Sizes of a Llama, as in its config.json.
        rank: Of every adapter.
        length: Tokens a row.
        tokens: Of all rows and lanes of the step.
        labels: Label tokens of the same.
    """
    layers = _number(config, "num_hidden_layers")
    sizes = linear_sizes(config).values()
    frozen = layers * sum(outputs * inputs for outputs, inputs in sizes)
    adapter = layers * rank * sum(outputs + inputs for outputs, inputs in sizes)
    attended = layers * _number(config, "num_attention_heads") * _head_size(config) * length
    head = _number(config, "vocab_size") * _number(config, "hidden_size")
    return tokens * (4 * frozen + 6 * adapter + 6 * attended) + labels * 4 * head


def measure_ceiling(
    config: Mapping[str, object], *, dtype: torch.dtype, device: str, tokens: int = CEILING_TOKENS
) -> dict[str, float]:
    """Return FLOP/s of matrix products at the model's sizes, of one layer's together, and of a square.

    The products are (tokens, in) @ (in, out), and (tokens, tokens) squared: what the device can do at best.
    Each is the median of five times ten, one after the other without waiting in between.
    """
    sizes = {**linear_sizes(config), "square": (tokens, tokens)}
    _product_s(tokens, tokens, tokens, dtype=dtype, device=device)  # an idle GPU's clock is low
    rates, spent, done = {}, 0.0, 0
    for name, (outputs, inputs) in sizes.items():
        taken = _product_s(tokens, inputs, outputs, dtype=dtype, device=device)
        flops = 2 * tokens * inputs * outputs
        rates[name] = flops / taken
        if name != "square":
            spent, done = spent + taken, done + flops
    return {**rates, "layer": done / spent}


def _product_s(tokens: int, inputs: int, outputs: int, *, dtype: torch.dtype, device: str) -> float:
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    w = torch.randn(outputs, inputs, dtype=dtype, device=device)

    def work() -> None:
        for _ in range(_IN_A_ROW):
            x @ w.T

    work()
    return median(seconds_of(work, device) for _ in range(_REPEATS)) / _IN_A_ROW


def _head_size(config: Mapping[str, object]) -> int:
    given = config.get("head_dim")
    if given is not None:
        return int(str(given))
    return _number(config, "hidden_size") // _number(config, "num_attention_heads")


def _number(config: Mapping[str, object], key: str) -> int:
    return int(str(config[key]))
