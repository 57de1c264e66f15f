"""Commands of llama.cpp as shell scripts: from safetensors to GGUF, for models and for adapters.

The flags are those of ``convert_hf_to_gguf.py``, ``convert_lora_to_gguf.py`` and ``llama-quantize`` in
llama.cpp's source. llama.cpp scales an adapter by ``lora_alpha / rank`` alone, so what it is given has plain
scaling (``adapter.copy_adapter``).
"""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

_HEADER = """\
#!/bin/sh
# LLAMA_CPP is a copy of llama.cpp with its Python requirements installed{built}:
#   git clone https://github.com/ggml-org/llama.cpp
#   pip install -r llama.cpp/requirements.txt
{build}set -eu
cd "$(dirname "$0")"
: "${{LLAMA_CPP:?set it to the folder of llama.cpp}}"
"""
_BUILD = "#   cmake -S llama.cpp -B llama.cpp/build && cmake --build llama.cpp/build --config Release -j\n"


def model_to_gguf(folder: str, *, outfile: str, outtype: str) -> str:
    """Return the command that makes a GGUF file of a model's folder."""
    words = [folder, "--outtype", outtype, "--outfile", outfile]
    return f'python "$LLAMA_CPP/convert_hf_to_gguf.py" {shlex.join(words)}'


def adapter_to_gguf(folder: str, *, base: str, outfile: str) -> str:
    """Return the command that makes a GGUF file of an adapter's folder; of the base it needs the config."""
    words = ["--base", base, "--outtype", "f16", "--outfile", outfile, folder]
    return f'python "$LLAMA_CPP/convert_lora_to_gguf.py" {shlex.join(words)}'


def quantize(source: str, *, outfile: str, kind: str) -> str:
    """Return the command that quantizes a GGUF file."""
    return f'"$LLAMA_CPP/build/bin/llama-quantize" {shlex.join([source, outfile, kind])}'


def write_script(path: Path, commands: Iterable[str], *, needs_build: bool) -> Path:
    """Write a script that runs the commands in its own folder, and stops at the first that fails."""
    header = _HEADER.format(
        built=", and built" if needs_build else "", build=_BUILD if needs_build else ""
    )
    path.write_text(header + "".join(f"{command}\n" for command in commands), encoding="utf-8")
    path.chmod(0o755)
    return path


def with_llama_cpp(script: str, then: Sequence[str]) -> str:
    """Return the lines that run a script of this module, and what comes after it."""
    return "\n".join([f"LLAMA_CPP=path/to/llama.cpp sh {shlex.quote(script)}", *then])
