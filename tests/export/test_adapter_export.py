"""The exported adapter in plain PEFT, in processes that know nothing of lora-tune; and the page on adapters.

What the study recorded of the adapter is the witness for its loss; sums over the adapters' own matrices,
taken in float64, are the witness for blends.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from finished_studies import finished_study
from test_end_to_end import loss_by_peft
from test_end_to_end import workplace as workplace  # the fixture

from lora_tune.errors import StoreError
from lora_tune.export.adapter import adapter_folder, copy_adapter, export
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.files import is_complete, sha256_of
from lora_tune.records import StudySnapshot

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.fixture(scope="module")
def study(workplace: Path) -> StudySnapshot:
    return finished_study(workplace, "none")


def run_export(snapshot: StudySnapshot, folder: Path) -> ExportResult:
    folder.mkdir()
    return export(ExportJob(snapshot=snapshot, folder=folder, gpu=None, note=lambda text: None))


def python(code: str, *arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PLAIN_LOSS = """
import json, sys, torch, transformers
from peft import PeftModel
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2])
total, count = 0.0, 0
with torch.no_grad():
    for ids, labels in json.load(open(sys.argv[3])):
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        target = torch.tensor(labels[1:])
        total += torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum").item()
        count += int((target != -100).sum())
print(repr(total / count))
"""


def rows_file(study: StudySnapshot, path: Path) -> Path:
    from lora_tune.export.base import confirmation_rows, find_base, load_tokenizer

    rows = confirmation_rows(study, load_tokenizer(find_base(study).folder))
    path.write_text(json.dumps([[row.input_ids, row.labels] for row in rows]))
    return path


def recorded_loss(study: StudySnapshot) -> float:
    confirmation = study.confirmation
    assert confirmation is not None
    assert confirmation.decision is not None
    decision = confirmation.decision
    evaluation = confirmation.runs_of(decision.chosen)[decision.median_seed].evaluation
    assert evaluation is not None
    return evaluation.mean_loss


def test_the_exported_adapter_has_the_recorded_loss_in_plain_peft(study, tmp_path):
    run_export(study, tmp_path / "out")
    base = study.folder.parents[1] / "model"
    rows = rows_file(study, tmp_path / "rows.json")
    found = float(python(PLAIN_LOSS, base, tmp_path / "out", rows, cwd=tmp_path))
    # float32 sums in another order, and nothing else
    assert found == pytest.approx(recorded_loss(study), rel=1e-5)


def test_the_exported_adapter_of_a_4_bit_study_has_its_loss_too(workplace, tmp_path):
    study = finished_study(workplace, "nf4")
    run_export(study, tmp_path / "out")
    folder = study.folder.parents[1]
    found = loss_by_peft(folder / "model", tmp_path / "out", folder / "small.toml", tmp_path)
    assert found == pytest.approx(recorded_loss(study), rel=1e-4)


def test_weights_are_copied_to_the_byte_and_the_config_names_no_folder(study, tmp_path):
    result = run_export(study, tmp_path / "out")
    out = tmp_path / "out"
    name = "adapter_model.safetensors"
    assert sha256_of(out / name) == sha256_of(study.folder / "adapter" / name)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None  # a local folder has no hub id
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(study.folder.parents[1]) not in (out / "README.md").read_text()
    assert set(result.files) == set(out.iterdir())
    assert "the card name none" in result.notes[0]


def test_a_base_of_the_hub_is_named_with_its_revision(study, tmp_path):
    model = replace(study.lock.model, hub_id="org/base", revision="abc")
    run_export(replace(study, lock=replace(study.lock, model=model)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    assert 'base_id = "org/base"' in (tmp_path / "out" / "load_adapter.py").read_text()


def test_the_loading_script_loads_the_adapter_from_its_folder(study, tmp_path):
    result = run_export(study, tmp_path / "out")
    assert result.command == "python load_adapter.py"
    code = (tmp_path / "out" / "load_adapter.py").read_text()
    shown = python(code, cwd=tmp_path / "out")
    assert f"r={json.loads((tmp_path / 'out/adapter_config.json').read_text())['r']}," in shown


def test_an_adapter_whose_base_is_gone_is_exported_and_the_note_says_where_the_base_is_named(
    study, tmp_path
):
    spec = {**study.lock.spec, "model": {**study.lock.spec["model"], "base": "/nowhere/tiny"}}
    model = replace(study.lock.model, base="/nowhere/tiny")
    gone = replace(study, lock=replace(study.lock, model=model, spec=spec))
    result = run_export(gone, tmp_path / "out")
    [note] = result.notes
    assert "give its folder to load_adapter.py as base_id" in note
    assert "on this machine" not in note
    assert 'base_id = "/nowhere/tiny"' in (tmp_path / "out" / "load_adapter.py").read_text()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_missing_or_changed_adapter_is_refused_by_name(study, tmp_path):
    broken = tmp_path / "study"
    (broken / "adapter").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"there is no adapter_model\.safetensors"):
        adapter_folder(replace(study, folder=broken))
    for path in (study.folder / "adapter").iterdir():
        (broken / "adapter" / path.name).write_bytes(path.read_bytes())
    assert is_complete(broken / "adapter")
    with (broken / "adapter" / "adapter_config.json").open("a") as stream:
        stream.write("\n")
    with pytest.raises(StoreError, match=r"adapter_config\.json: damaged or changed"):
        adapter_folder(replace(study, folder=broken))


def test_plain_scaling_means_the_same_without_rank_stabilisation(workplace, tmp_path):
    study = finished_study(workplace, "none", ("learning_rate = [1e-3, 3e-2]\nuse_rslora = true",))
    copy_adapter(study, tmp_path, plain_scaling=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    before = json.loads((study.folder / "adapter" / "adapter_config.json").read_text())
    assert (before["use_rslora"], config["use_rslora"]) == (True, False)
    scaling = before["lora_alpha"] / before["r"] ** 0.5
    assert config["lora_alpha"] / config["r"] == pytest.approx(scaling, rel=1e-12)


# docs/adapters.md


def page_code() -> str:
    """The page's Python blocks, one after the other."""
    return "\n".join(
        re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    )


def trial_adapters(study: StudySnapshot) -> tuple[Path, Path]:
    """Two trials of different rank."""
    by_rank = {trial.config.rank: trial for trial in study.trials if trial.rungs}
    assert len(by_rank) >= 2, "the study tried one rank only"
    first, second = list(by_rank.values())[:2]
    folders = [
        study.folder / f"trials/{t.number:04d}/rung-{t.rungs[-1].rung}" for t in (first, second)
    ]
    return folders[0], folders[1]


CHECKS = """
import torch
def logits():
    with torch.no_grad():
        return model(input_ids=ids).logits.double()
def delta(layer, name):
    if name not in layer.lora_A:
        return 0.0
    a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
    return layer.scaling[name] * (b @ a)
ids = torch.arange(4, 16)[None]
model.set_adapter("first"); first = logits()
model.set_adapter("second"); second = logits()
with model.disable_adapter(): bare = logits()
model.set_adapter("blend"); blend = logits()
model.set_adapter("first"); assert torch.equal(first, logits())  # swapping back changes nothing
from peft.tuners.lora import LoraLayer
wanted = type(base)(base.config).double()
state = {k.replace(".base_layer", ""): v.double() for k, v in base.state_dict().items() if "lora_" not in k}
for name, layer in base.named_modules():
    if isinstance(layer, LoraLayer):
        change = 0.7 * delta(layer, "first") + 0.3 * delta(layer, "second")
        state[f"{name}.weight"] = state[f"{name}.weight"] + change
wanted.load_state_dict(state)
with torch.no_grad():
    wanted = wanted.eval()(input_ids=ids).logits
print((blend - wanted).norm() / wanted.norm(), (first - second).norm() / bare.norm(),
      (first - bare).norm() / bare.norm())
"""


def test_two_trials_are_swapped_and_blended_as_the_page_says(study, tmp_path):
    first, second = trial_adapters(study)
    code = page_code()
    places = {"BASE": study.folder.parents[1] / "model", "FIRST": first, "SECOND": second}
    for name, path in places.items():
        code, found = re.subn(
            rf"^{name} = .*$", f"{name} = {str(path)!r}", code, flags=re.MULTILINE
        )
        assert found == 1, name
    error, apart, tuned = map(
        float, re.findall(r"tensor\(([-\de.]+)", python(code + CHECKS, cwd=tmp_path))
    )
    assert error < 1e-5  # float32 against float64
    assert apart > 1e-2
    assert tuned > 1e-2


def test_the_blend_of_unequal_ranks_by_linear_is_refused_as_the_page_says(study, tmp_path):
    first, second = trial_adapters(study)
    code = """
import sys, transformers
from peft import PeftModel
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2], adapter_name="first")
model.load_adapter(sys.argv[3], adapter_name="second")
for kind in ("linear", "ties", "cat", "svd"):
    try:
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], kind, combination_type=kind, density=0.5)
        print(kind, model.peft_config[kind].r)
    except ValueError as error:
        print(kind, "refused")
"""
    shown = python(code, study.folder.parents[1] / "model", first, second, cwd=tmp_path).split()
    ranks = [json.loads((f / "adapter_config.json").read_text())["r"] for f in (first, second)]
    assert shown == f"linear refused ties refused cat {sum(ranks)} svd {max(ranks)}".split()


def test_an_adapter_of_a_gguf_base_says_that_the_hub_s_weights_differ(study, tmp_path):
    note = "the base comes from b.Q4_1.gguf: its weights differ slightly from those of org/base."
    model = replace(study.lock.model, hub_id="org/base", revision=None)
    lock = replace(study.lock, model=model, notes=(note,))
    [said] = run_export(replace(study, lock=lock), tmp_path / "gguf").notes
    assert said.startswith(note)
    assert "the losses in the card are not of them" in said
    assert run_export(replace(study, lock=replace(lock, notes=())), tmp_path / "hub").notes == ()


def test_the_page_s_example_names_trials_that_were_trained_to_the_end():
    trials = (PAGE.parents[1] / "README.md").read_text("utf-8")
    for number, rung in re.findall(r"reports/quickstart/trials/(\d+)/rung-(\d)", page_code()):
        assert rung == "1"
        assert re.search(rf"^ +{int(number)}  (.* )?complete ", trials, re.MULTILINE), number
