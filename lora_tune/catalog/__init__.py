"""Tables with sources: GPUs, target-module sets, base models that need no hub."""
