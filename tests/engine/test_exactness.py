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
# each lane a product of its own; two groups, of which one joins ranks 2 and 16; one of all lanes
GROUP_RANKS = (0, 20, 64)
SETTINGS = PackSettings(
    effective_batch_size=4, micro_batch_size=2, max_grad_norm=1.0, weight_decay=0.01, group_rank=0
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
    return [
        (loss, gradients(lane)) for loss, lane in zip(found.losses_K.tolist(), started, strict=True)
    ]


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
    folder: Path, rows: tuple[TokenizedRow, ...], quantization: str, *, group_rank: int
) -> tuple[float, float]:
    """Return the worst relative difference of loss and gradient over all lanes of a pack."""
    base = load(folder, quantization, "float32")
    pack = TrialPack(base, rows, dataclasses.replace(SETTINGS, group_rank=group_rank))
    lanes = start_lanes(pack, [0, 1, 2, 3])
    starts = start_lanes(pack, [0, 1, 2, 3])
    found = pack.accumulate(lanes)
    worst_loss = worst_gradient = 0.0
    for lane, start, loss in zip(lanes, starts, found.losses_K.tolist(), strict=True):
        wanted_loss, wanted = reference_gradients(folder, rows, start, quantization, "float32")
        worst_loss = max(worst_loss, abs(loss - wanted_loss) / wanted_loss)
        worst_gradient = max(worst_gradient, relative(gradients(lane), wanted))
    return worst_loss, worst_gradient


@pytest.fixture(scope="module")
def rows(make_rows) -> tuple[TokenizedRow, ...]:
    return make_rows(20)


@pytest.mark.parametrize("group_rank", GROUP_RANKS)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_every_lane_of_a_pack_has_the_gradients_of_plain_peft(
    tiny_llama, rows, quantization, group_rank
):
    loss, gradient = differences_from_reference(
        tiny_llama, rows, quantization, group_rank=group_rank
    )
    assert loss < LOSS_RTOL
    assert gradient < GRADIENT_RTOL


@pytest.mark.parametrize("group_rank", GROUP_RANKS)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_packed_lane_equals_the_same_trial_alone(tiny_llama, rows, quantization, group_rank):
    base = load(tiny_llama, quantization, "float32")
    pack = TrialPack(base, rows, dataclasses.replace(SETTINGS, group_rank=group_rank))
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
        losses.append(pack.accumulate(started).losses_K.tolist())
    return torch.tensor(losses, dtype=torch.float64).T


@pytest.mark.parametrize("group_rank", GROUP_RANKS)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_in_bfloat16_packing_adds_no_error_beyond_that_of_the_type(
    tiny_llama, rows, quantization, group_rank
):
    settings = dataclasses.replace(SETTINGS, group_rank=group_rank)
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
    assert found.losses_K[0].item() == pytest.approx(
        pack.accumulate([alone]).losses_K[0].item(), rel=LOSS_RTOL
    )


def test_a_group_scales_a_lane_as_the_lane_alone_does_in_bfloat16(tiny_llama, rows):
    # 1 / 0.9 is no bfloat16 number: a scaling in 16 bit would be off by 0.16 %
    base = load(tiny_llama, "none", "bfloat16")
    pack = TrialPack(base, rows, SETTINGS)
    adapters = tuple(lane.adapter for lane in start_lanes(pack, [0, 0]))
    layer = base.model.get_submodule("model.layers.0.mlp.up_proj")
    x_NI = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = [slice(0, 128), slice(128, 256)]
    shares = []
    for group_rank in (0, 64):
        layout = base.layout
        layout.adapters, layout.steps = adapters, (1, 1)
        layout.training, layout.group_rank = True, group_rank
        layout.set_pass(tokens, (None, None), None)
        layer.base_layer.weight.data.zero_()  # what is left is the lanes' share
        shares.append(layer(x_NI).detach().double()[:128])
        layout.clear()
    alone, grouped = shares
    assert float((grouped * alone).sum() / alone.square().sum()) == pytest.approx(1.0, abs=4e-4)


# Planted faults: the comparison with plain PEFT has to notice each of them.


@pytest.mark.parametrize("group_rank", [0, 64])
def test_a_dropout_mask_ignored_in_backward_is_noticed(tiny_llama, rows, monkeypatch, group_rank):
    honest = lora._LowRankUpdate.backward

    def forgetful(ctx, *grads):
        class Forgetful:
            needs_input_grad, groups, pairs = ctx.needs_input_grad, ctx.groups, ctx.pairs
            # of a group: mask, A, B, rank-R product
            saved_tensors = tuple(
                None if number % 4 == 1 else tensor
                for number, tensor in enumerate(ctx.saved_tensors)
            )

        return honest(Forgetful, *grads)

    monkeypatch.setattr(lora._LowRankUpdate, "backward", staticmethod(forgetful))
    _, gradient = differences_from_reference(tiny_llama, rows, "none", group_rank=group_rank)
    assert gradient > 10 * GRADIENT_RTOL


@pytest.mark.parametrize("group_rank", [0, 64])
def test_the_neighbours_alpha_is_noticed(tiny_llama, rows, monkeypatch, group_rank):
    honest = lora.PackLayout._config

    def neighbour(self, lane):
        own = honest(self, lane)
        other = honest(self, (lane + 1) % len(self.adapters))
        return dataclasses.replace(own, lora_alpha=own.rank * other.scaling)

    monkeypatch.setattr(lora.PackLayout, "_config", neighbour)
    loss, gradient = differences_from_reference(tiny_llama, rows, "none", group_rank=group_rank)
    assert loss > 10 * LOSS_RTOL
    assert gradient > 10 * GRADIENT_RTOL


def test_a_group_that_lets_a_neighbour_in_is_noticed(tiny_llama, rows, monkeypatch):
    honest = lora.PackLayout._group

    def leaky(self, lanes, device):
        group = honest(self, lanes, device)
        if len(lanes) == 1:
            return group
        return group._replace(scaling=group.scaling.clamp(min=1e-2))

    monkeypatch.setattr(lora.PackLayout, "_group", leaky)
    loss, gradient = differences_from_reference(tiny_llama, rows, "none", group_rank=64)
    assert loss > 10 * LOSS_RTOL
    assert gradient > 10 * GRADIENT_RTOL


def test_labels_shifted_by_one_are_noticed(tiny_llama, rows, monkeypatch):
    from lora_tune.engine import pack as pack_module

    honest = pack_module.collate

    def shifted(lane_rows, device, *, flat):
        batch = honest(lane_rows, device, flat=flat)
        return batch._replace(positions_L=(batch.positions_L + 1) % batch.ids.numel())

    monkeypatch.setattr(pack_module, "collate", shifted)
    loss, gradient = differences_from_reference(tiny_llama, rows, "none", group_rank=0)
    assert loss > 10 * LOSS_RTOL
    assert gradient > 10 * GRADIENT_RTOL
