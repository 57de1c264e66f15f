"""What would make a request fit: every offer is judged again by the same estimate, and fits."""

import shlex

import pytest

from lora_tune.catalog.models import find_catalog_model
from lora_tune.catalog.targets import SET_NAMES
from lora_tune.commands.estimate_options import EstimateOptions
from lora_tune.memory.changes import Situation, changes_that_fit, term_to_blame
from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.request import MemoryRequest
from lora_tune.memory.shape import ModelShape, target_suffixes
from lora_tune.memory.solve import fit_on
from lora_tune.memory.verdict import Verdict, find_device
from lora_tune.records import MemoryEstimate

_DEFAULTS: dict[str, object] = {
    "model": "llama-3.1-8b",
    "rank": 16,
    "targets": "all-linear",
    "dropout": 0.0,
    "quantization": "nf4",
    "dtype": "bfloat16",
    "batch_size": 1,
    "max_length": 2048,
    "gradient_accumulation_steps": 1,
    "label_fraction": 1.0,
    "lanes": 1,
    "gradient_checkpointing": True,
    "optimizer": "adamw",
    "adapter_dtype": None,
    "autocast": None,
    "attention": "sdpa",
    "padded": False,
    "outputs": "dropped",
    "stack": "lora-tune",
    "gpus": (),
    "all_gpus": False,
    "solve": None,
    "exact": False,
    "full_depth": False,
    "tokens": None,
    "prices": (),
}


def shape_of(name: str) -> ModelShape:
    found = find_catalog_model(name)
    assert found is not None
    return ModelShape.from_config(found.model.config)


SHAPES = {name: shape_of(name) for name in ("llama-3.1-8b", "llama-3.1-70b")}


def options(**given: object) -> EstimateOptions:
    return EstimateOptions(**(_DEFAULTS | given))  # type: ignore[arg-type]


def written(text: str) -> dict[str, object]:
    """Return options of a command line as the values that they stand for."""
    words = shlex.split(text)
    found: dict[str, object] = {}
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if name == "gradient_checkpointing":
            found[name] = True
            continue
        value = words.pop(0)
        found[name] = int(value) if value.isdecimal() else value
    return found


def offers(gpu: str, **given: object) -> list[str]:
    """Return the changes offered, after having checked that each of them fits."""
    asked = options(**given)
    shape = SHAPES[asked.model]

    def estimate(request: MemoryRequest) -> MemoryEstimate:
        return estimate_memory(shape, request)

    device = find_device(gpu, key="--gpu")
    situation = Situation(
        device=device,
        estimate=estimate,
        accumulation_steps=asked.gradient_accumulation_steps,
        target_sets={name: target_suffixes(shape, name) for name in SET_NAMES},
    )
    request = asked.request(target_suffixes(shape, asked.targets))
    assert fit_on(device, request, estimate).verdict is Verdict.NO
    found = changes_that_fit(request, situation)
    for change in found:
        again = options(**(given | written(change.options)))
        if again.stack != asked.stack:
            again = options(
                **(given | {"adapter_dtype": None, "autocast": None} | written(change.options))
            )
        fit = fit_on(device, again.request(target_suffixes(shape, again.targets)), estimate)
        assert fit.verdict is Verdict.FITS, change.options
        assert fit.process.process_bytes == change.process_bytes
    return [change.options for change in found]


def test_checkpointing_is_the_first_offer_where_it_is_off() -> None:
    found = offers("RTX 4090", gradient_checkpointing=False, batch_size=3)
    assert found[0] == "--gradient-checkpointing"


def test_a_smaller_micro_batch_keeps_the_rows_of_a_step() -> None:
    found = offers("RTX 4090", stack="trainer", batch_size=12, gradient_accumulation_steps=2)
    batch = next(written(text) for text in found if text.startswith("--batch-size"))
    assert int(str(batch["batch_size"])) * int(str(batch["gradient_accumulation_steps"])) == 24


def test_full_logits_offer_our_stack_and_a_shorter_length() -> None:
    found = offers("RTX 4090", stack="trainer", batch_size=8)
    assert "--stack lora-tune" in found
    assert any(text.startswith("--max-length") for text in found)
    assert not any(text.startswith("--quantization") for text in found)


def test_an_unquantized_base_offers_nf4() -> None:
    assert offers("RTX 3060 12GB", quantization="none") == ["--quantization nf4"]


def test_lanes_offer_the_most_that_fit() -> None:
    found = offers("RTX 3060 12GB", lanes=16)
    lanes = next(int(text.split()[1]) for text in found if text.startswith("--lanes"))
    assert 1 <= lanes < 16
    with pytest.raises(AssertionError):  # one lane more is not refused, so nothing is to be offered
        offers("RTX 3060 12GB", lanes=lanes)


def test_a_high_rank_offers_the_largest_power_of_two_that_fits_and_fewer_targets() -> None:
    found = offers("12GiB", rank=700)
    rank = next(int(text.split()[1]) for text in found if text.startswith("--rank"))
    shape, device = SHAPES["llama-3.1-8b"], find_device("12GiB", key="--gpu")
    twice = options(rank=2 * rank).request(target_suffixes(shape, "all-linear"))
    fit = fit_on(device, twice, lambda request: estimate_memory(shape, request))
    assert rank.bit_count() == 1
    assert fit.verdict is not Verdict.FITS
    assert any(text.startswith("--targets") for text in found)


def test_when_no_single_change_is_enough_several_are_taken_together() -> None:
    found = offers(
        "12GiB", quantization="none", gradient_checkpointing=False, stack="trainer", batch_size=8
    )
    assert len(found) == 1
    assert "--quantization nf4" in found[0]
    assert len(written(found[0])) > 2


def test_a_base_that_is_too_large_alone_has_no_change() -> None:
    assert offers("24GiB", model="llama-3.1-70b") == []


def test_the_term_to_blame_is_the_base_only_when_it_is_too_large_alone() -> None:
    device = find_device("24GiB", key="--gpu")
    for model, stack, expected in (
        ("llama-3.1-70b", "lora-tune", "base_weights"),
        ("llama-3.1-8b", "trainer", "logits_and_loss"),
    ):
        asked = options(model=model, stack=stack, batch_size=8)
        shape = SHAPES[model]
        request = asked.request(target_suffixes(shape, "all-linear"))
        assert term_to_blame(estimate_memory(shape, request), device) == expected
