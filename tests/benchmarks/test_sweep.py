"""The benchmark of whole sweeps: its arithmetic, and that all arms train the same trials.

The losses of the arms are the witness: packed lanes, one lane and the Trainer share no code for layers,
loss or optimizer. Everything here trains a tiny model on a CPU; nothing here is a measurement.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sweep import (
    _arm_cells,
    compare_losses,
    describe_sweep,
    draw_configs,
    early_exit,
    levers,
    merged,
    parse,
    summarize,
    tables,
    trainer_mean,
)
from sweep_arms import Result, Sweep, TrainerLoop, fastest, pack_settings, run_arm
from test_packs import BENCHMARKS, WITHOUT
from trainer_loop import TrainerSettings

from lora_tune.engine.base import load_base_model, read_meta_model
from lora_tune.engine.pack import TrialPack
from lora_tune.records import TokenizedRow

MakeRows = Callable[..., tuple[TokenizedRow, ...]]
LOSS_DIFFERENCE = 1e-3  # of float32 runs by different code over a few steps; seen: 1e-6
PACKED: Result = {"lanes": 4, "micro_batch": 2, "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def sweep(tiny_llama: Path, make_rows: MakeRows) -> Sweep:
    """Five trials of four steps, with rates that move the loss."""
    drawn = draw_configs(5, read_meta_model(tiny_llama).linears)
    configs = tuple(
        replace(config, learning_rate=2e-2 * (1 + number)) for number, config in enumerate(drawn)
    )
    return Sweep(
        folder=tiny_llama,
        quantization="nf4",
        device="cpu",
        steps=4,
        batch=4,
        configs=configs,
        train=make_rows(14),
        held_out=make_rows(19, seed=1),
        compute_dtype="float32",
        rungs=(0.5, 1.0),
    )


@pytest.fixture(scope="module")
def arms(sweep: Sweep) -> dict[str, Result]:
    """All arms, run in this process."""
    found = {arm: run_arm(arm, sweep) for arm in "abc"}
    found["d"] = run_arm("d", sweep, found["c"]["settings"])  # type: ignore[arg-type]
    found["e"] = run_arm("e", sweep, PACKED)
    return found


def test_all_arms_train_the_same_trials_to_the_same_losses(
    sweep: Sweep, arms: dict[str, Result]
) -> None:
    found = compare_losses(arms)
    losses = found["eval_loss"]
    assert isinstance(losses, dict)
    assert set(losses) == {"a", "b", "c", "d"}
    assert found["without_loss"] == []
    assert len(losses["a"]) == len(sweep.configs)
    difference = found["largest_relative_difference"]
    assert isinstance(difference, float)
    assert difference < LOSS_DIFFERENCE
    base = load_base_model(sweep.folder, quantization="nf4", compute_dtype="float32", device="cpu")
    pack = TrialPack(base, sweep.train, pack_settings(sweep, 2))
    [untrained] = pack.evaluate([None], sweep.held_out, split="selection")
    batch = int(arms["c"]["settings"]["eval_batch_size"])  # type: ignore[index]
    before = trainer_mean(untrained.loss_sums, untrained.label_counts, batch_size=batch)
    moved = [abs(loss / before - 1) for loss in losses["a"]]
    assert min(moved) > 3 * LOSS_DIFFERENCE  # training shows, so equal losses say something


def test_a_pool_of_processes_trains_the_same_trials(sweep: Sweep, arms: dict[str, Result]) -> None:
    found = run_arm("a", replace(sweep, lanes=2, workers=2))
    settings = found["settings"]
    assert isinstance(settings, dict)
    assert (settings["workers"], settings["lanes"]) == (2, 2)
    compared = compare_losses({"a": arms["a"], "pooled": found})
    assert compared["without_loss"] == []
    assert float(str(compared["largest_relative_difference"])) < LOSS_DIFFERENCE
    makespan, loading = float(str(found["makespan_s"])), float(str(found["loading_s"]))
    assert 0 < loading < makespan
    assert 0 < float(str(found["evaluation_s"])) < makespan
    assert "2 processes, each: float32, 2 lanes" in _arm_cells("a", found, None)[1]


def test_every_arm_says_where_its_seconds_went(arms: dict[str, Result]) -> None:
    for name, arm in arms.items():
        parts = sum(
            float(str(arm[key])) for key in ("loading_s", "training_s", "evaluation_s", "other_s")
        )
        assert parts == pytest.approx(float(str(arm["makespan_s"]))), name
        assert float(str(arm["loading_s"])) > 0
        assert float(str(arm["evaluation_s"])) > 0
        assert arm["run"]["hardware"]["device"] == "cpu"  # type: ignore[index]
        assert arm["run"]["versions"]["torch"] == torch.__version__  # type: ignore[index]
    assert arms["d"]["settings"] == arms["c"]["settings"]
    rows = {name: arm["num_rows"] for name, arm in arms.items()}
    assert rows["a"] == rows["b"] == rows["c"] == rows["d"] == 5 * 4 * 4
    tokens = {arms[name]["num_tokens"] for name in "abcd"}
    assert len(tokens) == 1


def test_the_rungs_train_the_best_alone_further(arms: dict[str, Result]) -> None:
    rungs = arms["e"]
    assert rungs["rungs"] == [2, 4]
    # a quarter of five, at least two, and the third, which so few rows cannot tell from the second
    assert rungs["trials_at_rung"] == [5, 3]
    num_rows = (5 * 2 + 3 * 2) * 4
    assert rungs["num_rows"] == num_rows
    found = early_exit(arms)
    assert found is not None
    assert found["saved_rows"] == 5 * 4 * 4 - num_rows
    full = {trial["number"]: trial["eval_loss"] for trial in arms["a"]["trials"]}  # type: ignore[attr-defined]
    assert found["winner_full_loss"] == full[rungs["winner"]]
    # stopping at a rung and going on is the same training as not stopping
    assert rungs["winner_loss"] == pytest.approx(full[rungs["winner"]], rel=LOSS_DIFFERENCE)
    assert found["best_full_loss"] == min(full.values())


def test_the_kept_base_has_the_same_parameters_after_every_trial(sweep: Sweep) -> None:
    settings = TrainerSettings(
        compute_dtype="float32", autocast=False, micro_batch_size=4, effective_batch_size=4
    )
    loop = TrainerLoop(sweep, settings, reload=False)
    loop.clock.begin()
    sizes = []
    for number in range(2):
        loop.train(number)
        assert loop._model is not None
        sizes.append(sum(parameter.numel() for parameter in loop._model.parameters()))
        assert not [name for name, _ in loop._model.named_modules() if "lora" in name]
    assert sizes[0] == sizes[1] == loop._size


def test_the_fastest_way_is_chosen_at_the_largest_size_that_fits_then_its_fastest_size() -> None:
    rates = {("x", 4): 0.0, ("y", 4): 0.0}  # out of memory
    rates |= {("x", 2): 30.0, ("y", 2): 20.0, ("x", 1): 31.0, ("y", 1): 99.0}
    tried = []

    def rate(way: str, size: int) -> float:
        tried.append((way, size))
        return rates[way, size]

    assert fastest(("x", "y"), (1, 2, 4), rate) == ("x", 1)
    assert tried == [("x", 4), ("y", 4), ("x", 2), ("y", 2), ("x", 1)]
    with pytest.raises(SystemExit, match="no micro-batch fits the memory"):
        fastest(("x",), (4,), rate)


def arm(makespan: float, evaluation: float = 0.0, **more: object) -> Result:
    return {"makespan_s": makespan, "evaluation_s": evaluation, **more}


def test_the_levers_add_up_to_the_whole_gap() -> None:
    head = {"all_tokens_s": 0.5, "labels_only_s": 0.1}
    found = levers(
        {
            "a": arm(60.0, 5.0),
            "b": arm(100.0, 10.0, head=head, num_steps=50),
            "c": arm(150.0, 18.0),
            "d": arm(200.0, 18.0),
            "e": arm(40.0, 6.0),
        }
    )
    saved = {name: one["saved_s"] for name, one in found.items()}
    assert saved == pytest.approx(
        {
            "reload": 50.0,
            "labels_only_logits": 20.0,
            "evaluation": 8.0,
            "rest_of_the_loop": 22.0,
            "lanes": 40.0,
            "early_exit": 20.0,
        }
    )
    assert sum(saved.values()) == pytest.approx(200.0 - 40.0)
    assert found["lanes"]["share_of_the_arm_before"] == pytest.approx(0.4)


def test_levers_of_arms_that_did_not_run_are_left_out() -> None:
    assert set(levers({"c": arm(2.0), "d": arm(3.0)})) == {"reload"}
    assert levers({"a": arm(2.0), "e": {"skipped": "optuna is not installed"}}) == {}


def test_a_trial_without_a_loss_is_named_and_not_compared() -> None:
    trials = [
        {"number": 0, "loss_sums": [2.0, 2.0], "label_counts": [1, 1]},
        {"number": 1, "reason": "loss nan at step 3"},
    ]
    theirs = [{"number": 0, "eval_loss": 2.02}, {"number": 1, "eval_loss": 3.0}]
    found = compare_losses({"a": {"trials": trials}, "c": {"trials": theirs}})
    assert found["eval_loss"] == {"a": [2.0], "c": [2.02]}
    assert found["largest_relative_difference"] == pytest.approx(0.01)
    assert found["without_loss"] == ["arm a, trial 1: loss nan at step 3"]


def test_arms_of_another_sweep_are_never_merged(sweep: Sweep) -> None:
    described = describe_sweep(sweep, "tiny")
    earlier: Result = {"sweep": described, "arms": {"a": arm(1.0)}}
    assert merged({}, described, earlier)["arms"] == {"a": arm(1.0)}
    longer = describe_sweep(replace(sweep, steps=5), "tiny")
    assert merged({}, longer, earlier)["arms"] == {}
    other_rows = describe_sweep(replace(sweep, train=sweep.train[1:]), "tiny")
    assert merged({}, other_rows, earlier)["arms"] == {}
    assert json.loads(json.dumps(described)) == described  # as it comes back from the file


def test_the_trials_are_the_same_on_every_machine(sweep: Sweep) -> None:
    linears = read_meta_model(sweep.folder).linears
    drawn = draw_configs(16, linears)
    assert drawn == draw_configs(16, linears)
    assert {config.target_set for config in drawn} == {"attention", "mlp", "all-linear"}
    assert len({(config.rank, config.target_set) for config in drawn}) == 9
    assert all(config.lora_dropout == 0 and config.target_modules for config in drawn)


def test_a_plan_survives_its_file(sweep: Sweep, tmp_path: Path) -> None:
    sweep.write(tmp_path / "plan.json")
    assert Sweep.read(tmp_path / "plan.json") == sweep


def test_the_tables_show_all_arms_and_levers(sweep: Sweep, arms: dict[str, Result]) -> None:
    head = arms["a"]["run"]
    assert isinstance(head, dict)
    result = summarize({**head, "sweep": describe_sweep(sweep, "tiny"), "arms": arms})
    text = tables(json.loads(json.dumps(result)))
    for expected in ("| a: lora-tune, packed |", "| d: Trainer loop, base reloaded |"):
        assert expected in text
    for lever in ("reload", "labels only logits", "evaluation", "lanes", "early exit"):
        assert f"| {lever} |" in text
    assert "Largest relative difference between arms" in text


def test_options_that_mean_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--trials", "0"])
    assert (
        "--trials, --steps, --batch, --eval-rows and --workers are at least 1"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        parse(["--workers", "2"])
    assert "--workers needs --lanes" in capsys.readouterr().err


def test_the_command_runs_an_arm_without_the_packages_of_a_search(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    output = tmp_path / "sweep.json"
    arguments = ["--model", tiny_llama, "--device", "cpu", "--length", "10", "--output", output]
    arguments += ["--trials", "2", "--steps", "2", "--batch", "2", "--eval-rows", "3"]
    arguments += ["--compute-dtype", "float32", "--arms", "c", "e"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "sweep.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{BENCHMARKS.parent}"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["hardware"]["device"] == "cpu"
    assert result["versions"]["torch"] == torch.__version__
    loop = result["arms"]["c"]
    assert loop["search"] == "optuna is not installed: the same configurations in a plain loop"
    assert [trial["number"] for trial in loop["trials"]] == [0, 1]
    assert result["arms"]["e"]["skipped"].startswith("the ladder needs a package")
    assert "| c: Trainer loop, base kept |" in done.stdout
