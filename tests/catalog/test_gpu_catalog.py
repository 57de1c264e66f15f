"""The GPU table: every row is complete and plausible, and names are found as people write them."""

import pytest

from lora_tune.catalog.gpus import Gpu, find_gpu, load_gpus, nearest_gpus
from lora_tune.errors import LoraTuneError, StudyFileError
from lora_tune.units import GIB, MIB


@pytest.mark.parametrize("gpu", load_gpus(), ids=lambda gpu: gpu.name)
def test_every_row_is_plausible(gpu: Gpu) -> None:
    assert gpu.source
    assert gpu.compute_capability
    assert 4 * GIB < gpu.usable_bytes < 300 * GIB
    assert 100 < gpu.bandwidth_gb_s < 20_000
    assert gpu.bf16_tflops is None or 10 < gpu.bf16_tflops < 5_000
    assert 5 < gpu.fp32_tflops <= gpu.fp16_tflops < 5_000
    assert gpu.usable_bytes % MIB == 0
    if gpu.memory_mib is not None:  # torch sees at most what the driver shows, and most of it
        assert 0.95 < gpu.usable_bytes / (gpu.memory_mib * MIB) < 1


@pytest.mark.parametrize("gpu", load_gpus(), ids=lambda gpu: gpu.name)
def test_every_name_finds_its_own_row(gpu: Gpu) -> None:
    for name in gpu.names:
        for written in (name, name.lower(), name.replace(" ", "-"), f"NVIDIA {name}"):
            assert find_gpu(written) is gpu


def test_there_are_enough_rows_and_no_name_twice() -> None:
    names = [name.casefold() for gpu in load_gpus() for name in gpu.names]
    assert len(load_gpus()) >= 25
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx-4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("Tesla T4", "T4"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB SXM"),
        ("a100 80gb", "A100 80GB"),
    ],
)
def test_a_gpu_is_found_as_people_and_drivers_write_it(written: str, name: str) -> None:
    assert find_gpu(written).name == name


def test_the_matrix_rate_is_that_of_the_compute_type() -> None:
    t4, ada = find_gpu("T4"), find_gpu("RTX 4090")
    assert t4.matrix_tflops("float16") == 65
    assert t4.matrix_tflops("bfloat16") == t4.matrix_tflops("float32") == 8.1  # no such units
    assert ada.matrix_tflops("float16") == ada.matrix_tflops("bfloat16") == 165
    assert ada.matrix_tflops("float32") == 82.6


@pytest.mark.parametrize("gpu", load_gpus(), ids=lambda gpu: gpu.name)
def test_usable_memory_that_nobody_read_is_a_cautious_default(gpu: Gpu) -> None:
    if not gpu.usable_is_read and "total" not in gpu.source:
        assert gpu.memory_mib is not None
        assert gpu.usable_bytes <= 0.976 * gpu.memory_mib * MIB


def test_an_unknown_gpu_is_refused_with_the_nearest_names_and_the_list() -> None:
    with pytest.raises(StudyFileError) as caught:
        find_gpu("RTX 4099")
    message = str(caught.value)
    assert isinstance(caught.value, LoraTuneError)
    assert 'unknown GPU "RTX 4099"; did you mean RTX 4090' in message
    assert all(gpu.name in message for gpu in load_gpus())


def test_a_family_name_suggests_its_members() -> None:
    assert nearest_gpus("a100") == ("A100 40GB", "A100 80GB")
    assert nearest_gpus("quantum-9000") == ()
    assert nearest_gpus("") == ()
