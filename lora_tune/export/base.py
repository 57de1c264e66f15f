"""The study's base model, tokenizer and held-out rows, found again as the study found them."""

from pathlib import Path
from typing import NamedTuple

import transformers
from transformers import PreTrainedTokenizerBase

from lora_tune.data import prepare_data
from lora_tune.data.chat import choose_template
from lora_tune.engine.convert import converted_folder
from lora_tune.errors import DataError, ModelError
from lora_tune.export.adapter import OWN_TEMPLATES
from lora_tune.hub import ModelFiles, find_model
from lora_tune.records import StudySnapshot, TokenizedRow
from lora_tune.store.origin import base_dir_of, spec_of


class Base(NamedTuple):
    """Where the base is: its files as found, and a folder with config, tokenizer and safetensors."""

    files: ModelFiles
    folder: Path


def find_base(snapshot: StudySnapshot) -> Base:
    """Return the base of a study, of the same hub revision; a GGUF file is converted once.

    Raises:
        ModelError: It is gone, or the hub cannot be reached.
    """
    spec = spec_of(snapshot)
    files = find_model(
        spec.model.base,
        revision=snapshot.lock.model.revision,
        base_dir=base_dir_of(snapshot, spec),
    )
    if files.folder is not None:
        return Base(files, files.folder)
    assert files.gguf is not None
    return Base(files, converted_folder(files.gguf))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a model's folder.

    Raises:
        ModelError: There is none that transformers can read.
    """
    try:
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({error})") from error
    return found


def study_template(snapshot: StudySnapshot, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template that ``data.chat_template`` named; None where it is the model's own.

    Raises:
        DataError: It was a file, which is gone.
    """
    if snapshot.lock.data.chat_template in OWN_TEMPLATES:
        return None
    spec = spec_of(snapshot)
    return choose_template(
        spec.data.chat_template, tokenizer=tokenizer, base_dir=base_dir_of(snapshot, spec)
    ).text


def confirmation_rows(
    snapshot: StudySnapshot, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenizedRow, ...]:
    """Return the rows on which the study's candidates were scored.

    Raises:
        DataError: The data are gone, or are not those of the study.
    """
    spec, lock = spec_of(snapshot), snapshot.lock
    data = prepare_data(
        spec.data,
        tokenizer=tokenizer,
        seed=spec.study.seed,
        base_dir=base_dir_of(snapshot, spec),
    )
    if data.fingerprint.sha256 != lock.data.sha256:
        raise DataError(
            f"{spec.data.train}: the rows differ from those that {lock.name} was scored on"
        )
    return data.confirmation
