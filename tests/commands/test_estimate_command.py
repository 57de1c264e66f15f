"""``lora-tune estimate`` as a user meets it: numbers, verdicts, exit codes, and one message per mistake.

Counts are checked against sums by hand (the LoRA paper's formula on published sizes); the rest against
the estimate itself, asked again with the options that the command offers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_tune import cli
from lora_tune.catalog.gpus import load_gpus
from lora_tune.catalog.models import load_models
from lora_tune.commands.estimate_model import find_estimated_model
from lora_tune.memory.estimate import trainable_parameters
from lora_tune.memory.request import LaneShape
from lora_tune.units import GIB

Capture = pytest.CaptureFixture[str]

FIELDS = {
    "model",
    "trainable_parameters",
    "base_parameters",
    "peak_allocated_bytes",
    "peak_phase",
    "terms",
    "peak_reserved_bytes",
    "process_bytes",
    "interval_bytes",
    "method",
    "stack",
    "versions",
    "gpus",
}
TERMS = [
    "base_weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits_and_loss",
    "workspace",
]


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """Run the command; return its exit code, output and error output."""
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


def answer(capsys: Capture, *arguments: str) -> dict[str, object]:
    """Return the JSON object of a command that ends well."""
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


# Numbers.


def test_the_object_has_every_field_and_its_terms_sum_to_the_peak(capsys: Capture) -> None:
    found = answer(capsys, "llama-3.1-8b", "--gpu", "rtx-4090")
    assert set(found) >= FIELDS
    assert list(found["terms"]) == TERMS
    assert sum(found["terms"].values()) == found["peak_allocated_bytes"]
    assert found["peak_allocated_bytes"] <= found["peak_reserved_bytes"] < found["process_bytes"]
    low, high = found["interval_bytes"]
    assert low < found["process_bytes"] < high
    assert (found["method"], found["stack"]) == ("closed-form", "lora-tune")
    assert set(found["versions"]) >= {"lora-tune", "torch", "transformers", "peft", "bitsandbytes"}
    assert "hours" not in found
    (gpu,) = found["gpus"]
    assert set(gpu) >= {"name", "usable_bytes", "verdict", "headroom_bytes"}
    assert gpu["headroom_bytes"] == gpu["usable_bytes"] - found["process_bytes"]
    assert (gpu["name"], gpu["verdict"]) == ("RTX 4090", "fits")


@pytest.mark.parametrize(
    ("model", "rank", "targets", "trainable"),
    [
        ("llama-3.1-8b", 16, "q_proj,k_proj,v_proj,o_proj", 13_631_488),
        ("llama-3.1-8b", 16, "all-linear", 41_943_040),
        ("meta-llama/Llama-3.1-8B-Instruct", 16, "attention", 13_631_488),
        ("gpt2", 8, "c_attn", 294_912),
    ],
)
def test_trainable_parameters_are_those_of_the_paper(
    capsys: Capture, model: str, rank: int, targets: str, trainable: int
) -> None:
    found = find_estimated_model(
        model, targets=targets, attention="sdpa", exact=False, full_depth=False
    )
    lane = LaneShape(rank=rank, targets=found.targets, lora_dropout=0.0)
    assert found.shape is not None
    assert trainable_parameters(found.shape, lane) == trainable


def test_the_base_of_llama_8b_is_counted_to_the_byte(capsys: Capture) -> None:
    found = answer(capsys, "llama-3.1-8b")
    assert found["terms"]["base_weights"] == 5_702_540_160
    assert found["base_parameters"] == 8_030_261_248
    assert found["gpus"] == []


def test_options_reach_the_estimate(capsys: Capture) -> None:
    def peak(*arguments: str) -> int:
        return int(str(answer(capsys, "llama-3.2-1b", *arguments)["peak_allocated_bytes"]))

    plain = peak()
    for more in (
        ("--rank", "64"),
        ("--batch-size", "4"),
        ("--max-length", "4096"),
        ("--lanes", "4"),
        ("--no-gradient-checkpointing",),
        ("--stack", "trainer"),
        ("--stack", "trainer-kbit"),
        ("--quantization", "none"),
        ("--dtype", "float32"),
        ("--dropout", "0.1", "--no-gradient-checkpointing"),
    ):
        assert peak(*more) > plain, more
    for less in (("--targets", "attention-qv"), ("--max-length", "512"), ("--rank", "4")):
        assert peak(*less) < plain, less
    assert peak("--stack", "trainer", "--outputs", "held") > peak("--stack", "trainer")
    settings = answer(capsys, "llama-3.2-1b", "--stack", "trl")["settings"]
    assert (settings["adapter_dtype"], settings["autocast"]) == ("bfloat16", True)


def test_the_headline_is_that_of_the_first_gpu(capsys: Capture) -> None:
    alone = answer(capsys, "llama-3.1-8b", "--gpu", "h100 80gb sxm")
    both = answer(capsys, "llama-3.1-8b", "--gpu", "h100 80gb sxm", "--gpu", "t4")
    assert alone["process_bytes"] == both["process_bytes"] == both["gpus"][0]["process_bytes"]
    assert both["gpus"][1]["process_bytes"] != both["process_bytes"]  # each has its own kernels


def test_all_gpus_are_each_judged_once(capsys: Capture) -> None:
    found = answer(capsys, "qwen2.5-14b", "--gpu", "rtx-4090", "--gpu", "RTX 4090", "--all-gpus")
    names = [gpu["name"] for gpu in found["gpus"]]
    assert names[0] == "RTX 4090"
    assert sorted(names) == sorted(gpu.name for gpu in load_gpus())
    assert {gpu["verdict"] for gpu in found["gpus"]} >= {"fits", "no"}


# What does not fit.


def test_a_70b_does_not_fit_24_gib_and_the_table_says_why_and_what_would(capsys: Capture) -> None:
    code, out, err = run(capsys, "llama-3.1-70b", "--gpu", "24GiB")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert (
        "24GiB does not fit: the base weights alone take 36.80 GiB, the GPU has 24.00 GiB." in text
    )
    assert "Only a larger GPU has room as asked, from " in text
    found = answer(capsys, "llama-3.1-70b", "--gpu", "24GiB")["gpus"][0]
    assert (found["verdict"], found["blame"], found["changes"]) == ("no", "base_weights", [])
    larger = answer(capsys, "llama-3.1-70b", "--gpu", found["larger_gpu"])["gpus"][0]
    assert larger["verdict"] == "fits"


def test_the_smallest_change_makes_it_fit(capsys: Capture) -> None:
    asked = ("llama-3.1-8b", "--stack", "trainer", "--batch-size", "8", "--gpu", "rtx-4090")
    gpu = answer(capsys, *asked)["gpus"][0]
    assert (gpu["verdict"], gpu["blame"]) == ("no", "logits_and_loss")
    for change in gpu["changes"]:
        again = answer(capsys, *asked, *change["options"].split())
        assert again["gpus"][0]["verdict"] == "fits"
        assert again["process_bytes"] == change["process_bytes"]
    _, out, _ = run(capsys, *asked)
    assert f"smallest change: {gpu['changes'][0]['options']} (process " in out


def test_require_fit_is_exit_5_unless_every_gpu_fits(capsys: Capture) -> None:
    fits = run(capsys, "llama-3.1-8b", "--gpu", "rtx-4090", "--require-fit")
    assert (fits[0], fits[2]) == (0, "")
    code, out, err = run(
        capsys, "llama-3.1-8b", "--gpu", "rtx-4090", "--gpu", "4GiB", "--require-fit", "--json"
    )
    assert code == 5
    assert [gpu["verdict"] for gpu in json.loads(out)["gpus"]] == ["fits", "no"]
    assert err == "lora-tune: --require-fit: not every GPU is certain to fit (4GiB: no).\n"


# Solving.


@pytest.mark.parametrize(
    ("variable", "option"),
    [
        ("max-rank", "--rank"),
        ("max-length", "--max-length"),
        ("max-batch", "--batch-size"),
        ("max-lanes", "--lanes"),
    ],
)
def test_what_is_solved_for_fits_and_one_more_does_not(
    capsys: Capture, variable: str, option: str
) -> None:
    asked = ("llama-3.1-8b", "--gpu", "rtx-4090")
    found = answer(capsys, *asked, "--solve", variable)
    value = found["solve"]["value"]
    assert found["gpus"][0]["verdict"] == "fits"
    at = answer(capsys, *asked, option, str(value))
    assert (at["gpus"][0]["verdict"], at["process_bytes"]) == ("fits", found["process_bytes"])
    assert answer(capsys, *asked, option, str(value + 1))["gpus"][0]["verdict"] != "fits"


def test_the_smallest_gpu_fits_and_the_next_smaller_does_not(capsys: Capture) -> None:
    found = answer(capsys, "qwen2.5-14b", "--solve", "min-gpu")
    name = found["solve"]["value"]
    assert [gpu["name"] for gpu in found["gpus"]] == [name]
    everywhere = answer(capsys, "qwen2.5-14b", "--all-gpus")["gpus"]
    usable = {gpu["name"]: gpu["usable_bytes"] for gpu in everywhere}
    for gpu in everywhere:
        assert gpu["verdict"] != "fits" or gpu["usable_bytes"] >= usable[name]
    among = answer(capsys, "llama-3.1-70b", "--solve", "min-gpu", "--gpu", "h200", "--gpu", "t4")
    assert among["solve"]["value"] == "H200"
    assert (
        answer(capsys, "llama-3.1-70b", "--solve", "min-gpu", "--gpu", "t4")["solve"]["value"]
        is None
    )


def test_a_person_reads_what_was_solved(capsys: Capture) -> None:
    _, out, _ = run(capsys, "llama-3.1-8b", "--gpu", "rtx-4090", "--solve", "max-lanes")
    assert "Largest number of lanes that fits RTX 4090: " in out
    _, out, _ = run(capsys, "llama-3.1-8b", "--gpu", "4GiB", "--solve", "max-rank")
    assert "No rank fits 4GiB, not even 1." in out


# Time and cost.


def test_hours_and_cost_order_the_gpus(capsys: Capture) -> None:
    found = answer(
        capsys, "llama-3.1-8b", "--gpu", "t4", "--gpu", "rtx-4090", "--gpu", "5GiB",
        "--tokens", "10000000", "--price", "t4=0.3", "--price", "rtx 4090=0.4",
    )  # fmt: skip
    fast, slow, none = found["gpus"]
    assert [fast["name"], slow["name"], none["name"]] == ["RTX 4090", "T4", "5GiB"]
    assert found["hours"] == fast["hours"] < slow["hours"]
    assert found["cost"] == fast["cost"] == pytest.approx(0.4 * fast["hours"])
    low, high = fast["hours_interval"]
    assert low < fast["hours"] < high
    assert "hours" not in none
    assert any("no hours for 5GiB" in note for note in found["notes"])


def test_a_card_by_name_and_as_it_is_free_here_are_two_rows(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path, "NVIDIA GeForce RTX 4090, 20000, 8.9")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = answer(capsys, "llama-3.1-8b", "--gpu", "auto", "--gpu", "rtx-4090", "--tokens", "1000")
    free, whole = found["gpus"]
    assert (free["name"], whole["name"]) == ("RTX 4090", "RTX 4090")
    assert free["usable_bytes"] < whole["usable_bytes"]
    assert free["hours"] == whole["hours"] > 0


def test_without_a_price_there_are_hours_only(capsys: Capture) -> None:
    found = answer(capsys, "llama-3.1-8b", "--gpu", "t4", "--tokens", "1000")
    assert found["hours"] > 0
    assert found["cost"] is None


# The list.


def test_the_list_names_every_model_and_gpu(capsys: Capture) -> None:
    found = answer(capsys, "--list")
    assert [row["name"] for row in found["models"]] == [row.name for row in load_models()]
    assert [row["name"] for row in found["gpus"]] == [row.name for row in load_gpus()]
    assert all(row["parameters"] > 10**7 for row in found["models"])
    code, out, err = run(capsys, "--list")
    assert (code, err) == (0, "")
    assert "llama-3.1-8b" in out
    assert "RTX 4090" in out


# Models from files.


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def test_a_folder_and_its_config_give_the_same(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    folder = answer(capsys, str(tmp_path))
    file = answer(capsys, str(tmp_path / "config.json"))
    assert folder["terms"] == file["terms"]
    assert folder["model_source"] == "config.json"


# What is free here.


def fake_driver(folder: Path, says: str, code: int = 0) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n", encoding="utf-8")
    script.chmod(0o755)


def test_auto_is_what_the_driver_says_is_free(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path, "NVIDIA GeForce RTX 4090, 20000, 8.9")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (gpu,) = answer(capsys, "llama-3.1-8b", "--gpu", "auto")["gpus"]
    assert (gpu["name"], gpu["usable_bytes"]) == ("RTX 4090", 20000 * 1024**2)


@pytest.mark.parametrize(
    ("says", "code", "message"),
    [
        ("NVIDIA GB10, [N/A], 12.1", 0, 'does not tell what is free ("NVIDIA GB10, [N/A], 12.1")'),
        ("", 0, "does not tell what is free"),
        ("No devices were found", 6, "nvidia-smi says: No devices were found"),
    ],
)
def test_auto_without_an_answer_is_one_message(
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    code: int,
    message: str,
) -> None:
    fake_driver(tmp_path, says, code)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    exit_code, out, err = run(capsys, "llama-3.1-8b", "--gpu", "auto", "--json")
    assert (exit_code, out) == (7, "")
    assert err.startswith('lora-tune: --gpu is "auto"')
    assert message in err


def test_auto_without_a_driver_or_a_visible_gpu_is_one_message(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = run(capsys, "llama-3.1-8b", "--gpu", "auto")
    assert (code, out) == (7, "")
    assert "nvidia-smi is not installed" in err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides every GPU" in run(capsys, "llama-3.1-8b", "--gpu", "auto")[2]


# Notes.


def test_settings_without_effect_are_named(capsys: Capture) -> None:
    notes = "\n".join(answer(capsys, "llama-3.1-8b", "--padded")["notes"])
    assert "--padded has no effect with stack lora-tune" in notes
    notes = "\n".join(
        answer(capsys, "llama-3.1-8b", "--stack", "trainer", "--label-fraction", "0.5")["notes"]
    )
    assert "--label-fraction has no effect with stack trainer" in notes
    assert answer(capsys, "llama-3.1-8b", "--gpu", "rtx-4090")["notes"] == []


def test_a_value_for_what_is_solved_has_no_effect_and_is_named(capsys: Capture) -> None:
    asked = ("llama-3.2-1b", "--gpu", "t4", "--dtype", "float32", "--solve", "max-rank")
    plain, given = (answer(capsys, *asked, *more) for more in ((), ("--rank", "16")))
    assert plain["notes"] == []
    assert given["notes"] == ["--solve max-rank finds --rank: the one given has no effect."]
    assert plain["solve"] == given["solve"]


def test_what_the_gpu_or_the_model_lacks_is_noted(capsys: Capture) -> None:
    (note,) = answer(capsys, "llama-3.1-8b", "--gpu", "t4")["notes"]
    assert note.startswith("T4 has no bfloat16 units")
    (note,) = answer(capsys, "llama-2-7b", "--max-length", "8192")["notes"]
    assert note == "8192 tokens a row are more than the model's 4096 positions."


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["llama-3.1-9b"], 8, "or llama-3.1-8b or"),
        (["no/such/folder"], 8, "no/such/folder"),
        (["llama-3.1-8b", "--gpu", "RTX 4091"], 3, '--gpu is "RTX 4091"'),
        (["llama-3.1-8b", "--rank", "0"], 3, "--rank is 0; ranks are whole numbers from 1 on."),
        (["llama-3.1-8b", "--batch-size", "0"], 3, "--batch-size is 0"),
        (["llama-3.1-8b", "--max-length", "0"], 3, "--max-length is 0"),
        (["llama-3.1-8b", "--max-length", "-5"], 3, "--max-length is -5"),
        (["llama-3.1-8b", "--lanes", "0"], 3, "--lanes is 0"),
        (
            ["llama-3.1-8b", "--gradient-accumulation-steps", "0"],
            3,
            "--gradient-accumulation-steps",
        ),
        (["llama-3.1-8b", "--dropout", "1"], 3, "--dropout is 1"),
        (["llama-3.1-8b", "--dropout", "nan"], 3, "--dropout is nan"),
        (["llama-3.1-8b", "--label-fraction", "0"], 3, "--label-fraction is 0"),
        (["llama-3.1-8b", "--label-fraction", "1.5"], 3, "--label-fraction is 1.5"),
        (["llama-3.1-8b", "--label-fraction", "nan"], 3, "--label-fraction is nan"),
        (["llama-3.1-8b", "--targets", "nothing"], 3, "gate_proj"),
        (["llama-3.1-8b", "--targets", ""], 3, "--targets"),
        (["gpt2", "--targets", "attention-qv"], 3, "fused in c_attn"),
        (["llama-3.1-8b", "--quantization", "nf5"], 3, "did you mean nf4? Choices: nf4,"),
        (["llama-3.1-8b", "--dtype", "half"], 3, '--dtype is "half"'),
        (["llama-3.1-8b", "--optimizer", "sgd"], 3, '--optimizer is "sgd"'),
        (["llama-3.1-8b", "--adapter-dtype", "int8"], 3, '--adapter-dtype is "int8"'),
        (["llama-3.1-8b", "--attention", "xformers"], 3, '--attention is "xformers"'),
        (["llama-3.1-8b", "--outputs", "kept"], 3, '--outputs is "kept"'),
        (["llama-3.1-8b", "--stack", "trainers"], 3, "did you mean trainer?"),
        (["llama-3.1-8b", "--solve", "max-gpu"], 3, '--solve is "max-gpu"'),
        (["llama-3.1-8b", "--stack", "trainer", "--lanes", "2"], 3, "one adapter at a time"),
        (["llama-3.1-8b", "--autocast"], 3, "stack lora-tune: "),
        (["llama-3.1-8b", "--outputs", "held"], 3, "no logits that a caller could hold"),
        (["llama-3.1-8b", "--solve", "max-rank"], 3, "needs exactly one --gpu"),
        (
            ["llama-3.1-8b", "--solve", "max-rank", "--gpu", "t4", "--gpu", "l4"],
            3,
            "needs exactly one --gpu to fill, not 2",
        ),
        (
            ["llama-3.1-8b", "--stack", "trl", "--solve", "max-lanes", "--gpu", "t4"],
            3,
            "one adapter at a time",
        ),
        (["llama-3.1-8b", "--full-depth"], 3, "add --exact"),
        (["llama-3.1-8b", "--require-fit"], 3, "--require-fit needs a GPU"),
        (["llama-3.1-8b", "--tokens", "5"], 3, "add --gpu NAME or --all-gpus"),
        (["llama-3.1-8b", "--gpu", "t4", "--tokens", "0"], 3, "--tokens is 0"),
        (["llama-3.1-8b", "--gpu", "t4", "--price", "t4=1"], 3, "--price gives the cost of"),
        (
            ["llama-3.1-8b", "--gpu", "t4", "--tokens", "5", "--price", "t4"],
            3,
            '--price is "t4"',
        ),
        (
            ["llama-3.1-8b", "--gpu", "t4", "--tokens", "5", "--price", "l4=1"],
            3,
            "--price names L4",
        ),
        (["--list", "--rank", "8"], 3, "--rank would have no effect"),
        (["--study", "x.toml", "--rank", "8", "--lanes", "2"], 3, "--lanes, --rank would have no"),
        (["--study", "no.toml"], 3, "no.toml: no such study file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_message_with_its_exit_code(
    capsys: Capture, arguments: list[str], code: int, says: str
) -> None:
    seen, out, err = run(capsys, *arguments, "--json")
    assert (seen, out) == (code, "")
    assert err.startswith("lora-tune: ")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_config_without_a_needed_key_names_it(capsys: Capture, tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, out, err = run(capsys, str(tmp_path))
    assert (code, out) == (8, "")
    assert f"config.json: {key} is missing" in err


@pytest.mark.parametrize("arguments", [[], ["llama-3.1-8b", "--list"], ["--list", "--study", "x"]])
def test_one_of_model_study_and_list_is_needed(capsys: Capture, arguments: list[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "give a MODEL, --study FILE or --list" in " ".join(err.split())


# Light.

LOADED = """
import sys
from lora_tune import cli
sys.argv = ["lora-tune", *sys.argv[1:]]
code = 0
try:
    cli.main()
except SystemExit as end:
    code = end.code or 0
heavy = ("torch", "peft", "transformers", "huggingface_hub", "numpy", "pandas", "jinja2", "optuna")
print("loaded:", ",".join(name for name in heavy if name in sys.modules), "exit:", code)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["llama-3.1-8b", "--gpu", "rtx-4090"],
        ["meta-llama/Llama-3.1-8B-Instruct", "--all-gpus", "--json"],
        ["qwen2.5-7b", "--stack", "trainer", "--solve", "max-length", "--gpu", "24GiB"],
        ["llama-3.1-8b", "--gpu", "t4", "--tokens", "1000", "--price", "t4=1"],
        ["--list"],
    ],
    ids=" ".join,
)
def test_an_estimate_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, "estimate", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "loaded:  exit: 0", done.stderr


def test_json_needs_no_rich(tmp_path: Path) -> None:
    code = LOADED.replace('"jinja2"', '"rich"')
    done = subprocess.run(
        [sys.executable, "-c", code, "estimate", "llama-3.1-8b", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "loaded:  exit: 0", done.stderr


def test_no_term_is_negative_and_sizes_are_plausible(capsys: Capture) -> None:
    found = answer(capsys, "llama-3.2-1b", "--gpu", "rtx-4090")
    assert all(size >= 0 for size in found["terms"].values())
    assert GIB < found["process_bytes"] < 8 * GIB


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            ["gpt2", "--lanes", "100000000"],
            "--lanes is 100,000,000; more than 1,024 is beyond any use",
        ),
        (["gpt2", "--rank", "9" * 330], "--rank is a number of 330 digits"),
        (["gpt2", "--gpu", "9" * 300 + "GiB"], "which is no GPU of the catalogue"),
    ],
)
def test_numbers_beyond_any_use_are_refused(capsys: Capture, asked: list[str], said: str) -> None:
    code, out, errors = run(capsys, *asked)
    assert (code, out) == (3, "")
    assert said in errors
