"""``lora-tune estimate --list``: the models and GPUs that are known by name."""

import json

from lora_tune.catalog.gpus import Gpu, load_gpus
from lora_tune.catalog.models import CatalogModel, load_models
from lora_tune.commands.estimate_options import refuse_others
from lora_tune.memory.shape import ModelShape


def show_catalogue(*, as_json: bool, given: set[str]) -> None:
    """Print the catalogue of models and GPUs.

    Args:
        as_json: One object instead of two tables.
        given: Names of the options that the user wrote.

    Raises:
        StudyFileError: An option was given that the list does not take.
    """
    refuse_others(given, allowed={"catalogue", "as_json"}, why="--list shows the catalogue")
    models, gpus = load_models(), load_gpus()
    if as_json:
        found = {"models": [_model(row) for row in models], "gpus": [_gpu(row) for row in gpus]}
        print(json.dumps(found, indent=2))
        return
    from lora_tune.report.estimate_tables import print_catalogue
    from lora_tune.report.terminal import open_console

    print_catalogue([(row, num_parameters(row)) for row in models], gpus, open_console())


def num_parameters(model: CatalogModel) -> int:
    """Return the model's parameters: the published count, else by its sizes."""
    return model.parameters or ModelShape.from_config(model.config).num_parameters


def _model(row: CatalogModel) -> dict[str, object]:
    return {
        "name": row.name,
        "hub_id": row.hub_id,
        "parameters": num_parameters(row),
        "model_type": row.config["model_type"],
        "same_shape": list(row.same_shape),
        "mirrors": list(row.mirrors),
        "license": row.license,
        "source": row.source,
    }


def _gpu(row: Gpu) -> dict[str, object]:
    return {
        "name": row.name,
        "usable_bytes": row.usable_bytes,
        "usable_is_read": row.usable_is_read,
        "bandwidth_gb_s": row.bandwidth_gb_s,
        "bf16_tflops": row.bf16_tflops,
        "compute_capability": row.compute_capability,
        "source": row.source,
    }
