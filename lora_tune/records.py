"""The values that cross walls: plain, frozen, without torch, Optuna or pandas.

Memory is bytes, time is seconds, losses are nats per target token.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class TrialState(StrEnum):
    """What became of a trial, in our own record (Optuna is told less, see ``search/``)."""

    RUNNING = "running"
    COMPLETE = "complete"  # trained to the end of its last rung
    PRUNED = "pruned"  # finished a rung and was not promoted
    DIVERGED = "diverged"  # loss not finite, or far above where it began
    INFEASIBLE = "infeasible"  # did not fit the memory after all
    FAILED = "failed"  # fault of the machine or a bug; the reason says which


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """A linear layer that LoRA can adapt: full module name and its sizes."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """One configuration as it is really trained: effective values, after any clamp.

    ``target_modules`` are full module names, ``scaling`` is lora_alpha / rank
    (or / sqrt(rank) with ``use_rslora``). ``init_seed`` and ``dropout_seed`` belong to the trial,
    ``data_seed`` is the same for all trials of a study.
    """

    rank: int
    lora_alpha: float
    lora_dropout: float
    target_set: str
    target_modules: tuple[str, ...]
    learning_rate: float
    use_rslora: bool = False
    init_seed: int = 0
    dropout_seed: int = 0
    data_seed: int = 0

    @property
    def scaling(self) -> float:
        """What the adapter's product is multiplied by."""
        return self.lora_alpha / (self.rank**0.5 if self.use_rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuggestedParams:
    """What the sampler proposed, before the clamp to the memory budget."""

    rank: int
    alpha_ratio: float | None
    lora_dropout: float
    target_set: str
    effective_step: float  # learning_rate * lora_alpha / 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRow:
    """A row as token ids; ``labels`` repeats the ids where loss is taken and is -100 elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_labels(self) -> int:
        """Target tokens of the row. The first token is never a target: nothing predicts it."""
        return sum(label != -100 for label in self.labels[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFingerprint:
    """What the data were, so that two studies can be told apart."""

    source: str
    format: str
    sha256: str  # of the token ids and labels of all three splits, in order
    num_train: int
    num_selection: int
    num_confirmation: int
    num_train_tokens: int
    num_train_labels: int
    num_bad_rows: int
    num_duplicates: int
    num_unlabelled: int
    num_truncated: int
    max_tokens: int  # longest row of any split, after truncation
    chat_template: str  # "model", a name, a file, or "none" for rows of plain text


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """The three splits, tokenized."""

    train: tuple[TokenizedRow, ...]
    selection: tuple[TokenizedRow, ...]
    confirmation: tuple[TokenizedRow, ...]
    fingerprint: DataFingerprint
    notes: tuple[str, ...] = ()  # what was detected, dropped and truncated, as sentences


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A lane's training reading at an optimizer step (1 is the first)."""

    step: int
    train_loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Losses of one evaluation, example by example: the split's first rows, in its order."""

    split: str
    loss_sums: tuple[float, ...]  # summed nats of each example's target tokens
    label_counts: tuple[int, ...]
    compute_dtype: str

    @property
    def mean_loss(self) -> float:
        """Nats per target token over the rows evaluated."""
        return sum(self.loss_sums) / sum(self.label_counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneJob:
    """One trial segment: train from ``start_step``, branch a cool-down, evaluate.

    The lane trains at constant learning rate (after warm-up) to ``hold_step``, where its state is
    kept for the next rung, then cools down linearly to ``end_step`` and is evaluated on
    ``eval_split``. With ``end_step == start_step`` it is only evaluated. ``config`` None
    is the untuned base. ``start_folder`` holds the lane state or adapter to begin from;
    ``result_folder`` is where the segment's files are published.
    """

    trial: int
    rung: int
    config: TrialConfig | None
    start_step: int
    hold_step: int
    end_step: int
    warmup_steps: int
    eval_split: str
    eval_dtype: str  # "train" or "float32"
    start_folder: Path | None
    result_folder: Path | None
    eval_rows: int | None = None  # of the split, the first ones; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneOutcome:
    """How a lane job ended. ``state`` COMPLETE means that the segment was finished."""

    trial: int
    rung: int
    state: TrialState
    points: tuple[Point, ...] = ()
    evaluation: EvalResult | None = None
    reason: str = ""
    wall_s: float = 0.0
    num_tokens: int = 0
    peak_bytes: int = 0  # measured: CUDA peak allocated, or resident memory on a CPU
    pack_lanes: int = 1  # most lanes that shared a step with this one


@dataclass(frozen=True, slots=True, kw_only=True)
class RungResult:
    """What a trial showed at one rung."""

    rung: int
    steps: int
    eval_loss: float
    evaluation: EvalResult
    points: tuple[Point, ...]
    wall_s: float
    num_tokens: int
    peak_bytes: int
    pack_lanes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """Everything that is known of a trial; ``trials/NNNN/trial.json`` is its file."""

    number: int
    state: TrialState
    origin: str  # "anchor A1", "tpe", "random"
    suggested: SuggestedParams
    config: TrialConfig
    predicted_bytes: int
    trainable_parameters: int
    rungs: tuple[RungResult, ...] = ()
    reason: str = ""
    first_loss: float | None = None  # of a trial that ended early: its first training loss
    penalty: float | None = None  # finite value told to Optuna for a diverged or infeasible trial

    @property
    def best_loss(self) -> float | None:
        """Loss at the highest rung reached, None before the first."""
        return self.rungs[-1].eval_loss if self.rungs else None

    @property
    def steps(self) -> int:
        """Optimizer steps at the highest rung reached."""
        return self.rungs[-1].steps if self.rungs else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """The winner and the untuned base on the split that the search never saw."""

    winner: int
    winner_evaluation: EvalResult
    base_evaluation: EvalResult
    base_selection_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Predicted peak of a training step. ``terms`` sum to ``peak_allocated_bytes``."""

    peak_allocated_bytes: int  # what torch.cuda.max_memory_allocated would say
    peak_reserved_bytes: int  # the same with what the caching allocator holds beside it
    peak_phase: str
    terms: dict[str, int]
    trainable_parameters: int
    base_parameters: int
    method: str = "closed-form"  # or "trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSet:
    """A target-module set resolved on the base model, with what fits of it."""

    name: str
    modules: tuple[str, ...]  # full names
    max_rank: int  # largest rank of the space that fits; 0: none does
    trainable_parameters_per_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReading:
    """How fast one way to train a pack was, measured before the first trial.

    Forward, backward and an optimizer step of equal lanes with the study's largest adapter, on rows
    of about the mean length of the training split; every reading uses the same rows.
    """

    lanes: int
    micro_batch_size: int  # rows a lane and pass
    compute_dtype: str
    tokens_per_s: float  # of all lanes together; 0 when memory ran out
    peak_bytes: int | None  # allocated, of these rows; None on a CPU, which keeps no peak
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePlan:
    """What the first start decided, kept in study.lock.json and used again on resume.

    ``probe_readings`` are in the order in which they were measured; there are none when nothing was
    left to measure.
    """

    compute_dtype: str
    device: str
    lanes: int
    micro_batch_size: int
    gradient_checkpointing: bool
    budget_bytes: int
    group_rank: int = 0  # largest sum of ranks in one low-rank product; 0: one product a lane
    capacity_bytes: int = 0  # what the budget is a share of; 0 in a study of an older version
    probe_readings: tuple[ProbeReading, ...] = ()
    probe_s: float = 0.0  # seconds that the readings took
    probe_cut: bool = False  # more readings would have taken more than their share of the study


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Which base model a study used."""

    base: str  # as written in the study file
    hub_id: str | None  # public id of the weights, None when only a local folder is known
    revision: str | None
    architecture: str
    model_type: str
    num_parameters: int
    license: str | None
    quantization: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyLock:
    """What the first start resolved; written once to ``study.lock.json``."""

    name: str
    created: str  # ISO 8601, UTC
    command: str
    study_file: str  # as given
    spec: dict[str, object]  # the study file with all defaults filled in
    spec_sha256: str
    model: ModelIdentity
    data: DataFingerprint
    notes: tuple[str, ...]
    versions: dict[str, str]
    hardware: dict[str, str]
    plan: LanePlan
    rungs: tuple[int, ...]  # optimizer steps at the end of each rung
    warmup_steps: int
    target_sets: tuple[TargetSet, ...]
    # selection rows used at each rung, the first ones; empty in a study of an older version: all
    eval_rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPeak:
    """What a trial pack took on a GPU over steps in which its lanes did not change.

    Peaks are those of training steps, evaluation left out. ``process_bytes`` is the device memory
    taken since the run began, by torch's allocator and beside it (kernels loaded, libraries'
    buffers); the CUDA context that existed by then is not in it, as it is not in ``free_bytes``.
    """

    device: str  # name of the GPU
    trials: tuple[int, ...]  # lane by lane
    steps: int  # optimizer steps; 0: memory ran out in the first
    rows: int  # of a pass through the base, all lanes together
    max_length: int  # padded length of the longest batch seen
    num_labels: int  # label positions of the pass that had most
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    free_bytes: int  # on the device when the run began, before the base was loaded
    out_of_memory: bool = False  # the pack needed more than there was

    @property
    def outside_bytes(self) -> int:
        """What the process took beside torch's allocator."""
        return self.process_bytes - self.reserved_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """A measured pack beside the estimate of the same lanes, rows and lengths."""

    measured: PackPeak
    predicted_allocated_bytes: int
    predicted_reserved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLimit:
    """The readings so far showed that a pack of ``lanes_before`` lanes would not fit."""

    num_readings: int  # readings that it was decided from
    margin: float  # by which measured peaks may exceed the estimate
    budget_bytes: int  # what the estimate of a pack may be after the correction
    lanes_before: int
    lanes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLog:
    """All readings of a study in the order of time; empty where the device has no such statistics."""

    readings: tuple[MemoryReading, ...]
    limits: tuple[LaneLimit, ...]


NO_READINGS = MemoryLog(readings=(), limits=())


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySnapshot:
    """A study folder as read from disk: all that a report may use."""

    folder: Path
    lock: StudyLock
    trials: tuple[TrialRecord, ...]  # by number
    confirmation: Confirmation | None  # None while the study runs, or when no trial succeeded
    wall_s: float  # of all runs of the study so far
    memory: MemoryLog = NO_READINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneReading:
    """Where one lane of the running pack is."""

    trial: int
    rung: int
    step: int
    end_step: int
    train_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressState:
    """What the live view shows."""

    phase: str  # "rung 0", "confirmation", ...
    trials_done: int
    trials_total: int
    states: dict[str, int]
    lanes: tuple[LaneReading, ...]
    best_trial: int | None
    best_loss: float | None
    tokens_per_s: float
    memory_bytes: int
    budget_bytes: int
    elapsed_s: float
    left_s: float | None
