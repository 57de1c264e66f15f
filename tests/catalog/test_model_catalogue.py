"""The table of base models: every way to write a name, and what a row must have.

That the sizes are right is shown against transformers in tests/memory/test_shapes_against_models.py.
"""

import subprocess
import sys

import pytest

from lora_tune.catalog.models import (
    CatalogModel,
    find_catalog_model,
    load_models,
    nearest_models,
)

MODELS = load_models()


def hub_id_of(name: str) -> str | None:
    named = find_catalog_model(name)
    return named.hub_id if named else None


def test_the_catalogue_has_at_least_forty_models() -> None:
    assert len(MODELS) >= 40


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_name_of_a_row_finds_that_row(model: CatalogModel) -> None:
    for name in (model.name, model.hub_id, *model.aliases):
        named = find_catalog_model(name)
        assert named is not None
        assert (named.model, named.label, named.hub_id) == (model, model.name, model.hub_id)
    for hub_id in (*model.same_shape, *model.mirrors):
        named = find_catalog_model(hub_id)
        assert named is not None
        assert (named.model, named.hub_id) == (model, hub_id)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_row_names_license_source_and_hub(model: CatalogModel) -> None:
    assert model.name == model.name.casefold()
    assert " " not in model.name
    assert model.license
    assert model.source
    for hub_id in (model.hub_id, *model.same_shape, *model.mirrors):
        assert hub_id.count("/") == 1
    assert "null" not in model.config.values()


def test_no_two_rows_claim_the_same_name() -> None:
    names = [name.casefold() for model in MODELS for name in (model.name, *model.aliases)]
    ids = [name for model in MODELS for name in (model.hub_id, *model.same_shape, *model.mirrors)]
    assert len(set(names)) == len(names)
    assert len({name.casefold() for name in ids}) == len(ids)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama 3.1 8B", "meta-llama/Llama-3.1-8B"),
        ("llama_3.1_8b_instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B"),
        ("Qwen2.5-Coder-7B-Instruct", "Qwen/Qwen2.5-Coder-7B-Instruct"),
        ("qwen/qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("GPT2", "openai-community/gpt2"),
        ("gpt2-small", "openai-community/gpt2"),
        ("Mixtral 8x7B v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("phi 3 mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_case_spaces_and_underscores_do_not_matter(name: str, expected: str) -> None:
    assert hub_id_of(name) == expected


@pytest.mark.parametrize(
    ("copy", "row"),
    [
        ("NousResearch/Llama-2-7b-hf", "llama-2-7b"),
        ("NousResearch/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("unsloth/llama-3-8b-bnb-4bit", "llama-3-8b"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit", "llama-3.1-8b"),
        ("unsloth/mistral-7b-v0.3", "mistral-7b-v0.3"),
        ("unsloth/tinyllama-chat-bnb-4bit", "tinyllama-1.1b"),
        ("unsloth/gemma-2-9b-it-bnb-4bit", "gemma-2-9b"),
        ("unsloth/Qwen2.5-Coder-14B-Instruct-bnb-4bit", "qwen2.5-14b"),
        ("unsloth/Phi-4-mini-instruct", None),  # another architecture under the same name
        ("unsloth/Qwen2.5-Omni-900B", None),
        ("someone/Llama-2-7b-hf", None),  # only who is known to copy is taken at his word
        ("someone/llama-3-8b-bnb-4bit", None),
    ],
)
def test_ungated_copies_are_found_under_their_own_id(copy: str, row: str | None) -> None:
    named = find_catalog_model(copy)
    assert (named.model.name if named else None) == row
    if named is not None:
        assert (named.label, named.hub_id) == (copy, copy)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lama-3.1-8b", "llama-3.1-8b"),
        ("someone/qwen3-8", "qwen3-8b"),
        ("gemma2", "gemma-2-2b"),
        ("xyzzy", None),
    ],
)
def test_a_misspelt_name_gives_the_nearest_ones(name: str, expected: str | None) -> None:
    near = nearest_models(name)
    assert len(near) <= 3
    assert (expected in near) if expected else not near


def test_one_shape_serves_base_instruct_and_coder() -> None:
    rows = {
        find_catalog_model(f"Qwen/Qwen2.5-{middle}7B{end}")
        for middle in ("", "Coder-")
        for end in ("", "-Instruct")
    }
    assert {named.model.name for named in rows if named} == {"qwen2.5-7b"}
    assert len({named.hub_id for named in rows if named}) == 4


def test_null_in_the_table_is_null_in_the_config() -> None:
    named = find_catalog_model("mistral-7b-v0.3")
    assert named is not None
    assert named.model.config["sliding_window"] is None


def test_reading_the_catalogue_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lora_tune.hub import find_config; from pathlib import Path; "
        "find_config('llama-3.1-8b', base_dir=Path()); "
        "print([name for name in ('torch', 'transformers', 'numpy', 'gguf', 'huggingface_hub') "
        "if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
