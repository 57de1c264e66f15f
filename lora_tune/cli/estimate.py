"""The signature of ``lora-tune estimate``, which has an option for everything that memory depends on."""

from typing import Annotated

import typer

from lora_tune.cli.arguments import JsonOption, catalogue_gpus, catalogue_models, study_files


def estimate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A catalogue name, a hub id, a folder, a config.json or a GGUF file.",
            show_default=False,
            autocompletion=catalogue_models,
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
            help="A GPU of the catalogue, a size such as 24GiB, or auto: what is free here. Repeatable.",
            autocompletion=catalogue_gpus,
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
        typer.Option(
            help="A study file: what of its whole space fits. Instead of MODEL.",
            autocompletion=study_files,
        ),
    ] = None,
    catalogue: Annotated[
        bool, typer.Option("--list", help="Show the catalogue of models and GPUs.")
    ] = False,
    as_json: JsonOption = False,
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
