"""The same inputs and the same judgement as ``fuzz_inputs.py``, guided by atheris (libFuzzer).

    pip install atheris
    python tests/faults/fuzz_with_atheris.py -atheris_runs=20000 -seed=1 -timeout=5 CORPUS

atheris is no dependency of the project. It counts edges of the bytecode instead of steps between lines, and
its own mutator of bytes takes turns with the one that knows the grammar. A finding ends the run; its input is
kept as ``crash-*`` or ``timeout-*`` in the working directory.
"""

import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["lora_tune.study", "lora_tune.data", "tomllib"]):
    from fuzz_inputs import outcome_of
    from fuzz_mutations import DATA_KINDS, MOST_BYTES, Input, mutated, options_of, seeds

KINDS = ("study", *DATA_KINDS)
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz."))


def as_input(data: bytes) -> Input:
    """Return what bytes stand for: a kind, a number for the options, and the file's content."""
    kind = KINDS[data[0] % len(KINDS)] if data else "study"
    options = {} if kind == "study" else options_of(Random(data[1:2]))
    return Input(kind, data[2:], options)


def as_bytes(item: Input, options: int) -> bytes:
    """Return an input as bytes that stand for it."""
    return bytes([KINDS.index(item.kind), options]) + item.content


def read_one(data: bytes) -> None:
    """Read an input; what is neither taken nor refused in words is a finding."""
    outcome = outcome_of(as_input(data), FOLDER)
    if outcome not in ("taken", "refused"):
        raise AssertionError(outcome)


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Change an input, by the grammar or by bytes."""
    random = Random(seed)
    item = as_input(data)
    if random.random() < 0.5:
        other = random.choice([seed for seed in SEEDS if seed.kind == item.kind])
        return as_bytes(mutated(item, other, random), random.randrange(256))[:most]
    return bytes(data[:1]) + bytes(atheris.Mutate(data[1:], most - 1))


SEEDS = seeds()

if __name__ == "__main__":
    places = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    for place in places[:1]:
        place.mkdir(parents=True, exist_ok=True)
        for number, item in enumerate(SEEDS):
            (place / f"seed-{number}").write_bytes(as_bytes(item, 0))
    atheris.Setup([*sys.argv, f"-max_len={MOST_BYTES}"], read_one, custom_mutator=mutate)
    atheris.Fuzz()
