"""The commands' signatures and exit codes. Imports the rest only when a command runs.

Exit codes: 0 finished; 1 a bug; 2 usage; 3 study file or data; 4 study folder; 5 nothing fits the memory;
6 all trials failed; 7 this machine; 8 the base model; 9 packed and plain training differ (verify); 75 stopped
by SIGTERM, the same command goes on; 130 interrupted; 141 the reader of a pipe went away; 143 ended at
once by a second SIGTERM.
"""

import os
import shlex
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from lora_tune import __version__
from lora_tune.cli.arguments import (
    STUDY_HELP,
    GpuOption,
    JsonOption,
    StudyArgument,
    StudyFileArgument,
    catalogue_gpus,
    catalogue_models,
    export_targets,
    started_studies,
    studies_and_files,
)
from lora_tune.cli.estimate import estimate
from lora_tune.errors import LoraTuneError, MachineError, StoreError, StudyFileError, Terminated
from lora_tune.export.targets import TARGETS
from lora_tune.files import is_full
from lora_tune.redaction import redact
from lora_tune.signals import EXIT_INTERRUPTED, EXIT_RESUMABLE, keep_exit_code, stoppable

_GOES_ON = "the same command goes on from here, and `lora-tune report` shows what is there so far."
EXIT_BUG = 1
EXIT_DIFFERS = 9
EXIT_NO_READER = 141  # what a shell reports of a program that SIGPIPE ended


class _Commands(TyperGroup):
    """The commands; one whose reader has gone, as with ``| head``, ends without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty values: as a path they would mean the working directory."""
        if not ctx.resilient_parsing:  # as when a shell asks what could stand there
            _check_not_empty(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_output()
            raise typer.Exit(EXIT_NO_READER) from None
        return result


def _check_not_empty(args: list[str]) -> None:
    for before, word in pairwise(["", *args]):
        if word == "" or (word.startswith("--") and word.endswith("=")):
            option = word.removesuffix("=") or (before if before.startswith("-") else "an argument")
            raise StudyFileError(f"{option} is empty: give a value, or leave it out.")


def _drop_output() -> None:
    """Let what is not yet written to standard output go; Python flushes once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="lora-tune",
    cls=_Commands,
    help="Tune LoRA and QLoRA: many trials packed on one frozen 4-bit base.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)


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
def init(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="Where study.toml is written, made if it is not there; here if not given.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base: a catalogue name, a hub id, a folder or a .gguf file.",
            autocompletion=catalogue_models,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="The rows: a .jsonl, .json, .csv or .parquet file, or a hub data set.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file to write, instead of study.toml in DIR."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The study's name; that of the data if not given."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="GPU",
            help="A GPU of the catalogue or a size such as 24GiB; what is free here if not given.",
            autocompletion=catalogue_gpus,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that exists.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")] = False,
) -> None:
    """Write a commented study file; asks for what is not given."""
    from lora_tune.commands.init import StudyChoices
    from lora_tune.commands.init import init as init_command

    if folder is not None and output is not None:
        raise StudyFileError(f"{folder} and --output {output} both say where to write: give one.")
    path = output or (folder or Path()) / "study.toml"
    choices = StudyChoices(model=model, data=data, name=name, gpu=gpu)
    try:
        init_command(path, choices, force=force, may_ask=not yes)
    except typer.Abort:  # Ctrl-C or Ctrl-D at a question
        typer.echo("\nlora-tune: interrupted; nothing was written.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


@app.command()
def check(study: StudyFileArgument, gpu: GpuOption = None, as_json: JsonOption = False) -> None:
    """Show what a study will do: rows, what fits, trials, hours, disk; trains nothing."""
    from lora_tune.commands.check import check as check_command

    check_command(study, gpu=gpu, as_json=as_json)


@app.command()
def run(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY",
            help="A study file, or a started study's folder or name.",
            autocompletion=studies_and_files,
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be done, as check does.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Events on standard output, one JSON object a line.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress on standard error.")
    ] = False,
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="Let select.metrics name functions of your own modules."),
    ] = False,
) -> None:
    """Run a study to its end, or go on with one that was interrupted."""
    if dry_run:
        from lora_tune.commands.run import dry_run as dry_run_command

        dry_run_command(study, as_json=as_json)
        return
    try:
        with stoppable():
            from lora_tune.commands.run import run as run_command

            run_command(
                study,
                command=shlex.join(["lora-tune", *sys.argv[1:]]),
                allow_code=allow_code,
                as_json=as_json,
                quiet=quiet,
            )
    except KeyboardInterrupt:  # typer would end without a word
        keep_exit_code()
        typer.echo(f"\nlora-tune: interrupted; {_GOES_ON}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


@app.command()
def best(study: StudyArgument = None, as_json: JsonOption = False) -> None:
    """Show the recommended configuration, ready to paste."""
    from lora_tune.commands.best import best as best_command

    best_command(study, as_json=as_json)


@app.command()
def report(
    studies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STUDY",
            help=f"{STUDY_HELP} Several are shown side by side.",
            autocompletion=started_studies,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder to write to, instead of the study's own."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a study's report again from its folder, or compare several studies."""
    from lora_tune.commands.report import report as report_command

    report_command(studies or (), output=output, as_json=as_json)


@app.command()
def export(
    study: StudyArgument = None,
    *,
    target: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TARGET",
            help=f"One of {', '.join(TARGETS)}.",
            autocompletion=export_targets,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The folder to write, instead of export/TARGET in the study's own."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="GPU",
            help="The GPU whose memory the other framework has; the study's own if not given.",
            autocompletion=catalogue_gpus,
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload an adapter or a merged model to the hub."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: a repository that everyone may read.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a folder that exists.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take the winner elsewhere: as a model, or as another framework's settings."""
    from lora_tune.commands.export import export as export_command

    export_command(
        study,
        target=target,
        output=output,
        gpu=gpu,
        push=push,
        public=public,
        force=force,
        as_json=as_json,
    )


@app.command()
def verify(
    study: StudyArgument = None,
    trial: Annotated[
        int | None,
        typer.Option(help="A trial that finished a rung; the winner if not given.", min=0),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Further plain runs with other seeds: the seed noise.", min=0)
    ] = 2,
    as_json: JsonOption = False,
) -> None:
    """Train a finished trial again by plain PEFT and torch, and compare."""
    from lora_tune.commands.verify import verify as verify_command

    try:
        agrees = verify_command(study, trial=trial, num_seeds=seeds, as_json=as_json)
    except KeyboardInterrupt:
        typer.echo("\nlora-tune: interrupted; nothing was written.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if not agrees:
        raise typer.Exit(EXIT_DIFFERS)


@app.command()
def doctor(
    study: StudyArgument = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Remove what killed runs left behind.")
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Make a damaged database again from the records, or lost records from it.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Look for damage in a study's folder, and mend it if asked to."""
    from lora_tune.commands.doctor import doctor as doctor_command

    if not doctor_command(study, fix=fix, rebuild=rebuild, as_json=as_json):
        raise typer.Exit(StoreError.exit_code)


app.command()(estimate)


@app.command()
def schema() -> None:
    """Print the JSON Schema of study.toml, for editors."""
    from lora_tune.commands.schema import schema as schema_command

    schema_command()


def main() -> None:
    """Run the command line; a ``LoraTuneError`` becomes one message and its exit code."""
    try:
        app()
    except LoraTuneError as error:
        typer.echo(f"lora-tune: {redact(str(error))}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        keep_exit_code()
        typer.echo(f"\nlora-tune: interrupted; {_GOES_ON}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except Terminated:
        typer.echo(f"lora-tune: stopped by a signal; {_GOES_ON}", err=True)
        sys.exit(EXIT_RESUMABLE)
    except Exception as error:
        if isinstance(error, OSError) and is_full(error):
            _end_without_room(error)
        # A bug keeps its traceback, which people paste into reports: without what looks like a credential.
        typer.echo(redact(traceback.format_exc()), err=True, nl=False)
        sys.exit(EXIT_BUG)


def _end_without_room(error: OSError) -> NoReturn:
    what = error.filename or "standard output or a file"
    typer.echo(
        redact(f"lora-tune: {what} cannot be written ({error.strerror}). Make room and try again."),
        err=True,
    )
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    sys.exit(MachineError.exit_code)
