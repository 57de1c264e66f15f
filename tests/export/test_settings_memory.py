"""Memory for other stacks: what is changed to fit, in which order, and that it then really fits."""

from dataclasses import replace

import pytest
from framework_studies import SHAPE, finished_study

from lora_tune.errors import StudyFileError
from lora_tune.export.refit_memory import refit_memory
from lora_tune.export.settings import winner_settings
from lora_tune.memory.request import LaneShape, resolve_request
from lora_tune.memory.solve import ClosedForm, fit_on
from lora_tune.memory.verdict import Verdict, find_device
from lora_tune.units import GIB

STACKS = ["trainer", "trl"]


def verdict(settings, stack, gpu):
    """Ask the estimate directly, without the module that is tested."""
    request = resolve_request(
        stack=stack,
        quantization=settings.quantization,
        compute_dtype=settings.compute_dtype,
        lanes=(
            LaneShape(
                rank=settings.rank,
                targets=settings.target_modules,
                lora_dropout=settings.lora_dropout,
            ),
        ),
        micro_batch_size=settings.micro_batch_size,
        max_length=settings.longest_row,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_accumulation=settings.accumulation_steps > 1,
        padded=settings.micro_batch_size > 1,
    )
    return fit_on(find_device(gpu, key="--gpu"), request, ClosedForm(SHAPE)).verdict


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return finished_study(tmp_path_factory.mktemp("memory") / "reports" / "study")


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("gpu", ["10GiB", "16GiB", "24GiB", "RTX 4090", "80GiB"])
def test_what_is_exported_fits_at_the_same_effective_batch(study, stack, gpu):
    before = winner_settings(study)
    refit = refit_memory(before, study.lock, stack=stack, gpu=gpu)
    after = refit.applied(before)
    assert verdict(after, stack, gpu) is Verdict.FITS
    assert after.micro_batch_size * after.accumulation_steps == before.effective_batch_size
    changed = (after.micro_batch_size, after.gradient_checkpointing) != (8, False)
    assert changed is (verdict(before, stack, gpu) is not Verdict.FITS)
    [note] = refit.notes
    assert note.endswith("which fits.")
    assert ("lowered" in note or "switched on" in note) is changed
    assert gpu in note


def test_the_micro_batch_is_lowered_before_checkpointing_is_switched_on(study):
    settings = winner_settings(study)
    seen = [
        refit_memory(settings, study.lock, stack="trainer", gpu=f"{size}GiB")
        for size in range(8, 81, 4)
    ]
    plans = [(refit.gradient_checkpointing, refit.micro_batch_size) for refit in seen]
    without = [rows for checkpointing, rows in plans if not checkpointing]
    assert without == sorted(without)  # more memory, more rows
    assert without[0] < without[-1] == 8
    first = next(i for i, (checkpointing, _) in enumerate(plans) if not checkpointing)
    assert all(not checkpointing for checkpointing, _ in plans[first:])
    assert plans[first - 1][0]


def test_what_cannot_fit_is_said_with_what_is_missing(study):
    settings = winner_settings(study)
    refit = refit_memory(settings, study.lock, stack="trainer", gpu="5GiB")
    assert (refit.micro_batch_size, refit.gradient_checkpointing) == (1, True)
    assert "not certain to fit" in refit.notes[0]
    assert "GiB are missing" in refit.notes[0]


def test_without_a_gpu_named_it_is_the_one_of_the_study(tmp_path, study):
    settings = winner_settings(study)
    assert "80.00 GiB" in refit_memory(settings, study.lock, stack="trl", gpu=None).notes[0]
    named = finished_study(
        tmp_path / "reports" / "named", study_keys={"memory": {"gpu": "RTX 4090"}}, device="cpu"
    )
    note = refit_memory(settings, named.lock, stack="trl", gpu=None).notes[0]
    assert "RTX 4090" in note
    own = finished_study(tmp_path / "reports" / "own", capacity_bytes=12 * GIB)
    assert refit_memory(settings, own.lock, stack="trainer", gpu=None).micro_batch_size < 8


def test_nothing_is_changed_where_nothing_can_be_estimated(tmp_path, study):
    settings = winner_settings(study)
    on_cpu = finished_study(tmp_path / "reports" / "cpu", device="cpu")
    refit = refit_memory(settings, on_cpu.lock, stack="trl", gpu=None)
    assert (refit.micro_batch_size, refit.gradient_checkpointing) == (8, False)
    assert "Add --gpu" in refit.notes[0]
    unknown = replace(settings, shape=None)
    refit = refit_memory(unknown, study.lock, stack="trl", gpu="24GiB")
    assert refit.micro_batch_size == 8
    assert "lora-tune estimate --exact --stack trl" in refit.notes[0]


@pytest.mark.parametrize("gpu", ["RTX 9999", "24", "auto"])
def test_a_gpu_that_is_none_is_refused(study, gpu):
    with pytest.raises(StudyFileError, match="--gpu"):
        refit_memory(winner_settings(study), study.lock, stack="trl", gpu=gpu)
