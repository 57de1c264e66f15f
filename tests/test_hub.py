"""Finding a model's config: catalogue, folder, config.json, GGUF file, hub cache; and its errors."""

import json
from pathlib import Path

import gguf
import pytest

from lora_tune.errors import ModelError
from lora_tune.hub import ModelConfig, find_config, find_model

CONFIG = {"model_type": "llama", "hidden_size": 64}


def refusal(model: str, base_dir: Path) -> str:
    with pytest.raises(ModelError) as caught:
        find_config(model, base_dir=base_dir)
    return str(caught.value)


def write_config(folder: Path, config: object = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_catalogue_name_needs_neither_files_nor_network(tmp_path: Path) -> None:
    found = find_config("Llama 3.1 8B", base_dir=tmp_path)
    assert found[:2] == ("llama-3.1-8b", "meta-llama/Llama-3.1-8B")
    assert found.config["hidden_size"] == 4096
    assert found.source == "catalogue"
    copy = find_config("unsloth/Meta-Llama-3.1-8B-bnb-4bit", base_dir=tmp_path)
    assert copy.config == found.config
    assert copy.label == copy.hub_id == "unsloth/Meta-Llama-3.1-8B-bnb-4bit"


def test_a_folder_and_a_config_file_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path / "models" / "mine")
    expected = ModelConfig("models/mine", None, CONFIG, "config.json")
    assert find_config("models/mine", base_dir=tmp_path) == expected
    full = str(tmp_path / "models" / "mine" / "config.json")
    assert find_config(full, base_dir=tmp_path)[1:] == expected[1:]
    monkeypatch.chdir(tmp_path)  # relative to the working directory too
    assert find_config("models/mine", base_dir=tmp_path / "elsewhere") == expected


def test_a_folder_with_a_model_is_taken_before_a_catalogue_name_or_hub_id(tmp_path: Path) -> None:
    write_config(tmp_path / "gpt2")
    (tmp_path / "qwen3-4b").mkdir()  # holds no model: the name is the catalogue's
    write_config(tmp_path / "Qwen" / "Qwen2.5-7B")
    assert find_config("gpt2", base_dir=tmp_path).source == "config.json"
    assert find_config("gpt2-medium", base_dir=tmp_path).source == "catalogue"
    assert find_config("qwen3-4b", base_dir=tmp_path).source == "catalogue"
    assert find_config("./gpt2", base_dir=tmp_path).source == "config.json"
    assert find_config("Qwen/Qwen2.5-7B", base_dir=tmp_path).source == "config.json"


def test_the_language_model_is_taken_out_of_a_multimodal_config(tmp_path: Path) -> None:
    config = {
        "model_type": "gemma3",
        "tie_word_embeddings": False,
        "text_config": {"model_type": "gemma3_text", "hidden_size": 64},
        "vision_config": {"hidden_size": 8},
    }
    write_config(tmp_path / "seeing", config)
    assert find_config("./seeing", base_dir=tmp_path).config == {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "tie_word_embeddings": False,
    }


def test_a_gguf_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert "gpt2.embedding_length" in refusal("model.gguf", tmp_path)
    path.write_bytes(b"GGUF")
    assert "version missing" in refusal("model.gguf", tmp_path)


def test_a_config_in_the_hub_cache_is_found_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repository = tmp_path / "models--org--rare-model"
    write_config(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    found = find_config("org/rare-model", base_dir=tmp_path)
    assert found == ModelConfig("org/rare-model", "org/rare-model", CONFIG, "hub")
    message = refusal("org/qwen3-8b-chat", tmp_path)
    assert "the hub cannot be reached" in message
    assert "did you mean qwen3-8b" in message


def test_a_folder_without_config_says_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "folder without config.json" in refusal("./empty", tmp_path)
    (tmp_path / "empty" / "model.Q4_1.gguf").touch()
    assert "Give the file model.Q4_1.gguf" in refusal("./empty", tmp_path)
    (tmp_path / "empty" / "adapter_config.json").touch()
    assert "with an adapter, not a base model" in refusal("./empty", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"{", "is no config.json"),
        (b"[1, 2]", "holds no object"),
        (b"\xff\xfe\xfa", "is no config.json"),
    ],
)
def test_a_broken_config_is_named(text: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    assert expected in refusal("config.json", tmp_path)


@pytest.mark.parametrize(
    "model", ["lama-3.1-8b", "", "./nothing", "~nobody-here/model", "x" * 5000, "a/b/c", "\0"]
)
def test_what_is_nowhere_is_refused_with_the_ways_to_name_a_model(
    model: str, tmp_path: Path
) -> None:
    message = refusal(model, tmp_path)
    assert "no file or folder" in message
    assert "Give a catalogue name" in message
    assert ("did you mean llama-3.1-8b" in message) == (model == "lama-3.1-8b")


def test_weights_of_an_unknown_name_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="did you mean smollm2-135m"):
        find_model("smollm2-135n", revision=None, base_dir=tmp_path)
    with pytest.raises(ModelError, match="catalogue name that needs no network: smollm2-135m"):
        find_model("gpt2-xl", revision=None, base_dir=tmp_path)
