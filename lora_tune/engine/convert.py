"""A GGUF file to a folder of safetensors, once per file, kept in the user's cache.

transformers reads GGUF by dequantizing every tensor, which takes about half a minute for 135M
parameters; the folder it leaves loads in seconds.
"""

import io
import os
from contextlib import redirect_stderr
from pathlib import Path

import torch
import transformers

from lora_tune.errors import ModelError
from lora_tune.files import is_complete, publish_folder, sha256_of

_FORMAT = "v1"


def cache_folder() -> Path:
    """Return the folder for converted models: ``LORA_TUNE_CACHE``, or below the user's cache."""
    own = os.environ.get("LORA_TUNE_CACHE")
    if own:
        return Path(own)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lora-tune"


def converted_folder(gguf: Path) -> Path:
    """Return the folder with this GGUF file's config, tokenizer and bfloat16 safetensors.

    Raises:
        ModelError: The file is not a GGUF file that transformers can read.
    """
    target = cache_folder() / "models" / f"{gguf.stem}-{sha256_of(gguf)[:12]}-{_FORMAT}"
    if not is_complete(target):
        _convert(gguf, target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    try:
        # transformers draws a progress bar here that no setting of its own switches off
        with redirect_stderr(io.StringIO()):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"{gguf}: cannot be read as a GGUF model ({error})") from error
    # A model loaded from GGUF counts as quantized and refuses to be saved: its tensors go into
    # a model built from the same config without that mark.
    fields = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        fields.pop(key, None)
    config = type(loaded.config).from_dict(fields)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.config.dtype = torch.bfloat16
    with publish_folder(target) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
