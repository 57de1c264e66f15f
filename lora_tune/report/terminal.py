"""How every report is put on a terminal: sentences, plain tables, and whether a live panel suits it."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_tune.report import formatting as fmt


def say(console: Console, text: str, *, style: str = "") -> None:
    """Print a sentence on lines of the console's width; foreign text in it cannot reach the terminal."""
    console.print(Text(fmt.one_line(text), style=style))


def say_unbroken(console: Console, text: str) -> None:
    """Print a path or command so that it can be copied from a narrow terminal too."""
    console.print(Text(fmt.one_line(text)), soft_wrap=True)


def plain_table(*, header: bool = True) -> Table:
    """Return a table without lines, its columns two cells apart; columns and rows are still to come."""
    return Table(
        box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_header=header
    )


def wants_panel(console: Console, environ: Mapping[str, str]) -> bool:
    """Say whether a live panel suits the console: on a terminal, unless NO_COLOR or CI is set."""
    plain = environ.get("NO_COLOR") or environ.get("CI")
    return console.is_terminal and not console.is_dumb_terminal and not plain
