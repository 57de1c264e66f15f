"""The values that cross walls: plain, frozen, without torch, Optuna or pandas.

Memory is bytes, time is seconds, losses are nats per target token.
"""

from array import array
from collections.abc import Sequence
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
    CACHED = "cached"  # same effective configuration as an earlier trial: its result is used again


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


class TokenizedRow:
    """A row as token ids; ``labels`` repeats the ids where loss is taken and is -100 elsewhere.

    ``group`` names the conversation or document that the row comes from, as the user's data do;
    empty: the row stands for itself.

    All rows of a study stay in memory, so ids are held in two or four bytes each (a tuple takes eight), and
    of the labels only where loss begins and ends. Both are tuples to everyone who asks.

    Raises:
        ValueError: A label is neither -100 nor the id in its place, or there are not as many.
    """

    __slots__ = ("_ids", "_spans", "group")

    def __init__(self, *, input_ids: Sequence[int], labels: Sequence[int], group: str = "") -> None:
        self._ids = array("H" if max(input_ids, default=0) < 2**16 else "I", input_ids)
        self._spans = _loss_spans(input_ids, labels)
        self.group = group

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Token ids."""
        return tuple(self._ids)

    @property
    def labels(self) -> tuple[int, ...]:
        """The ids of the tokens that carry loss, -100 for the others."""
        labels = [-100] * len(self._ids)
        for start, end in zip(self._spans[::2], self._spans[1::2], strict=True):
            labels[start:end] = self._ids[start:end]
        return tuple(labels)

    @property
    def num_labels(self) -> int:
        """Target tokens of the row. The first token is never a target: nothing predicts it."""
        starts, ends = self._spans[::2], self._spans[1::2]
        return sum(end - max(start, 1) for start, end in zip(starts, ends, strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenizedRow):
            return NotImplemented
        return (self._ids, self._spans, self.group) == (other._ids, other._spans, other.group)

    def __hash__(self) -> int:
        return hash((self._ids.tobytes(), self._spans.tobytes(), self.group))

    def __repr__(self) -> str:
        return (
            f"TokenizedRow(input_ids={self.input_ids}, labels={self.labels}, group={self.group!r})"
        )


def _loss_spans(ids: Sequence[int], labels: Sequence[int]) -> "array[int]":
    """Return where loss begins and ends, in turn.

    >>> list(_loss_spans([5, 6, 7, 8], [-100, 6, 7, -100]))
    [1, 3]
    """
    if len(ids) != len(labels):
        raise ValueError(f"{len(ids)} tokens have {len(labels)} labels")
    spans = array("I")
    has_loss = bytes([label != -100 for label in labels])
    start = has_loss.find(1)
    while start >= 0:
        end = has_loss.find(0, start)
        end = len(ids) if end < 0 else end
        if list(labels[start:end]) != list(ids[start:end]):
            raise ValueError(f"labels {start} to {end} are neither -100 nor the tokens there")
        spans.extend((start, end))
        start = has_loss.find(1, end)
    return spans


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
        return self.loss_of_first(len(self.label_counts))

    def loss_of_first(self, rows: int) -> float:
        """Return nats per target token over the first rows alone."""
        return sum(self.loss_sums[:rows]) / sum(self.label_counts[:rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneJob:
    """One trial segment: train from ``start_step``, branch a cool-down, evaluate.

    The lane trains at constant learning rate (after warm-up) to ``hold_step``, where its state is
    kept for the next rung, then cools down linearly to ``end_step`` and is evaluated on
    ``eval_split``. With ``end_step == start_step`` it is only evaluated. ``config`` None
    is the untuned base. ``start_folder`` holds the lane state or adapter to begin from;
    ``result_folder`` is where the segment's files are published. ``state_folder`` is where the lane's state
    is saved on the way: a job that finds one of its own there goes on from it.
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
    state_folder: Path | None = None
    eval_rows: int | None = None  # of the split, the first ones; None: all
    # (step, loss): the lane has diverged when its smoothed training loss is above at that step
    loss_limits: tuple[tuple[int, float], ...] = ()
    # of a segment that goes on: the trial's loss at its first step; None: that of this segment's first
    first_loss: float | None = None
    metrics: tuple[str, ...] = ()  # besides the loss, by generation on the rows of ``eval_split``
    keep_state: bool = True  # publish the lane's state at ``hold_step`` beside its adapter
    train_split: str = "train"  # or "all": the rows of all three splits


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricResult:
    """A metric beside the loss over the rows of a split; ``reason`` says why it has no values."""

    metric: str
    values: tuple[float, ...] = ()  # row by row, in the order of the split
    reason: str = ""

    @property
    def mean(self) -> float | None:
        """Mean over the rows, each counted once; None without values."""
        return sum(self.values) / len(self.values) if self.values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSpan:
    """When a segment was trained and in which slot of the pack, for the timeline of the lanes."""

    slot: int  # 0 is the first; no two segments share one at the same time
    began_s: float  # seconds since the study began, the time between its runs left out
    ended_s: float  # its evaluation included


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
    metrics: tuple[MetricResult, ...] = ()
    span: LaneSpan | None = None  # None for what was only evaluated


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
    span: LaneSpan | None = None  # None in a study of an older version


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
    span: LaneSpan | None = None  # of a trial that ended early: the segment in which it did
    penalty: float | None = None  # finite value told to Optuna for a diverged or infeasible trial
    repeats: int | None = (
        None  # of a cached trial: the earlier one with its effective configuration
    )

    @property
    def best_loss(self) -> float | None:
        """Loss at the highest rung reached, None before the first."""
        return self.rungs[-1].eval_loss if self.rungs else None

    @property
    def steps(self) -> int:
        """Optimizer steps at the highest rung reached."""
        return self.rungs[-1].steps if self.rungs else 0

    @property
    def kept(self) -> RungResult | None:
        """The evaluated state that counts: of all rungs the one with the lowest loss, the later of equals.

        Compared on the rows that all of its evaluations have in common, so a run that overfits keeps an
        earlier state. None before the first rung.
        """
        if not self.rungs:
            return None
        common = min(len(result.evaluation.label_counts) for result in self.rungs)
        return min(reversed(self.rungs), key=lambda result: result.evaluation.loss_of_first(common))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A configuration that is trained again with fresh seeds: a finalist of the search, or the default."""

    name: str  # "trial 8" or "default"
    trial: int | None  # of the search, None for a default that the space cannot express
    config: TrialConfig  # the seeds in it are those of the search
    steps: int  # optimizer steps of a run
    predicted_bytes: int
    trainable_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmationRun:
    """One full training of a candidate with a fresh seed, scored on the confirmation split."""

    candidate: str
    seed: int  # 0, 1, ...: the same number means the same data order, initialisation and dropout
    state: TrialState  # COMPLETE or why there is no evaluation
    evaluation: EvalResult | None = None
    metrics: tuple[MetricResult, ...] = ()
    reason: str = ""
    wall_s: float = 0.0
    num_tokens: int = 0
    peak_bytes: int = 0
    pack_lanes: int = 1
    span: LaneSpan | None = None


class Verdict(StrEnum):
    """What the confirmation says of the best candidate against the default configuration."""

    BETTER = "better"
    SAME = "not distinguishable"
    WORSE = "worse"
    NONE = "no default"  # the default could not be trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A candidate less a reference, nats per target token, paired by row; above 0 it is worse."""

    candidate: str
    reference: str
    difference: float
    standard_error: float  # of rows and seeds together
    row_error: float  # of rows alone
    seed_error: float  # of seeds alone; 0 with a single seed, which shows none
    low: float  # 95 % interval
    high: float
    p_value: float  # two-sided, of no difference
    p_adjusted: float  # Holm over the comparisons made together


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """What a candidate showed over its seeds, and what it costs."""

    candidate: str
    loss: float  # mean over seeds, nats per target token
    standard_error: float
    low: float  # 95 % interval
    high: float
    seed_losses: tuple[float, ...]
    median_seed: (
        int  # the seed whose loss is in the middle; of two, the lower loss is not preferred
    )
    peak_bytes: int  # by the estimate, of a lone lane
    step_s: float  # seconds an optimizer step; 0 when not known
    rank: int
    lora_dropout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoFront:
    """Candidates that no other beats in loss, memory and time at once, and three of them by name."""

    members: tuple[str, ...]  # by loss
    best: str
    knee: str
    smallest: str  # within the practical margin of the best


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the confirmation decided, and why."""

    scores: tuple[CandidateScore, ...]  # by loss
    failed: tuple[str, ...]  # candidates of which a run did not come to its end
    best: str
    against_best: tuple[Comparison, ...]  # the other candidates less the best, by difference
    tied: tuple[str, ...]  # with the best, itself included
    unresolved: tuple[str, ...]  # tied only because the interval is wide
    chosen: str
    median_seed: int  # of the chosen candidate: its adapter is shipped
    default: str | None
    against_default: (
        Comparison | None
    )  # the best (or the best but the default itself) less the default
    verdict: Verdict
    practical_margin: float  # relative
    num_rows: int
    num_clusters: int
    seeds: int
    seed_sd: float | None  # pooled over candidates, of one run's loss; None with a single seed
    smallest_visible: float  # difference seen with 80 % power at 5 %, nats per target token
    rows_needed: int | None  # to see the practical margin; None if seeds alone are too noisy for it
    front: ParetoFront


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """Candidates trained again and scored, with the untuned base, on rows that the search never saw."""

    candidates: tuple[Candidate, ...]
    default: str | None  # name of the candidate that is the default configuration
    seeds: int
    runs: tuple[ConfirmationRun, ...] = ()
    base_evaluation: EvalResult | None = None
    base_selection_loss: float | None = None
    base_metrics: tuple[MetricResult, ...] = ()
    clusters: tuple[int, ...] = ()  # of each row; empty: every row is its own
    decision: Decision | None = None  # None until all has been run
    refit: bool = False  # the adapter was trained once more on all rows, and was not scored

    def candidate(self, name: str) -> Candidate:
        """Return the candidate of this name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def runs_of(self, name: str) -> tuple[ConfirmationRun, ...]:
        """Return the runs of a candidate, by seed."""
        found = (run for run in self.runs if run.candidate == name)
        return tuple(sorted(found, key=lambda run: run.seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Seconds that a study will take, made before its first trial; nothing ends early in it."""

    tokens_per_s: float  # of a full pack; measured by the probe, or from the GPU's data sheet
    measured: bool
    search_steps: int  # optimizer steps of all trials and rungs
    confirmation_steps: int
    search_s: float
    evaluation_s: float
    confirmation_s: float  # with its evaluation, and the training on all rows where one follows
    load_s: float  # until the first step: base, probe

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.load_s + self.search_s + self.evaluation_s + self.confirmation_s


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
    workers: int = 1  # child processes that train packs; on GPUs each has one of its own

    @property
    def num_devices(self) -> int:
        """GPUs that train at the same time; on a CPU the workers share the cores, which count as one."""
        return self.workers if self.device == "cuda" else 1


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
    base_bytes: int = 0  # of the loaded base's storages; 0 in a study of an older version


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """How many trials, rungs, seeds and rows a study has: a function of its data, steps and budget."""

    num_train: int
    num_selection: int
    num_confirmation: int
    total_steps: int  # optimizer steps of a full run
    rungs: tuple[int, ...]  # steps at the end of each; one: too small for halving
    num_trials: int
    finalists: int  # most, the default not counted in
    seeds: int  # of the confirmation
    search_steps: int  # of all trials and rungs
    confirmation_steps: int
    anchors_only: bool = False  # too few steps for halving: only the anchors are tried
    notes: tuple[str, ...] = ()


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
    study_plan: StudyPlan | None = None  # None in a study of an older version
    forecast: Forecast | None = None


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
UNTUNED = "untuned base"  # who answers and is scored without an adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleAnswer:
    """What the untuned base or a candidate's adapter wrote to a prompt, by greedy decoding."""

    subject: str  # ``UNTUNED``, or a candidate's name
    text: str
    num_tokens: int
    ended: bool  # by an end token; False: it was cut at the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt of the confirmation split, its reference in the data, and the answers side by side."""

    row: int  # of the confirmation split
    prompt: str
    reference: str
    answers: tuple[SampleAnswer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneralLoss:
    """Loss on a general text that is no part of the training data, nats per token."""

    subject: str
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How base, default and chosen candidate write, and what they lost on general text; ``behaviour.json``.

    The adapters are those of each candidate's median seed. Subjects are the untuned base, the default where
    it was trained, and the chosen candidate; a default that was chosen comes once.
    """

    chosen: str
    default: str | None
    samples: tuple[Sample, ...]
    max_new_tokens: int
    general_text: str  # name of the text
    general_tokens: int  # that carry loss
    general_losses: tuple[GeneralLoss, ...]
    chosen_seed: int | None = None  # median seed of the chosen candidate; None: not noted
    default_seed: int | None = None  # and of the default
    reason: str = ""  # why samples or losses are missing; empty: nothing is


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySnapshot:
    """A study folder as read from disk: all that a report may use."""

    folder: Path
    lock: StudyLock
    trials: tuple[TrialRecord, ...]  # by number
    confirmation: Confirmation | None  # None while the study runs, or when no trial succeeded
    wall_s: float  # of all runs of the study so far
    memory: MemoryLog = NO_READINGS
    behaviour: Behaviour | None = None  # None before the decision, and in studies of older versions
    adapter_bytes: int = 0  # of the published adapter's weights file; 0: there is none


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
    runs_done: int = 0  # of the confirmation; 0 and 0 before it
    runs_total: int = 0
    names: tuple[tuple[int, str], ...] = ()  # of jobs that are no trials: number, "trial 8 seed 1"
