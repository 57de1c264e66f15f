"""An exported folder on the hub: private unless asked otherwise, nothing sent before all is checked."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, utils
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
)

from lora_tune.errors import MachineError, ModelError, StudyFileError
from lora_tune.files import MANIFEST

# What is about this machine, not about the model.
_NOT_SENT = [MANIFEST, "export.json", "load_adapter.py"]
_FAULTS = (HTTPError, OSError)  # the hub said no, no token, offline, no connection
_LOGIN = "Log in with: hf auth login (a token that may write)."


def check_push(repo: str) -> str:
    """Return the repository's full name, ``owner/name``; a name alone is one of the user's own.

    Raises:
        StudyFileError: The name is not valid.
        MachineError: The hub is off limits here.
        ModelError: It cannot be reached, or nobody is logged in.
    """
    try:
        utils.validate_repo_id(repo)  # type: ignore[attr-defined]  # public, but not listed
    except HFValidationError as error:
        raise StudyFileError(
            f"--push {repo}: this is no valid repository name ({error})."
        ) from error
    if constants.is_offline_mode():
        raise MachineError(
            f"--push {repo}: HF_HUB_OFFLINE is set, so nothing is sent. Unset it to upload, or export "
            "without --push."
        )
    if get_token() is None:
        raise ModelError(f"--push {repo}: nobody is logged in to the hub. {_LOGIN}")
    try:
        user = HfApi().whoami()["name"]
    except _FAULTS as error:
        raise _failed(repo, error) from error
    return repo if "/" in repo else f"{user}/{repo}"


def push_folder(repo: str, folder: Path, *, public: bool, message: str) -> str:
    """Upload a folder to a model repository, which is made if it is not there; return its address.

    Raises:
        ModelError: The hub refused it or cannot be reached; the folder stays on disk.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True, repo_type="model")
        if not public and not api.model_info(repo).private:
            raise ModelError(
                f"--push {repo}: this repository is there already and is public. Add --public if that is "
                f"meant, or give another name. The export is in {folder}."
            )
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type="model",
            commit_message=message,
            ignore_patterns=_NOT_SENT,
        )
    except _FAULTS as error:
        raise _failed(repo, error, folder) from error
    return str(url)


def _failed(repo: str, error: Exception, folder: Path | None = None) -> ModelError:
    kept = f" The export is in {folder}." if folder is not None else ""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return ModelError(
            f"--push {repo}: the hub refused it (HTTP {status}): the token is not valid or may not write "
            f"there. {_LOGIN}{kept}"
        )
    what = f"HTTP {status}" if status is not None else type(error).__name__
    return ModelError(f"--push {repo}: the hub did not take it ({what}). Try again later.{kept}")
