"""Tokens per second, hours and cost: against hand arithmetic, published runs and the ladder's own plan.

No GPU is asked: what is checked is the arithmetic, its direction, and that the interval is honest.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.catalog.gpus import Gpu, find_gpu, load_gpus
from lora_tune.errors import StudyFileError
from lora_tune.memory.request import LaneShape, MemoryRequest, resolve_request
from lora_tune.memory.roofline import frozen_parameters, step_work
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.throughput import (
    PRIOR_HIGH,
    PRIOR_LOW,
    MeasuredPoint,
    estimate_throughput,
    measured_points,
    parse_price,
    plan_time,
    published_points,
    read_points,
)

LLAMA = ModelShape.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)
MIXTRAL = ModelShape.from_config(
    {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
)
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*QKVO, "gate_proj", "up_proj", "down_proj")
A100 = find_gpu("A100 80GB")


def request(
    *,
    lanes: int = 1,
    quantization: str = "nf4",
    checkpointing: bool = True,
    length: int = 2048,
    batch: int = 1,
    stack: str = "lora-tune",
    rank: int = 16,
    targets: tuple[str, ...] = ALL,
    **options: object,
) -> MemoryRequest:
    lane = LaneShape(rank=rank, targets=targets, lora_dropout=0.0)
    return resolve_request(
        stack=stack,
        quantization=quantization,
        compute_dtype="bfloat16",
        lanes=(lane,) * lanes,
        micro_batch_size=batch,
        max_length=length,
        gradient_checkpointing=checkpointing,
        gradient_accumulation=False,
        **options,
    )


def rate(gpu: Gpu = A100, shape: ModelShape = LLAMA, **options: object) -> float:
    return estimate_throughput(shape, request(**options), gpu, measured=()).tokens_per_s


def test_the_parts_of_a_step_are_what_hand_arithmetic_gives() -> None:
    # Llama-3.1-8B, 2048 tokens, NF4, checkpointing, one lane on an A100 80GB: 312e12 operations/s
    # times 0.70, 2039e9 bytes/s times 0.80 or, for dequantization, 0.25.
    parts = estimate_throughput(LLAMA, request(), A100, measured=()).parts
    assert frozen_parameters(LLAMA) == 6_979_321_856
    assert parts["products"] == pytest.approx(3 * 28_587_302_322_176 / 218.4e12)
    # 0.5 + 9/64 + 2 bytes per parameter, in forward, recomputation and backward
    assert parts["dequantize"] == pytest.approx(3 * 18_429_771_776 / 509.75e9)
    # 41,943,040 adapter parameters: 2 operations in each of two forwards, 4 in backward
    assert parts["adapters"] == pytest.approx(8 * 41_943_040 * 2048 / 218.4e12)
    # causal: 2*S*q per token and layer, times two forwards and a backward of 2.5
    assert parts["attention"] == pytest.approx(4.5 * 2 * 2048 * 4096 * 32 * 2048 / 156e12)
    # logits and their gradient
    assert parts["head"] == pytest.approx(4 * 128256 * 4096 * 2048 / 218.4e12)
    # clipping reads and writes the gradient and reads it for the norm; AdamW reads four values, writes three
    assert parts["optimizer"] == pytest.approx(40 * 41_943_040 / (2039e9 * 0.8))


def test_tokens_per_second_are_tokens_over_the_longer_of_device_and_host() -> None:
    for options in ({"length": 4096}, {"length": 64}):
        found = estimate_throughput(LLAMA, request(**options), A100, measured=())
        device = sum(seconds for part, seconds in found.parts.items() if part != "host")
        slower = max(device, found.parts["host"])
        assert found.tokens_per_s == pytest.approx(options["length"] / slower)
    assert slower == found.parts["host"]  # 64 tokens: the GPU waits for launches


@given(
    tflops=st.floats(20, 2000),
    bandwidth=st.floats(200, 8000),
    factor=st.floats(1, 4),
    length=st.sampled_from([64, 512, 4096]),
    lanes=st.sampled_from([1, 4]),
    quantization=st.sampled_from(["nf4", "none"]),
)
@settings(max_examples=60, deadline=None)
def test_a_gpu_that_is_faster_in_both_rates_is_never_slower(
    tflops: float, bandwidth: float, factor: float, length: int, lanes: int, quantization: str
) -> None:
    slow = replace(A100, bf16_tflops=tflops, bandwidth_gb_s=bandwidth)
    fast = replace(A100, bf16_tflops=tflops * factor, bandwidth_gb_s=bandwidth * factor)
    options = {"length": length, "lanes": lanes, "quantization": quantization}
    assert rate(fast, **options) >= rate(slow, **options)


def test_when_the_device_is_the_limit_twice_the_rates_are_twice_the_tokens() -> None:
    fast = replace(A100, bf16_tflops=624, bandwidth_gb_s=4078)
    options = {"length": 4096, "batch": 8}
    assert rate(fast, **options) == pytest.approx(2 * rate(A100, **options))


def test_checkpointing_costs_half_more_products_where_the_base_is_frozen() -> None:
    # forward + backward is 4 operations per parameter and token, recomputation adds 2
    def products(checkpointing: bool) -> float:
        asked = request(checkpointing=checkpointing, batch=8)
        return estimate_throughput(LLAMA, asked, A100, measured=()).parts["products"]

    assert products(True) / products(False) == pytest.approx(1.5)
    slowdown = rate(checkpointing=False, batch=8) / rate(checkpointing=True, batch=8)
    assert 4 / 3 - 0.05 < slowdown < 1.5  # elementwise backward is dearer than products' backward


def test_lanes_raise_the_tokens_per_second_of_nf4_and_approach_a_roof() -> None:
    rates = [rate(lanes=lanes, length=512) for lanes in (1, 2, 4, 8, 16, 32)]
    assert rates == sorted(rates)
    assert rates[1] > 1.1 * rates[0]
    gains = [b / a for a, b in zip(rates, rates[1:], strict=False)]
    assert gains[-1] < 1.05  # the roof
    # Dequantization is paid once for all lanes.
    one, many = (
        estimate_throughput(LLAMA, request(lanes=lanes, length=512), A100, measured=()).parts
        for lanes in (1, 16)
    )
    assert many["dequantize"] == one["dequantize"]
    assert many["products"] == pytest.approx(16 * one["products"])


def test_few_tokens_pay_for_reading_the_weights() -> None:
    work = step_work(LLAMA, request(length=8, quantization="none"))
    parts = estimate_throughput(
        LLAMA, request(length=8, quantization="none"), A100, measured=()
    ).parts
    assert parts["products"] == pytest.approx(3 * work.weight_bytes / (2039e9 * 0.8))
    assert parts["dequantize"] == 0


def test_what_a_stack_does_more_of_costs_time() -> None:
    long = {"length": 4096, "batch": 4}
    assert rate(**long, quantization="none") > rate(**long, quantization="nf4")
    assert rate(**long, label_fraction=0.1) > rate(**long, label_fraction=1.0)
    assert rate(**long, stack="trainer") > rate(**long, stack="trainer-kbit")
    assert rate(**long, stack="trainer", attention="sdpa") > rate(
        **long, stack="trainer", attention="eager"
    )
    assert rate(**long, stack="trainer") > rate(**long, stack="trainer", autocast=False)
    assert rate(**long, rank=8) > rate(**long, rank=256)
    assert rate(**long, targets=("q_proj",)) > rate(**long)


def test_more_micro_batches_per_step_share_the_optimizer() -> None:
    asked = request(length=512)
    once, shared = (
        estimate_throughput(LLAMA, asked, A100, accumulation_steps=steps, measured=()).parts
        for steps in (1, 8)
    )
    assert shared["optimizer"] == pytest.approx(once["optimizer"] / 8)
    assert shared["host"] < once["host"]


def test_a_mixture_of_experts_multiplies_two_experts_of_eight_and_reads_all() -> None:
    work = step_work(MIXTRAL, request(targets=QKVO))
    attention, expert = 32 * 41_943_040, 32 * 3 * 4096 * 14336
    assert work.layer_operations == 2 * (attention + 2 * expert) * 2048
    assert work.weight_bytes == 2 * (attention + 8 * expert)


def test_a_t4_has_no_bfloat16_units() -> None:
    t4 = find_gpu("T4")
    half = resolve_request(
        stack="trainer",
        quantization="nf4",
        compute_dtype="float16",
        lanes=(LaneShape(rank=16, targets=QKVO, lora_dropout=0.0),),
        micro_batch_size=1,
        max_length=2048,
        gradient_checkpointing=True,
        gradient_accumulation=False,
    )
    brain = replace(half, compute_dtype="bfloat16")
    rates = [
        estimate_throughput(LLAMA, asked, t4, measured=()).tokens_per_s for asked in (half, brain)
    ]
    assert rates[0] > 3 * rates[1]


# Where the numbers come from.


@pytest.mark.parametrize("gpu", load_gpus(), ids=lambda gpu: gpu.name)
def test_without_measured_points_the_interval_is_wide_and_says_so(gpu: Gpu) -> None:
    found = estimate_throughput(LLAMA, request(), gpu, measured=())
    assert found.basis == "prior"
    assert found.source.startswith("prior: no measured point for this class of GPU")
    assert found.low == PRIOR_LOW * found.tokens_per_s
    assert found.high == PRIOR_HIGH * found.tokens_per_s
    assert found.high > 3 * found.low


@pytest.mark.parametrize("point", published_points(), ids=lambda point: point.source)
def test_a_published_run_is_inside_the_prior_s_interval(point: MeasuredPoint) -> None:
    found = estimate_throughput(point.shape, point.request, find_gpu(point.gpu), measured=())
    assert found.low < point.tokens_per_s < found.high


def test_the_published_runs_are_several_cards_stacks_and_sizes() -> None:
    points = published_points()
    assert len(points) >= 10
    assert len({point.gpu for point in points}) >= 2
    assert {point.request.stack for point in points} == {"trainer", "trainer-kbit"}
    assert {point.shape.num_layers for point in points} == {32, 80}


def point(gpu: str, tokens_per_s: float, **options: object) -> MeasuredPoint:
    return MeasuredPoint(
        gpu=gpu,
        shape=LLAMA,
        request=request(**options),
        tokens_per_s=tokens_per_s,
        source="a test",
    )


def test_a_measured_point_moves_its_own_card_onto_it() -> None:
    model = rate(length=1024)
    points = [point("A100 80GB", 0.6 * model, length=1024)]
    found = estimate_throughput(LLAMA, request(length=1024), A100, measured=points)
    assert found.tokens_per_s == pytest.approx(0.6 * model)
    assert found.basis == "measured"
    assert found.source == "1 point measured on A100 80GB (a test)"
    assert found.low < found.tokens_per_s < found.high < 1.3 * found.tokens_per_s
    other = estimate_throughput(LLAMA, request(length=4096), A100, measured=points)
    assert other.tokens_per_s == pytest.approx(0.6 * rate(length=4096))


def test_a_card_of_the_same_class_borrows_points_with_a_wider_interval() -> None:
    points = [point("A100 80GB", rate(length=length), length=length) for length in (512, 2048)]
    own = estimate_throughput(LLAMA, request(), A100, measured=points)
    borrowed = estimate_throughput(LLAMA, request(), find_gpu("A100 40GB"), measured=points)
    stranger = estimate_throughput(LLAMA, request(), find_gpu("RTX 3090"), measured=points)
    assert own.high / own.low < borrowed.high / borrowed.low < stranger.high / stranger.low
    assert borrowed.basis == "measured"
    assert "A100 80GB" in borrowed.source
    assert stranger.basis == "prior"


def test_points_that_disagree_widen_the_interval_until_it_holds_them() -> None:
    model = rate()
    points = [point("A100 80GB", factor * model) for factor in (0.5, 0.7, 1.0, 1.4)]
    found = estimate_throughput(LLAMA, request(), A100, measured=points)
    assert found.tokens_per_s == pytest.approx((0.5 * 0.7 * 1.0 * 1.4) ** 0.25 * model)
    assert all(found.low < p.tokens_per_s < found.high for p in points)


def test_the_installed_table_is_readable_and_every_row_names_its_source() -> None:
    for known in (*measured_points(), *published_points()):
        assert known.source
        assert known.tokens_per_s > 0


def test_a_row_with_a_gpu_that_is_not_catalogued_is_refused() -> None:
    row = '[[measured]]\ngpu = "Quantum 9000"\nsource = "x"\ntokens_per_s = 1.0\n'
    with pytest.raises(StudyFileError, match="unknown GPU"):
        read_points(row)


# Hours and cost.

CARDS = [find_gpu(name) for name in ("T4", "RTX 4090", "A100 80GB", "H100")]


def test_hours_times_rate_are_the_tokens_and_cost_is_hours_times_price() -> None:
    prices = {"rtx-4090": 0.5, "H100": 3.0}
    for row in plan_time(LLAMA, request(), CARDS, tokens=10**8, prices=prices):
        assert row.hours * 3600 * row.estimate.tokens_per_s == pytest.approx(10**8)
        assert row.hours_low * 3600 * row.estimate.high == pytest.approx(10**8)
        assert row.hours_high * 3600 * row.estimate.low == pytest.approx(10**8)
        assert row.hours_low < row.hours < row.hours_high
        if row.gpu in ("RTX 4090", "H100 80GB SXM"):
            price = 0.5 if row.gpu == "RTX 4090" else 3.0
            assert row.cost == pytest.approx(row.hours * price)
            assert row.cost_low == pytest.approx(row.hours_low * price)
            assert row.cost_high == pytest.approx(row.hours_high * price)
        else:
            assert row.cost is row.cost_low is row.cost_high is None


def test_the_cheapest_finished_study_is_first_and_cards_without_price_follow_by_hours() -> None:
    rows = plan_time(LLAMA, request(), CARDS, tokens=10**8, prices={"T4": 0.2, "H100": 3.0})
    assert [row.gpu for row in rows[:2]] == ["H100 80GB SXM", "T4"]  # a slow card is not cheap
    assert rows[0].cost < rows[1].cost
    assert [row.gpu for row in rows[2:]] == ["A100 80GB", "RTX 4090"]
    dear = plan_time(LLAMA, request(), CARDS, tokens=10**8, prices={"T4": 0.2, "H100": 3000.0})
    assert [row.gpu for row in dear[:2]] == ["T4", "H100 80GB SXM"]


def test_a_pack_may_depend_on_the_gpu() -> None:
    lanes = {"T4": 1, "H100 80GB SXM": 8}
    rows = plan_time(
        LLAMA,
        lambda gpu: request(lanes=lanes[gpu.name], length=512),
        [CARDS[0], CARDS[3]],
        tokens=10**6,
    )
    by_gpu = {row.gpu: row.estimate.tokens_per_s for row in rows}
    assert by_gpu["T4"] == pytest.approx(rate(CARDS[0], length=512))
    assert by_gpu["H100 80GB SXM"] == pytest.approx(rate(CARDS[3], lanes=8, length=512))


def test_a_price_for_a_gpu_that_is_not_asked_for_is_refused() -> None:
    with pytest.raises(StudyFileError, match="--price names L4, but no estimate of it"):
        plan_time(LLAMA, request(), CARDS, tokens=1, prices={"l4": 0.5})
    with pytest.raises(StudyFileError, match="--tokens is 0; it must be at least 1"):
        plan_time(LLAMA, request(), CARDS, tokens=0)


@pytest.mark.parametrize(
    "text", ["RTX 4090", "=1", "RTX 4090=", "T4=zero", "T4=0", "T4=-1", "T4=inf"]
)
def test_a_price_that_cannot_be_read_says_what_to_write(text: str) -> None:
    with pytest.raises(StudyFileError) as caught:
        parse_price(text)
    assert f'--price is "{text}"; write GPU=PRICE_PER_HOUR' in str(caught.value)


def test_a_price_of_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(StudyFileError, match=r'unknown GPU "RTX 4099"; did you mean RTX 4090'):
        parse_price("RTX 4099=1")
