"""The targets of ``lora-tune export``: what each makes, and what it needs of the study."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A row of the table; the module of the same name in this room does the work."""

    name: str
    makes: str
    needs_adapter: bool  # else the winner's settings are enough
    uses_gpu: bool = False  # whether --gpu has a meaning
    can_be_pushed: bool = False


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="adapter",
            makes="PEFT folder with its model card",
            needs_adapter=True,
            can_be_pushed=True,
        ),
        Target(
            name="merged",
            makes="base and adapter as one model in 16 bit, scored again",
            needs_adapter=True,
            can_be_pushed=True,
        ),
        Target(
            name="axolotl", makes="axolotl configuration file", needs_adapter=False, uses_gpu=True
        ),
        Target(
            name="llamafactory",
            makes="LLaMA-Factory configuration file",
            needs_adapter=False,
            uses_gpu=True,
        ),
        Target(name="trl", makes="training script for TRL", needs_adapter=False, uses_gpu=True),
        Target(name="vllm", makes="serve command for vLLM", needs_adapter=True),
        Target(name="ollama", makes="Modelfile for Ollama", needs_adapter=True),
        Target(name="gguf", makes="merged model and llama.cpp commands", needs_adapter=True),
    )
}
