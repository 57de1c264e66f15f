"""The winner's settings against the study's record, transformers' own schedule and PEFT's own matcher."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from framework_studies import (
    LLAMA,
    SHAPE,
    WINNERS,
    adapted_by_peft,
    built_in_rates,
    finished_study,
    modules,
)

from lora_tune.catalog.targets import short_names
from lora_tune.engine.schedule import learning_rate_at
from lora_tune.errors import StoreError
from lora_tune.export.settings import Schedule, winner_settings
from lora_tune.search.plan import hold_step_of

SCHEDULES = [
    (steps, warmup, cooldown)
    for steps in (1, 2, 24, 100, 1001)
    for warmup in (0, 1, 2, 30)
    for cooldown in (0.0, 0.15, 0.9)
]


@pytest.mark.parametrize(("steps", "warmup", "cooldown"), SCHEDULES)
def test_the_built_in_schedule_has_the_study_s_peak_and_decay(steps, warmup, cooldown):
    hold = hold_step_of(steps, cooldown)
    found = Schedule(steps=steps, warmup_steps=warmup, hold_step=hold).built_in
    assert min(found.values()) >= 0
    rates = built_in_rates(
        steps=steps,
        warmup_steps=found["num_warmup_steps"],
        kwargs={"num_decay_steps": found["num_decay_steps"], "decay_type": "linear"},
    )
    expected = [
        learning_rate_at(step, peak=1.0, warmup_steps=warmup, hold_step=hold, end_step=steps)
        for step in range(1, steps + 1)
    ]
    if warmup <= hold:  # else the study's rate falls before it has risen
        reached = max(0, warmup - 1)
        assert rates[reached:] == pytest.approx(expected[reached:], abs=1e-12)
        assert rates == pytest.approx(expected, abs=1e-12 + (1 / warmup if warmup else 0))


@pytest.mark.parametrize(
    "wanted",
    [
        modules("q_proj", "v_proj"),
        modules("mlp.down_proj"),
        modules(),
        ("model.layers.3.self_attn.q_proj",),
        modules("q_proj")[:-1],
        (*modules("o_proj"), "model.layers.0.mlp.up_proj"),
    ],
    ids=["q, v", "down", "all", "one", "all but one", "a group and one"],
)
def test_short_names_adapt_the_same_modules_by_peft_s_rule(wanted):
    names = short_names(wanted, SHAPE.linear_names)
    assert adapted_by_peft(list(names)) == set(wanted)
    whole = all(
        {n for n in SHAPE.linear_names if n.endswith(name.rpartition(".")[2])} <= set(wanted)
        for name in wanted
    )
    assert (len(names) < len(wanted)) is (whole and len(wanted) > 1)


def test_names_stay_full_where_the_base_s_modules_are_not_known():
    assert short_names(modules("q_proj"), ()) == modules("q_proj")


def test_a_base_is_named_by_its_hub_id_or_by_its_absolute_path(tmp_path, monkeypatch):
    by_id = winner_settings(finished_study(tmp_path / "reports" / "hub"))
    assert (by_id.base, by_id.revision, by_id.base_is_path) == (LLAMA, "0123abcd", False)
    monkeypatch.chdir("/")  # the study file's folder counts, not the working directory
    base = tmp_path / "bases" / "own"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"model_type": "unheard-of"}')
    (base / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    study = finished_study(
        tmp_path / "reports" / "local", base="bases/own", hub_id=None, name="local"
    )
    by_path = winner_settings(study)
    assert (by_path.base, by_path.revision, by_path.base_is_path) == (str(base), None, True)
    assert by_path.shape is None
    assert by_path.target_names == by_path.target_modules


def test_a_base_that_is_gone_is_named_as_in_the_study_file_and_said(tmp_path):
    study = finished_study(tmp_path / "reports" / "gone", base="./gone", hub_id=None, name="gone")
    settings = winner_settings(study)
    assert settings.base == "./gone"
    assert any("was not found here" in note for note in settings.notes)


def test_weights_from_elsewhere_than_the_hub_id_are_said(tmp_path):
    study = finished_study(
        tmp_path / "reports" / "gguf",
        base="smollm2-135m-instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        name="gguf",
    )
    lock = replace(study.lock, model=replace(study.lock.model, revision=None))
    settings = winner_settings(replace(study, lock=lock))
    assert any("weights may differ slightly" in note for note in settings.notes)


def test_a_study_without_a_decision_is_refused_with_what_to_do(tmp_path):
    study = finished_study(tmp_path / "reports" / "early")
    with pytest.raises(
        StoreError, match=r"has no winner yet.* Finish it with: lora-tune run winner\.toml"
    ):
        winner_settings(replace(study, confirmation=None))
    with pytest.raises(StoreError, match="no winner yet"):
        winner_settings(replace(study, confirmation=replace(study.confirmation, decision=None)))


EXPORT_ALL = """
import importlib, json, sys
from pathlib import Path
from lora_tune.export.job import ExportJob
from lora_tune.store.folder import StudyFolder
snapshot = StudyFolder(Path("reports/light")).snapshot()
found = {}
for target in ("axolotl", "llamafactory", "trl"):
    folder = Path(target)
    folder.mkdir()
    job = ExportJob(snapshot=snapshot, folder=folder, gpu=None, note=lambda text: None)
    result = importlib.import_module(f"lora_tune.export.{target}").export(job)
    found[target] = [[path.name for path in result.files], result.notes]
heavy = [name for name in ("torch", "transformers", "peft") if name in sys.modules]
print(json.dumps([heavy, found]))
"""


def test_exports_neither_load_torch_nor_need_the_rows(tmp_path):
    finished_study(tmp_path / "reports" / "light")
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_ALL],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    heavy, found = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    for target, (files, notes) in found.items():
        assert "train.jsonl" not in files
        assert sorted(files) == sorted(path.name for path in (tmp_path / target).iterdir())
        [said] = [note for note in notes if note.startswith("train.jsonl was not written")]
        assert "Llama-3.1-8B is not on this machine" in said
        assert [note for note in notes if note.startswith("carried: ")]


def test_winners_differ_in_every_searched_setting():
    keys = {key for changes in WINNERS.values() for key in changes}
    searched = {"rank", "lora_alpha", "lora_dropout", "target_modules", "learning_rate"}
    assert keys >= searched | {"use_rslora", "quantization"}
    assert Path(__file__).with_name("fetch_frameworks.sh").stat().st_mode & 0o100


def test_a_base_from_a_gguf_file_is_said_as_the_study_said_it(tmp_path):
    said = "the base comes from Llama.Q4_1.gguf: its weights were quantized once already."
    study = finished_study(tmp_path / "reports" / "study", base="llama-q4", hub_id=LLAMA)
    study = replace(study, lock=replace(study.lock, notes=("something else", said)))
    model = replace(study.lock.model, revision=None)
    settings = winner_settings(replace(study, lock=replace(study.lock, model=model)))
    assert f"{said} The file names {LLAMA}." in settings.notes
    assert not any("came as" in note for note in settings.notes)
