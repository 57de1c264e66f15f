"""``lora-tune estimate`` by the trace: asked for, or because a family has no closed form."""

import json
import sys
from pathlib import Path

import pytest

from lora_tune import cli
from lora_tune.units import MIB

Capture = pytest.CaptureFixture[str]
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    previous = sys.argv
    sys.argv = ["lora-tune", "estimate", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = previous
    captured = capsys.readouterr()
    assert code is None or isinstance(code, int)
    return code or 0, captured.out, captured.err


def folder(path: Path, model_type: str) -> str:
    (path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES}), "utf-8")
    return str(path)


def test_exact_counts_the_same_tensors_as_the_closed_form(capsys: Capture, tmp_path: Path) -> None:
    asked = (folder(tmp_path, "llama"), "--max-length", "64", "--gpu", "t4", "--json")
    form, trace = (json.loads(run(capsys, *asked, *more)[1]) for more in ((), ("--exact",)))
    assert (form["method"], trace["method"]) == ("closed-form", "trace")
    assert list(form["terms"]) == list(trace["terms"])
    for name in ("base_weights", "adapters", "optimizer"):
        assert trace["terms"][name] == form["terms"][name]
    assert trace["trainable_parameters"] == form["trainable_parameters"]
    assert sum(trace["terms"].values()) == trace["peak_allocated_bytes"]


def test_a_family_without_a_closed_form_is_traced_and_says_so(
    capsys: Capture, tmp_path: Path
) -> None:
    asked = (folder(tmp_path, "olmo2"), "--max-length", "64", "--targets", "attention")
    code, out, _ = run(capsys, *asked, "--gpu", "t4", "--tokens", "1000", "--json")
    found = json.loads(out)
    assert (code, found["method"]) == (0, "trace")
    # q, k, v, o of 4 layers, rank 16 on 256 by 256
    assert found["trainable_parameters"] == 4 * 4 * 16 * (256 + 256)
    assert "no closed form for olmo2 models" in found["notes"][0]
    assert any(note.startswith("no hours") for note in found["notes"])
    assert found["hours"] is None


def test_gpus_differ_by_the_workspaces_of_their_libraries(capsys: Capture, tmp_path: Path) -> None:
    asked = (folder(tmp_path, "llama"), "--max-length", "64", "--exact", "--json")
    small, large = (
        json.loads(run(capsys, *asked, "--gpu", gpu)[1])["peak_allocated_bytes"]
        for gpu in ("rtx-4090", "h200")
    )
    assert large - small == 2 * (32 * MIB - 8_519_680)


def test_targets_are_refused_without_a_closed_form_too(capsys: Capture, tmp_path: Path) -> None:
    code, out, err = run(capsys, folder(tmp_path, "olmo2"), "--targets", "c_attn", "--json")
    assert (code, out) == (3, "")
    assert err.startswith('lora-tune: --targets: "c_attn" matches no linear layer')
    assert "q_proj" in err


def test_a_type_that_transformers_does_not_know_is_one_message(
    capsys: Capture, tmp_path: Path
) -> None:
    code, out, err = run(capsys, folder(tmp_path, "nonsense"))
    assert (code, out) == (8, "")
    assert "nonsense" in err
    assert "Traceback" not in err
