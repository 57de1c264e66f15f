"""From a peak to a verdict: the interval's two ends, the context of each GPU, and devices by name.

The contexts are checked against the readings that they were made from, and the verdicts against
their definition. How often a verdict is ``tight`` is counted over random configurations and every GPU.
"""

import random

import pytest

from lora_tune.catalog.gpus import load_gpus
from lora_tune.catalog.models import find_catalog_model
from lora_tune.errors import StudyFileError
from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.request import LaneShape, resolve_request
from lora_tune.memory.shape import ModelShape, target_suffixes
from lora_tune.memory.solve import fit_on
from lora_tune.memory.verdict import (
    Device,
    Verdict,
    context_of,
    find_device,
    judge,
    process_memory,
)
from lora_tune.records import MemoryEstimate
from lora_tune.units import GIB, MIB

DEVICES = [Device.of(gpu) for gpu in load_gpus()]


def estimate(
    *, method: str = "closed-form", activations: int = 2 * GIB, cached: int = 0
) -> MemoryEstimate:
    terms = {
        "base_weights": 5 * GIB,
        "adapters": GIB // 4,
        "gradients": 0,
        "optimizer": GIB // 2,
        "activations": activations,
        "logits_and_loss": 0,
        "workspace": 0,
    }
    peak = sum(terms.values())
    return MemoryEstimate(
        peak_allocated_bytes=peak,
        peak_reserved_bytes=peak + cached,
        peak_phase="backward",
        terms=terms,
        trainable_parameters=1,
        base_parameters=1,
        method=method,
    )


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_the_context_of_every_gpu_is_a_plausible_range(device: Device) -> None:
    context = context_of(device)
    assert 100 <= context.low <= context.usual <= context.high <= 1200


@pytest.mark.parametrize(
    ("gpu", "mib"),
    [
        ("T4", 140.9),  # README of fitcheck-llm 0.3.1
        ("RTX 3090", 256),  # invoke-ai/InvokeAI issue 9413
        ("RTX 6000 Ada", 426),  # unslothai/unsloth-zoo pull request 1053
        ("RTX 4090", 23.28 * 1024 - 22.74 * 1024 - 136.85),  # eosphoros-ai/DB-GPT-Hub issue 248
        ("RTX 4090", 23.48 * 1024 - 22.72 * 1024 - 257.71),  # huggingface/lora-fast issue 1
        ("RTX 5090", 31.34 * 1024 - 30.74 * 1024 - 19.41),  # Wan-Video/Wan2.1 issue 465
        ("H100 80GB SXM", 522),  # a process entry of an out-of-memory message
        ("H200", 612),  # likewise
    ],
)
def test_published_readings_lie_in_the_range_of_their_gpu(gpu: str, mib: float) -> None:
    context = context_of(find_device(gpu, key="--gpu"))
    assert context.low <= mib <= context.high


def test_a_bare_size_has_the_context_of_any_gpu() -> None:
    context = context_of(find_device("24GiB", key="--gpu"))
    assert context == context_of(None)
    nvidia = [d for d in DEVICES if d.compute_capability not in ("10.0", "12.1", "gfx942")]
    assert context.low >= min(context_of(device).low for device in nvidia)
    assert context.high >= context_of(find_device("RTX 5090", key="--gpu")).high


def test_the_low_end_is_what_is_needed_and_the_high_end_what_can_be() -> None:
    device = find_device("RTX 4090", key="--gpu")
    context = context_of(device)
    process = process_memory(estimate(cached=GIB), device)
    # 5 % of the 2 GiB that are not held tensors; cached blocks count at the high end only
    assert process.low_bytes == int(7.75 * GIB) - GIB // 10 + context.low * MIB
    assert process.high_bytes == int(8.75 * GIB) + GIB // 10 + context.high * MIB
    assert process.process_bytes == int(8.75 * GIB) + context.usual * MIB


def test_a_trace_is_trusted_more_than_the_closed_form() -> None:
    form, trace = (process_memory(estimate(method=m), None) for m in ("closed-form", "trace"))
    assert trace.process_bytes == form.process_bytes
    assert form.low_bytes < trace.low_bytes < trace.high_bytes < form.high_bytes


def test_held_tensors_carry_no_error() -> None:
    process = process_memory(estimate(activations=0), None)
    context = context_of(None)
    assert process.high_bytes - process.low_bytes == (context.high - context.low) * MIB


def test_the_verdict_turns_exactly_at_the_ends_of_the_interval() -> None:
    process = process_memory(estimate(), None)
    assert judge(process, process.high_bytes) is Verdict.FITS
    assert judge(process, process.high_bytes - 1) is Verdict.TIGHT
    assert judge(process, process.low_bytes) is Verdict.TIGHT
    assert judge(process, process.low_bytes - 1) is Verdict.NO


def test_a_device_is_a_gpu_or_a_size() -> None:
    card = find_device("rtx-4090", key="--gpu")
    assert (card.name, card.compute_capability, card.has_bfloat16) == ("RTX 4090", "8.9", True)
    assert not find_device("t4", key="--gpu").has_bfloat16
    size = find_device("512 MiB", key="--gpu")
    assert (size.usable_bytes, size.compute_capability) == (512 * MIB, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("RTX 4091", "did you mean RTX 4090"),
        ("24GB", 'Sizes are in GiB (1024**3 bytes), which the sticker\'s GB are not. Write "auto"'),
        ("24", "Sizes are in GiB"),
        ("0GiB", "a GPU without memory"),
        ("a100", "did you mean A100 40GB or A100 80GB"),
    ],
)
def test_what_is_neither_is_refused_with_what_to_write(text: str, says: str) -> None:
    with pytest.raises(StudyFileError) as caught:
        find_device(text, key="--gpu")
    assert str(caught.value).startswith(f'--gpu is "{text}"')
    assert says in str(caught.value)


def test_few_verdicts_are_tight() -> None:
    """At most a tenth; the docstring of ``memory/verdict.py`` has the count over many more."""
    rng = random.Random(0)
    shapes = []
    for name in ("smollm2-360m", "llama-3.2-3b", "qwen2.5-7b", "llama-3.1-70b"):
        found = find_catalog_model(name)
        assert found is not None
        shapes.append(ModelShape.from_config(found.model.config))
    verdicts = []
    for _ in range(60):
        shape = rng.choice(shapes)
        targets = target_suffixes(shape, rng.choice(["all-linear", "attention"]))
        lane = LaneShape(rank=rng.choice([8, 64]), targets=targets, lora_dropout=0.0)
        request = resolve_request(
            stack=rng.choice(["lora-tune", "trainer"]),
            quantization=rng.choice(["nf4", "none"]),
            compute_dtype="bfloat16",
            lanes=(lane,),
            micro_batch_size=rng.choice([1, 4]),
            max_length=rng.choice([512, 2048, 4096]),
            gradient_checkpointing=rng.random() < 0.7,
            gradient_accumulation=False,
        )
        verdicts += [
            fit_on(
                device, request, lambda asked, shape=shape: estimate_memory(shape, asked)
            ).verdict
            for device in DEVICES
        ]
    assert set(verdicts) == set(Verdict)
    assert verdicts.count(Verdict.TIGHT) / len(verdicts) < 0.1
