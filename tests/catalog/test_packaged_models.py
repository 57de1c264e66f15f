"""Base models that come inside a package are found without importing it."""

import sys

import pytest

from lora_tune.catalog.models import CATALOG_MODELS, find_packaged_gguf


def test_the_quickstart_model_is_in_the_catalogue() -> None:
    model = CATALOG_MODELS["smollm2-135m-instruct"]
    assert model.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert model.license == "apache-2.0"


@pytest.mark.parametrize("model", CATALOG_MODELS.values(), ids=CATALOG_MODELS)
def test_the_gguf_of_an_installed_package_is_found(model) -> None:
    path = find_packaged_gguf(model.package)
    if path is None:
        pytest.skip(f"{model.package} is not installed")
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert model.package.replace("-", "_") not in sys.modules


def test_a_package_without_gguf_or_not_installed_gives_none() -> None:
    assert find_packaged_gguf("pytest") is None
    assert find_packaged_gguf("no-such-package-here") is None
