"""axolotl's configuration file: every setting read back, axolotl's own classes, and its own tokens."""

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
)

from lora_tune.export import axolotl
from lora_tune.export.settings import winner_settings
from lora_tune.export.training_rows import TrainingRows
from lora_tune.report.formatting import format_scientific

CHECK = """
import json, sys, yaml
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.datasets import SFTDataset

def faults_of_keys(values, kind, where=""):
    for key in values:
        field = kind.model_fields.get(key)
        if field is None or field.deprecated:
            yield f"{where}{key} is {'deprecated' if field else 'unknown'}"

def faults(given):
    yield from faults_of_keys(given, AxolotlInputConfig)
    for dataset in given["datasets"]:
        yield from faults_of_keys(dataset, SFTDataset, "datasets.")
    try:
        read = AxolotlInputConfig(**given)
    except ValueError as error:
        yield str(error)
        return
    for key, value in given.items():
        if key != "datasets" and hasattr(read, key) and getattr(read, key) != value:
            yield f"{key} became {getattr(read, key)!r}"

texts = json.load(open(sys.argv[1], encoding="utf-8"))
print(json.dumps({name: list(faults(yaml.safe_load(text))) for name, text in texts.items()}))
"""

TOKENS = """
import json, sys, yaml
from axolotl.prompt_strategies.chat_template import load
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer
given = yaml.safe_load(open("axolotl.yml", encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(given["base_model"])
strategy = load(tokenizer, DictDefault(given), ds_cfg=given["datasets"][0])
rows = [json.loads(line) for line in open("train.jsonl", encoding="utf-8")]
done = [strategy.tokenize_prompt(row) for row in rows]
print(json.dumps([[row["input_ids"], row["labels"]] for row in done]))
"""


def read_back(text: str) -> ReadBack:
    values = yaml.safe_load(text)
    assert values["adapter"] == ("qlora" if values["load_in_4bit"] else "lora")
    assert values["lr_scheduler"] == "warmup_stable_decay"
    assert values["optimizer"] == "adamw_torch_fused"
    assert not values["sample_packing"]
    dtype = {(True, False): "bfloat16", (False, True): "float16", (False, False): "float32"}
    return ReadBack(
        base=values["base_model"],
        revision=values.get("revision_of_model"),
        quantization="nf4" if values["load_in_4bit"] else "none",
        compute_dtype=dtype[values["bf16"], values["fp16"]],
        rank=values["lora_r"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=values["lora_dropout"],
        use_rslora=values["peft_use_rslora"],
        target_modules=values["lora_target_modules"],
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
        rows_a_step=values["micro_batch_size"] * values["gradient_accumulation_steps"],
        checkpointing=values["gradient_checkpointing"],
        max_length=values["sequence_len"],
        seed=values["seed"],
    )


@pytest.mark.parametrize("winner", WINNERS)
def test_every_setting_comes_back_from_the_file(tmp_path, winner):
    study = finished_study(tmp_path / "reports" / "study", **WINNERS[winner])
    found = read_back(axolotl.config_text(winner_settings(study), TrainingRows(), []))
    assert isinstance(found.lora_alpha, int)  # axolotl takes nothing else
    assert_carried(found, study, exact_warmup=False)


def test_an_alpha_that_axolotl_cannot_take_is_said_with_both_numbers(tmp_path):
    study = finished_study(tmp_path / "reports" / "study", rank=4, lora_alpha=2.5)
    settings = winner_settings(study)
    notes = axolotl.differences(settings, TrainingRows())
    [said] = [note for note in notes if "whole numbers" in note]
    assert "lora_alpha is 2, not 2.5" in said
    assert format_scientific(2e-4) in said
    assert format_scientific(2e-4 * 2.5 / 2) in said
    assert "lora_alpha" not in axolotl.carried(settings)
    text = axolotl.config_text(settings, TrainingRows(), notes)
    assert "lora_alpha is 2, not 2.5" in " ".join(text.replace("#", " ").split())


ROWS = {
    "conversations": TrainingRows(),
    "the last turn": TrainingRows(loss="last"),
    "an own template": TrainingRows(template="chat_template.jinja"),
    "plain text": TrainingRows(is_text=True),
}


STALE = {
    "lora_rank is unknown": ("lora_r:", "lora_rank:"),
    "datasets.messages_field is unknown": ("field_messages:", "messages_field:"),
    "sdp_attention is deprecated": ("attn_implementation: sdpa", "sdp_attention: true"),
    "lora_alpha\n  Input should be a valid integer": ("lora_alpha: 32", "lora_alpha: 2.5"),
}
"""What axolotl must say of a file in which a key or value is replaced."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What axolotl's classes say of the files of all winners, of all kinds of rows, and of stale ones."""
    folder = tmp_path_factory.mktemp("axolotl schema")
    texts = {
        name: axolotl.config_text(
            winner_settings(finished_study(folder / "reports" / str(number), **changes)),
            TrainingRows(),
            [],
        )
        for number, (name, changes) in enumerate(WINNERS.items())
    }
    settings = winner_settings(finished_study(folder / "reports" / "rows"))
    texts |= {name: axolotl.config_text(settings, rows, []) for name, rows in ROWS.items()}
    for fault, (old, new) in STALE.items():
        assert old in texts["conversations"]
        texts[fault] = texts["conversations"].replace(old, new)
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    return ask_framework(CHECK, str(folder / "texts.json"), cwd=folder)


@pytest.mark.parametrize("name", [*WINNERS, *ROWS])
def test_the_file_is_valid_by_axolotl_s_own_classes(answers, name):
    assert answers[name] == []


@pytest.mark.parametrize("fault", STALE)
def test_a_stale_key_or_value_is_noticed(answers, fault):
    assert [said for said in answers[fault] if fault in said]


def test_axolotl_s_own_preparation_gives_the_study_s_tokens_and_labels(exports):
    study = {
        tuple(row["input_ids"]): row["labels"] for row in read_jsonl(exports / "trl/train.jsonl")
    }
    rows = ask_framework(TOKENS, cwd=exports / "axolotl")
    assert len(rows) == len(study) > 30
    for ids, labels in rows:
        assert study[tuple(ids)] == labels


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    from framework_studies import study_with_rows

    from lora_tune.export import trl

    folder = tmp_path_factory.mktemp("axolotl rows")
    study = study_with_rows(folder)
    axolotl.export(job(study, folder / "axolotl"))
    trl.export(job(study, folder / "trl"))
    return folder


def test_names_and_notes_cannot_leave_their_place(tmp_path):
    hostile = 'x evil: true - "a": &a !!python/object:os.system {} # '
    lines = hostile.replace(" evil", "\n\u2028evil").replace(" - ", "\r\n- ")
    study = finished_study(tmp_path / "reports" / "study", base=hostile, hub_id=lines)
    settings = winner_settings(study)
    values = yaml.safe_load(axolotl.config_text(settings, TrainingRows(), [lines, "two\nlines"]))
    assert "evil" not in values
    assert values["base_model"] == lines
