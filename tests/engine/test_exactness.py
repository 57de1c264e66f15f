"""A packed lane against the same trial alone and against plain PEFT + torch (engine/reference.py).

Lanes differ in rank, alpha, dropout, target set and learning rate; the base is NF4 and not
quantized, in float32 and bfloat16; products are per lane and grouped.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from lora_tune.engine import lora
from lora_tune.engine.base import BaseModel, load_base_model
from lora_tune.engine.lane import Lane
from lora_tune.engine.pack import PackSettings, TrialPack
from lora_tune.engine.reference import ReferenceTrial
from lora_tune.records import LaneJob, TokenizedRow, TrialConfig

# Rounding of float32 sums in another order, over two layers and 128 terms.
LOSS_RTOL = 1e-5
GRADIENT_RTOL = 1e-4

ATTENTION_QV = ("q_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
LANES = [  # rank, alpha, dropout, modules, learning rate
    (4, 8.0, 0.1, ALL, 1e-3),
    (16, 4.0, 0.0, ATTENTION_QV, 3e-3),
    (2, 16.0, 0.1, MLP, 1e-3),
    (8, 8.0, 0.0, ALL, 5e-4),
]
SETTINGS = PackSettings(
    effective_batch_size=4, micro_batch_size=2, max_grad_norm=1.0, weight_decay=0.01, grouped=False
)


def make_job(lane: int, *, steps: int = 3) -> LaneJob:
    rank, alpha, dropout, modules, rate = LANES[lane]
    names = tuple(
        f"model.layers.{layer}.{'mlp' if module in MLP else 'self_attn'}.{module}"
        for layer in range(2)
        for module in modules
    )
    config = TrialConfig(
        rank=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_set="test",
        target_modules=names,
        learning_rate=rate,
        init_seed=100 + lane,
        dropout_seed=200 + lane,
        data_seed=7,
    )
    return LaneJob(
        trial=lane,
        rung=0,
        config=config,
        start_step=0,
        hold_step=max(1, steps - 1),
        end_step=steps,
        warmup_steps=1,
        eval_split="selection",
        eval_dtype="train",
        start_folder=None,
        result_folder=None,
    )


def load(folder: Path, quantization: str, dtype: str) -> BaseModel:
    return load_base_model(folder, quantization=quantization, compute_dtype=dtype, device="cpu")


def start_lanes(pack: TrialPack, lanes: list[int], *, trained_b: bool = True) -> list[Lane]:
    started = [pack.new_lane(make_job(lane)) for lane in lanes]
    if trained_b:  # B is zero at the start, which would leave A without gradient
        for lane in started:
            randomize_b(lane)
    return started


def randomize_b(lane: Lane) -> None:
    assert lane.adapter is not None
    for name, (_, b) in lane.adapter.weights.items():
        generator = torch.Generator().manual_seed(lora.keyed_seed(lane.job.trial, "b", name))
        with torch.no_grad():
            b.copy_(torch.randn(b.shape, generator=generator) * 0.05)


def gradients(lane: Lane) -> dict[str, torch.Tensor]:
    assert lane.adapter is not None
    found = {}
    for name, pair in lane.adapter.weights.items():
        for letter, matrix in zip("AB", pair, strict=True):
            assert matrix.grad is not None
            found[f"{name}.{letter}"] = matrix.grad.clone()
    return found


def relative(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the wanted ones."""
    assert found.keys() == wanted.keys()
    difference = sum(float((found[key] - wanted[key]).double().square().sum()) for key in wanted)
    norm = sum(float(wanted[key].double().square().sum()) for key in wanted)
    return float((difference / norm) ** 0.5)


def packed_gradients(
    pack: TrialPack, lanes: list[int]
) -> list[tuple[float, dict[str, torch.Tensor]]]:
    started = start_lanes(pack, lanes)
    found = pack.accumulate(started)
    return [(loss, gradients(lane)) for loss, lane in zip(found.losses, started, strict=True)]


def reference(
    folder: Path, rows: tuple[TokenizedRow, ...], lane: Lane, quantization: str, dtype: str
) -> ReferenceTrial:
    assert lane.adapter is not None
    return ReferenceTrial(
        folder,
        lane.job,
        rows,
        initial=lane.adapter.weights,
        quantization=quantization,
        compute_dtype=dtype,
        effective_batch_size=SETTINGS.effective_batch_size,
        micro_batch_size=SETTINGS.micro_batch_size,
        max_grad_norm=SETTINGS.max_grad_norm,
        weight_decay=SETTINGS.weight_decay,
    )


def reference_gradients(
    folder: Path, rows: tuple[TokenizedRow, ...], lane: Lane, quantization: str, dtype: str
) -> tuple[float, dict[str, torch.Tensor]]:
    trial = reference(folder, rows, lane, quantization, dtype)
    loss = trial.accumulate(step=1)
    found = {}
    for name, pair in trial.weights.items():
        for letter, matrix in zip("AB", pair, strict=True):
            assert matrix.grad is not None
            found[f"{name}.{letter}"] = matrix.grad
    return loss, found


def differences_from_reference(
    folder: Path, rows: tuple[TokenizedRow, ...], quantization: str, *, grouped: bool
) -> tuple[float, float]:
    """Return the worst relative difference of loss and gradient over all lanes of a pack."""
    base = load(folder, quantization, "float32")
    pack = TrialPack(base, rows, dataclasses.replace(SETTINGS, grouped=grouped))
    lanes = start_lanes(pack, [0, 1, 2, 3])
    starts = start_lanes(pack, [0, 1, 2, 3])
    found = pack.accumulate(lanes)
    worst_loss = worst_gradient = 0.0
    for lane, start, loss in zip(lanes, starts, found.losses, strict=True):
        wanted_loss, wanted = reference_gradients(folder, rows, start, quantization, "float32")
        worst_loss = max(worst_loss, abs(loss - wanted_loss) / wanted_loss)
        worst_gradient = max(worst_gradient, relative(gradients(lane), wanted))
    return worst_loss, worst_gradient


@pytest.fixture(scope="module")
def rows(make_rows) -> tuple[TokenizedRow, ...]:
    return make_rows(20)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_every_lane_of_a_pack_has_the_gradients_of_plain_peft(
    tiny_llama, rows, quantization, grouped
):
    loss, gradient = differences_from_reference(tiny_llama, rows, quantization, grouped=grouped)
    assert loss < LOSS_RTOL
    assert gradient < GRADIENT_RTOL


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_packed_lane_equals_the_same_trial_alone(tiny_llama, rows, quantization, grouped):
    base = load(tiny_llama, quantization, "float32")
    pack = TrialPack(base, rows, dataclasses.replace(SETTINGS, grouped=grouped))
    packed = packed_gradients(pack, [0, 1, 2, 3])
    for lane in range(4):
        [(loss, alone)] = packed_gradients(pack, [lane])
        assert packed[lane][0] == pytest.approx(loss, rel=LOSS_RTOL)
        assert relative(packed[lane][1], alone) < GRADIENT_RTOL


def losses_of_batches(pack: TrialPack, lanes: list[int]) -> torch.Tensor:
    """Return each lane's loss on ten effective batches, (lanes, batches), nothing trained between."""
    started = start_lanes(pack, lanes)
    losses = []
    for batch in range(10):
        for lane in started:
            lane.step = batch
        losses.append(pack.accumulate(started).losses)
    return torch.tensor(losses, dtype=torch.float64).T


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_in_bfloat16_packing_adds_no_error_beyond_that_of_the_type(
    tiny_llama, rows, quantization, grouped
):
    settings = dataclasses.replace(SETTINGS, grouped=grouped)
    exact = TrialPack(load(tiny_llama, quantization, "float32"), rows, settings)
    rounded = TrialPack(load(tiny_llama, quantization, "bfloat16"), rows, settings)
    lanes = [0, 1, 2, 3]
    packed_losses = losses_of_batches(rounded, lanes)
    packed = packed_gradients(rounded, lanes)
    for lane in lanes:
        [wanted] = losses_of_batches(exact, [lane])
        [alone] = losses_of_batches(rounded, [lane])
        # over ten batches, since the distance of a single mean loss can be small by luck
        assert (packed_losses[lane] - wanted).norm() <= 2 * (alone - wanted).norm()
        [(_, wanted_gradient)] = packed_gradients(exact, [lane])
        [(_, gradient)] = packed_gradients(rounded, [lane])
        distance = relative(gradient, wanted_gradient)
        assert relative(packed[lane][1], wanted_gradient) <= 2 * distance


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_three_steps_of_a_packed_lane_follow_plain_peft(tiny_llama, rows, quantization):
    pack = TrialPack(load(tiny_llama, quantization, "float32"), rows, SETTINGS)
    lanes = start_lanes(pack, [0, 1, 2, 3], trained_b=False)
    starts = start_lanes(pack, [0, 1, 2, 3], trained_b=False)
    for _ in range(3):
        pack.train_step(lanes)
    results = pack.evaluate([lane.adapter for lane in lanes], rows[:5], split="selection")
    for lane, start, result in zip(lanes, starts, results, strict=True):
        trial = reference(tiny_llama, rows, start, quantization, "float32")
        losses = [trial.train_step(step) for step in (1, 2, 3)]
        assert [point.train_loss for point in lane.points] == pytest.approx(losses, rel=LOSS_RTOL)
        assert result.loss_sums == pytest.approx(trial.evaluate(rows[:5]), rel=LOSS_RTOL)


def test_the_order_of_lanes_does_not_matter(tiny_llama, rows):
    pack = TrialPack(load(tiny_llama, "nf4", "float32"), rows, SETTINGS)
    forward = packed_gradients(pack, [0, 1, 2, 3])
    backward = packed_gradients(pack, [3, 2, 1, 0])[::-1]
    for (loss, gradient), (other_loss, other) in zip(forward, backward, strict=True):
        assert loss == pytest.approx(other_loss, rel=LOSS_RTOL)
        assert relative(gradient, other) < GRADIENT_RTOL


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulation_does_not_change_gradients_without_dropout(tiny_llama, rows, micro_batch_size):
    settings = dataclasses.replace(SETTINGS, micro_batch_size=micro_batch_size)
    base = load(tiny_llama, "none", "float32")
    [(loss, found)] = packed_gradients(TrialPack(base, rows, settings), [3])
    [(wanted_loss, wanted)] = packed_gradients(TrialPack(base, rows, SETTINGS), [3])
    assert loss == pytest.approx(wanted_loss, rel=LOSS_RTOL)
    assert relative(found, wanted) < GRADIENT_RTOL


def test_gradient_checkpointing_recomputes_the_same_dropout(tiny_llama, rows):
    base = load(tiny_llama, "nf4", "float32")
    pack = TrialPack(base, rows, SETTINGS)
    wanted = packed_gradients(pack, [0, 1, 2])
    base.set_gradient_checkpointing(True)
    found = packed_gradients(pack, [0, 1, 2])
    for (loss, gradient), (wanted_loss, wanted_gradient) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=LOSS_RTOL)
        assert relative(gradient, wanted_gradient) < GRADIENT_RTOL


def test_a_lane_of_smaller_steps_leaves_its_neighbours_alone(tiny_llama, rows):
    pack = TrialPack(load(tiny_llama, "none", "float32"), rows, SETTINGS)
    early, late = start_lanes(pack, [0, 2])
    pack.train_step([late])  # the lanes are now at different steps of the data
    found = pack.accumulate([early, late])
    [alone] = start_lanes(pack, [0])
    assert found.losses[0] == pytest.approx(pack.accumulate([alone]).losses[0], rel=LOSS_RTOL)


def test_a_group_scales_a_lane_as_the_lane_alone_does_in_bfloat16(tiny_llama, rows):
    # 1 / 0.9 is no bfloat16 number: a scaling in 16 bit would be off by 0.16 %
    base = load(tiny_llama, "none", "bfloat16")
    pack = TrialPack(base, rows, SETTINGS)
    adapters = tuple(lane.adapter for lane in start_lanes(pack, [0, 0]))
    layout = base.layout
    layout.adapters, layout.rows, layout.steps = adapters, (slice(0, 4), slice(4, 8)), (1, 1)
    layer = base.model.get_submodule("model.layers.0.mlp.up_proj")
    x_BTI = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    layout.training = True
    try:
        grouped = layer._grouped_deltas(x_BTI, [0, 1])[0].detach().double()
        alone = layer._delta(x_BTI[:4], 0).detach().double()
    finally:
        layout.training = False
    assert float((grouped * alone).sum() / alone.square().sum()) == pytest.approx(1.0, abs=4e-4)


# Planted faults: the comparison with plain PEFT has to notice each of them.


def test_a_dropout_mask_ignored_in_backward_is_noticed(tiny_llama, rows, monkeypatch):
    def forgetful(ctx, *grads):
        x, a, b, low, _ = ctx.saved_tensors
        grad_low = (grads[0] @ b) * ctx.scaling
        return grad_low @ a, grad_low.mT @ x, grads[0].mT @ low, None, None

    monkeypatch.setattr(lora._LowRankProduct, "backward", staticmethod(forgetful))
    _, gradient = differences_from_reference(tiny_llama, rows, "none", grouped=False)
    assert gradient > 10 * GRADIENT_RTOL


def test_the_neighbours_alpha_is_noticed(tiny_llama, rows, monkeypatch):
    honest = lora.PackedLinear._delta

    def neighbour(self, x_BTI, lane):
        other = self.layout.adapters[(lane + 1) % len(self.layout.adapters)]
        own = self.layout.adapters[lane]
        wrong = honest(self, x_BTI, lane)
        return wrong * (other.config.lora_alpha / own.config.lora_alpha)

    monkeypatch.setattr(lora.PackedLinear, "_delta", neighbour)
    loss, gradient = differences_from_reference(tiny_llama, rows, "none", grouped=False)
    assert loss > 10 * LOSS_RTOL
    assert gradient > 10 * GRADIENT_RTOL


def test_labels_shifted_by_one_are_noticed(tiny_llama, rows, monkeypatch):
    from lora_tune.engine import pack as pack_module

    honest = pack_module.collate

    def shifted(batch_rows, device):
        batch = honest(batch_rows, device)
        return batch._replace(positions_N=batch.positions_N + 1)

    monkeypatch.setattr(pack_module, "collate", shifted)
    loss, gradient = differences_from_reference(tiny_llama, rows, "none", grouped=False)
    assert loss > 10 * LOSS_RTOL
    assert gradient > 10 * GRADIENT_RTOL
