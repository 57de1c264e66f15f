"""StudySpec: the study file as frozen, validated values. The only place where user defaults live.

Every key has a default but ``model.base`` and ``data.train``; unknown keys are refused.
``study/loader.py`` turns the file into these models and words the errors.
"""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from lora_tune.redaction import MASK, redact
from lora_tune.study.choices import toml_literal

Rank = Annotated[int, Field(strict=True, ge=1, le=1024)]
# Without `strict` pydantic reads "2", true and "yes" as numbers and truth values.
Flag = Annotated[bool, Field(strict=True)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Dropout = Annotated[float, Field(strict=True, ge=0, lt=1)]
# Bounds far beyond any use, so that no product of them leaves the range of a float or an integer.
Count = Annotated[int, Field(strict=True, ge=1, le=10_000_000)]
Rows = Annotated[int, Field(strict=True, ge=8, le=10_000_000)]
Epochs = Annotated[float, Field(strict=True, gt=0, le=10_000)]
Alpha = Annotated[float, Field(strict=True, ge=1e-6, le=1e6)]
LearningRate = Annotated[float, Field(strict=True, ge=1e-12, le=1000)]
Hours = Annotated[float, Field(strict=True, gt=0, le=100_000)]


def _plain(text: str) -> str:
    """Refuse what no path or name has: it would end in the middle, or rewrite a terminal's lines."""
    shown = toml_literal(text[:60])[:60]
    if not text.isprintable():
        raise ValueError(f"{shown} holds a control character; take it out")
    longest = max(len(part.encode()) for part in text.split("/"))
    if longest > 255 or len(text.encode()) > 1000:
        raise ValueError(
            f"{shown}... has {len(text):,} characters; a path has up to 1000 bytes, "
            "and 255 between two slashes"
        )
    return text


def _short(name: str) -> str:
    """Refuse a name that a file system cannot take, with what is put around it while a folder is filled."""
    if len(name.encode()) > 200:
        raise ValueError(
            f"{len(name.encode())} bytes in UTF-8 are too many for a folder; 200 are not"
        )
    return name


Text = Annotated[str, Field(min_length=1), AfterValidator(_plain)]
TargetSetName = Text | Annotated[tuple[Text, ...], Field(min_length=1)]
AnchorName = Literal["A1", "A2", "A3", "A4", "A5", "A6"]
DataFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"]


class Section(BaseModel):
    """A section of the study file: immutable, and no key that is not declared."""

    # The text below each key is its description in the JSON Schema and in the file that `init` writes.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class StudySection(Section):
    """``[study]``: what the study is called and where it writes."""

    name: Annotated[str, AfterValidator(_short)] = Field(
        default="", pattern=r"^[\w][\w.-]*$|^$", max_length=100
    )
    """Folder name below ``output``; empty: the study file's own name."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**31)] = 0
    """Fixes data order, splits, adapter initialisation, dropout and the sampler."""
    output: Text = "reports"
    """Folder in which the study's folder is made, relative to the working directory."""


class ModelSection(Section):
    """``[model]``: the frozen base."""

    base: Text
    """A catalogue name, a hub id, a folder with safetensors, or a ``.gguf`` file."""
    revision: Text | None = Field(default=None, examples=["main"])
    """Hub revision (branch, tag or commit); only for a hub id."""
    quantization: Literal["nf4", "none"] = "nf4"
    """``nf4``: 4-bit NormalFloat with double quantization; ``none``: the compute type."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: on CUDA bfloat16, float16 where the GPU has none; on a CPU the faster of float32 and
    bfloat16, by a probe. In float16 every lane has a loss scale of its own."""


class DataSection(Section):
    """``[data]``: the rows, how they become tokens, and the held-out splits."""

    train: Text
    """A .jsonl, .json, .csv or .parquet file (relative to the study file), or a hub data set."""
    split: Text = "train"
    """Split of a hub data set."""
    eval: Text | None = Field(default=None, examples=["held-out.jsonl"])
    """A file or hub data set whose rows make the selection and confirmation splits."""
    format: DataFormat = "auto"
    """``auto`` detects the format of each file and says what it found."""
    chat_template: Text | None = Field(default=None, examples=["chatml"])
    """For a tokenizer without a chat template: a template's name or a Jinja file."""
    train_on: Literal["assistant", "last-assistant"] = "assistant"
    """Which turns carry loss: every assistant turn, or only the last one."""
    max_length: Rows = 1024
    """Tokens a row is cut to."""
    selection_rows: Rows | None = Field(default=None, examples=[200])
    """Rows that choose between trials; default min(1000, a tenth of the rows), at least 8."""
    confirmation_rows: Rows | None = Field(default=None, examples=[200])
    """Rows opened once, for the winner; default as ``selection_rows``."""
    group: str | None = Field(default=None, examples=["conversation_id"])
    """Column that names the conversation or document a row comes from: its rows stay in one split."""
    max_bad_fraction: Fraction = 0.01
    """The study stops when a larger share of the rows cannot be used."""


class TrainSection(Section):
    """``[train]``: what every trial has in common."""

    epochs: Epochs = 1.0
    """Passes over the training split of a full run; ignored when ``max_steps`` is given."""
    max_steps: Count | None = Field(default=None, examples=[500])
    """Optimizer steps of a full run."""
    effective_batch_size: Count = 16
    """Rows per optimizer step; the same for every trial, so that losses compare."""
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Rows per forward pass and lane; ``auto``: measured, up to the largest divisor that fits."""
    warmup_ratio: Fraction = 0.03
    """Share of a full run's steps with rising learning rate, at most 100 steps."""
    cooldown_ratio: Annotated[float, Field(strict=True, ge=0, le=0.9)] = 0.15
    """Share of a rung's steps over which a branch lowers the learning rate linearly to zero."""
    optimizer: Literal["adamw"] = "adamw"
    """AdamW with float32 states, one per lane."""
    weight_decay: Annotated[float, Field(strict=True, ge=0, le=1000)] = 0.0
    """Decoupled weight decay of the adapter."""
    max_grad_norm: Annotated[float, Field(strict=True, gt=0, le=1e9)] = 1.0
    """Each lane's gradient is clipped to this norm."""
    gradient_checkpointing: Literal["auto"] | Flag = "auto"
    """``auto``: off when the estimate fits without, on when it does not."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        size = self.micro_batch_size
        if size != "auto" and self.effective_batch_size % size:
            raise ValueError(
                f"micro_batch_size {size} does not divide effective_batch_size "
                f"{self.effective_batch_size}; the passes of a step are of equal size"
            )
        return self


class SpaceSection(Section):
    """``[space]``: what is searched."""

    rank: Annotated[tuple[Rank, ...], Field(min_length=1)] = (4, 8, 16, 32, 64, 128)
    """LoRA ranks."""
    alpha_ratio: Annotated[tuple[Alpha, ...], Field(min_length=1)] = (
        0.25,
        0.5,
        1.0,
        2.0,
        4.0,
        8.0,
    )
    """lora_alpha divided by rank."""
    lora_alpha: Alpha | None = Field(default=None, examples=[32])
    """One fixed lora_alpha instead of ``alpha_ratio``."""
    lora_dropout: Annotated[tuple[Dropout, ...], Field(min_length=1)] = (0.0, 0.05, 0.1)
    """Dropout on the adapter's input."""
    target_modules: Annotated[tuple[TargetSetName, ...], Field(min_length=1)] = (
        "attention-qv",
        "attention",
        "mlp",
        "all-linear",
    )
    """Named target sets, or lists of module names; ordered from small to large."""
    learning_rate: tuple[LearningRate, LearningRate] = (3e-5, 2e-3)
    """Bounds of the effective step, learning_rate * lora_alpha / 32."""
    use_rslora: Flag = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    epochs: Annotated[tuple[Epochs, ...], Field(min_length=1)] | None = Field(
        default=None, examples=[[1, 2, 3]]
    )
    """Lengths of a run to choose from, in epochs: each becomes a rung, and a trial keeps its best one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.learning_rate[0] > self.learning_rate[1]:
            low, high = self.learning_rate
            raise ValueError(
                f"learning_rate is [{low}, {high}], which is [highest, lowest]; write [{high}, {low}]"
            )
        if self.lora_alpha is not None and "alpha_ratio" in self.model_fields_set:
            raise ValueError("give alpha_ratio or lora_alpha, not both")
        return self


class AnchorSection(Section):
    """A configuration to begin with; what is not given is taken from anchor A1."""

    rank: Rank | None = None
    """LoRA rank."""
    lora_alpha: Alpha | None = None
    """The product of the adapter is scaled by lora_alpha / rank."""
    lora_dropout: Dropout | None = None
    """Dropout on the adapter's input."""
    target_modules: TargetSetName | None = None
    """A named target set, or a list of module names."""
    learning_rate: LearningRate | None = None
    """Learning rate as it is trained."""


def _anchor_kind(value: object) -> str:
    return "table[anchor]" if isinstance(value, dict | AnchorSection) else "name[anchor]"


# Told apart by their form, so that an error is about the one that was meant.
Anchor = Annotated[
    Annotated[AnchorName, Tag("name[anchor]")] | Annotated[AnchorSection, Tag("table[anchor]")],
    Discriminator(_anchor_kind),
]


class SearchSection(Section):
    """``[search]``: how many trials, who proposes them, and when they are cut."""

    trials: Literal["auto"] | Count = "auto"
    """Trials in all, those of earlier runs of the same study counted in; ``auto``: 24, or as many (8 to
    64) as the budget allows."""
    sampler: Literal["tpe", "gp", "random", "grid"] = "tpe"
    """Who proposes after the anchors."""
    startup_trials: Count = 6
    """Trials, anchors counted in, before the sampler models the results."""
    anchors: tuple[Anchor, ...] = ("A1", "A2", "A3", "A4", "A5", "A6")
    """Configurations to begin with: known good ones by name, or your own; ``[]``: none."""
    rungs: Annotated[
        tuple[Annotated[float, Field(strict=True, gt=0, le=1)], ...], Field(min_length=1)
    ] = (
        0.125,
        0.5,
        1.0,
    )
    """Shares of a full run at which trials are compared; the last one is 1."""
    min_rung_steps: Literal["auto"] | Count = "auto"
    """No rung is shorter, and rungs that coincide are merged; ``auto``: 50, in a run below 200 steps a
    quarter of it, at least 20."""
    half_step: Flag = False
    """With three rungs or more, also try half the step of the first rung's leader: short rungs favour high
    learning rates. Costs about 1 % of training all trials fully."""
    max_hours: Hours | None = Field(default=None, examples=[4])
    """Wall-clock budget in hours, confirmation and earlier runs counted in; no new trial is begun when
    only later rungs and the confirmation still fit."""
    max_gpu_hours: Hours | None = Field(default=None, examples=[4])
    """The same in hours of all GPUs together."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if list(self.rungs) != sorted(set(self.rungs)) or self.rungs[-1] != 1.0:
            raise ValueError(
                f"rungs are {list(self.rungs)}; they must rise and end with 1.0, such as [0.25, 0.5, 1.0]"
            )
        return self


class MemorySection(Section):
    """``[memory]``: the budget no trial may exceed."""

    gpu: Text = "auto"
    """``auto``: what is free on the device; a catalogue GPU; or a size such as ``24GiB``."""
    safety: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.95
    """Share of the budget that a trial pack may use by the estimate."""


class SelectSection(Section):
    """``[select]``: how the winner is chosen and reported."""

    seeds: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=20)] = "auto"
    """Fresh seeds with which each finalist and the default are trained again; ``auto``: 3, or as many as
    keep the confirmation below half of the budget."""
    finalists: Annotated[int, Field(strict=True, ge=1, le=8)] = 2
    """Best trials that are confirmed; those tied with the last of them make it one more at most."""
    refit: Literal["none", "all-rows"] = "none"
    """``all-rows``: the chosen configuration is trained once more on all rows; that adapter is not scored."""
    metrics: tuple[Text, ...] = ()
    """Shown beside the loss for finalists: ``exact-match``, ``rouge-l``, or your own ``module:function``."""
    max_new_tokens: Count = 256
    """Tokens generated for a row by the metrics, at most."""
    samples: Annotated[int, Field(strict=True, ge=0, le=100)] = 5
    """Held-out prompts that the report shows answered by base, default and winner; 0: none, and no check of
    what was forgotten."""
    practical_margin: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.005
    """Relative loss difference that is called a tie; the cheaper configuration then wins."""
    compute_dtype: Literal["auto", "train", "float32"] = "auto"
    """Confirmation is scored in float32 on a CPU, in the training type on CUDA."""


def _postgres_url(url: str) -> str:
    """Return the address of a PostgreSQL database whose password, if it has one, can be masked."""
    scheme = url.partition("://")[0]
    if scheme.startswith("sqlite"):
        raise ValueError(
            "SQLite needs no address: leave the key out, and the study's folder has its study.db"
        )
    if scheme not in ("postgresql", "postgres") or "://" not in url:
        raise ValueError(
            "the only server known is PostgreSQL, as postgresql://user@host:5432/database"
        )
    try:
        parts = urlsplit(url)
        password, _ = parts.password, parts.port  # a port may be none
    except ValueError as error:
        raise ValueError(f"this is no address: {error}") from None
    if not parts.path.strip("/"):
        raise ValueError(f"the address names no database: write {scheme}://user@host/database")
    is_shown = password not in (None, MASK) and f":{password}@" in redact(url, {})
    if is_shown or "password=" in url.casefold():
        raise ValueError(
            "a password stands between user and host, user:password@host, with / : @ and others "
            "written as %2F %3A %40; better leave it to PGPASSWORD or ~/.pgpass"
        )
    return url


class RunSection(Section):
    """``[run]``: where trials train and how many at once."""

    executor: Literal["process", "in-process"] = "process"
    """``process``: trial packs train in child processes, so that a crash there does not end the study;
    ``in-process``: in the study's own process."""
    workers: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=64)] = 1
    """Child processes, each with a base of its own, on a GPU of its own; ``auto``: one for every GPU that is
    visible. On a CPU they share the cores."""
    checkpoint_every: PositiveFloat = 60.0
    """Seconds of work after which the lanes' states are saved: what a crash can cost, at most."""
    lanes: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=256)] = "auto"
    """Trials trained together; ``auto``: as many as fit and still raise the measured tokens/s."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA if there is a GPU, else the CPU."""
    storage: Annotated[Text, AfterValidator(_postgres_url)] | None = Field(
        default=None, examples=["postgresql://user@host/database"]
    )
    """A PostgreSQL database for the proposals, ``postgresql://user@host/database``, instead of the study
    folder's own ``study.db``. Leave the password to PGPASSWORD or ~/.pgpass."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where points and results are sent as well, through accelerate; none unless named."""


class StudySpec(Section):
    """A whole study file."""

    study: StudySection = StudySection()
    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    space: SpaceSection = SpaceSection()
    search: SearchSection = SearchSection()
    memory: MemorySection = MemorySection()
    select: SelectSection = SelectSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        # a spec that was written down and read again has every key set, so values are compared
        rival = "max_steps" if self.train.max_steps is not None else "epochs"
        has_rival = rival == "max_steps" or self.train.epochs != TrainSection().epochs
        if self.space.epochs is not None and has_rival:
            raise ValueError(
                f"space.epochs and train.{rival} both say how long a run is; give one of them"
            )
        return self
