"""The winner as a PEFT folder: weights, config, model card, and a script that loads it.

The weights are the study's own file, byte for byte. The config names the base by its hub id or not at all: a
folder of the machine that trained it means nothing elsewhere.
"""

import json
import shutil
from pathlib import Path

from lora_tune.catalog.models import find_catalog_model
from lora_tune.errors import LoraTuneError, StoreError
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.files import published_digests, sha256_of
from lora_tune.hub import find_model
from lora_tune.records import Candidate, Confirmation, StudySnapshot
from lora_tune.report import model_card
from lora_tune.report.card import loading_script
from lora_tune.report.resolved import gguf_note
from lora_tune.store.folder import ADAPTER_FOLDER, WEIGHTS_FILE
from lora_tune.store.origin import base_dir_of, spec_of

CONFIG_FILE = "adapter_config.json"  # peft's name; importing peft takes seconds
CARD_FILE = "README.md"
SCRIPT_FILE = "load_adapter.py"
# In the data's fingerprint: the tokenizer's own, or none was used.
OWN_TEMPLATES = ("model", "none")


def export(job: ExportJob) -> ExportResult:
    """Write the adapter folder.

    Raises:
        StoreError: The study's adapter is missing or damaged.
    """
    snapshot, model = job.snapshot, job.snapshot.lock.model
    weights, config = copy_adapter(snapshot, job.folder)
    card, script = job.folder / CARD_FILE, job.folder / SCRIPT_FILE
    card.write_text(model_card(snapshot, base_model=model.hub_id), encoding="utf-8")
    local_base = _local_base(snapshot)
    script.write_text(loading_script(snapshot, local_base=local_base), encoding="utf-8")
    if model.hub_id is None:
        notes: tuple[str, ...] = (_nameless_note(local_base),)
    elif note := gguf_note(snapshot.lock):
        notes = (f"{note} {SCRIPT_FILE} loads those; the losses in the card are not of them.",)
    else:
        notes = ()
    return ExportResult(
        files=(weights, config, card, script), command=f"python {SCRIPT_FILE}", notes=notes
    )


def _nameless_note(local_base: Path | None) -> str:
    """Return what is said of a base without a hub id."""
    if local_base is not None:
        place = f"{SCRIPT_FILE} has its place on this machine."
    else:
        place = f"give its folder to {SCRIPT_FILE} as base_id."
    return f"the base model has no known id on the hub, so {CONFIG_FILE} and the card name none; {place}"


def chosen_candidate(snapshot: StudySnapshot) -> Candidate:
    """Return the configuration that a decided study recommends."""
    confirmation = decided(snapshot)
    assert confirmation.decision is not None
    return confirmation.candidate(confirmation.decision.chosen)


def decided(snapshot: StudySnapshot) -> Confirmation:
    """Return the confirmation of a study that has made its decision.

    Raises:
        StoreError: It has not, or nothing succeeded.
    """
    confirmation = snapshot.confirmation
    if confirmation is None or confirmation.decision is None:
        raise StoreError(
            f"{snapshot.folder}: the study {snapshot.lock.name} has not decided yet, so there is no "
            f"winner to export. Finish it with: lora-tune run {snapshot.lock.study_file}"
        )
    return confirmation


def adapter_folder(snapshot: StudySnapshot) -> Path:
    """Return the folder of the study's published adapter, its files checked.

    Raises:
        StoreError: It is missing, or its files are not those that were published.
    """
    folder = snapshot.folder / ADAPTER_FOLDER
    digests = published_digests(folder) or {}
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise StoreError(
                f"{folder}: there is no {name}, so there is no adapter to export. Bring the folder back, or "
                f"let the study publish it again with: lora-tune run {snapshot.lock.study_file}"
            )
        if digests.get(name) != sha256_of(folder / name):
            raise StoreError(
                f"{folder / name}: damaged or changed (it does not match manifest.json), so it is not "
                f"exported. Move the folder away and let the study publish it again with: lora-tune run "
                f"{snapshot.lock.study_file}"
            )
    return folder


def copy_adapter(
    snapshot: StudySnapshot, folder: Path, *, plain_scaling: bool = False
) -> tuple[Path, Path]:
    """Copy the adapter's weights and config into ``folder``; return both files.

    Args:
        snapshot: A study with an adapter.
        folder: An existing folder.
        plain_scaling: Write rank-stabilised scaling as the lora_alpha that means the same without it,
            for programs that know ``lora_alpha / rank`` alone.

    Raises:
        StoreError: The study's adapter is missing or damaged.
    """
    source, model = adapter_folder(snapshot), snapshot.lock.model
    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    shutil.copyfile(source / WEIGHTS_FILE, weights)
    fields = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    fields["base_model_name_or_path"] = model.hub_id
    fields["revision"] = model.revision if model.hub_id else None
    fields["target_modules"] = sorted(fields["target_modules"])  # PEFT writes a set
    if plain_scaling and fields.get("use_rslora"):
        fields["lora_alpha"] *= fields["r"] ** 0.5
        fields["use_rslora"] = False
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return weights, config


def base_was_gguf(snapshot: StudySnapshot) -> bool:
    """Return whether the study read its base from a GGUF file, its own or one that a package carries."""
    base = snapshot.lock.model.base
    named = find_catalog_model(base) if "/" not in base else None
    return base.lower().endswith(".gguf") or (named is not None and named.model.package is not None)


def _local_base(snapshot: StudySnapshot) -> Path | None:
    """Return the base's folder on this machine; None: it has a hub id, is a GGUF file, or is gone."""
    if snapshot.lock.model.hub_id is not None:
        return None
    spec = spec_of(snapshot)
    try:
        files = find_model(spec.model.base, revision=None, base_dir=base_dir_of(snapshot, spec))
    except LoraTuneError:  # the adapter is whole without it
        return None
    return files.folder
