"""A serve command for vLLM, which puts the adapter on its base while it serves.

Facts from vLLM's source: ``MaxLoRARanks`` in vllm/config/lora.py for the legal ranks,
vllm/lora/peft_helper.py for what an adapter's config may hold, vllm/lora/lora_model.py for how its tensors
are named. vLLM itself is not asked: it cannot be installed everywhere.
"""

import json
import shlex
from pathlib import Path

from lora_tune.errors import InfeasibleError
from lora_tune.export.adapter import OWN_TEMPLATES, base_was_gguf, chosen_candidate, copy_adapter
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.records import StudySnapshot

LEGAL_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
ADAPTER = "adapter"
SERVE_FILE = "serve.sh"
REQUEST_FILE = "request.sh"
TEMPLATE_FILE = "chat_template.jinja"
_WITHOUT_LORA = ("gpt2",)  # model types that vLLM serves without SupportsLoRA


def export(job: ExportJob) -> ExportResult:
    """Write the adapter, a script that serves it, and one that sends a request.

    Raises:
        StoreError: The study's adapter is missing or damaged.
        InfeasibleError: Its rank is above what vLLM serves.
    """
    snapshot, folder = job.snapshot, job.folder
    arguments = serve_arguments(snapshot)
    (folder / ADAPTER).mkdir()
    files = [*copy_adapter(snapshot, folder / ADAPTER)]
    if snapshot.lock.data.chat_template not in OWN_TEMPLATES:
        files.append(_write_template(snapshot, folder / TEMPLATE_FILE))
        arguments += ["--chat-template", TEMPLATE_FILE]
    files.append(_script(folder / SERVE_FILE, " \\\n  ".join(_words(arguments))))
    files.append(_script(folder / REQUEST_FILE, _request(snapshot)))
    return ExportResult(
        files=tuple(files), command=f"sh {SERVE_FILE}", notes=tuple(_notes(snapshot))
    )


def legal_rank(rank: int) -> int:
    """Return the smallest legal ``--max-lora-rank`` that serves a rank; more costs memory and speed.

    Raises:
        InfeasibleError: vLLM serves no adapter of this rank.

    >>> legal_rank(4), legal_rank(16), legal_rank(300)
    (8, 16, 320)
    """
    for legal in LEGAL_RANKS:
        if rank <= legal:
            return legal
    raise InfeasibleError(
        f"vLLM serves adapters up to rank {LEGAL_RANKS[-1]}, this one has rank {rank}. Serve the merged "
        "model: lora-tune export --to merged."
    )


def serve_arguments(snapshot: StudySnapshot) -> list[str]:
    """Return the words of the command, run in the folder of the export."""
    model = snapshot.lock.model
    arguments = ["vllm", "serve", _base(snapshot)]
    if model.hub_id is not None and model.revision is not None:
        arguments += ["--revision", model.revision]
    if model.quantization == "nf4":
        arguments += ["--quantization", "bitsandbytes"]
    rank = chosen_candidate(snapshot).config.rank
    return [
        *arguments,
        "--enable-lora",
        "--max-lora-rank",
        str(legal_rank(rank)),
        "--lora-modules",
        f"{snapshot.lock.name}={ADAPTER}",
    ]


def _write_template(snapshot: StudySnapshot, path: Path) -> Path:
    # late: it imports torch, and most studies have the model's own template
    from lora_tune.export.base import find_base, load_tokenizer, study_template

    template = study_template(snapshot, load_tokenizer(find_base(snapshot).folder))
    assert template is not None
    path.write_text(template, encoding="utf-8")
    return path


def _base(snapshot: StudySnapshot) -> str:
    if snapshot.lock.model.hub_id is not None:
        return snapshot.lock.model.hub_id
    from lora_tune.export.base import find_base  # late, as above

    return str(find_base(snapshot).folder)


def _words(arguments: list[str]) -> list[str]:
    """Return the command's lines: an option with its value on each."""
    lines: list[str] = []
    for word in arguments:
        if lines and not word.startswith("--"):
            lines[-1] += f" {shlex.quote(word)}"
        else:
            lines.append(shlex.quote(word))
    return lines


def _request(snapshot: StudySnapshot) -> str:
    prompt: object
    if snapshot.lock.data.chat_template == "none":
        path, key, prompt = "completions", "prompt", "Once upon a time"
    else:
        path, key = "chat/completions", "messages"
        prompt = [{"role": "user", "content": "Hello"}]
    fields = {"model": snapshot.lock.name, key: prompt, "max_tokens": 64, "temperature": 0}
    body = json.dumps(fields)
    return (
        f"curl http://localhost:8000/v1/{path} -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)}"
    )


def _script(path: Path, command: str) -> Path:
    path.write_text(f'#!/bin/sh\ncd "$(dirname "$0")" || exit\n{command}\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def _notes(snapshot: StudySnapshot) -> list[str]:
    model, config = snapshot.lock.model, chosen_candidate(snapshot).config
    notes = []
    if legal_rank(config.rank) != config.rank:
        notes.append(
            f"rank {config.rank} is none of vLLM's --max-lora-rank ({', '.join(map(str, LEGAL_RANKS))}): it "
            f"is served with {legal_rank(config.rank)}, which changes no output."
        )
    if model.quantization == "nf4":
        notes.append(
            "the adapter was trained on an NF4 base, so vLLM is told to quantize the base while it loads "
            "(--quantization bitsandbytes). Without that option it serves the adapter on the 16-bit base: "
            "faster, but another base than the adapter was scored on; --to merged measures what that does."
        )
    if base_was_gguf(snapshot):
        notes.append(
            "the study read its base from a GGUF file, whose weights were quantized once already; vLLM loads "
            f"{_base(snapshot)} instead."
        )
    if model.model_type in _WITHOUT_LORA:
        notes.append(
            f"vLLM has no LoRA for {model.model_type} models: serve the merged model (--to merged)."
        )
    notes.append(
        "vLLM takes LoRA on linear layers of architectures with SupportsLoRA, rank-stabilised scaling too; "
        "no DoRA, no modules_to_save. This adapter has neither."
    )
    return notes
