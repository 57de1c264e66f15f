"""The gate: what fits the memory budget, decided before any training.

For every target set the largest rank of the space that fits; then how a pack trains: micro-batch,
gradient checkpointing, and how many lanes are possible. Everything comes from the closed form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lora_tune.catalog.targets import named_sets, resolve_target_set, set_label
from lora_tune.errors import InfeasibleError, ModelError, StudyFileError
from lora_tune.memory.estimate import estimate_memory, trainable_parameters
from lora_tune.memory.fit import explain_no_fit, largest_that_fits
from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.memory.shape import ModelShape
from lora_tune.memory.solve import Estimate
from lora_tune.records import MemoryEstimate, StudyLock, TargetSet, TrialConfig
from lora_tune.study.spec import SpaceSection, StudySpec, TrainSection
from lora_tune.units import format_bytes

MOST_LANES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """How a pack of the largest configuration can be trained within the budget."""

    micro_batch_size: int
    gradient_checkpointing: bool
    most_lanes: int


def pack_plan_of(lock: StudyLock) -> PackPlan:
    """Return how the packs of a study train, as the gate knows it."""
    return PackPlan(
        micro_batch_size=lock.plan.micro_batch_size,
        gradient_checkpointing=lock.plan.gradient_checkpointing,
        most_lanes=lock.plan.lanes,
    )


class Gate:
    """Estimates and limits of one study on one model under one budget."""

    def __init__(
        self,
        spec: StudySpec,
        shape: ModelShape,
        *,
        compute_dtype: str,
        max_tokens: int,
        budget_bytes: int,
        group_rank: int,
        compute_capability: str | None = None,
        estimate: Estimate | None = None,
    ) -> None:
        """Keep what the estimates depend on.

        Args:
            spec: The study.
            shape: Sizes of the base.
            compute_dtype: ``float32``, ``bfloat16`` or ``float16``.
            max_tokens: Longest row after truncation: the batch that decides.
            budget_bytes: What a pack may use.
            group_rank: Largest sum of ranks in one low-rank product.
            compute_capability: Of the GPU, which decides its libraries' workspaces; None on a CPU.
            estimate: What answers for a request; the closed form of ``shape`` unless given.
        """
        self.spec = spec
        self.shape = shape
        self._memory = estimate or partial(estimate_memory, shape)
        self._replayed = estimate or partial(estimate_memory, shape, reserved=True)
        self.budget_bytes = budget_bytes
        self._request = MemoryRequest(
            quantization=spec.model.quantization,
            compute_dtype=compute_dtype,
            lanes=(),
            micro_batch_size=1,
            max_length=max_tokens,
            gradient_checkpointing=True,
            gradient_accumulation=True,
            group_rank=group_rank,
            compute_capability=compute_capability,
        )

    def target_sets(
        self, modules: dict[str, tuple[str, ...]]
    ) -> tuple[tuple[TargetSet, ...], list[str]]:
        """Return every set with its largest rank that fits, and what was left out, as sentences.

        Raises:
            InfeasibleError: Not even the smallest rank of any set fits.
        """
        found, notes = [], []
        space = self.spec.space
        for name, names in modules.items():
            rank = self._largest_rank(names, sorted(space.rank))
            found.append(
                TargetSet(
                    name=name,
                    modules=names,
                    max_rank=rank,
                    trainable_parameters_per_rank=self._trainable(1, names),
                )
            )
            if rank == 0:
                peak = self._lone(min(space.rank), names).peak_allocated_bytes
                notes.append(
                    f"target set {name} is left out: rank {min(space.rank)} needs {format_bytes(peak)}, "
                    f"the budget is {format_bytes(self.budget_bytes)}."
                )
            elif rank < max(space.rank):
                notes.append(
                    f"target set {name}: ranks above {rank} do not fit and are lowered to it."
                )
        if not any(target.max_rank for target in found):
            raise InfeasibleError(self._nothing_fits(found))
        return tuple(found), notes

    def pack_plan(self, target_sets: Sequence[TargetSet]) -> PackPlan:
        """Return how the largest configuration is trained: no checkpointing if that fits.

        A ``run.lanes`` given as a number comes first: the micro-batch is lowered until so many fit.
        """
        train, run = self.spec.train, self.spec.run
        wanted = 1 if run.lanes == "auto" else run.lanes
        largest = self._largest_lane(target_sets)
        for lanes in range(wanted, 0, -1):
            for checkpointing in _checkpointing_choices(train):
                for size in _micro_batch_sizes(train):
                    plan = PackPlan(
                        micro_batch_size=size,
                        gradient_checkpointing=checkpointing,
                        most_lanes=lanes,
                    )
                    if self._peak(plan, largest, lanes) <= self.budget_bytes:
                        most = self.most_lanes(plan, target_sets) if run.lanes == "auto" else lanes
                        return replace(plan, most_lanes=most)
        raise InfeasibleError(
            f"train.micro_batch_size {train.micro_batch_size} does not fit the budget even with one lane. "
            "Lower it, or leave it at auto."
        )

    def most_lanes(self, plan: PackPlan, target_sets: Sequence[TargetSet]) -> int:
        """Return how many lanes of the largest configuration fit with the plan's micro-batch.

        A power of two up to ``MOST_LANES``, 0 if not even one fits; ``plan.most_lanes`` is not looked at.
        """
        largest = self._largest_lane(target_sets)
        lanes = 0
        while lanes < MOST_LANES and self._peak(plan, largest, lanes * 2 or 1) <= self.budget_bytes:
            lanes = lanes * 2 or 1
        return lanes

    def open_sizes(self, plan: PackPlan) -> tuple[int, ...]:
        """Return the micro-batches that a measurement may choose from: the plan's and smaller ones.

        One that the study file gives is the only one; so is the plan's when lanes are given as a number,
        since it was lowered until so many fit.
        """
        if self.spec.run.lanes != "auto":
            return (plan.micro_batch_size,)
        sizes = _micro_batch_sizes(self.spec.train)
        return tuple(size for size in sizes if size <= plan.micro_batch_size)

    def predict(self, config: TrialConfig, plan: PackPlan, *, lanes: int) -> tuple[int, int]:
        """Return the predicted peak of a pack of ``lanes`` such lanes, and one lane's parameters."""
        lane = _lane_shape(config)
        return self._peak(plan, lane, lanes), trainable_parameters(self.shape, lane)

    def predict_pack(
        self,
        configs: Sequence[TrialConfig],
        plan: PackPlan,
        *,
        max_length: int,
        label_fraction: float,
    ) -> MemoryEstimate:
        """Return the estimate of a pack as it trained, to be compared with what was measured.

        Args:
            configs: Lane by lane.
            plan: How the pack trains.
            max_length: Padded length of its longest batch.
            label_fraction: Label positions of its largest pass, as a share of that pass' tokens.
        """
        request = replace(
            self._pack_request(plan, tuple(_lane_shape(config) for config in configs)),
            max_length=max_length,
            label_fraction=label_fraction,
        )
        return self._replayed(request)

    def most_lanes_within(
        self, budget_bytes: int, plan: PackPlan, target_sets: Sequence[TargetSet]
    ) -> int:
        """Return how many lanes of the largest configuration fit a corrected budget, at least 1.

        Never more than the plan has. A lone lane is always tried: what became of it is the answer.
        """
        largest = self._largest_lane(target_sets)
        for lanes in range(plan.most_lanes, 1, -1):
            if self._peak(plan, largest, lanes) <= budget_bytes:
                return lanes
        return 1

    def _peak(self, plan: PackPlan, lane: LaneShape, lanes: int) -> int:
        return self._memory(self._pack_request(plan, (lane,) * lanes)).peak_allocated_bytes

    def _pack_request(self, plan: PackPlan, lanes: tuple[LaneShape, ...]) -> MemoryRequest:
        return replace(
            self._request,
            lanes=lanes,
            micro_batch_size=plan.micro_batch_size,
            gradient_checkpointing=plan.gradient_checkpointing,
            gradient_accumulation=plan.micro_batch_size < self.spec.train.effective_batch_size,
        )

    def _largest_lane(self, target_sets: Sequence[TargetSet]) -> LaneShape:
        """Return the lane that needs most memory of all that the space can propose."""
        dropout = max(self.spec.space.lora_dropout)
        lanes = [
            LaneShape(rank=t.max_rank, targets=t.modules, lora_dropout=dropout)
            for t in target_sets
            if t.max_rank
        ]
        plan = PackPlan(micro_batch_size=1, gradient_checkpointing=False, most_lanes=1)
        return max(lanes, key=lambda lane: self._peak(plan, lane, 1))

    def _largest_rank(self, modules: tuple[str, ...], ranks: Sequence[int]) -> int:
        return largest_that_fits(
            ranks, lambda rank: self._lone(rank, modules).peak_allocated_bytes, self.budget_bytes
        )

    def _lone(
        self, rank: int, modules: tuple[str, ...], max_length: int | None = None
    ) -> MemoryEstimate:
        """Estimate one lane in its smallest form: one row at a time, checkpointed if allowed."""
        lane = LaneShape(rank=rank, targets=modules, lora_dropout=max(self.spec.space.lora_dropout))
        request = replace(
            self._request,
            lanes=(lane,),
            gradient_checkpointing=self.spec.train.gradient_checkpointing is not False,
            max_length=max_length or self._request.max_length,
        )
        return self._memory(request)

    def _nothing_fits(self, target_sets: Sequence[TargetSet]) -> str:
        rank = min(self.spec.space.rank)
        smallest = min(target_sets, key=lambda t: t.trainable_parameters_per_rank)
        safety = self.spec.memory.safety
        return explain_no_fit(
            self._lone(rank, smallest.modules),
            self.budget_bytes,
            configuration=f"rank {rank}, {smallest.name}",
            budget=f'memory.gpu "{self.spec.memory.gpu}", {safety:.0%}',
            safety=safety,
            max_length=self._request.max_length,
            peak_at_length=lambda length: (
                self._lone(rank, smallest.modules, length).peak_allocated_bytes
            ),
        )

    def _trainable(self, rank: int, modules: tuple[str, ...]) -> int:
        return trainable_parameters(
            self.shape, LaneShape(rank=rank, targets=modules, lora_dropout=0.0)
        )


def _lane_shape(config: TrialConfig) -> LaneShape:
    return LaneShape(
        rank=config.rank, targets=config.target_modules, lora_dropout=config.lora_dropout
    )


def resolve_sets(
    space: SpaceSection, *, model_type: str, linears: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return the target sets of the space as full module names, and notes on those left out.

    Sets that the study names must exist on the model; of the default ones, those that do not are
    left out and listed.

    Raises:
        TargetModulesError: A named set or module that the model does not have.
    """
    if "target_modules" in space.model_fields_set:
        chosen = {
            set_label(entry): resolve_target_set(entry, model_type=model_type, linears=linears)
            for entry in space.target_modules
        }
        return chosen, []
    known = named_sets(model_type, linears)
    wanted = [str(name) for name in space.target_modules]
    missing = [name for name in wanted if name not in known]
    notes = [f"target sets that this model does not have: {', '.join(missing)}."] if missing else []
    return {name: known[name] for name in wanted if name in known}, notes


def check_base_config(spec: StudySpec, config: Mapping[str, object]) -> None:
    """Refuse a base that would train wrongly without a word.

    Args:
        spec: The study.
        config: The base's config.json.

    Raises:
        ModelError: It is quantized already, or a mixture of experts.
        StudyFileError: ``data.max_length`` is longer than its positions.
    """
    if config.get("quantization_config") is not None:
        raise ModelError(
            f'model.base "{spec.model.base}" is quantized already. Give the unquantized model; '
            "model.quantization makes it NF4."
        )
    experts = [config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")]
    if any(isinstance(count, int) and count > 1 for count in experts):
        raise ModelError(
            f'model.base "{spec.model.base}" is a mixture of experts, which cannot be packed yet.'
        )
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(longest, int) and spec.data.max_length > longest:
        raise StudyFileError(
            f"data.max_length is {spec.data.max_length}, but {config.get('model_type')} models of this size "
            f"have {longest} positions. Write {longest} or less."
        )


def _micro_batch_sizes(train: TrainSection) -> list[int]:
    """Return the sizes to try, largest first: the divisors of the effective batch."""
    batch = train.effective_batch_size
    if train.micro_batch_size != "auto":
        return [train.micro_batch_size]
    return [size for size in range(batch, 0, -1) if batch % size == 0]


def _checkpointing_choices(train: TrainSection) -> list[bool]:
    if train.gradient_checkpointing == "auto":
        return [False, True]
    return [bool(train.gradient_checkpointing)]
