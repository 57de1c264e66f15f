"""The TRL script: every setting read back from its code, and its loss beside the study's."""

import ast
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from framework_studies import (
    WINNERS,
    WORDS,
    ReadBack,
    assert_carried,
    backwards,
    finished_study,
    job,
    make_base,
    read_jsonl,
    study_with_rows,
    write_jsonl,
)

from lora_tune.export import axolotl, llamafactory, trl
from lora_tune.export.settings import winner_settings
from lora_tune.export.training_rows import TrainingRows, write_rows
from lora_tune.store.folder import StudyFolder


def keywords(tree: ast.Module, name: str) -> dict[str, ast.expr]:
    """Return the arguments of the call that ``name`` is set to, or that is made of it anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name:
            return {str(keyword.arg): keyword.value for keyword in node.keywords}
    return {}


def read_back(text: str) -> ReadBack:
    tree = ast.parse(text)
    constants = {
        node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)
    }
    [share] = [n for n in tree.body if getattr(n, "name", "") == "share_of_peak"]
    steps = {name: constants[name].value for name in ("STEPS", "WARMUP_STEPS", "HOLD_STEP")}
    names: dict[str, object] = dict(steps)
    exec(compile(ast.Module([share], []), "share", "exec"), names)
    lora, training = keywords(tree, "LoraConfig"), keywords(tree, "SFTConfig")
    quantization = keywords(tree, "BitsAndBytesConfig")
    value = {key: ast.literal_eval(node) for key, node in lora.items()}
    number = {
        key: ast.literal_eval(node)
        for key, node in training.items()
        if isinstance(node, ast.Constant)
    }
    assert ast.unparse(training["max_steps"]) == "STEPS"
    assert number["packing"] is False
    dtype = ast.unparse(constants["COMPUTE_DTYPE"]).removeprefix("torch.")
    assert (number["bf16"], number["fp16"]) == (dtype == "bfloat16", dtype == "float16")
    if quantization:
        assert quantization["load_in_4bit"].value is True
        assert quantization["bnb_4bit_use_double_quant"].value is True
    return ReadBack(
        base=ast.literal_eval(constants["BASE"]),
        revision=ast.literal_eval(constants["REVISION"]),
        quantization=quantization["bnb_4bit_quant_type"].value if quantization else "none",
        compute_dtype=dtype,
        rank=value["r"],
        lora_alpha=value["lora_alpha"],
        lora_dropout=value["lora_dropout"],
        use_rslora=value["use_rslora"],
        target_modules=value["target_modules"],
        learning_rate=number["learning_rate"],
        rates=[names["share_of_peak"](done) for done in range(steps["STEPS"])],
        betas=(number["adam_beta1"], number["adam_beta2"]),
        epsilon=number["adam_epsilon"],
        weight_decay=number["weight_decay"],
        max_grad_norm=number["max_grad_norm"],
        rows_a_step=number["per_device_train_batch_size"] * number["gradient_accumulation_steps"],
        checkpointing=number["gradient_checkpointing"],
        max_length=number["max_length"],
        seed=number["seed"],
    )


@pytest.mark.parametrize("winner", WINNERS)
def test_every_setting_comes_back_from_the_script(tmp_path, winner):
    study = finished_study(tmp_path / "reports" / "study", **WINNERS[winner])
    found = read_back(trl.script_text(winner_settings(study), TrainingRows(), []))
    assert found.lora_alpha == study.confirmation.candidates[0].config.lora_alpha
    assert_carried(found, study, exact_warmup=True)


def test_names_and_notes_cannot_become_code(tmp_path):
    hostile = 'x\'\nimport os\r\u2028""" {{ 7 * 7 }} \\'
    base = 'x\' import os""" {{ 7 * 7 }} \\'  # a study file has no line break here
    study = finished_study(tmp_path / "reports" / "study", base=base, hub_id=hostile)
    text = trl.script_text(winner_settings(study), TrainingRows(), [hostile])
    assert read_back(text).base == hostile
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)]
    assert [alias.name for node in imported for alias in node.names] == ["torch"]
    assert text.count("{{ 7 * 7 }}") == 2


@pytest.mark.parametrize(
    "rows", [TrainingRows(reason="gone"), TrainingRows(reason="gone", is_text=True)]
)
def test_without_rows_the_script_lets_trl_prepare_those_that_are_put_there(tmp_path, rows):
    study = finished_study(tmp_path / "reports" / "study")
    text = trl.script_text(winner_settings(study), rows, [])
    training = keywords(ast.parse(text), "SFTConfig")
    assert ("assistant_only_loss" in training) is not rows.is_text
    assert "confirmation" not in text.partition("from pathlib")[2]
    assert "input_ids" not in text


def test_rows_are_the_study_s_training_rows_and_no_other(tmp_path):
    rows = []
    for i in range(60):
        words = [WORDS[(i * k) % 16] for k in (1, 3, 7, 5)] + [WORDS[i % 16], WORDS[i // 16]]
        turns = [("user", " ".join(words)), ("assistant", words[0]), ("user", words[1])]
        turns.append(("assistant", " ".join(words[2:])))
        rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    study = study_with_rows(tmp_path, rows=[*rows, rows[0]], data={"train_on": "last-assistant"})
    result = trl.export(job(study, tmp_path / "trl"))
    train = read_jsonl(tmp_path / "trl" / "train.jsonl")
    confirmation = read_jsonl(tmp_path / "trl" / "confirmation.jsonl")
    assert (len(train), len(confirmation)) == (44, 8)
    written = [json.dumps(row["messages"]) for row in (*train, *confirmation)]
    assert len(set(written)) == len(written)
    assert set(written) <= {json.dumps(row["messages"]) for row in rows}
    assert sum(label != -100 for label in train[0]["labels"]) == 5  # four words and the turn's end
    assert {path.name for path in result.files} == {
        "train_trl.py",
        "train.jsonl",
        "confirmation.jsonl",
    }
    (tmp_path / "text").mkdir()
    found = write_rows(job(study, tmp_path / "text" / "rows"), winner_settings(study), tokens=False)
    assert found.loss == "last"
    plain = read_jsonl(tmp_path / "text" / "rows" / "train.jsonl")
    marks = [[turn.get("train") for turn in row["messages"]] for row in plain]
    assert marks == [[False, False, False, True]] * 44


def test_what_looks_like_a_token_in_a_row_is_exported_as_it_is(tmp_path):
    token = "hf_" + "abcdEFGH12" * 4
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{WORDS[i % 16]} {WORDS[i // 16]} {token}"},
                {"role": "assistant", "content": WORDS[i % 7]},
            ]
        }
        for i in range(60)
    ]
    study = study_with_rows(tmp_path, rows=rows)
    trl.export(job(study, tmp_path / "out"))
    written = read_jsonl(tmp_path / "out" / "train.jsonl")
    assert written
    assert all(row["messages"][0]["content"].endswith(token) for row in written)


@pytest.mark.parametrize("target", [axolotl, llamafactory, trl])
def test_rows_that_are_gone_keep_the_last_turn_as_the_one_with_loss(tmp_path, target):
    rows = [
        {
            "messages": [
                {"role": role, "content": content}
                for asked, answer in (backwards(i), backwards(i + 60))
                for role, content in (("user", asked), ("assistant", answer))
            ]
        }
        for i in range(60)
    ]
    study = study_with_rows(tmp_path, rows=rows, data={"train_on": "last-assistant"})
    (tmp_path / "rows.jsonl").unlink()
    result = target.export(job(study, tmp_path / "out"))
    text = result.files[0].read_text(encoding="utf-8")
    said = [note for note in result.notes if "last assistant turn alone" in note]
    if target is llamafactory:
        assert "mask_history: true" in text
    else:
        assert len(said) == 1
    if target is axolotl:
        assert "message_field_training: train" in text


def loaded_rows(script: Path) -> dict[str, list[str]]:
    """Run the lines of a script that load its rows; return the columns of each split."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    [main] = [node for node in tree.body if getattr(node, "name", "") == "main"]
    lines = [n for n in main.body if ast.unparse(n).startswith(("rows = ", "if 'labels' in rows"))]
    code = ast.unparse(ast.Module(lines, []))
    program = (
        "import json; from pathlib import Path; from datasets import load_dataset; "
        f"HERE = Path({str(script.parent)!r})\n{code}\n"
        "print(json.dumps({name: split.column_names for name, split in rows.items()}))"
    )
    return json.loads(run("-c", program, cwd=script.parent).splitlines()[-1])


def test_rows_of_one_s_own_are_loaded_with_their_own_columns(tmp_path):
    trl.export(job(study_with_rows(tmp_path), tmp_path / "out"))
    script = tmp_path / "out" / "train_trl.py"
    found = loaded_rows(script)
    assert found["train"] == ["input_ids", "labels"]
    assert {"input_ids", "labels"} <= set(found["confirmation"])
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    for row in ({"text": "mine"}, {"prompt": "1", "completion": "2"}, {"messages": turns}):
        write_jsonl(script.parent / "train.jsonl", [row] * 3)
        assert loaded_rows(script)["train"] == list(row)


def test_rows_that_have_changed_are_not_exported(tmp_path):
    study = study_with_rows(tmp_path)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    write_jsonl(tmp_path / "rows.jsonl", rows[:40])
    result = trl.export(job(study, tmp_path / "out"))
    assert [path.name for path in result.files] == ["train_trl.py"]
    assert any("not those of the study any more" in note for note in result.notes)


# A real study, and the script it exports.

STUDY = """
[model]
base = "model"
quantization = "{quantization}"
compute_dtype = "float32"
[data]
train = "rows.jsonl"
max_length = 64
selection_rows = 16
confirmation_rows = 48
[train]
max_steps = 40
effective_batch_size = 8
[space]
rank = [8]
alpha_ratio = [2.0]
lora_dropout = [0.05]
target_modules = ["all-linear"]
learning_rate = [2e-3, 2e-3]
[search]
trials = 1
rungs = [1.0]
anchors = []
[select]
seeds = 5
finalists = 1
samples = 0
[run]
lanes = 3
device = "cpu"
"""


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def trained_study(folder: Path, quantization: str) -> Path:
    """Run a study and export its script; return the script."""
    make_base(folder / "model")
    drawn = random.Random(0)
    rows = []
    for _ in range(300):  # the answer repeats the question backwards: there is something to learn
        words = drawn.sample(WORDS, drawn.randint(3, 6))
        turns = [("user", " ".join(words)), ("assistant", " ".join(reversed(words)))]
        rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "s.toml").write_text(STUDY.format(quantization=quantization), encoding="utf-8")
    run("-m", "lora_tune.cli", "run", "s.toml", cwd=folder)
    snapshot = StudyFolder(folder / "reports" / "s").snapshot()
    trl.export(job(snapshot, folder / "trl"))
    return folder / "trl" / "train_trl.py"


def printed_loss(script: Path) -> float:
    found = re.search(r"confirmation rows: ([0-9.]+)", run(script.name, cwd=script.parent))
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("none", marks=pytest.mark.slow)])
def test_the_script_reaches_the_study_s_loss_within_the_noise_of_seeds(tmp_path, quantization):
    script = trained_study(tmp_path, quantization)
    confirmation = StudyFolder(tmp_path / "reports" / "s").snapshot().confirmation
    assert confirmation is not None
    decision, base = confirmation.decision, confirmation.base_evaluation
    assert decision is not None
    assert base is not None
    assert decision.chosen == "trial 0"
    score = next(score for score in decision.scores if score.candidate == decision.chosen)
    noise = statistics.stdev(score.seed_losses)
    assert noise < 0.1 * (base.mean_loss - score.loss)  # so that the comparison says something
    loss = printed_loss(script)
    assert abs(loss - score.loss) < 3 * noise
    assert loss_by_peft(tmp_path, script.parent, quantization) == pytest.approx(loss, rel=1e-4)
    text = script.read_text(encoding="utf-8")
    assert "lora_alpha=16," in text
    script.write_text(text.replace("lora_alpha=16,", "lora_alpha=4,"), encoding="utf-8")
    assert abs(printed_loss(script) - score.loss) > 3 * noise  # a setting not carried is seen


def loss_by_peft(folder: Path, exported: Path, quantization: str) -> float:
    """Score the script's adapter on the confirmation rows that were exported, with plain PEFT."""
    import peft
    import torch
    import transformers

    config = None
    if quantization == "nf4":
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, quantization_config=config
    )
    model = peft.PeftModel.from_pretrained(base, exported / "adapter").eval()
    total, count = 0.0, 0
    for row in read_jsonl(exported / "confirmation.jsonl"):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        total += float(
            torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        )
        count += int((targets != -100).sum())
    return total / count
