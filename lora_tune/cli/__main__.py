"""``python -m lora_tune.cli``: the same as the ``lora-tune`` command."""

from lora_tune.cli import main

main()
