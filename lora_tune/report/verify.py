"""A trial beside the same trial by plain PEFT: the verdict, its table, its JSON, and the live view.

Packed and plain training do the same arithmetic in another order, so their losses differ by rounding,
which training then amplifies. How much of a difference matters is told by the study's seed noise: what
the evaluation loss does when nothing but the seeds changes.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_tune.report import formatting as fmt
from lora_tune.report.terminal import open_console, plain_table, say, wants_panel
from lora_tune.units import format_duration

# Largest relative difference of the evaluation loss at the end of training that rounding explains. Seen
# on a tiny Llama in NF4 at learning rates up to 0.02: 3e-8 in float32, 2.5e-3 in bfloat16 (docs/verify.md).
# float16, with three more bits than bfloat16, was not measured.
TRAINED_TOLERANCE = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 1e-2}
# The same for one evaluation of the same adapter, where no training amplifies it; seen: 6e-8 and 5e-4.
EVALUATED_TOLERANCE = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 5e-3}
LINE_INTERVAL_S = 10.0


class LossPair(NamedTuple):
    """A loss as the study recorded it and as plain PEFT finds it, in nats per target token."""

    packed: float
    plain: float

    @property
    def difference(self) -> float:
        """Plain less packed."""
        return self.plain - self.packed

    @property
    def relative(self) -> float:
        """Size of the difference as a share of the packed loss."""
        return abs(self.difference) / abs(self.packed) if self.packed else float("inf")


class StepLosses(NamedTuple):
    """The training loss of one optimizer step (1 is the first), before the step."""

    step: int
    packed: float
    plain: float

    @property
    def pair(self) -> LossPair:
        """Both losses."""
        return LossPair(self.packed, self.plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a study recorded of a trial and what plain PEFT gives instead."""

    study: str
    folder: Path
    trial: int
    rung: int
    num_steps: int
    most_lanes: int  # that shared a step with the trial
    quantization: str
    compute_dtype: str
    device: str
    training: tuple[StepLosses, ...]  # the recorded steps on the way to the rung
    evaluation: LossPair
    standard_error: float | None  # of the difference, paired over the rows of the split
    largest_row_difference: float  # nats per target token of one row
    num_rows: int
    adapter: LossPair  # the stored adapter: recorded evaluation, and by PEFT
    other_seed_losses: tuple[float, ...]  # evaluation losses of plain runs with other seeds
    other_versions: dict[str, tuple[str, str]]  # package: version of the study, version now

    @property
    def seed_noise(self) -> float | None:
        """Standard deviation of the plain runs' losses; None below two that ended well."""
        losses = [loss for loss in self.seed_losses if isfinite(loss)]
        return statistics.stdev(losses) if len(losses) > 1 else None

    @property
    def seed_losses(self) -> tuple[float, ...]:
        """Evaluation losses of all plain runs, the trial's own seeds first."""
        return (self.evaluation.plain, *self.other_seed_losses)

    @property
    def widest_step(self) -> StepLosses | None:
        """The recorded step whose training losses differ most, relatively."""
        return max(self.training, key=lambda losses: losses.pair.relative, default=None)

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains the difference of the evaluation losses."""
        return self.evaluation.relative <= TRAINED_TOLERANCE[self.compute_dtype]

    @property
    def is_seed_noise(self) -> bool:
        """Whether another seed changes the evaluation loss as much."""
        noise = self.seed_noise
        return noise is not None and abs(self.evaluation.difference) <= noise

    @property
    def adapter_agrees(self) -> bool:
        """Whether the stored adapter gives the recorded evaluation."""
        return self.adapter.relative <= EVALUATED_TOLERANCE[self.compute_dtype]

    @property
    def agrees(self) -> bool:
        """Whether the trial holds: its training and its adapter."""
        return (self.is_rounding or self.is_seed_noise) and self.adapter_agrees


def verdict(found: Verification) -> str:
    """Return the answer in a sentence or two."""
    rounding = f"{found.compute_dtype} rounding (up to {_percent(found)} of the loss)"
    size = f"the difference {_small(found.evaluation.difference)} is {_in_seed_noise(found)}"
    if not (found.is_rounding or found.is_seed_noise):
        return f"differs: {size}, more than {rounding} explains.{_hints(found)}"
    if not found.adapter_agrees:
        return (
            f"differs: the stored adapter gives {fmt.format_loss(found.adapter.plain)} by PEFT, the record "
            f"says {fmt.format_loss(found.adapter.packed)}.{_hints(found)}"
        )
    if found.is_rounding:
        return f"agrees: {size}, within {rounding}."
    return f"agrees: {size}, though more than {rounding} explains.{_hints(found)}"


def verification_json(found: Verification) -> dict[str, object]:
    """Return everything as one object; a loss that is not finite is null."""
    widest = found.widest_step
    return {
        "study": found.study,
        "folder": str(found.folder),
        "trial": found.trial,
        "rung": found.rung,
        "steps": found.num_steps,
        "most_lanes": found.most_lanes,
        "quantization": found.quantization,
        "compute_dtype": found.compute_dtype,
        "device": found.device,
        "agrees": found.agrees,
        "verdict": verdict(found),
        "evaluation": {
            **_pair_json(found.evaluation),
            "standard_error": found.standard_error,
            "largest_row_difference": _finite(found.largest_row_difference),
            "rows": found.num_rows,
            "tolerance": TRAINED_TOLERANCE[found.compute_dtype],
        },
        "seed_noise": {"value": found.seed_noise, "losses": [*map(_finite, found.seed_losses)]},
        "adapter": {
            **_pair_json(found.adapter),
            "tolerance": EVALUATED_TOLERANCE[found.compute_dtype],
        },
        "training": {
            "largest_relative_difference": _finite(widest.pair.relative) if widest else None,
            "at_step": widest.step if widest else None,
            "steps": [losses.step for losses in found.training],
            "packed": [_finite(losses.packed) for losses in found.training],
            "plain": [_finite(losses.plain) for losses in found.training],
        },
        "other_versions": {name: list(pair) for name, pair in found.other_versions.items()},
    }


def print_verification(found: Verification, console: Console) -> None:
    """Print both sides, the seed noise and the verdict."""
    lanes = f"; up to {fmt.plural(found.most_lanes, 'lane')} a pack" if found.most_lanes > 1 else ""
    base = "NF4" if found.quantization == "nf4" else "not quantized"
    say(
        console,
        f"Trial {found.trial} of {found.study}, {fmt.plural(found.num_steps, 'step')} to the end of rung "
        f"{found.rung}{lanes}; base {base}, {found.compute_dtype} on {found.device}",
    )
    console.print()
    console.print(_table(found))
    console.print()
    say(console, _evaluation_sentence(found))
    say(console, _seed_sentence(found))
    if found.compute_dtype != "float32":
        say(
            console,
            f"{found.compute_dtype} rounds: packed lanes and PEFT multiply in another order, and PEFT "
            "multiplies adapters in float32, so their losses differ in the third digit.",
        )
    say(console, f"Verdict: {verdict(found)}", style="bold green" if found.agrees else "bold red")


def _table(found: Verification) -> Table:
    table = plain_table()
    table.add_column("loss", no_wrap=True, overflow="ellipsis")
    for header in ("packed", "plain PEFT", "relative difference"):
        table.add_column(header, justify="right", no_wrap=True)
    rows = [("evaluation after training", found.evaluation), ("stored adapter", found.adapter)]
    if found.training:
        first, widest = found.training[0], found.widest_step
        rows.append((f"training, step {first.step}", first.pair))
        if widest is not None and widest is not first:
            rows.append((f"training, step {widest.step} (widest)", widest.pair))
    for name, pair in rows:
        losses = (fmt.format_loss(pair.packed), fmt.format_loss(pair.plain))
        table.add_row(name, *losses, _small(pair.relative))
    return table


def _evaluation_sentence(found: Verification) -> str:
    error = ""
    if found.standard_error is not None:
        error = f" +- {_small(found.standard_error)} (standard error, paired by row)"
    return (
        f"Evaluation: plain less packed is {_small(found.evaluation.difference)}{error} over "
        f"{fmt.plural(found.num_rows, 'row')}; on a single row at most "
        f"{_small(found.largest_row_difference)} a token."
    )


def _seed_sentence(found: Verification) -> str:
    losses = ", ".join(map(fmt.format_loss, found.seed_losses))
    if not found.other_seed_losses:
        return "Seed noise: not measured (--seeds 0)."
    if found.seed_noise is None:
        return f"Seed noise: not measured, plain runs with other seeds diverged ({losses})."
    return (
        f"Seed noise: {_small(found.seed_noise)}, the standard deviation of {len(found.seed_losses)} plain "
        f"runs that differ in their seeds alone ({losses})."
    )


def _in_seed_noise(found: Verification) -> str:
    noise = found.seed_noise
    if noise is None:
        return f"{_small(found.evaluation.relative)} of the loss"
    if noise == 0:
        return "beside a seed noise of 0"
    times = abs(found.evaluation.difference) / noise
    return f"{_small(times)} of the seed noise {_small(noise)}"


def _hints(found: Verification) -> str:
    """Say what may explain a difference beyond rounding."""
    text = ""
    if not found.other_seed_losses:
        text += " Seed noise was not measured; --seeds 2 tells whether the difference matters."
    if found.other_versions:
        changed = ", ".join(
            f"{name} {then} (now {now})" for name, (then, now) in found.other_versions.items()
        )
        text += f" The study ran with {changed}."
    return text


def _percent(found: Verification) -> str:
    return f"{100 * TRAINED_TOLERANCE[found.compute_dtype]:g} %"


def _small(value: float) -> str:
    return f"{value:.2g}"


def _pair_json(pair: LossPair) -> dict[str, float | None]:
    return {
        "packed": _finite(pair.packed),
        "plain": _finite(pair.plain),
        "difference": _finite(pair.difference),
        "relative_difference": _finite(pair.relative),
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


class VerifyView:
    """Shows how the plain runs go: a bar on a terminal, a line now and then anywhere else."""

    def __init__(
        self,
        num_runs: int,
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or open_console(stderr=True)
        self._num_runs = num_runs
        self._clock = clock
        self._last_line_s = clock()
        self._bar: Progress | None = None
        if wants_panel(self._console, os.environ):
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("loading the base model", total=None)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Print a sentence at once."""
        self._console.print(Text(fmt.one_line(text)), soft_wrap=True)

    def step(self, *, run: int, step: int, end_step: int, loss: float) -> None:
        """Show an optimizer step of a run."""
        text = f"{self._name(run)}: step {step}/{end_step}, loss {fmt.format_loss(loss)}"
        if self._bar is not None:
            done, total = run * end_step + step, self._num_runs * end_step
            self._bar.update(self._task, description=text, completed=done, total=total)
        elif self._clock() - self._last_line_s >= LINE_INTERVAL_S:
            self._last_line_s = self._clock()
            self.note(text)

    def end(self, *, run: int, loss: float) -> None:
        """Say what a run ended with."""
        self.note(f"{self._name(run)}: evaluation loss {fmt.format_loss(loss)}")

    def _name(self, run: int) -> str:
        seeds = "the trial's own seeds" if run == 0 else "other seeds"
        return f"plain run {run + 1} of {self._num_runs} ({seeds})"


def cost_sentence(*, trial: int, num_runs: int, seconds: float) -> str:
    """Say beforehand about how long the plain runs take."""
    return (
        f"training trial {trial} by plain PEFT, {fmt.plural(num_runs, 'run')}: at least about "
        f"{format_duration(max(1.0, seconds))} and the loading of the base, by the trial's share of its "
        "packs; plain runs share nothing and may take several times as long."
    )
