"""The merged model and its scripts for llama.cpp, run with stand-ins that take the real programs' options."""

import json
from pathlib import Path

import pytest
from finished_studies import finished_study
from test_end_to_end import workplace as workplace  # the fixture
from test_ollama_export import llama_cpp, run_script

from lora_tune.export.gguf import export
from lora_tune.export.job import ExportJob, ExportResult


@pytest.fixture(scope="module")
def exported(
    workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExportResult]:
    folder = tmp_path_factory.mktemp("it's gguf")
    study = finished_study(workplace, "none", ("learning_rate = [1e-3, 3e-2]\nuse_rslora = true",))
    job = ExportJob(snapshot=study, folder=folder, gpu=None, note=lambda text: None)
    return folder, export(job)


def test_the_scripts_make_a_model_and_an_adapter(exported, tmp_path):
    folder, result = exported
    place = llama_cpp(tmp_path / "llama cpp")
    for script in ("convert_model.sh", "convert_adapter.sh"):
        done = run_script(folder / script, place)
        assert done.returncode == 0, done.stderr
    assert (folder / "small-bf16.gguf").read_text() == "bf16"
    assert (folder / "small-Q4_K_M.gguf").read_text() == "Q4_K_M\n"
    assert result.command.splitlines()[-1].endswith("llama-cli -m small-Q4_K_M.gguf")
    # llama.cpp divides lora_alpha by the rank, whatever use_rslora says
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert json.loads((folder / "small-adapter.gguf").read_text()) == config["lora_alpha"]
    assert config["use_rslora"] is False


def test_the_model_is_merged_and_scored_and_the_next_rounding_named(exported):
    folder, result = exported
    assert "## Merging" in (folder / "merged" / "README.md").read_text()
    assert any("Merging moved the loss" in note for note in result.notes)
    assert any("rounds the merged weights once more" in note for note in result.notes)
    assert any("--lora small-adapter.gguf" in note for note in result.notes)
    assert folder / "merged" / "model.safetensors" in result.files
