"""Base models that come inside a package are found without importing it."""

import sys

import pytest

from lora_tune.catalog.models import (
    CatalogModel,
    find_catalog_model,
    find_packaged_gguf,
    load_models,
)

PACKAGED = [model for model in load_models() if model.package is not None]


def test_the_quickstart_model_is_in_the_catalogue() -> None:
    named = find_catalog_model("smollm2-135m-instruct")
    assert named is not None
    assert named.model in PACKAGED
    assert named.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert named.model.license == "apache-2.0"


@pytest.mark.parametrize("model", PACKAGED, ids=lambda model: model.name)
def test_the_gguf_of_an_installed_package_is_found(model: CatalogModel) -> None:
    assert model.package is not None
    path = find_packaged_gguf(model.package)
    if path is None:
        pytest.skip(f"{model.package} is not installed")
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert model.package.replace("-", "_") not in sys.modules


def test_a_package_without_gguf_or_not_installed_gives_none() -> None:
    assert find_packaged_gguf("pytest") is None
    assert find_packaged_gguf("no-such-package-here") is None
