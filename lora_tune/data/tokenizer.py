"""The base model's tokenizer, if it is on this machine: nothing is downloaded and no weight is read."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_tune.hub import find_tokenizer_source


def local_tokenizer(
    base: str, *, revision: str | None, base_dir: Path
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of ``model.base`` from a folder, a GGUF file or the hub's cache.

    Args:
        base: As in the study file.
        revision: Hub revision.
        base_dir: Folder of the study file.

    Returns:
        The tokenizer; None if this machine has none of that model.
    """
    source = find_tokenizer_source(base, base_dir=base_dir)
    where = {"gguf_file": source.gguf_file} if source.gguf_file else {"revision": revision}
    try:
        return AutoTokenizer.from_pretrained(
            source.place, local_files_only=True, trust_remote_code=False, **where
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
