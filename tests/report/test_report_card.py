"""The model card: front matter that the hub reads, and text that a stranger can use."""

import socket
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from report_studies import confirmed_study, finished_study, fruitless_study, unfinished_study

from lora_tune.errors import AllTrialsFailedError
from lora_tune.report import model_card

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
    expected = {
        "base_model": HUB_ID,
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-tune"],
    }
    assert front_matter(card) == expected
    assert ModelCard(card).data.to_dict() == expected


@pytest.mark.parametrize("base_model", [None, "", "/home/me/model", "../model", "m.gguf"])
def test_a_base_without_a_hub_id_is_left_out_and_the_card_says_so(base_model):
    card = model_card(finished_study(), base_model=base_model)
    assert "base_model" not in front_matter(card)
    assert "no known id on the hub" in card


def test_an_unknown_license_is_left_out():
    study = finished_study()
    model = replace(study.lock.model, license=None)
    card = model_card(replace(study, lock=replace(study.lock, model=model)), base_model=HUB_ID)
    assert "license" not in front_matter(card)


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


def test_foreign_text_cannot_end_the_front_matter_or_add_markup():
    study = finished_study()
    evil = "x\n---\n<script>alert(1)</script> | y"
    lock = replace(
        study.lock,
        name=evil,
        model=replace(study.lock.model, license=evil),
        versions={evil: evil},
    )
    card = model_card(replace(study, lock=lock), base_model=HUB_ID)
    assert ModelCard(card).data.license == evil
    assert "<script>" not in ModelCard(card).text


def test_an_unconfirmed_adapter_says_so_and_no_adapter_has_no_card():
    assert "not confirmed on unseen rows" in model_card(unfinished_study(), base_model=HUB_ID)
    with pytest.raises(AllTrialsFailedError, match="no trial succeeded"):
        model_card(fruitless_study(), base_model=HUB_ID)
