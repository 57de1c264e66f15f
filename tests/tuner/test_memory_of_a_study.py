"""Whole studies whose device replays given peaks: what is measured is stored, survives, and is shown.

The base is the tiny Llama of the command-line tests, on the CPU; only the meter is not a real one. The
witnesses are the estimate asked directly, margins by hand, and the same study on a plain CPU.
"""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_end_to_end import STUDY, copy_of, losses, table
from test_end_to_end import workplace as workplace  # the fixture
from test_gpu_claims import GPU, other_process

from lora_tune.engine.base import BaseModel
from lora_tune.engine.memory_reading import HostMeter
from lora_tune.files import write_text
from lora_tune.memory.estimate import estimate_memory
from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.memory.shape import ModelShape
from lora_tune.records import MemoryReading, ProgressState, StudySnapshot, TrialConfig
from lora_tune.report.files import report_data
from lora_tune.store.folder import StudyFolder
from lora_tune.study.loader import load_study
from lora_tune.tuner import run_study
from lora_tune.units import GIB, MIB


class Quiet:
    """A view that keeps the notes, and stops the study after so many trials."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.stop_after = stop_after

    def update(self, state: ProgressState) -> None:
        if self.stop_after is not None and state.trials_done >= self.stop_after:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(folder: Path, meter: Any, *, view: Quiet | None = None) -> StudySnapshot:
    file = folder / "memory.toml"
    text = STUDY.format(quantization="none").replace(
        "[run]", f'[study]\noutput = "{folder / "reports"}"\n[run]'
    )
    # close to divergence training multiplies the rounding by which packs of other sizes differ
    assert "[1e-3, 3e-2]" in text
    text = text.replace("[1e-3, 3e-2]", "[1e-4, 3e-3]")
    write_text(file, text)
    return run_study(
        load_study(file),
        study_file=file,
        command="lora-tune run memory.toml",
        view=view or Quiet(),
        meter_of=lambda device: meter,
    )


@pytest.fixture(scope="module")
def plain(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> StudySnapshot:
    """The study on a CPU, which reads no peaks."""
    return run(copy_of(workplace, tmp_path_factory.mktemp("plain") / "run"), HostMeter())


@pytest.fixture(scope="module")
def measured(
    workplace: Path, replay_meter: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> StudySnapshot:
    """The study on a device with ample memory."""
    folder = copy_of(workplace, tmp_path_factory.mktemp("measured") / "run")
    return run(folder, replay_meter(GIB, PEAKS))


PEAKS = [(2 * MIB + 4096 * n, 3 * MIB, 4 * MIB) for n in range(50)]


def config_of(snapshot: StudySnapshot, number: int) -> TrialConfig:
    """Return what a lane trained: a trial, or below zero a run of the confirmation."""
    if number >= 0:
        return snapshot.trials[number].config
    assert snapshot.confirmation is not None
    candidates = snapshot.confirmation.candidates  # by seed, then by candidate, from -4 down
    return candidates[(-4 - number) % len(candidates)].config


def predicted(snapshot: StudySnapshot, reading: MemoryReading) -> int:
    """Ask the estimate for the pack of a reading."""
    config = json.loads(Path(snapshot.lock.model.base, "config.json").read_text())
    pack = reading.measured
    request = MemoryRequest(
        quantization="none",
        compute_dtype="float32",
        lanes=tuple(
            LaneShape(rank=c.rank, targets=c.target_modules, lora_dropout=c.lora_dropout)
            for c in (config_of(snapshot, trial) for trial in pack.trials)
        ),
        micro_batch_size=pack.rows // len(pack.trials),
        max_length=pack.max_length,
        gradient_checkpointing=snapshot.lock.plan.gradient_checkpointing,
        gradient_accumulation=snapshot.lock.plan.micro_batch_size < 4,
        group_rank=snapshot.lock.plan.group_rank,
        label_fraction=pack.num_labels / (pack.rows * pack.max_length),
        compute_capability=None,
    )
    return estimate_memory(ModelShape.from_config(config), request).peak_allocated_bytes


def test_every_pack_is_stored_with_its_own_estimate(measured, monkeypatch) -> None:
    monkeypatch.chdir(measured.folder.parent.parent)
    readings = measured.memory.readings
    # eight trials in pairs, then the two that were promoted, then two finalists and the default
    assert [r.measured.trials for r in readings[:4]] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    promoted = [t for t in measured.trials if len(t.rungs) == 2]
    promoted.sort(key=lambda t: t.rungs[0].eval_loss)
    confirmed = [(-4 - 2 * n, -5 - 2 * n) for n in range(3)]
    assert [r.measured.trials for r in readings[4:]] == [
        tuple(t.number for t in promoted),
        *confirmed,
    ]
    for reading in readings:
        pack = reading.measured
        assert (pack.device, pack.free_bytes) == ("Replay 9000", GIB)
        assert pack.rows == len(pack.trials) * measured.lock.plan.micro_batch_size
        assert 0 < pack.num_labels < pack.rows * pack.max_length
        assert pack.max_length <= measured.lock.data.max_tokens
        assert (pack.allocated_bytes, pack.reserved_bytes, pack.process_bytes) in PEAKS
        assert reading.predicted_allocated_bytes == predicted(measured, reading)
    assert measured.memory.limits == ()


def test_measuring_changes_nothing_else(plain, measured) -> None:
    assert table(measured) == table(plain)
    assert losses(measured) == pytest.approx(losses(plain), rel=1e-5)


def test_a_cpu_leaves_no_readings(plain) -> None:
    assert plain.memory.readings == ()
    assert not (plain.folder / "memory.json").exists()
    assert not (plain.folder / "memory.csv").exists()
    assert "Predicted and measured" not in (plain.folder / "report.md").read_text()


def test_the_report_shows_the_residuals_and_the_margin_by_hand(measured) -> None:
    shares = sorted(
        reading.measured.allocated_bytes / reading.predicted_allocated_bytes - 1
        for reading in measured.memory.readings
        if reading.measured.steps >= 2
    )
    assert len(shares) < 19
    margin = max(shares[-1], 1 / 0.95 - 1)
    summary = report_data(measured)["summary"]["memory"]
    allocated = summary["spreads"][0]
    assert sorted(allocated["residuals"]) == pytest.approx(shares)
    assert allocated["margin"] == pytest.approx(margin)
    assert summary["margin_is_prior"] is True
    text = (measured.folder / "report.md").read_text()
    assert f"Safety margin: {100 * margin:.1f} %" in text
    assert f"{100 * shares[0]:+.1f} % to {100 * shares[-1]:+.1f} % off the estimate" in text
    frame = pd.read_csv(measured.folder / "memory.csv")
    assert list(frame["allocated_bytes"]) == [
        reading.measured.allocated_bytes for reading in measured.memory.readings
    ]
    kept = frame[frame["counted"]]
    assert sorted(kept["allocated_residual"]) == pytest.approx(shares)


def test_readings_survive_an_interruption(
    workplace, measured, replay_meter, tmp_path: Path
) -> None:
    folder = copy_of(workplace, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        run(folder, replay_meter(GIB, PEAKS), view=Quiet(stop_after=4))
    before = StudyFolder(folder / "reports" / "memory").load_memory()
    assert before.readings
    after = run(folder, replay_meter(GIB // 2, PEAKS))
    assert after.memory.readings[: len(before.readings)] == before.readings
    assert len(after.memory.readings) > len(before.readings)
    assert {r.measured.free_bytes for r in after.memory.readings} == {GIB, GIB // 2}
    measured_again = {"probe_readings": (), "probe_s": 0.0}
    assert replace(after.lock.plan, **measured_again) == replace(
        measured.lock.plan, **measured_again
    )
    assert table(after) == table(measured)
    assert losses(after) == pytest.approx(losses(measured), rel=1e-5)


def test_peaks_far_above_the_estimate_make_packs_smaller_but_not_other_trials(
    workplace, measured, replay_meter, tmp_path: Path
) -> None:
    # two lanes just fit by the estimate, and the first pack takes twice what was predicted
    largest = max(trial.predicted_bytes for trial in measured.trials)
    free = int(1.2 * largest)
    folder = copy_of(workplace, tmp_path / "tight")
    peaks = [(2 * largest, 2 * largest, 2 * largest)]
    with pytest.raises(KeyboardInterrupt):
        run(folder, replay_meter(free, peaks), view=Quiet(stop_after=4))
    store = StudyFolder(folder / "reports" / "memory")
    [limit] = store.load_memory().limits
    assert (limit.lanes_before, limit.lanes) == (2, 1)
    view = Quiet()
    after = run(folder, replay_meter(free, peaks), view=view)
    assert after.lock.plan.lanes == measured.lock.plan.lanes == 2
    assert after.lock.plan.micro_batch_size == measured.lock.plan.micro_batch_size
    assert after.memory.limits == (limit,)
    lowered = [r.measured for r in after.memory.readings if r.measured.trials not in ((0, 1),)]
    assert all(len(pack.trials) == 1 for pack in lowered[1:])
    assert table(after) == table(measured)
    # A lane alone and one in a group sum in another order, and AdamW turns the rounding of gradients near
    # zero into whole steps: 1.8e-5 were seen after twelve. tests/engine holds the steps themselves to 1e-5.
    assert losses(after) == pytest.approx(losses(measured), rel=1e-4)
    text = (after.folder / "report.md").read_text()
    assert "The lanes of a pack were lowered from 2 to 1" in text


def test_auto_plans_with_what_is_free_before_the_base_is_loaded(
    workplace, replay_meter, tmp_path: Path
) -> None:
    loaded: list[int] = []

    class Watching(replay_meter):
        """Notes how many bases are in memory whenever it is asked what is free."""

        @property
        def free_bytes(self) -> int:
            loaded.append(sum(type(value) is BaseModel for value in gc.get_objects()))
            return 100_000_003

        @free_bytes.setter
        def free_bytes(self, value: int) -> None:
            pass

    gc.collect()
    folder = copy_of(workplace, tmp_path / "auto")
    meter = Watching(0, PEAKS)
    with pytest.raises(KeyboardInterrupt):
        run(folder, meter, view=Quiet(stop_after=1))
    assert loaded[0] == 0
    assert loaded[-1] == 1  # asked again for the readings, while it trained
    lock = StudyFolder(folder / "reports" / "memory").load_lock()
    assert lock is not None
    assert lock.plan.capacity_bytes == 100_000_003
    assert lock.plan.budget_bytes == int(100_000_003 * 0.95)


def test_a_resumed_study_says_when_less_memory_is_free_than_it_was_planned_with(
    workplace, replay_meter, tmp_path: Path
) -> None:
    folder = copy_of(workplace, tmp_path / "less")
    with pytest.raises(KeyboardInterrupt):
        run(folder, replay_meter(GIB, PEAKS), view=Quiet(stop_after=2))
    view = Quiet(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(folder, replay_meter(GIB // 2, PEAKS), view=view)
    assert view.notes[-1] == (
        "0.50 GiB of the Replay 9000 are free, the plan may use 0.95 GiB: a pack that runs out of "
        "memory is halved."
    )


def test_a_study_says_when_another_one_trains_on_its_gpu(
    workplace, replay_meter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    meter, view = replay_meter(GIB, PEAKS), Quiet(stop_after=1)
    meter.device_id = GPU
    claims = tmp_path / f"lora-tune-{os.getuid()}" / "gpus"
    with other_process(claims) as process, pytest.raises(KeyboardInterrupt):
        run(copy_of(workplace, tmp_path / "shared"), meter, view=view)
    [said] = [note for note in view.notes if "another study" in note]
    assert said.startswith(f"another study trains on this Replay 9000 (pid {process.pid} on ")
    assert "of which 1.00 GiB are free now" in said
