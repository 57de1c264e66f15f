"""How every report is put on a terminal: sentences, plain tables, and whether colours and a panel suit it."""

import os
from collections.abc import Mapping
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_tune.report import formatting as fmt


class _Console(Console):
    """A console that leaves a reader who has gone to whoever called, instead of ending the program."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def open_console(*, stderr: bool = False, environ: Mapping[str, str] | None = None) -> Console:
    """Return the console of standard output, or of standard error: plain text where colours do not suit.

    Args:
        stderr: For people alone: progress, notes, what comes next.
        environ: Environment variables; those of the process when None.
    """
    if wants_plain(os.environ if environ is None else environ):
        return _Console(stderr=stderr, color_system=None)
    return _Console(stderr=stderr)


def wants_plain(environ: Mapping[str, str]) -> bool:
    """Say whether text is to stay without colours and bold, though it may be on a terminal.

    >>> wants_plain({"NO_COLOR": "1"}), wants_plain({"CI": "true"}), wants_plain({"NO_COLOR": ""})
    (True, True, False)
    """
    return bool(environ.get("NO_COLOR") or environ.get("CI"))


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
    on_terminal = console.is_terminal and not console.is_dumb_terminal
    return on_terminal and not wants_plain(environ)
