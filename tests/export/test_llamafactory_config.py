"""LLaMA-Factory's configuration file: every setting read back, and its own argument parser."""

import json

import pytest
import yaml
from framework_studies import (
    WINNERS,
    ReadBack,
    ask_framework,
    assert_carried,
    built_in_rates,
    finished_study,
    job,
    read_jsonl,
    study_with_rows,
)

from lora_tune.export import llamafactory
from lora_tune.export.settings import winner_settings
from lora_tune.export.training_rows import TrainingRows

# What its launcher does before it looks for devices.
CHECK = """
import json, sys, yaml
from llamafactory.hparams.parser import _parse_train_args, _verify_model_args

def faults(given):
    try:
        model, data, training, finetuning, _ = _parse_train_args(dict(given))
        _verify_model_args(model, data, finetuning)
    except (ValueError, TypeError) as error:
        yield str(error)
        return
    read = {**vars(training), **vars(finetuning), **vars(data), **vars(model)}
    for key, value in given.items():
        now = read.get(key, "no setting of training")
        if key in ("dataset", "lora_target"):  # texts that become lists
            now = ",".join(now)
        if key == "report_to" and now == []:
            now = "none"
        if str(getattr(now, "value", now)) != str(value):
            yield f"{key} became {now!r}"

texts = json.load(open(sys.argv[1], encoding="utf-8"))
print(json.dumps({name: list(faults(yaml.safe_load(text))) for name, text in texts.items()}))
"""

# Its package of data loads torchaudio, which rows of text do not need: two of its modules are loaded alone.
DATASET = """
import json, sys, types
from pathlib import Path
import llamafactory
package = types.ModuleType("llamafactory.data")
package.__path__ = [str(Path(llamafactory.__file__).parent / "data")]
sys.modules["llamafactory.data"] = package
from llamafactory.data.converter import get_dataset_converter
from llamafactory.data.parser import get_dataset_list
from llamafactory.hparams import DataArguments
[found] = get_dataset_list(["study_train"], ".")
convert = get_dataset_converter(found.formatting, found, DataArguments(dataset_dir="."))
rows = [json.loads(line) for line in open(found.dataset_name, encoding="utf-8")]
print(json.dumps({"from": found.load_from, "rows": [convert(row) for row in rows]}))
"""


def read_back(text: str) -> ReadBack:
    values = yaml.safe_load(text)
    assert values["finetuning_type"] == "lora"
    assert values["lr_scheduler_type"] == "warmup_stable_decay"
    assert values["optim"] == "adamw_torch_fused"
    assert not values["packing"]
    quantized = "quantization_bit" in values
    if quantized:
        assert (values["quantization_bit"], values["double_quantization"]) == (4, True)
    dtype = {(True, False): "bfloat16", (False, True): "float16", (False, False): "float32"}
    return ReadBack(
        base=values["model_name_or_path"],
        revision=values.get("model_revision"),
        quantization=values["quantization_type"] if quantized else "none",
        compute_dtype=dtype[values["bf16"], values["fp16"]],
        rank=values["lora_rank"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=values["lora_dropout"],
        use_rslora=values["use_rslora"],
        target_modules=values["lora_target"].split(","),
        learning_rate=values["learning_rate"],
        rates=built_in_rates(
            steps=values["max_steps"],
            warmup_steps=values["warmup_steps"],
            kwargs=values["lr_scheduler_kwargs"],
        ),
        betas=(values["adam_beta1"], values["adam_beta2"]),
        epsilon=values["adam_epsilon"],
        weight_decay=values["weight_decay"],
        max_grad_norm=values["max_grad_norm"],
        rows_a_step=values["per_device_train_batch_size"] * values["gradient_accumulation_steps"],
        checkpointing=not values["disable_gradient_checkpointing"],
        max_length=values["cutoff_len"],
        seed=values["seed"],
    )


@pytest.mark.parametrize("winner", WINNERS)
def test_every_setting_comes_back_from_the_file(tmp_path, winner):
    study = finished_study(tmp_path / "reports" / "study", **WINNERS[winner])
    found = read_back(llamafactory.config_text(winner_settings(study), TrainingRows(), []))
    assert found.lora_alpha == study.confirmation.candidates[0].config.lora_alpha
    assert_carried(found, study, exact_warmup=False)


STALE = {
    "lora_r": ("lora_rank:", "lora_r:"),
    "max_length became": ("cutoff_len:", "max_length:"),  # a setting of generation there
    "adamw_fast": ("adamw_torch_fused", "adamw_fast"),
    "max_len": ("cutoff_len:", "max_len:"),
}
"""What must be said of a file in which a key or value is replaced."""
ROWS = {
    "conversations": TrainingRows(),
    "the last turn": TrainingRows(loss="last"),
    "plain text": TrainingRows(is_text=True),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What LLaMA-Factory's parser says of the files of all winners and kinds of rows, and of stale ones."""
    folder = tmp_path_factory.mktemp("llamafactory schema")
    usual = {"compute_dtype": "float32"}  # without a GPU its parser refuses bfloat16
    texts = {
        name: llamafactory.config_text(
            winner_settings(finished_study(folder / "reports" / str(number), **usual | changes)),
            TrainingRows(),
            [],
        )
        for number, (name, changes) in enumerate(WINNERS.items())
    }
    settings = winner_settings(finished_study(folder / "reports" / "rows", **usual))
    texts |= {name: llamafactory.config_text(settings, rows, []) for name, rows in ROWS.items()}
    for fault, (old, new) in STALE.items():
        assert old in texts["conversations"]
        texts[fault] = texts["conversations"].replace(old, new)
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    return ask_framework(CHECK, str(folder / "texts.json"), cwd=folder)


@pytest.mark.parametrize("name", [*WINNERS, *ROWS])
def test_the_file_is_read_by_llamafactory_s_own_parser(answers, name):
    assert answers[name] == []


@pytest.mark.parametrize("fault", STALE)
def test_a_stale_key_or_value_is_noticed(answers, fault):
    assert [said for said in answers[fault] if fault in said]


def test_the_rows_are_read_by_llamafactory_s_own_converter(tmp_path):
    llamafactory.export(job(study_with_rows(tmp_path), tmp_path / "out"))
    found = ask_framework(DATASET, cwd=tmp_path / "out")
    assert found["from"] == "file"
    written = [row["messages"] for row in read_jsonl(tmp_path / "out" / "train.jsonl")]
    assert [[*row["_prompt"], *row["_response"]] for row in found["rows"]] == written
    assert len(written) > 30


def test_what_llamafactory_cannot_take_is_said(tmp_path):
    settings = winner_settings(finished_study(tmp_path / "reports" / "study"))
    rows = TrainingRows(loss="mixed", template="chat_template.jinja", not_alternating=7)
    notes = " ".join(llamafactory.differences(settings, rows))
    assert "which turns carry loss is not carried" in notes
    assert "chat_template.jinja, which LLaMA-Factory cannot take" in notes
    assert "7 rows" in notes
    assert "mask_history: false" in llamafactory.config_text(settings, rows, [])
    assert "mask_history: true" in llamafactory.config_text(settings, TrainingRows(loss="last"), [])
