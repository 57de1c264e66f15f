"""``lora-tune check``: the plan is the study's own, and nothing is loaded, trained or written for it."""

import dataclasses
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from lora_tune.catalog.gpus import find_gpu
from lora_tune.catalog.models import find_catalog_model
from lora_tune.commands.check import check, check_study
from lora_tune.errors import DataError, InfeasibleError, ModelError, StudyFileError
from lora_tune.memory.shape import ModelShape
from lora_tune.records import LanePlan, ModelIdentity, ProbeReading, StudyLock
from lora_tune.report.check import (
    DiskNeed,
    StudyCheck,
    all_notes,
    check_json,
    forecast_sentence,
    print_check,
)
from lora_tune.search.gate import Gate, resolve_sets
from lora_tune.store.folder import StudyFolder
from lora_tune.study.loader import load_study
from lora_tune.units import GIB

ROOT = Path(__file__).parents[2]
LLAMA_STUDY = ROOT / "studies" / "llama-8b-24gb.toml"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example study of an 8B model beside the rows that its first lines make."""
    folder = tmp_path_factory.mktemp("llama")
    script = runpy.run_path(str(ROOT / "studies" / "pydoc_data.py"))
    with script["silence"]():
        rows = script["collect_rows"]()
    rows = [rows[i * len(rows) // 2000] for i in range(2000)]
    script["write_rows"](rows, folder / "data" / "pydoc-2000.jsonl")
    return Path(shutil.copy(LLAMA_STUDY, folder))


@pytest.fixture(scope="module")
def checked(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyCheck:
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))  # no study of that name has begun there
    try:
        return check_study(llama)
    finally:
        os.chdir(here)


def variant(llama: Path, folder: Path, **changes: str) -> Path:
    """Return the study with other lines, beside the same rows."""
    text = llama.read_text().replace('"data/', f'"{llama.parent}/data/')
    for old, new in changes.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{old} = "))
        text = text.replace(line, new)
    path = folder / "other.toml"
    path.write_text(text)
    return path


def printed(found: StudyCheck, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_check(found, console)
    return console.file.getvalue()


def lock_of(found: StudyCheck, plan: LanePlan) -> StudyLock:
    """Return what the study would have written down at its first start."""
    return StudyLock(
        name=found.study,
        created="2026-01-01T00:00:00+00:00",
        command="lora-tune run",
        study_file="study.toml",
        spec={},
        spec_sha256="",
        model=ModelIdentity(
            base="m",
            hub_id=None,
            revision=None,
            architecture="LlamaForCausalLM",
            model_type="llama",
            num_parameters=1,
            license=None,
            quantization="nf4",
        ),
        data=found.data.fingerprint,
        notes=(),
        versions={},
        hardware={},
        plan=plan,
        rungs=found.plan.rungs,
        warmup_steps=3,
        target_sets=(),
    )


# The 8B example on a 24 GB card.


def test_the_example_of_an_8b_model_is_gated_on_24_gib(llama: Path) -> None:
    spec = load_study(llama)
    known = find_catalog_model(spec.model.base)
    assert known is not None
    shape = ModelShape.from_config(known.model.config)
    gate = Gate(
        spec,
        shape,
        compute_dtype="bfloat16",
        max_tokens=spec.data.max_length,
        budget_bytes=int(24 * GIB * spec.memory.safety),
        group_rank=128,
        compute_capability="8.9",
    )
    modules, _ = resolve_sets(spec.space, model_type="llama", linears=shape.linear_names)
    sets, _ = gate.target_sets(modules)
    assert [target.name for target in sets] == list(spec.space.target_modules)
    assert min(target.max_rank for target in sets) >= 64
    plan = gate.pack_plan(sets)
    assert plan.most_lanes >= 1
    assert 24 * GIB >= find_gpu(spec.memory.gpu).usable_bytes > 23 * GIB


def test_its_plan_is_one_hundred_steps_at_three_rungs(checked: StudyCheck) -> None:
    plan = checked.plan
    assert (plan.num_train, plan.num_selection, plan.num_confirmation) == (1600, 200, 200)
    assert (plan.rungs, plan.num_trials) == ((25, 50, 100), 24)
    assert (plan.finalists, plan.seeds, plan.search_steps) == (2, 2, 890)
    assert [anchor.name for anchor in checked.anchors] == ["A1", "A2", "A3", "A4", "A5", "A6"]
    assert {anchor.config.rank for anchor in checked.anchors} == {4, 16}  # below 2,000 rows
    assert checked.default is None  # it is among the anchors
    assert checked.forecast is not None
    assert not checked.forecast.measured
    low, high = checked.hours[1:]
    assert 0.05 < low < checked.hours[0] < high < 5


def test_people_read_the_whole_plan_in_eighty_columns(checked: StudyCheck) -> None:
    text = printed(
        dataclasses.replace(checked, study_file="study.toml")
    )  # a long path would not be broken
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for part in (
        "llama-8b-24gb: llama-3.1-8b-instruct on RTX 4090",
        "1,600 rows train, 200 choose between trials, 200 confirm the winner",
        "attention-qv           128",
        "A5      mlp             16          32        0           2e-4",
        "   0     25      24          -",
        "   1     50       6       <= 8",
        "   2    100       2       <= 3             200",
        "2 finalists and the default, 2 fresh seeds each: 6 runs of 100 steps",
        "tokens/s",
        "prior: no measured point",
        "the tokenizer of meta-llama/Llama-3.1-8B-Instruct is not on this machine",
    ):
        assert part in text
    flat = " ".join(text.split())
    assert "200 confirmation rows show a difference of 0.0099 nats per token" in flat
    assert "needs 785." in flat
    assert forecast_sentence(checked.forecast) in flat


def test_machines_read_one_object(checked: StudyCheck, llama: Path) -> None:
    found = json.loads(json.dumps(check_json(checked)))
    assert found["rungs"][1] == {"steps": 50, "trials": 6, "selection_rows": 185}
    assert found["hours"] * 3600 == pytest.approx(found["forecast"]["total_s"])
    assert found["data"]["tokens_are_estimated"] is True
    assert found["power"]["rows_needed_for_margin"] == 785
    assert found["anchors"][5]["lora_dropout"] == 0.05
    assert found["default"] is None


def test_another_gpu_is_judged_by_the_option(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = check_study(llama, gpu="RTX 4060 Ti 16GB")
    assert small.device.name == "RTX 4060 Ti 16GB"
    bare = check_study(llama, gpu="24GiB")
    assert (bare.forecast, bare.budget_bytes) == (None, int(24 * GIB * 0.95))
    assert any("no hours: the speed is modelled for GPUs of the catalogue" in n for n in bare.notes)
    with pytest.raises(InfeasibleError, match="no trial fits"):
        check_study(llama, gpu="4GiB")


def test_sets_that_never_fit_are_listed(llama: Path, tmp_path: Path) -> None:
    only = variant(llama, tmp_path, rank="rank = [512]")
    found = check_study(only, gpu="10GiB")
    ranks = {row.target_set: row.max_rank for row in found.target_sets}
    assert ranks["attention-qv"] == 512
    assert ranks["all-linear"] == 0
    assert re.search(r"all-linear +never fits", printed(found))
    assert any("target set all-linear is left out" in note for note in found.notes)


def test_a_budget_in_hours_sets_the_trials(llama: Path, tmp_path: Path) -> None:
    few = check_study(variant(llama, tmp_path, trials="max_hours = 0.2"))
    many = check_study(variant(llama, tmp_path, trials="max_hours = 2"))
    assert 8 <= few.plan.num_trials < 24 < many.plan.num_trials <= 64
    assert few.forecast.total_s <= 0.2 * 3600


def test_too_little_data_are_said_to_be_so(llama: Path, tmp_path: Path) -> None:
    rows = (llama.parent / "data" / "pydoc-2000.jsonl").read_text().splitlines()[:300]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    found = check_study(variant(llama, tmp_path, train=f'train = "{tmp_path}/few.jsonl"'))
    assert found.plan.anchors_only
    assert found.plan.num_trials == len(found.anchors) == 6
    flat = " ".join(printed(found).split())
    assert "too small for halving: a full run has 15 optimizer steps" in flat
    assert "Only the anchors are tried (6), each to its end." in flat


# Elsewhere.


def test_a_study_of_this_machine_has_its_rows_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": f"{n}!"},
            ]
        }
        for n in range(200)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    study = tmp_path / "here.toml"
    study.write_text(
        '[model]\nbase = "smollm2-135m-instruct"\n[data]\ntrain = "rows.jsonl"\n'
        '[space]\nrank = [4, 8]\ntarget_modules = ["all-linear"]\n'
    )
    found = check_study(study)
    assert found.device.name == "the CPU"
    assert not found.tokens_are_estimated
    assert found.data.fingerprint.chat_template == "model"
    assert found.forecast is None
    assert found.hours is None
    assert "not known before the first start, which measures the speed" in printed(found)
    assert found.default is not None  # q and v are no set of this space
    assert "default" in printed(found)


def test_a_study_that_has_begun_is_forecast_from_its_own_readings(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: StudyCheck
) -> None:
    monkeypatch.chdir(tmp_path)
    reading = ProbeReading(
        lanes=2,
        micro_batch_size=4,
        compute_dtype="bfloat16",
        tokens_per_s=1600.0,
        peak_bytes=None,
    )
    plan = LanePlan(
        compute_dtype="bfloat16",
        device="cuda",
        lanes=2,
        micro_batch_size=4,
        gradient_checkpointing=True,
        budget_bytes=1,
        probe_readings=(reading,),
    )
    folder = tmp_path / "reports" / "llama-8b-24gb"
    folder.mkdir(parents=True)
    StudyFolder(folder).save_lock(lock_of(checked, plan))
    found = check_study(llama)
    assert (found.lanes, found.micro_batch_size, found.gradient_checkpointing) == (2, 4, True)
    assert found.forecast.measured
    assert found.forecast.tokens_per_s == 1600.0
    assert found.forecast.search_s == pytest.approx(890 * 16 * found.row_tokens / 1600)
    assert not check_study(llama, gpu="RTX 4090").forecast.measured


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": 'train = "none.jsonl"'}, DataError, "file not found"),
        ({"base": 'base = "no-such-model"'}, ModelError, "no-such-model"),
        ({"gpu": 'gpu = "RTX 4099"'}, StudyFileError, "memory.gpu"),
        ({"max_length": "max_length = 999999"}, StudyFileError, "have 131072 positions"),
        ({"base": 'base = "mixtral-8x7b"'}, ModelError, "mixture of experts"),
        ({"rank": 'rank = ["32"]'}, StudyFileError, r"space\.rank"),
    ],
)
def test_what_a_run_would_refuse_a_check_refuses(
    llama: Path, tmp_path: Path, changes: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_study(variant(llama, tmp_path, **changes))


# The rows.


def small_study(folder: Path, rows: list[object], *lines: str) -> Path:
    """Return a study of the packaged model on a few rows."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    study = folder / "small.toml"
    study.write_text(
        '[model]\nbase = "smollm2-135m-instruct"\n[space]\nrank = [4, 8]\n[data]\ntrain = "rows.jsonl"\n'
        + "".join(f"{line}\n" for line in lines)
    )
    return study


def pair(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without studies, on a machine without a GPU."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples_show_what_is_trained_on(elsewhere: Path) -> None:
    rows: list[object] = [pair(f"question {n}", f"answer {n}") for n in range(60)]
    found = check_study(small_study(elsewhere, rows))
    assert len(found.rows.examples) == 3
    for example in found.rows.examples:
        [trained] = [part.text for part in example if part.has_loss]
        assert re.fullmatch(r"answer \d+<\|im_end\|>", trained)
        number = re.findall(r"\d+", trained)[0]
        assert f"question {number}" in example[0].text
    plain = printed(found, width=100)
    assert re.search(r"\{\+answer \d+<\|im_end\|>\+\}", plain)
    assert "chat template: the model's own" in plain
    console = Console(width=100, file=io.StringIO(), color_system="standard", force_terminal=True)
    print_check(found, console)
    coloured = console.file.getvalue()
    assert re.search("\x1b\\[1;32manswer \\d+", coloured)
    assert "{+" not in coloured


def test_rows_that_would_move_the_cursor_are_shown_without_it(elsewhere: Path) -> None:
    rows: list[object] = [pair(f"{n}\x1b[2J\u202e", f"{n}\x07!") for n in range(60)]
    text = printed(check_study(small_study(elsewhere, rows)))
    assert not set("\x1b\x07\u202e") & set(text)


def test_a_long_row_is_shown_by_its_ends(elsewhere: Path) -> None:
    rows: list[object] = [pair(f"{n} " + "long " * 900, f"the end {n}") for n in range(60)]
    text = printed(check_study(small_study(elsewhere, rows, "max_length = 4000")), width=100)
    assert "characters ...]" in text
    assert len(text.splitlines()) < 120


def test_leaks_doubles_and_cut_rows_are_said_and_in_the_object(elsewhere: Path) -> None:
    rows: list[object] = [pair(f"question {n}", f"answer {n}") for n in range(80)]
    rows += [rows[0], pair("question 5", "word " * 300), pair("QUESTION  7!", "Answer 7")]
    held_out = [pair(f"other {n}", f"reply {n}") for n in range(30)]
    held_out += [pair("Question 3", "answer 3.")]
    (elsewhere / "held.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    study = small_study(elsewhere, rows, 'eval = "held.jsonl"', "max_length = 128")
    found = check_study(study)
    seen = json.loads(json.dumps(check_json(found)))
    lengths = seen["data"]["lengths"]
    assert (seen["data"]["num_duplicates"], lengths["num_alike"], lengths["num_cut"]) == (2, 1, 1)
    assert seen["data"]["train"] == len(rows) - 2
    assert sum(found["rows"] for found in lengths["bins"]) == len(rows) + len(held_out)
    assert seen["data"]["train_label_tokens"] < seen["data"]["train_tokens"]
    flat = " ".join(printed(found).split())
    assert "2 duplicates left out" in flat
    assert "1 training row like another one but for case, punctuation and white space" in flat
    assert "1 row (0.9 %) cut to data.max_length = 128" in flat
    assert "1 rows of rows.jsonl are also in held.jsonl but for case, punctuation and white" in flat


def test_clean_rows_are_called_clean(elsewhere: Path) -> None:
    rows: list[object] = [pair(f"question {n}", f"answer {n}") for n in range(60)]
    found = check_study(small_study(elsewhere, rows))
    flat = " ".join(printed(found).split())
    assert "no exact duplicates, and no held-out row is also a training row" in flat
    assert "no row is longer than data.max_length = 1,024" in flat
    assert not [note for note in all_notes(found) if "also a" in note]


def test_without_a_tokenizer_it_says_what_was_not_checked(checked: StudyCheck) -> None:
    assert checked.rows.examples == ()
    text = printed(checked)
    assert "Examples" not in text
    flat = " ".join(text.split())
    assert "not checked without it: the chat template, which tokens carry loss" in flat
    assert check_json(checked)["data"]["chat_template"] is None


# The disk.


def test_the_disk_is_asked_for_what_adapters_and_lane_states_take(checked: StudyCheck) -> None:
    disk = checked.disk
    largest = max(row.trainable_parameters for row in checked.target_sets)
    trained = 24 + 8 + 3  # trials at the three rungs, seats for ties counted in
    runs = 6 + 1  # of the confirmation, and the winner's copy
    states = 24 + 5 * checked.lanes  # a trial's last, and those of lanes that train
    assert disk.most_bytes == largest * ((trained + runs) * 4 + states * 12)
    assert disk.used_bytes < disk.about_bytes < disk.most_bytes
    assert disk.free_bytes == pytest.approx(shutil.disk_usage(tempfile.gettempdir()).free, rel=0.2)
    assert "GiB are free for reports/llama-8b-24gb" in " ".join(printed(checked).split())


@pytest.mark.parametrize(
    ("free", "used", "word"), [(900, 0, None), (500, 400, None), (500, 0, "may"), (100, 0, "will")]
)
def test_a_disk_that_is_too_small_is_warned_of(
    checked: StudyCheck, free: int, used: int, word: str | None
) -> None:
    disk = DiskNeed(
        folder=Path("reports/x"),
        free_bytes=free,
        used_bytes=used,
        most_bytes=900,
        about_bytes=300,
    )
    notes = all_notes(dataclasses.replace(checked, disk=disk))
    warned = [note for note in notes if note.startswith("the disk")]
    assert [note.split()[2] for note in warned] == ([] if word is None else [word])


def run_check(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lora_tune.cli", "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_bad_file_ends_with_one_message_its_exit_code_and_no_torch(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(
        '[model]\nbase = "llama-3.1-8b"\n[data]\ntrain = "x.jsonl"\n[space]\nrnk = [4]\n'
    )
    done = run_check(bad)
    assert (done.returncode, done.stdout) == (3, "")
    assert "unknown key space.rnk; did you mean rank?" in done.stderr
    assert "Traceback" not in done.stderr
    code = (
        "import sys\nfrom lora_tune.commands.check import check\n"
        f"try:\n    check({str(bad)!r}, gpu=None, as_json=False)\n"
        "except ValueError:\n    print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    alone = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert alone.stdout == "[]\n"


def test_the_command_prints_one_object_and_writes_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check(str(llama), gpu=None, as_json=True)
    assert json.loads(capsys.readouterr().out)["trials"] == 24
    check(str(llama), gpu=None, as_json=False)
    assert capsys.readouterr().out.startswith("llama-8b-24gb: llama-3.1-8b-instruct on RTX 4090\n")
    assert list(tmp_path.iterdir()) == []
