"""An estimate on a terminal: settings, a bar per term, the process, verdicts, and what would help."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_tune.memory.verdict import Verdict
from lora_tune.report import formatting as fmt
from lora_tune.report.estimate import TERMS, EstimateReport, GpuRow
from lora_tune.report.terminal import plain_table, say
from lora_tune.units import GIB, format_bytes

MOST_CHANGES = 3
_WIDEST_BAR = 40
_WIDE, _NARROW = 100, 68
_STYLES = {Verdict.FITS: "green", Verdict.TIGHT: "yellow", Verdict.NO: "red"}
_QUANTIZATIONS = {
    "nf4": "base in NF4",
    "nf4-single": "base in NF4 without double quantization",
    "none": "base not quantized",
}
_VARIABLES = {
    "max-rank": "rank",
    "max-length": "length in tokens",
    "max-batch": "micro-batch",
    "max-lanes": "number of lanes",
}
_TIGHT = "tight: the memory lies inside the interval of what the process may take; it may run."
_METHODS = {"closed-form": "closed form", "trace": "trace of a real step"}


def print_estimate(report: EstimateReport, console: Console) -> None:
    """Print the report; a narrow terminal shortens the bars."""
    say(console, _title(report), style="bold")
    for line in _settings(report):
        say(console, line)
    if report.solved is not None:
        console.print()
        say(console, _solved(report), style="bold")
    console.print()
    console.print(_terms(report, console))
    console.print()
    console.print(_totals(report))
    if report.gpus:
        console.print()
        console.print(_verdicts(report.gpus, console))
        if any(row.time for row in report.gpus):
            say(console, _speed_sources(report), style="dim")
        for row in _explained(report.gpus):
            _print_help(console, row)
        if any(row.fit.verdict is Verdict.TIGHT for row in report.gpus):
            say(console, _TIGHT, style="dim")
    elif report.solved is None:
        console.print()
        say(console, _smallest(report))
    if report.notes:
        console.print()
    for note in report.notes:
        say(console, f"Note: {note}", style="yellow")


def _title(report: EstimateReport) -> str:
    hub = report.hub_id if report.hub_id not in (None, report.model) else None
    return f"{report.model} ({hub})" if hub else report.model


def _settings(report: EstimateReport) -> Iterable[str]:
    request = report.request
    lane = request.lanes[0]
    dropout = f", dropout {fmt.format_plain(lane.lora_dropout)}" if lane.lora_dropout else ""
    yield (
        f"LoRA rank {fmt.format_count(lane.rank)} on {report.target_set}{dropout}; "
        f"{_QUANTIZATIONS[request.quantization]}, compute in {request.compute_dtype}"
    )
    rows = f"{fmt.plural(request.micro_batch_size, 'row')} of {fmt.plural(request.max_length, 'token')}"
    lanes = len(request.lanes)
    parts = [rows if lanes == 1 else f"{fmt.plural(lanes, 'lane')}, each {rows}"]
    if report.accumulation_steps > 1:
        parts.append(f"{report.accumulation_steps} micro-batches a step")
    parts.append(f"gradient checkpointing {'on' if request.gradient_checkpointing else 'off'}")
    if request.label_fraction < 1:
        parts.append(f"labels on {fmt.format_percent(request.label_fraction)} of the tokens")
    yield ", ".join(parts)
    yield f"stack {request.stack}{_stack_details(report)}; {_METHODS[report.estimate.method]}"


def _stack_details(report: EstimateReport) -> str:
    request = report.request
    details = [f"{request.adapter_dtype} adapters", request.optimizer]
    if request.autocast:
        details.append("autocast")
    if request.attention != "sdpa":
        details.append(f"{request.attention} attention")
    if request.padded:
        details.append("padded")
    if request.outputs_held:
        details.append("outputs held")
    return f" ({', '.join(details)})"


def _solved(report: EstimateReport) -> str:
    solved = report.solved
    assert solved is not None
    if solved.variable == "min-gpu" and solved.value is None:
        among = "None of the GPUs asked" if report.gpus else "No GPU of the catalogue"
        return f"{among} is certain to fit."
    if solved.variable == "min-gpu":
        return f"Smallest GPU that fits: {solved.value}"
    what = _VARIABLES[solved.variable]
    if solved.value is None:
        return f"No {what} fits {solved.device}, not even 1."
    assert isinstance(solved.value, int)
    end = ", where the search ends" if solved.at_limit else ""
    return f"Largest {what} that fits {solved.device}: {fmt.format_count(solved.value)}{end}"


def _terms(report: EstimateReport, console: Console) -> Table:
    table = plain_table()
    table.add_column("at the peak", no_wrap=True, min_width=15)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    width = max(8, min(_WIDEST_BAR, console.width - 40))
    table.add_column("", no_wrap=True)
    mark = "#" if console.options.ascii_only else "\u2588"
    peak = report.estimate.peak_allocated_bytes
    for name in TERMS:
        size = report.estimate.terms[name]
        share = size / peak
        bar = mark * round(width * share)
        table.add_row(name.replace("_", " "), _gib(size), f"{100 * share:.1f} %", Text(bar, "cyan"))
    return table


def _totals(report: EstimateReport) -> Table:
    estimate, process = report.estimate, report.process
    table = plain_table(header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("")
    table.add_row(
        "peak allocated", format_bytes(estimate.peak_allocated_bytes), f"({estimate.peak_phase})"
    )
    table.add_row("peak reserved", format_bytes(estimate.peak_reserved_bytes), "(the allocator's)")
    where = f" on {report.process_device}" if report.process_device else ""
    table.add_row(
        f"process{where}",
        Text(format_bytes(process.process_bytes), style="bold"),
        f"({_gib(process.low_bytes)} to {_gib(process.high_bytes)} GiB, CUDA context included)",
    )
    table.add_row(
        "trainable parameters",
        fmt.format_count(estimate.trainable_parameters),
        f"({_share(estimate.trainable_parameters / estimate.base_parameters)} of "
        f"{fmt.format_count(estimate.base_parameters)})",
    )
    return table


def _verdicts(rows: Sequence[GpuRow], console: Console) -> Table:
    """Return a row per GPU; with hours and cost where they are known.

    A narrow terminal loses what the other columns tell: what is free and the verdict stay.
    """
    timed = any(row.time for row in rows)
    priced = any(row.time and row.time.cost is not None for row in rows)
    narrow = console.width < (_WIDE if timed else _NARROW)
    sizes = () if narrow else ("usable GiB", "process GiB")
    table = plain_table()
    table.add_column("GPU", no_wrap=True)
    for header in (*sizes, "free GiB"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for header in ["hours"] * timed + ["cost"] * priced:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        fit = row.fit
        both = (_gib(fit.device.usable_bytes), _gib(fit.process.process_bytes))
        table.add_row(
            fmt.one_line(fit.device.name),
            *both[: len(sizes)],
            f"{fit.headroom_bytes / GIB:+.2f}",
            Text(str(fit.verdict), style=f"bold {_STYLES[fit.verdict]}"),
            *([_hours(row)] * timed),
            *([_cost(row)] * priced),
        )
    return table


def _hours(row: GpuRow) -> str:
    if row.time is None:
        return fmt.NOTHING
    return f"{row.time.hours:.3g} ({row.time.hours_low:.2g} to {row.time.hours_high:.2g})"


def _cost(row: GpuRow) -> str:
    plan = row.time
    if plan is None or plan.cost is None:
        return fmt.NOTHING
    return f"{plan.cost:.2f} ({plan.cost_low:.2g} to {plan.cost_high:.2g})"


def _speed_sources(report: EstimateReport) -> str:
    sources = dict.fromkeys(row.time.estimate.source for row in report.gpus if row.time)
    tokens = fmt.plural(report.tokens or 0, "token")
    return f"Hours for {tokens}, by a roofline; {'; '.join(sources)}."


def _explained(rows: Sequence[GpuRow]) -> list[GpuRow]:
    """Return the rows to explain: where changes were sought, else the largest that does not fit."""
    misfits = [row for row in rows if row.blame is not None]
    return [row for row in misfits if row.changes is not None] or misfits[-1:]


def _print_help(console: Console, row: GpuRow) -> None:
    """Print the term to blame and the smallest changes."""
    assert row.blame is not None
    console.print()
    fit, terms = row.fit, row.fit.estimate.terms
    base = format_bytes(terms["base_weights"])
    if row.blame == "base_weights":
        room = format_bytes(fit.device.usable_bytes)
        why = f"the base weights alone take {base}, the GPU has {room}"
    else:
        blame = f"{row.blame.replace('_', ' ')} {format_bytes(terms[row.blame])}"
        why = f"{blame} on top of base weights {base}"
    say(console, f"{fit.device.name} does not fit: {why}.", style="bold")
    changes = row.changes or ()
    for i, change in enumerate(changes[:MOST_CHANGES]):
        start = "smallest change:" if i == 0 else "or"
        text = f"  {start} {change.options} (process {format_bytes(change.process_bytes)})"
        console.print(Text(text), soft_wrap=True)
    if row.larger_gpu:
        start = "Or a" if changes else "Only a" if row.changes is not None else "A"
        say(console, f"{start} larger GPU has room as asked, from {row.larger_gpu} on.")
    elif not changes:
        say(console, "No GPU of the catalogue has room for it. Choose a smaller base model.")


def _smallest(report: EstimateReport) -> str:
    fit = report.smallest_gpu
    if fit is None:
        return "No GPU of the catalogue is certain to fit it."
    return (
        f"Smallest GPU of the catalogue that fits: {fit.device.name} "
        f"({format_bytes(fit.device.usable_bytes)} usable). --gpu and --all-gpus give verdicts."
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _share(fraction: float) -> str:
    return f"{100 * fraction:.2g} %"
