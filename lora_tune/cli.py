"""The commands' signatures and exit codes. Imports the rest only when a command runs.

Exit codes: 0 finished; 1 a bug; 2 usage; 3 study file or data; 4 study folder; 5 nothing fits the memory;
6 all trials failed; 7 this machine; 8 the base model; 9 packed and plain training differ (verify); 75 stopped
by SIGTERM, the same command goes on; 130 interrupted.
"""

import shlex
import sys
from typing import Annotated

import typer

from lora_tune import __version__
from lora_tune.errors import LoraTuneError, Terminated

EXIT_DIFFERS = 9
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
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="Let select.metrics name functions of your own modules."),
    ] = False,
) -> None:
    """Run a study to its end, or go on with one that was interrupted."""
    from lora_tune.commands.run import run as run_command

    run_command(study, command=shlex.join(["lora-tune", *sys.argv[1:]]), allow_code=allow_code)


@app.command()
def check(
    study: Annotated[str, typer.Argument(help="A study file.")],
    gpu: Annotated[
        str | None,
        typer.Option(help="A GPU of the catalogue or a size, instead of the study's memory.gpu."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """Show the plan of a study: what fits, trials, hours; trains nothing."""
    from lora_tune.commands.check import check as check_command

    check_command(study, gpu=gpu, as_json=as_json)


@app.command()
def report(study: StudyArgument = None) -> None:
    """Make a study's tables and report again from its folder."""
    from lora_tune.commands.report import report as report_command

    report_command(study)


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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
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
def estimate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A catalogue name, a hub id, a folder, a config.json or a GGUF file.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    targets: Annotated[
        str,
        typer.Option(
            help="Adapted layers: all-linear, attention, attention-qv, mlp, or module names NAME,NAME."
        ),
    ] = "all-linear",
    dropout: Annotated[float, typer.Option(help="Dropout on the adapter's input.")] = 0.0,
    quantization: Annotated[
        str, typer.Option(help="Base: nf4 (double quantization), nf4-single or none.")
    ] = "nf4",
    dtype: Annotated[
        str, typer.Option(help="Compute type: bfloat16, float16 or float32.")
    ] = "bfloat16",
    batch_size: Annotated[int, typer.Option(help="Rows of a micro-batch, for each lane.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens a row, padding included.")] = 2048,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Micro-batches per optimizer step.")
    ] = 1,
    label_fraction: Annotated[
        float, typer.Option(help="Share of the tokens that carry a label.")
    ] = 1.0,
    lanes: Annotated[int, typer.Option(help="Adapters trained together on one base.")] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Keep only each layer's input and compute the rest again.",
        ),
    ] = True,
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw-8bit or paged-adamw-8bit.")
    ] = "adamw",
    adapter_dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; the stack's own if not given.")
    ] = None,
    autocast: Annotated[
        bool | None,
        typer.Option("--autocast/--no-autocast", help="The stack's own habit if not given."),
    ] = None,
    attention: Annotated[str, typer.Option(help="sdpa, flash or eager.")] = "sdpa",
    padded: Annotated[
        bool, typer.Option("--padded/--no-padded", help="Rows of unequal length in a batch.")
    ] = False,
    outputs: Annotated[
        str,
        typer.Option(
            help="dropped, or held: the caller keeps the model's outputs through backward."
        ),
    ] = "dropped",
    stack: Annotated[
        str, typer.Option(help="What trains: lora-tune, trainer, trainer-kbit or trl.")
    ] = "lora-tune",
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="A GPU of the catalogue, a size such as 24GiB, or auto: what is free here. Repeatable."
        ),
    ] = None,
    all_gpus: Annotated[
        bool, typer.Option("--all-gpus", help="Every GPU of the catalogue.")
    ] = False,
    solve: Annotated[
        str | None,
        typer.Option(
            help="Find what just fits the GPU: max-rank, max-length, max-batch, max-lanes; or min-gpu."
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Trace a real step instead of the closed form; slow.")
    ] = False,
    full_depth: Annotated[
        bool, typer.Option("--full-depth", help="With --exact: run every layer, not a few of them.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to train: gives the hours on each GPU.")
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(help="GPU=PER_HOUR: gives the cost of --tokens or --study. Repeatable."),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="A study file: what of its whole space fits. Instead of MODEL."),
    ] = None,
    catalogue: Annotated[
        bool, typer.Option("--list", help="Show the catalogue of models and GPUs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
    require_fit: Annotated[
        bool, typer.Option("--require-fit", help="Exit 5 unless every GPU given fits.")
    ] = False,
) -> None:
    """Estimate the memory of a LoRA or QLoRA run, without a GPU and without torch."""
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }
    if [catalogue, study is not None, model is not None].count(True) != 1:
        raise typer.BadParameter(
            "give a MODEL, --study FILE or --list, one of them (lora-tune estimate --list shows "
            "models and GPUs).",
            param_hint="MODEL",
        )
    if catalogue:
        from lora_tune.commands.estimate_catalogue import show_catalogue

        show_catalogue(as_json=as_json, given=given)
        return
    if study is not None:
        from lora_tune.commands.estimate_study import StudyQuestion, estimate_study

        question = StudyQuestion(
            gpus=tuple(gpu or ()), all_gpus=all_gpus, tokens=tokens, prices=tuple(price or ())
        )
        estimate_study(
            study,
            question,
            as_json=as_json,
            require_fit=require_fit,
            given=given,
        )
        return
    from lora_tune.commands.estimate import estimate as estimate_command
    from lora_tune.commands.estimate_options import EstimateOptions

    assert model is not None
    options = EstimateOptions(
        model=model,
        rank=rank,
        targets=targets,
        dropout=dropout,
        quantization=quantization,
        dtype=dtype,
        batch_size=batch_size,
        max_length=max_length,
        gradient_accumulation_steps=gradient_accumulation_steps,
        label_fraction=label_fraction,
        lanes=lanes,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        adapter_dtype=adapter_dtype,
        autocast=autocast,
        attention=attention,
        padded=padded,
        outputs=outputs,
        stack=stack,
        gpus=tuple(gpu or ()),
        all_gpus=all_gpus,
        solve=solve,
        exact=exact,
        full_depth=full_depth,
        tokens=tokens,
        prices=tuple(price or ()),
        written=frozenset(given),
    )
    estimate_command(options, as_json=as_json, require_fit=require_fit)


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
