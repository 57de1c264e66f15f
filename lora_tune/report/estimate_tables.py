"""The catalogue, and what of a study's space fits, on a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_tune.catalog.gpus import Gpu
from lora_tune.catalog.models import CatalogModel
from lora_tune.report import formatting as fmt
from lora_tune.report.estimate_study import FrontierRow, GpuFrontier, StudyFrontier
from lora_tune.report.terminal import plain_table, say
from lora_tune.units import GIB


def print_catalogue(
    models: Sequence[tuple[CatalogModel, int]], gpus: Sequence[Gpu], console: Console
) -> None:
    """Print the models with their parameters, then the GPUs."""
    table = plain_table()
    table.add_column("model", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("hub id", overflow="fold")
    for model, parameters in models:
        table.add_row(model.name, _billions(parameters), model.hub_id)
    console.print(table)
    console.print()
    table = plain_table()
    table.add_column("GPU", no_wrap=True)
    for header in ("usable GiB", "GB/s", "bf16 TFLOPS", "capability"):
        table.add_column(header, justify="right", no_wrap=True)
    for gpu in gpus:
        table.add_row(
            gpu.name,
            f"{gpu.usable_bytes / GIB:.2f}" + ("" if gpu.usable_is_read else " ~"),
            fmt.format_plain(gpu.bandwidth_gb_s),
            fmt.NOTHING if gpu.bf16_tflops is None else fmt.format_plain(gpu.bf16_tflops),
            gpu.compute_capability,
        )
    console.print(table)
    for line in (
        "Instruct and coder versions of the same sizes, and ungated copies of unsloth and "
        "NousResearch, are known too.",
        "~ a cautious default, not a reading. TFLOPS are dense.",
    ):
        console.print(Text(line, style="dim"))


def print_frontier(frontier: StudyFrontier, console: Console) -> None:
    """Print for each GPU the largest rank of every target set and how its lanes train."""
    say(console, f"{frontier.study}: what of its space fits on {frontier.model}", style="bold")
    say(
        console,
        f"rows of {fmt.plural(frontier.max_length, 'token')} (data.max_length, the longest a row can "
        f"be), {frontier.safety:.0%} of the memory (memory.safety)",
    )
    for gpu in frontier.gpus:
        console.print()
        name = fmt.one_line(gpu.device.name)
        size = f"{gpu.device.usable_bytes / GIB:.2f} GiB"
        say(console, f"{name}, {size}{_hours(gpu)}", style="bold")
        if gpu.problem:
            for line in gpu.problem.splitlines():
                say(console, line, style="red")
            continue
        console.print(frontier_table(gpu.rows, nothing="none fits"))
    if frontier.notes:
        console.print()
    for note in frontier.notes:
        say(console, f"Note: {note}", style="yellow")


def _hours(gpu: GpuFrontier) -> str:
    plan = gpu.time
    if plan is None:
        return ""
    cost = ""
    if plan.cost is not None:
        cost = f", cost {plan.cost:.2f} ({plan.cost_low:.2g} to {plan.cost_high:.2g})"
    return f"; {plan.hours:.3g} h ({plan.hours_low:.2g} to {plan.hours_high:.2g}){cost}"


def frontier_table(rows: Sequence[FrontierRow], *, nothing: str) -> Table:
    """Return what fits of every target set; ``nothing`` stands beside a set of which no rank fits."""
    table = plain_table()
    table.add_column("target set", no_wrap=True, overflow="ellipsis", max_width=24)
    for header in ("largest rank", "lanes", "rows a lane"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("checkpointing", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for row in rows:
        if row.plan is None:
            table.add_row(fmt.one_line(row.target_set), nothing, style="red")
            continue
        table.add_row(
            fmt.one_line(row.target_set),
            str(row.max_rank),
            str(row.plan.most_lanes),
            str(row.plan.micro_batch_size),
            "on" if row.plan.gradient_checkpointing else "off",
            fmt.format_count(row.trainable_parameters),
        )
    return table


def _billions(parameters: int) -> str:
    if parameters < 995 * 10**6:
        return f"{parameters / 10**6:.0f} M"
    return f"{parameters / 10**9:.2f} B"
