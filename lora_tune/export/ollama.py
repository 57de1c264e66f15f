"""A Modelfile for Ollama: the base with the adapter on it.

The adapter goes in as GGUF, made by llama.cpp. Ollama also reads a PEFT folder itself, for three families of
models; in its source (convert/convert_llama_adapter.go) that reorders the rows of A in q_proj and k_proj,
where the layout of GGUF asks for the rows of B, so this way is not taken here.
"""

import shlex
from pathlib import Path

from lora_tune.errors import ModelError
from lora_tune.export import llama_cpp
from lora_tune.export.adapter import copy_adapter
from lora_tune.export.base import find_base
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.records import StudySnapshot

MODELFILE = "Modelfile"
ADAPTER = "adapter"
ADAPTER_FILE = "adapter.gguf"
BASE_FILE = "base.gguf"
SCRIPT = "convert.sh"
# Model types of the GGUF architectures llama and gemma2, which convert.ConvertAdapter of Ollama takes.
IMPORTED_FOLDERS = ("llama", "mistral", "gemma2")


def export(job: ExportJob) -> ExportResult:
    """Write Modelfile, adapter and the script that converts what the Modelfile names.

    Raises:
        StoreError: The study's adapter is missing or damaged.
        ModelError: The base is gone, or its path cannot stand in a Modelfile.
    """
    snapshot, folder = job.snapshot, job.folder
    base = find_base(snapshot)
    (folder / ADAPTER).mkdir()
    files = [*copy_adapter(snapshot, folder / ADAPTER, plain_scaling=True)]
    base_folder = str(base.folder)
    commands = [llama_cpp.adapter_to_gguf(ADAPTER, base=base_folder, outfile=ADAPTER_FILE)]
    if base.files.gguf is None:
        commands.append(llama_cpp.model_to_gguf(base_folder, outfile=BASE_FILE, outtype="auto"))
    files.append(llama_cpp.write_script(folder / SCRIPT, commands, needs_build=False))
    path = folder / MODELFILE
    path.write_text(_modelfile(snapshot, base.files.gguf), encoding="utf-8")
    name = shlex.quote(snapshot.lock.name)
    command = llama_cpp.with_llama_cpp(
        SCRIPT, [f"ollama create {name} -f {MODELFILE}", f"ollama run {name}"]
    )
    return ExportResult(
        files=(path, *files), command=command, notes=tuple(_notes(snapshot, base.files.gguf))
    )


def base_line(gguf: Path | None) -> str:
    """Return the FROM line: the study's GGUF file, or the one that the script makes.

    Raises:
        ModelError: The path cannot stand in a Modelfile, where it would end its line.
    """
    source = f"./{BASE_FILE}" if gguf is None else str(gguf)
    if not source.isprintable() or '"' in source:
        raise ModelError(
            f"{source!r} cannot stand in a Modelfile: move the base model to a path without quotes and "
            "control characters."
        )
    return f"FROM {source}\n"


def _modelfile(snapshot: StudySnapshot, gguf: Path | None) -> str:
    return (
        f"# The adapter of study {snapshot.lock.name}. {SCRIPT} makes the GGUF files named here.\n"
        "# FROM may also name a model of Ollama's library, if it is the very same base.\n"
        f"{base_line(gguf)}"
        f"ADAPTER ./{ADAPTER_FILE}\n"
    )


def _notes(snapshot: StudySnapshot, gguf: Path | None) -> list[str]:
    model, label = snapshot.lock.model, snapshot.lock.data.chat_template
    notes = []
    if model.quantization == "nf4":
        notes.append(
            "the adapter was trained on an NF4 base and meets other weights in Ollama, which advises against "
            "adapters of quantized bases: compare answers with the report's before you trust it. "
            "--to gguf merges instead and measures the loss."
        )
    if model.model_type in IMPORTED_FOLDERS:
        notes.append(
            f"Ollama could import the folder {ADAPTER} itself (ADAPTER ./{ADAPTER}); by its source that "
            "reorders q_proj and k_proj in another way than llama.cpp, so the Modelfile names the GGUF file."
        )
    else:
        notes.append(
            f"Ollama imports adapter folders of {', '.join(IMPORTED_FOLDERS)} models only; "
            f"{model.model_type} is none of them, so {ADAPTER_FILE} must be made first."
        )
    notes.append(
        "older releases of Ollama answer 'loras are not yet implemented' for models that their own engine "
        "runs: update Ollama, or use --to gguf."
    )
    if label != "none":
        which = "the model's own" if label == "model" else f"{label} (data.chat_template)"
        notes.append(
            f"the rows were written with a chat template, {which}; Ollama takes the template of the GGUF "
            f"file: see what it has with ollama show {shlex.quote(snapshot.lock.name)} --modelfile."
        )
    if gguf is not None:
        notes.append(
            "the Modelfile names the GGUF file of the study's base by its path on this machine."
        )
    return notes
