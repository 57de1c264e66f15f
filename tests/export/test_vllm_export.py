"""The serve command for vLLM: parsed as a shell and argparse would, and held to vLLM's rules for ranks."""

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from finished_studies import finished_study
from test_end_to_end import workplace as workplace  # the fixture

from lora_tune.errors import InfeasibleError
from lora_tune.export.job import ExportJob, ExportResult
from lora_tune.export.vllm import LEGAL_RANKS, export, legal_rank
from lora_tune.records import StudySnapshot


@pytest.fixture(scope="module")
def study(workplace: Path) -> StudySnapshot:
    return finished_study(workplace, "nf4")


def with_model(study: StudySnapshot, **changes: object) -> StudySnapshot:
    return replace(study, lock=replace(study.lock, model=replace(study.lock.model, **changes)))


def run_export(study: StudySnapshot, folder: Path) -> ExportResult:
    folder.mkdir(parents=True)
    return export(ExportJob(snapshot=study, folder=folder, gpu=None, note=lambda text: None))


def words_of(script: Path, program: str) -> list[str]:
    """What a shell hands to ``program``, which is replaced by one that shows its arguments."""
    stand_in = script.parent / "bin" / program
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text('#!/bin/sh\npwd\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["sh", str(script)],
        cwd="/",
        env={"PATH": f"{stand_in.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    place, _, words = done.stdout.partition("\n")
    assert place == str(script.parent)
    return words.split("\0")[:-1]


def served(arguments: list[str]) -> argparse.Namespace:
    """The options as vLLM's parser names them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--revision")
    parser.add_argument("--quantization", choices=["bitsandbytes"])
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int, choices=LEGAL_RANKS)
    parser.add_argument("--lora-modules", nargs="+")
    parser.add_argument("--chat-template")
    return parser.parse_args(arguments)


def test_the_script_serves_the_adapter_on_its_base(study, tmp_path):
    hub = with_model(study, hub_id="org/base", revision="abc")
    result = run_export(hub, tmp_path / "it's here" / "vllm")
    folder = tmp_path / "it's here" / "vllm"
    found = served(words_of(folder / "serve.sh", "vllm"))
    assert (found.model, found.revision) == ("org/base", "abc")
    assert found.quantization == "bitsandbytes"
    assert found.enable_lora
    name, _, path = found.lora_modules[0].partition("=")
    assert name == "small"
    config = json.loads((folder / path / "adapter_config.json").read_text())
    assert found.max_lora_rank >= config["r"]
    assert result.command == "sh serve.sh"
    assert any("--quantization bitsandbytes" in note for note in result.notes)


def test_a_local_base_is_named_by_its_folder(study, tmp_path):
    run_export(study, tmp_path / "vllm")
    found = served(words_of(tmp_path / "vllm" / "serve.sh", "vllm"))
    assert (Path(found.model) / "config.json").is_file()
    assert found.revision is None


def test_a_study_without_quantization_is_served_without(workplace, tmp_path):
    run_export(finished_study(workplace, "none"), tmp_path / "vllm")
    assert served(words_of(tmp_path / "vllm" / "serve.sh", "vllm")).quantization is None


def test_the_request_is_a_chat_with_the_adapter(study, tmp_path):
    run_export(study, tmp_path / "vllm")
    words = words_of(tmp_path / "vllm" / "request.sh", "curl")
    assert words[0].endswith("/v1/chat/completions")
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "small"
    assert body["messages"][0]["role"] == "user"
    plain = replace(study.lock, data=replace(study.lock.data, chat_template="none"))
    run_export(replace(study, lock=plain), tmp_path / "plain")
    words = words_of(tmp_path / "plain" / "request.sh", "curl")
    assert words[0].endswith("/v1/completions")
    assert "prompt" in json.loads(words[words.index("-d") + 1])


def test_another_chat_template_goes_along(study, tmp_path):
    data = replace(study.lock.data, chat_template="chatml")
    section = dict(study.lock.spec["data"], chat_template="chatml")
    lock = replace(study.lock, data=data, spec={**study.lock.spec, "data": section})
    run_export(replace(study, lock=lock), tmp_path / "vllm")
    found = served(words_of(tmp_path / "vllm" / "serve.sh", "vllm"))
    assert "<|im_start|>" in (tmp_path / "vllm" / found.chat_template).read_text()


@pytest.mark.parametrize(
    ("rank", "legal"), [(1, 1), (2, 8), (4, 8), (8, 8), (9, 16), (64, 64), (257, 320), (512, 512)]
)
def test_a_rank_is_served_with_the_next_legal_one(rank, legal):
    assert legal_rank(rank) == legal


def test_a_rank_beyond_vllm_is_refused_with_what_to_do():
    with pytest.raises(
        InfeasibleError, match=r"up to rank 512, this one has rank 513.*--to merged"
    ):
        legal_rank(513)


def test_models_without_lora_in_vllm_are_named(study, tmp_path):
    result = run_export(with_model(study, model_type="gpt2"), tmp_path / "vllm")
    assert any("no LoRA for gpt2" in note for note in result.notes)


def test_a_base_read_from_gguf_is_said_to_be_another(study, tmp_path):
    hub = with_model(study, base="smollm2-135m-instruct", hub_id="org/base")
    notes = run_export(hub, tmp_path / "vllm").notes
    assert any("read its base from a GGUF file" in note for note in notes)
