"""Solving: the value found fits and the next one does not, by the same estimate and verdict."""

from dataclasses import replace

import pytest

from lora_tune.catalog.models import find_catalog_model
from lora_tune.engine.lora import default_group_rank
from lora_tune.errors import StudyFileError
from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.request import LaneShape, MemoryRequest, resolve_request
from lora_tune.memory.shape import ModelShape, target_suffixes
from lora_tune.memory.solve import (
    LIMITS,
    changed,
    fit_on,
    largest,
    put,
    smallest_device,
    solve,
)
from lora_tune.memory.verdict import Device, Verdict, find_device
from lora_tune.records import MemoryEstimate


def shape_of(name: str) -> ModelShape:
    found = find_catalog_model(name)
    assert found is not None
    return ModelShape.from_config(found.model.config)


LLAMA = shape_of("llama-3.1-8b")
SMOL = shape_of("smollm2-135m")


def request(shape: ModelShape, *, stack: str = "lora-tune") -> MemoryRequest:
    lane = LaneShape(rank=16, targets=target_suffixes(shape, "all-linear"), lora_dropout=0.05)
    return resolve_request(
        stack=stack,
        quantization="nf4",
        compute_dtype="bfloat16",
        lanes=(lane,),
        micro_batch_size=1,
        max_length=1024,
        gradient_checkpointing=True,
        gradient_accumulation=False,
    )


def verdict_at(
    shape: ModelShape, asked: MemoryRequest, variable: str, value: int, device: Device
) -> Verdict:
    estimate = lambda r: estimate_memory(shape, r)  # noqa: E731
    return fit_on(device, put(asked, variable, value), estimate).verdict


@pytest.mark.parametrize("gpu", ["RTX 3060 12GB", "RTX 4090", "16GiB"])
@pytest.mark.parametrize("variable", list(LIMITS))
def test_the_solution_is_exactly_on_the_boundary(variable: str, gpu: str) -> None:
    device, asked = find_device(gpu, key="--gpu"), request(LLAMA)
    solution = solve(variable, asked, device=device, estimate=lambda r: estimate_memory(LLAMA, r))
    assert solution.value > 0
    assert not solution.at_limit
    assert solution.request == put(asked, variable, solution.value)
    assert verdict_at(LLAMA, asked, variable, solution.value, device) is Verdict.FITS
    assert verdict_at(LLAMA, asked, variable, solution.value + 1, device) is not Verdict.FITS


@pytest.mark.parametrize("stack", ["trainer", "trainer-kbit", "trl"])
def test_lengths_are_solved_for_on_every_stack(stack: str) -> None:
    device, asked = find_device("RTX 4090", key="--gpu"), request(LLAMA, stack=stack)
    solution = solve(
        "max-length", asked, device=device, estimate=lambda r: estimate_memory(LLAMA, r)
    )
    assert verdict_at(LLAMA, asked, "max-length", solution.value, device) is Verdict.FITS
    assert verdict_at(LLAMA, asked, "max-length", solution.value + 1, device) is not Verdict.FITS


def test_nothing_fits_is_zero_without_a_request() -> None:
    solution = solve(
        "max-rank",
        request(LLAMA),
        device=find_device("4GiB", key="--gpu"),
        estimate=lambda r: estimate_memory(LLAMA, r),
    )
    assert (solution.value, solution.request) == (0, None)


def test_the_search_ends_at_a_limit_and_says_so() -> None:
    def constant(asked: MemoryRequest) -> MemoryEstimate:
        return estimate_memory(SMOL, replace(asked, max_length=64))

    device = find_device("H200", key="--gpu")
    solution = solve("max-length", request(SMOL), device=device, estimate=constant)
    assert (solution.value, solution.at_limit) == (LIMITS["max-length"], True)


def test_lanes_are_refused_where_the_stack_has_one() -> None:
    with pytest.raises(StudyFileError, match="one adapter at a time"):
        solve(
            "max-lanes",
            request(LLAMA, stack="trainer"),
            device=find_device("RTX 4090", key="--gpu"),
            estimate=lambda r: estimate_memory(LLAMA, r),
        )


def test_bisection_needs_few_steps_and_finds_every_boundary() -> None:
    for boundary in range(70):
        asked: list[int] = []

        def fits(n: int, boundary: int = boundary, asked: list[int] = asked) -> bool:
            asked.append(n)
            return n <= boundary

        assert largest(fits, limit=64) == min(boundary, 64)
        assert len(asked) <= 14


def test_a_change_resolves_again_what_the_stack_settles() -> None:
    asked = request(LLAMA, stack="trl")
    assert (asked.adapter_dtype, asked.autocast) == ("bfloat16", True)
    ours = changed(asked, stack="lora-tune", adapter_dtype=None, autocast=None)
    assert (ours.adapter_dtype, ours.autocast) == ("float32", False)
    assert changed(ours, compute_capability="8.0").group_rank == default_group_rank("cuda")
    assert changed(ours, compute_capability=None).group_rank == default_group_rank("cpu")


def test_the_smallest_device_is_the_first_that_fits() -> None:
    names = ("A100 40GB", "T4", "RTX 3060 12GB", "H200", "6GiB")
    devices = [find_device(name, key="--gpu") for name in names]
    estimate = lambda r: estimate_memory(LLAMA, r)  # noqa: E731
    found = smallest_device(devices, request(LLAMA), estimate=estimate)
    assert found is not None
    assert found.name == "RTX 3060 12GB"
    smaller = find_device("6GiB", key="--gpu")
    assert fit_on(smaller, request(LLAMA), estimate).verdict is Verdict.NO
    assert smallest_device([smaller], request(LLAMA), estimate=estimate) is None
