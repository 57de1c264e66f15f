"""What the first start measures and writes down, on the tiny Llama of the command-line tests.

Time is counted by the model's embedding: a pass takes ``OVERHEAD_S`` and a second per ``RATE`` tokens, so
that what pays is known. Steps and records are real.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_end_to_end import STUDY, WORDS, copy_of
from test_end_to_end import workplace as workplace  # the fixture

from lora_tune.engine import base as base_module
from lora_tune.engine.base import BaseModel
from lora_tune.planning import draft_plan, load_base, make_lock, plan_again, read_inputs
from lora_tune.records import ProgressState, StudyLock
from lora_tune.report.check import forecast_sentence
from lora_tune.report.probe import probe_sentence
from lora_tune.store.folder import StudyFolder
from lora_tune.study.loader import load_study
from lora_tune.tuner import run_study
from lora_tune.units import GIB

OVERHEAD_S = 0.04
RATE = 1000.0
AUTO = {"lanes = 2": "", "max_steps = 12": "max_steps = 1200", "trials = 8": "trials = 64"}


@dataclass
class Clock:
    """Seconds that something else moves on."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def lock_of(folder: Path, changes: dict[str, str]) -> tuple[StudyLock, BaseModel, list[str]]:
    """Return the lock of the tiny study with other lines, its base, and what was said."""
    text = STUDY.format(quantization="none")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    file = folder / "planned.toml"
    file.write_text(text)
    inputs = read_inputs(load_study(file), base_dir=folder, lock=None)
    draft = draft_plan(inputs, free_bytes=GIB)
    base, clock, notes = load_base(inputs, None), Clock(), []

    def embedded(module: object, args: tuple[object, ...]) -> None:
        clock.now += OVERHEAD_S + args[0].numel() / RATE

    base.model.get_input_embeddings().register_forward_pre_hook(embedded)
    lock = make_lock(
        inputs, base, draft, command="", study_file=file, note=notes.append, clock=clock
    )
    return lock, base, notes


@pytest.fixture
def plan_with(
    workplace: Path, tmp_path: Path
) -> Callable[..., tuple[StudyLock, object, list[str]]]:
    folder = copy_of(workplace, tmp_path / "planned")
    return lambda changes: lock_of(folder, changes)


def test_lanes_rise_until_they_do_not_pay_and_the_curve_is_written_down(
    plan_with, tmp_path
) -> None:
    lock, base, notes = plan_with(AUTO)
    plan = lock.plan
    # rows of about ten tokens: none has a pass of 128, so the whole batch of four is the only micro-batch
    assert {r.micro_batch_size for r in plan.probe_readings} == {4} == {plan.micro_batch_size}
    lanes = [r.lanes for r in plan.probe_readings]
    assert lanes == [2**n for n in range(len(lanes))]
    kept = next(r for r in plan.probe_readings if r.lanes == plan.lanes)
    tokens = kept.lanes * 4 * lock.data.num_train_tokens / lock.data.num_train
    expected = tokens / (OVERHEAD_S + tokens / RATE)
    assert kept.tokens_per_s == pytest.approx(expected, rel=0.1)  # rows are about the mean
    assert 1 < plan.lanes < 32
    last = plan.probe_readings[-1]
    assert last.lanes == 2 * plan.lanes
    assert last.tokens_per_s < 1.1 * kept.tokens_per_s
    assert plan.probe_s > 0
    assert not plan.probe_cut
    assert notes[0].startswith("measuring which plan is fastest")
    assert probe_sentence(plan) in notes
    assert base.layout.adapters == ()
    store = StudyFolder(tmp_path)
    store.save_lock(lock)
    assert store.load_lock() == lock


def test_a_model_whose_rows_have_to_be_padded_is_named(
    plan_with, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "the attention of LlamaForCausalLM cannot be cut into rows"
    assert not any(said in note for note in plan_with({})[2])
    monkeypatch.setattr(base_module, "attend_by_rows", lambda model, layout: False)
    assert [said in note for note in plan_with({})[2]].count(True) == 1


def test_the_probe_of_a_short_study_is_cut_and_says_so(plan_with) -> None:
    lock, _, notes = plan_with({"lanes = 2": ""})
    assert lock.plan.probe_cut
    assert [r.lanes for r in lock.plan.probe_readings] == [1]
    assert (lock.plan.lanes, lock.plan.micro_batch_size) == (1, 4)
    assert any("cut short" in note for note in notes)


def test_given_lanes_and_compute_type_are_measured_for_the_forecast_alone(plan_with) -> None:
    lock, _, notes = plan_with({})
    assert (lock.plan.lanes, lock.plan.micro_batch_size) == (2, 4)
    assert [(r.lanes, r.micro_batch_size) for r in lock.plan.probe_readings] == [(1, 4), (2, 4)]
    assert not lock.plan.probe_cut
    assert notes[0].startswith("measuring how fast it trains, for at most a twentieth")


def test_the_forecast_is_made_from_the_readings_and_said(plan_with) -> None:
    lock, _, notes = plan_with({})
    assert lock.study_plan is not None
    assert lock.forecast is not None
    # 8 trials of 6 steps, then 2 from step 5 to 12; one finalist and the default with two seeds
    assert (lock.study_plan.rungs, lock.study_plan.search_steps) == ((6, 12), 8 * 6 + 2 * 7)
    assert (lock.study_plan.finalists, lock.study_plan.seeds) == (2, 2)  # both were asked for
    assert lock.study_plan.confirmation_steps == 3 * 2 * 12
    full = lock.plan.probe_readings[-1]
    assert lock.forecast.tokens_per_s == full.tokens_per_s
    step_s = 4 * lock.data.num_train_tokens / lock.data.num_train / full.tokens_per_s
    assert lock.forecast.search_s == pytest.approx(62 * step_s)
    assert lock.forecast.load_s == pytest.approx(lock.plan.probe_s)
    assert forecast_sentence(lock.forecast) in notes


def test_a_raised_budget_is_planned_again_at_the_same_speed(
    workplace: Path, tmp_path: Path
) -> None:
    folder = copy_of(workplace, tmp_path / "planned")
    lock, _, _ = lock_of(folder, {})
    text = STUDY.format(quantization="none")
    file = folder / "planned.toml"
    same = read_inputs(load_study(file), base_dir=folder, lock=lock)
    assert plan_again(same, lock) == lock
    file.write_text(text.replace("trials = 8", "trials = 16"))
    more = plan_again(read_inputs(load_study(file), base_dir=folder, lock=lock), lock)
    assert more.study_plan is not None
    assert (more.study_plan.num_trials, more.study_plan.rungs) == (16, lock.rungs)
    assert more.forecast is not None
    assert lock.forecast is not None
    assert more.forecast.search_s > 1.5 * lock.forecast.search_s
    assert replace(more, study_plan=lock.study_plan, forecast=lock.forecast) == lock
    older = replace(lock, study_plan=None, forecast=None)
    assert plan_again(same, older).study_plan == lock.study_plan


def test_given_lanes_leave_the_compute_type_to_measure(plan_with) -> None:
    lock, _, _ = plan_with({**AUTO, "lanes = 2": "lanes = 2", 'compute_dtype = "float32"': ""})
    assert (lock.plan.lanes, lock.plan.micro_batch_size) == (2, 4)
    readings = [(r.lanes, r.compute_dtype) for r in lock.plan.probe_readings]
    # both types on one lane, then the given lanes; bare products are equally fast on this clock
    assert readings == [(1, "float32"), (1, "bfloat16"), (2, "float32")]
    assert lock.plan.compute_dtype == "float32"  # on this clock no type is faster


def test_a_given_micro_batch_is_kept_while_lanes_are_measured(plan_with) -> None:
    given = "effective_batch_size = 4\nmicro_batch_size = 1"
    lock, _, _ = plan_with({**AUTO, "effective_batch_size = 4": given})
    assert {r.micro_batch_size for r in lock.plan.probe_readings} == {1}
    assert lock.plan.micro_batch_size == 1
    assert lock.plan.lanes > 1


def test_no_more_lanes_are_measured_than_there_are_trials(plan_with) -> None:
    lock, _, _ = plan_with(
        {**AUTO, "trials = 8": "trials = 3", "max_steps = 12": "max_steps = 9999"}
    )
    assert [r.lanes for r in lock.plan.probe_readings] == [1, 2]


def test_early_rungs_are_evaluated_on_fewer_rows_and_the_notes_say_so(plan_with) -> None:
    lock, _, notes = plan_with({})
    # 6 steps of 4 rows, then from step 5 to 12: a fifth of twice as many forward passes is 9.6 and 11.2
    assert lock.eval_rows == (9, 16)
    said = "of 16 selection rows 9 at rung 0, 16 at rung 1: evaluation may cost 20% of a rung's training."
    assert said in notes
    assert said in lock.notes
    [dear] = [note for note in lock.notes if "data.selection_rows asks" in note]
    assert dear.startswith("rung 1: evaluation on 16 rows costs 29% of its 7 steps")


def test_without_a_number_of_selection_rows_the_last_rung_keeps_to_the_share_too(
    plan_with, tmp_path: Path
) -> None:
    rows = [{"text": " ".join(WORDS[i % 16 :] + WORDS[: i % 16 + 1])} for i in range(16)]
    (tmp_path / "planned" / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    split = 'train = "other.jsonl"\neval = "rows.jsonl"'
    lock, _, _ = plan_with({'train = "rows.jsonl"': split, "selection_rows = 16\n": ""})
    assert lock.data.num_selection == 40  # half of 80 different rows
    assert lock.eval_rows == (9, 11)
    assert not any("costs" in note for note in lock.notes)


def test_a_lock_of_an_older_version_is_still_read(plan_with, tmp_path: Path) -> None:
    lock, _, _ = plan_with({})
    store = StudyFolder(tmp_path)
    store.save_lock(lock)
    path = tmp_path / "study.lock.json"
    old = json.loads(path.read_text())
    for key in ("eval_rows", "study_plan", "forecast"):
        del old[key]
    for key in ("group_rank", "probe_readings", "probe_s", "probe_cut"):
        del old["plan"][key]
    old["plan"] |= {"grouped": False, "tokens_per_s": {"1 lanes": 181.4}}
    path.write_text(json.dumps(old))
    found = store.load_lock()
    unread = replace(lock.plan, group_rank=0, probe_readings=(), probe_s=0.0)
    assert found == replace(lock, eval_rows=(), study_plan=None, forecast=None, plan=unread)


class View:
    """Keeps the notes, and stops the study after so many trials."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.stop_after = stop_after

    def update(self, state: ProgressState) -> None:
        if self.stop_after is not None and state.trials_done >= self.stop_after:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_study_that_goes_on_does_not_measure_again(workplace: Path, tmp_path: Path) -> None:
    folder = copy_of(workplace, tmp_path / "resumed")
    file = folder / "auto.toml"
    text = STUDY.format(quantization="none").replace("lanes = 2", 'lanes = "auto"')
    file.write_text(text.replace("[run]", f'[study]\noutput = "{folder / "reports"}"\n[run]'))
    store = StudyFolder(folder / "reports" / "auto")

    def run(view: View) -> None:
        run_study(load_study(file), study_file=file, command="", view=view)

    first, second = View(stop_after=2), View()
    with pytest.raises(KeyboardInterrupt):
        run(first)
    before = store.load_lock()
    assert before is not None
    assert before.plan.probe_readings
    assert any("measuring" in note for note in first.notes)
    run(second)
    after = store.snapshot()
    assert not any("measuring" in note for note in second.notes)
    assert after.lock.plan == before.plan  # times and all
    assert after.confirmation is not None
    finished = [trial for trial in after.trials if len(trial.rungs) == 2]
    rows = {tuple(len(r.evaluation.loss_sums) for r in trial.rungs) for trial in finished}
    assert rows == {after.lock.eval_rows} == {(9, 16)}
