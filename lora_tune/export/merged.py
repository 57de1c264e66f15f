"""Base and adapter as one model in 16 bit, in safetensors, scored before and after.

The adapter is merged into the base's own 16-bit weights, not into the 4-bit ones that it was trained on:
those are rounded already, and rounding them a second time loses more. What this does to the loss is measured
on the confirmation rows. PEFT merges layer by layer, each sum in float32 and rounded once, so beside the
model one layer's difference is held. Tied embeddings stay tied: they are no target of adapters.
"""

import shutil
import warnings
from pathlib import Path

import peft
import psutil
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from lora_tune.engine.base import DTYPES, quiet_transformers
from lora_tune.errors import DataError, LoraTuneError, MachineError, ModelError
from lora_tune.export.adapter import CARD_FILE, adapter_folder, decided
from lora_tune.export.base import confirmation_rows, find_base, load_tokenizer, study_template
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.export.scoring import (
    SPARE,
    check_device,
    free_memory,
    score_as_trained,
    score_model,
)
from lora_tune.records import StudySnapshot
from lora_tune.report.card import merged_card
from lora_tune.report.merging import MergeReport, MergeScores, merge_sentences
from lora_tune.stats.paired import paired_difference
from lora_tune.units import format_bytes

_GENERATION_FILE = "generation_config.json"
_SHARD_SIZE = "5GB"


def export(job: ExportJob) -> ExportResult:
    """Write the merged model with tokenizer and card.

    Raises:
        StoreError: The study's adapter is missing or damaged.
        ModelError: The base is gone or cannot be loaded.
        MachineError: Memory or disk do not suffice.
    """
    report = write_merged(job, job.folder)
    return ExportResult(
        files=tuple(sorted(path for path in job.folder.iterdir() if path.is_file())),
        command=f"vllm serve . --served-model-name {job.snapshot.lock.name}",
        notes=tuple(merge_sentences(report)),
    )


def write_merged(job: ExportJob, folder: Path) -> MergeReport:
    """Write the merged model into ``folder``; return what became of its loss."""
    quiet_transformers()
    snapshot = job.snapshot
    base = find_base(snapshot)
    adapter = adapter_folder(snapshot)
    tokenizer = load_tokenizer(base.folder)
    dtype = merged_dtype(snapshot)
    check_room(snapshot, folder)
    scorer = _Scorer(job, base.folder, tokenizer)
    job.note(f"merging the adapter into the base in {dtype}.")
    merge(base.folder, adapter, folder, dtype=dtype)
    _write_tokenizer(snapshot, tokenizer, folder)
    if (base.folder / _GENERATION_FILE).is_file():  # as it is, and not as transformers reads it
        shutil.copyfile(base.folder / _GENERATION_FILE, folder / _GENERATION_FILE)
    scores = scorer.after(folder)
    report = MergeReport(
        dtype=dtype,
        quantization=snapshot.lock.model.quantization,
        scores=scores,
        reason=scorer.reason,
        refit=decided(snapshot).refit,
        from_gguf=base.files.gguf is not None,
    )
    card = merged_card(snapshot, base_model=snapshot.lock.model.hub_id, merge=report)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return report


def merged_dtype(snapshot: StudySnapshot) -> str:
    """Return the type of the merged weights: float16 where the study computed in it, else bfloat16."""
    return "float16" if snapshot.lock.plan.compute_dtype == "float16" else "bfloat16"


def merge(base_folder: Path, adapter: Path, folder: Path, *, dtype: str) -> None:
    """Write the base of ``base_folder`` with the adapter merged into it, in safetensors.

    Args:
        base_folder: config.json and safetensors.
        adapter: A PEFT folder.
        folder: An existing folder.
        dtype: ``bfloat16``, ``float16`` or ``float32``.

    Raises:
        ModelError: The base cannot be loaded, or a merged weight is not finite in this type.
    """
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base_folder,
            dtype=DTYPES[dtype],
            device_map={"": "cpu"},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{base_folder}: the base model cannot be loaded ({error})") from error
    with warnings.catch_warnings():
        # PEFT sees for itself that GPT-2's layers are stored transposed, and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        # peft 0.21 asks transformers 5.23 under a name that 5.23 deprecates
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        tuned = peft.PeftModel.from_pretrained(model, adapter)
    model = tuned.merge_and_unload()
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"{name}: not every merged weight is finite in {dtype}.")
    model.generation_config = transformers.GenerationConfig()  # the base's own file is copied
    with warnings.catch_warnings():
        # All of it is on the CPU, which accelerate's map calls offloaded.
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded")
        model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # they come from a temporary file, which nobody else may read
    del model, tuned
    free_memory()


def check_room(snapshot: StudySnapshot, folder: Path) -> None:
    """Refuse what memory or disk cannot hold, before anything is loaded; scoring may take more memory.

    Raises:
        MachineError: The merged model needs more than there is.
    """
    needed = int(SPARE * 2 * snapshot.lock.model.num_parameters)
    free = {"memory": psutil.virtual_memory().available, "disk": shutil.disk_usage(folder).free}
    for what, num_bytes in free.items():
        if num_bytes < needed:
            raise MachineError(
                f"the merged model needs {format_bytes(needed)} of {what}, {format_bytes(num_bytes)} are "
                "free. Free some or merge on a larger machine; --to adapter and --to vllm need no merging."
            )


def _write_tokenizer(
    snapshot: StudySnapshot, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the tokenizer, with the chat template of the study where that is another than the model's own."""
    template = study_template(snapshot, tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


class _Scorer:
    """Losses before and after; ``reason`` says why there are none."""

    def __init__(
        self, job: ExportJob, base_folder: Path, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.job, self.reason = job, ""
        snapshot = job.snapshot
        try:
            check_device(snapshot)
            self.rows = confirmation_rows(snapshot, tokenizer)
            job.note(f"scoring the adapter as trained on {len(self.rows)} confirmation rows.")
            self.before = score_as_trained(snapshot, base_folder, self.rows)
        except (MachineError, DataError) as error:
            self._give_up(error)
        free_memory()  # what an error has held is let go once it is handled

    def after(self, folder: Path) -> MergeScores | None:
        """Score the merged model as it lies on disk; None where nothing can be scored."""
        if self.reason:
            return None
        self.job.note(f"scoring the merged model on {len(self.rows)} confirmation rows.")
        try:
            found = score_model(self.job.snapshot, folder, self.rows)
        except MachineError as error:
            self._give_up(error)
            return None
        clusters = decided(self.job.snapshot).clusters
        return MergeScores(
            as_trained=self.before,
            merged=found,
            difference=paired_difference(found, self.before, clusters=clusters),
        )

    def _give_up(self, error: LoraTuneError) -> None:
        self.reason = f"{str(error).rstrip('.')}."
