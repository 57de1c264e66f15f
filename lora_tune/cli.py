"""The commands' signatures and exit codes. Imports the rest only when a command runs.

Exit codes: 0 finished; 1 a bug; 2 usage; 3 study file or data; 4 study folder; 5 nothing fits the memory;
6 all trials failed; 7 this machine; 8 the base model; 75 stopped by SIGTERM, the same command goes on;
130 interrupted.
"""

import shlex
import sys
from typing import Annotated

import typer

from lora_tune import __version__
from lora_tune.errors import LoraTuneError, Terminated

EXIT_RESUMABLE = 75
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="lora-tune",
    help="Tune LoRA and QLoRA: many trials packed on one frozen 4-bit base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

StudyArgument = Annotated[
    str | None,
    typer.Argument(
        help="A study's folder, its study.toml, or its name under reports/; the newest."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-tune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    study: Annotated[
        str, typer.Argument(help="A study file, or a started study's folder or name.")
    ],
) -> None:
    """Run a study to its end, or go on with one that was interrupted."""
    from lora_tune.commands.run import run as run_command

    run_command(study, command=shlex.join(["lora-tune", *sys.argv[1:]]))


@app.command()
def report(study: StudyArgument = None) -> None:
    """Make a study's tables and report again from its folder."""
    from lora_tune.commands.report import report as report_command

    report_command(study)


def main() -> None:
    """Run the command line; a ``LoraTuneError`` becomes one message and its exit code."""
    try:
        app()
    except LoraTuneError as error:
        typer.echo(f"lora-tune: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("\nlora-tune: interrupted; the same command goes on from here.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except Terminated:
        typer.echo("lora-tune: stopped by SIGTERM; the same command goes on from here.", err=True)
        sys.exit(EXIT_RESUMABLE)


if __name__ == "__main__":
    main()
