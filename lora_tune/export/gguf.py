"""The merged model and the commands of llama.cpp that make a GGUF file of it, or of the adapter alone."""

import shlex
from pathlib import Path

from lora_tune.export import llama_cpp
from lora_tune.export.adapter import base_was_gguf, copy_adapter
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.export.merged import write_merged
from lora_tune.records import StudySnapshot
from lora_tune.report.merging import merge_sentences

MERGED = "merged"
ADAPTER = "adapter"
MODEL_SCRIPT = "convert_model.sh"
ADAPTER_SCRIPT = "convert_adapter.sh"
KIND = "Q4_K_M"  # llama.cpp's usual compromise of size and loss
_OUTTYPES = {"bfloat16": "bf16", "float16": "f16"}


def export(job: ExportJob) -> ExportResult:
    """Write the merged model, the adapter, and a script for each.

    Raises:
        StoreError: The study's adapter is missing or damaged.
        ModelError: The base is gone or cannot be loaded.
        MachineError: Memory or disk do not suffice.
    """
    snapshot, folder = job.snapshot, job.folder
    for name in (MERGED, ADAPTER):
        (folder / name).mkdir()
    report = write_merged(job, folder / MERGED)
    copy_adapter(snapshot, folder / ADAPTER, plain_scaling=True)
    name = snapshot.lock.name
    outtype = _OUTTYPES[report.dtype]
    full, small = f"{name}-{outtype}.gguf", f"{name}-{KIND}.gguf"
    llama_cpp.write_script(
        folder / MODEL_SCRIPT,
        [
            llama_cpp.model_to_gguf(MERGED, outfile=full, outtype=outtype),
            llama_cpp.quantize(full, outfile=small, kind=KIND),
        ],
        needs_build=True,
    )
    llama_cpp.write_script(
        folder / ADAPTER_SCRIPT,
        [llama_cpp.adapter_to_gguf(ADAPTER, base=MERGED, outfile=f"{name}-adapter.gguf")],
        needs_build=False,
    )
    command = llama_cpp.with_llama_cpp(
        MODEL_SCRIPT, [f"path/to/llama.cpp/build/bin/llama-cli -m {shlex.quote(small)}"]
    )
    return ExportResult(
        files=_files(folder),
        command=command,
        notes=(*merge_sentences(report), *_notes(snapshot)),
    )


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.rglob("*") if path.is_file()))


def _notes(snapshot: StudySnapshot) -> list[str]:
    model, name = snapshot.lock.model, snapshot.lock.name
    notes = [
        f"{KIND} rounds the merged weights once more; that loss is not measured here.",
        f"the adapter alone: {ADAPTER_SCRIPT} makes {name}-adapter.gguf, which goes on a GGUF file of the "
        f"same base: llama-cli -m BASE.gguf --lora {shlex.quote(f'{name}-adapter.gguf')}.",
        f"llama.cpp must know the architecture {model.architecture}.",
    ]
    if base_was_gguf(snapshot):
        notes.append(
            "the study read its base from a GGUF file: with that file and the adapter alone nothing is "
            "merged or rounded again."
        )
    return notes
