"""The model card: front matter that the hub reads, and text that a stranger can use."""

import ast
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from report_studies import confirmed_study, finished_study, fruitless_study, unfinished_study

from lora_tune.errors import AllTrialsFailedError
from lora_tune.records import Behaviour, GeneralLoss
from lora_tune.report import model_card
from lora_tune.report.behaviour import summarize_behaviour
from lora_tune.report.card import loading_script, merged_card
from lora_tune.report.merging import MergeReport, MergeScores
from lora_tune.stats.paired import paired_difference

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the card needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def front_matter(card: str) -> dict[str, object]:
    """Return what stands between the first two lines of dashes."""
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_reads_back():
    card = model_card(finished_study(), base_model=HUB_ID)
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "docstrings", "name": "docstrings.jsonl, held-out rows"},
        "metrics": [
            {
                "type": "loss",
                "name": "loss, nats per target token",
                "value": 2.337,
                "verified": False,
            }
        ],
    }
    expected = {
        "base_model": HUB_ID,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-tune"],
        "model-index": [{"name": "docstrings", "results": [result]}],
    }
    found = front_matter(card)
    [metric] = found["model-index"][0]["results"][0]["metrics"]
    metric["value"] = round(metric["value"], 4)
    assert found == expected
    assert ModelCard(card).data.to_dict()["model-index"][0]["results"][0]["dataset"]["type"]


def test_the_loss_in_the_metadata_is_that_of_the_shipped_seed():
    study = finished_study()
    decision = study.confirmation.decision
    shipped = study.confirmation.runs_of(decision.chosen)[decision.median_seed]
    [result] = ModelCard(model_card(study, base_model=HUB_ID)).data.eval_results
    assert result.metric_value == pytest.approx(shipped.evaluation.mean_loss, rel=1e-5)
    assert result.verified is False


@pytest.mark.parametrize(
    ("source", "hub_id", "kind"),
    [
        ("org/rows", "org/rows", "org/rows"),
        ("imdb", "imdb", "imdb"),
        ("data/my rows.jsonl", None, "my-rows"),
        ("rows.parquet", None, "rows"),
        ("/home/me/private/rows.csv", None, "rows"),
        ("\u6570\u636e.jsonl", None, "data"),
    ],
)
def test_only_a_data_set_of_the_hub_is_named_as_one(source, hub_id, kind):
    study = finished_study()
    lock = replace(study.lock, data=replace(study.lock.data, source=source))
    card = model_card(replace(study, lock=lock), base_model=HUB_ID)
    data = ModelCard(card).data
    assert data.datasets == ([hub_id] if hub_id else None)
    assert data.eval_results[0].dataset_type == kind
    assert "/home/me" not in card


@pytest.mark.parametrize("base_model", [None, "", "/home/me/model", "../model", "m.gguf"])
def test_a_base_without_a_hub_id_is_left_out_and_the_card_says_so(base_model):
    card = model_card(finished_study(), base_model=base_model)
    assert not {"base_model", "base_model_relation"} & set(front_matter(card))
    assert "no known id on the hub" in card


def test_an_unknown_license_is_left_out():
    study = finished_study()
    model = replace(study.lock.model, license=None)
    card = model_card(replace(study, lock=replace(study.lock, model=model)), base_model=HUB_ID)
    assert "license" not in front_matter(card)
    assert "licence of the base model is not known" in card
    assert "licence of the base model is apache-2.0" in model_card(study, base_model=HUB_ID)


def test_the_card_has_the_confirmed_loss_with_its_interval_and_how_to_load():
    card = model_card(finished_study(), base_model=HUB_ID)
    assert "| 2.335 (95 % interval 2.236 to 2.434)" in card
    assert "| 2.337, 2.333 " in card
    assert "Better than the default: the loss of trial 7" in card
    assert "seed 0: of its 2 seeds the one of higher loss" in card
    assert "2 times each with fresh seeds" in card
    assert 'PeftModel.from_pretrained(base, "path/to/this/adapter")' in card
    assert "support_avx512bf16_for_cpu = False" in card


def test_an_adapter_trained_on_all_rows_says_that_it_was_not_scored():
    study = finished_study()
    study = replace(study, confirmation=replace(study.confirmation, refit=True))
    card = model_card(study, base_model=HUB_ID)
    assert "trained once more on all rows" in card
    assert "that adapter itself was not scored" in card
    assert "seed 0: of its" not in card
    assert "this adapter saw them" in card
    assert "not used in training" not in card
    assert "model-index" not in front_matter(card)


def test_the_card_of_a_default_that_was_no_trial_names_it():
    study = confirmed_study({"default": (2.3, 2.31)}, default="default")
    assert "The default configuration of study docstrings" in model_card(study, base_model=HUB_ID)


def test_the_card_names_no_folder_of_the_machine():
    study = finished_study()
    lock = replace(
        study.lock,
        model=replace(study.lock.model, base="/home/me/models/small", hub_id=None),
        data=replace(study.lock.data, source="/home/me/private/rows.jsonl"),
        command="lora-tune run /home/me/study.toml",
    )
    card = model_card(replace(study, lock=lock), base_model=None)
    assert "/home/me" not in card
    assert "rows.jsonl" in card


PAYLOADS = [
    "x\n---\n<script>alert(1)</script> | y",
    "a: b\nlicense: mit",
    "- x\n- y",
    "!!python/object/apply:os.system ['id']",
    "*anchor &anchor",
    "'\"` ${HOME} {{ 7 * 7 }} {% raw %}",
    "](javascript:alert(1)) <img src=x onerror=alert(1)>",
    "\u202e reversed \u0000 \x1b[31m",
    "null",
    "# heading | cell",
]


@pytest.mark.parametrize("evil", PAYLOADS)
def test_foreign_text_cannot_end_the_front_matter_or_add_markup(evil):
    study = finished_study()
    lock = replace(
        study.lock,
        name=evil,
        model=replace(study.lock.model, license=evil, base=evil, architecture=evil),
        data=replace(study.lock.data, source=evil),
        versions={evil: evil},
    )
    card = model_card(replace(study, lock=lock), base_model=HUB_ID)
    data, text = ModelCard(card).data, ModelCard(card).text
    assert data.license == evil
    assert data.model_name == evil
    assert data.library_name == "peft"
    assert data.base_model == HUB_ID
    assert data.datasets is None or data.datasets == ["null"]
    for markup in ("<script", "<img", " ](javascript", "\x1b", "\x00", "\u202e"):
        assert markup not in text
    assert "49" not in text.split("## Result")[0]


def test_an_unconfirmed_adapter_says_so_and_no_adapter_has_no_card():
    card = model_card(unfinished_study(), base_model=HUB_ID)
    assert "not confirmed on unseen rows" in card
    assert "model-index" not in front_matter(card)
    with pytest.raises(AllTrialsFailedError, match="no trial succeeded"):
        model_card(fruitless_study(), base_model=HUB_ID)


def behaviour(chosen: str) -> Behaviour:
    losses = {"untuned base": 3.0, "trial 5": 3.1, chosen: 3.6}
    return Behaviour(
        chosen=chosen,
        default="trial 5",
        samples=(),
        max_new_tokens=16,
        general_text="a text",
        general_tokens=100,
        general_losses=tuple(GeneralLoss(subject=s, loss=x) for s, x in losses.items()),
    )


def test_what_was_forgotten_stands_in_the_card():
    study = finished_study()
    chosen = study.confirmation.decision.chosen
    study = replace(study, behaviour=behaviour(chosen))
    found = summarize_behaviour(study)
    assert found is not None
    section = model_card(study, base_model=HUB_ID).split("## Behaviour\n")[1].split("## ")[0]
    assert found.sentences
    for sentence in found.sentences:
        assert sentence in section
    assert "20" in section  # 3.6 is 20 % above 3.0
    assert "## Behaviour" not in model_card(replace(study, behaviour=None), base_model=HUB_ID)


def test_the_card_of_a_merged_model_is_of_a_model_and_has_both_losses():
    study = finished_study()
    decision = study.confirmation.decision
    before = study.confirmation.runs_of(decision.chosen)[decision.median_seed].evaluation
    after = replace(before, loss_sums=tuple(1.01 * x for x in before.loss_sums))
    merge = MergeReport(
        dtype="bfloat16",
        quantization="nf4",
        scores=MergeScores(
            as_trained=before, merged=after, difference=paired_difference(after, before)
        ),
    )
    card = merged_card(study, base_model=HUB_ID, merge=merge)
    data = ModelCard(card).data
    assert data.library_name == "transformers"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.eval_results[0].metric_value == pytest.approx(after.mean_loss, rel=1e-5)
    assert "## Merging" in card
    assert "(+1.00 %; 95 % interval" in card
    assert "worse than as trained" in card
    assert "PeftModel" not in card
    assert "AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)" in card


def test_the_loading_script_is_python_and_names_a_local_base_only_if_told():
    study = finished_study()
    model = replace(study.lock.model, hub_id=None, base="small")
    study = replace(study, lock=replace(study.lock, model=model))
    for place in (None, Path('/it\'s "here"/model')):
        script = loading_script(study, local_base=place)
        tree = ast.parse(script)
        [base] = [
            node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "base_id"
        ]
        assert base == ("small" if place is None else str(place))
        assert 'PeftModel.from_pretrained(base, ".")' in script


def test_a_base_from_a_gguf_file_is_said_where_the_hub_s_weights_are_loaded():
    study = finished_study()
    assert "GGUF" not in model_card(study, base_model=HUB_ID)
    note = f"the base comes from Smol.Q4_1.GGUF: its weights differ from those of {HUB_ID}."
    study = replace(study, lock=replace(study.lock, notes=(*study.lock.notes, note)))
    body = model_card(study, base_model=HUB_ID).split("---\n", 2)[2]
    assert (
        "The base comes from Smol.Q4\\_1.GGUF" in body
        or "The base comes from Smol.Q4_1.GGUF" in body
    )
    assert "The losses here are of the former; the code below loads the latter." in body
    assert "code below loads the latter" not in model_card(study, base_model=None)
