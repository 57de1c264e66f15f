"""docs/memory.md: its rules of thumb against the trace, its tables and output against the command.

A rule is checked twice: the traced bytes against a sum by hand where there is one, and the numbers that
the page quotes in that section against the traced ones. The worked example is redone from the sizes
of the model alone.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import pytest

from lora_tune import cli
from lora_tune.hub import find_config
from lora_tune.memory.estimate import trainable_parameters
from lora_tune.memory.request import LaneShape, resolve_request
from lora_tune.memory.shape import ModelShape
from lora_tune.records import MemoryEstimate
from lora_tune.trace.estimate import trace_memory
from lora_tune.units import GIB

Capture = pytest.CaptureFixture[str]

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
QV = ("q_proj", "v_proj")
QKVO = ("q_proj", "v_proj", "k_proj", "o_proj")
ALL = (*QKVO, "gate_proj", "up_proj", "down_proj")
EIGHT = "llama-3.1-8b"
H, F, K, HEADS, V, LAYERS = 4096, 14336, 1024, 32, 128256, 32
ADAPTER = 41_943_040  # parameters at rank 16 on all linear layers


@cache
def traced(
    *,
    model: str = EIGHT,
    stack: str = "trainer",
    targets: tuple[str, ...] = ALL,
    rank: int = 16,
    dropout: float = 0.05,
    rows: int = 1,
    length: int = 512,
    checkpointing: bool = True,
    accumulation: bool = False,
    optimizer: str = "adamw",
    attention: str = "sdpa",
) -> MemoryEstimate:
    """Return the trace of a configuration; each is traced once."""
    request = resolve_request(
        stack=stack,
        quantization="nf4",
        compute_dtype="bfloat16",
        lanes=(LaneShape(rank=rank, targets=targets, lora_dropout=dropout),),
        micro_batch_size=rows,
        max_length=length,
        gradient_checkpointing=checkpointing,
        gradient_accumulation=accumulation,
        optimizer=optimizer,
        attention=attention,
    )
    return trace_memory(find_config(model, base_dir=Path()).config, request)


def peak(**settings: object) -> int:
    return traced(**settings).peak_allocated_bytes


def kept(**settings: object) -> int:
    """Return the peak of 4 rows of 2,048 tokens without checkpointing."""
    return peak(rows=4, length=2048, checkpointing=False, **settings)


def section(title: str) -> str:
    """Return what the page says below a heading, line breaks as spaces."""
    rest = PAGE.partition(f"\n### {title}\n")[2]
    assert rest, f"no section {title!r} in the page"
    return " ".join(re.split(r"\n#+ ", rest)[0].split())


def quotes(title: str, *numbers: str) -> None:
    """Require that the section has these numbers, as whole words."""
    text = section(title)
    for number in numbers:
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", text), f"{title}: {number}"


def gib(num_bytes: float, digits: int = 2) -> str:
    return f"{num_bytes / GIB:.{digits}f}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


# Rules of thumb.


def test_a_further_target_costs_its_adapter_when_layers_are_checkpointed() -> None:
    def cost(*inputs_and_outputs: int) -> int:
        # rank 16 on 32 layers, 12 bytes a parameter, and two step counters of 512 bytes a layer
        return sum((12 * 16 * size + 2 * 512) * LAYERS for size in inputs_and_outputs)

    two, seven = peak(targets=QV), peak()
    by_v, by_down = cost(H + K), cost(F + H)
    assert seven - two == cost(H + K, H + H) + 3 * by_down
    assert percent(by_v / (two - by_v), 2) == "0.47 %"
    assert percent(by_down / (seven - by_down), 2) == "1.61 %"
    quotes(
        '"Each further target module costs 15 to 20 % memory"',
        "0.47 %",
        gib(by_v, 3),
        "1.61 %",
        gib(by_down, 3),
        percent(seven / two - 1),
    )


def test_a_further_target_costs_15_percent_only_for_down_proj_without_checkpointing() -> None:
    def cost(inputs: int, outputs: int, *, first: bool = False) -> int:
        # a token: copy, mask and the rank-16 product; a parameter: itself, two states, autocast's
        # copy; two step counters. Layer 0 needs neither the masks nor the A copies of q, k and v.
        a_token, a_parameter = 3 * inputs + 2 * 16, 12 + 2
        whole = 4 * 2048 * a_token + a_parameter * 16 * (inputs + outputs) + 2 * 512
        spared = 4 * 2048 * inputs + 2 * 16 * inputs if first else 0
        return LAYERS * whole - spared

    by_v = cost(H, K, first=True)
    costs = [by_v, by_v, cost(H, H), cost(H, F), cost(H, F), cost(F, H)]
    peaks = list(accumulate(costs, initial=kept(targets=QV) - by_v))
    assert kept() == peaks[-1]
    rises = [percent(after / before - 1) for before, after in pairwise(peaks)]
    assert rises == ["5.6 %", "5.3 %", "5.1 %", "5.0 %", "4.7 %", "15.3 %"]
    quotes('"Each further target module costs 15 to 20 % memory"', *rises, *(gib(x) for x in peaks))


def test_fewer_targets_free_much_only_without_checkpointing() -> None:
    saved = peak() - peak(targets=QV)  # adapters and states: the same at any number of tokens
    saved_kept = kept() - kept(targets=QV)
    assert percent(saved / peak(rows=4, length=2048)) == "2.0 %"
    assert percent(saved_kept / kept()) == "28.7 %"
    quotes(
        '"Dropping to q_proj and v_proj frees an enormous amount of VRAM"',
        gib(saved),
        "2.0 %",
        gib(saved_kept),
        "28.7 %",
        gib(kept()),
        gib(peak(rows=4, length=2048)),
    )


def test_half_the_rank_saves_a_few_percent() -> None:
    short, long = peak(), peak(rows=4, length=2048)
    saved = short - peak(rank=8)
    assert saved == 12 * ADAPTER // 2  # at any number of tokens
    tokens = (long - short) / (4 * 2048 - 512)
    assert 14.5 < 2048 * tokens / saved < 15
    quotes(
        '"Halving the rank cures out-of-memory"',
        f"{ADAPTER // 2:,}",
        f"{saved:,}",
        gib(saved),
        percent(saved / short),
        percent(saved / long),
    )


def test_a_70b_model_does_not_fit_24_gb() -> None:
    smallest = {"targets": QV, "rank": 8, "dropout": 0.0, "length": 128}
    found = traced(model="llama-3.1-70b", **smallest)
    # by hand: q, k, v, o and the MLP of 80 layers in NF4; embeddings, head and norms in 16 bit
    weights = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    nf4 = weights // 2 + weights // 64 + 4 * weights // 16384 + 560 * (64 + 1024 + 4)
    older, newer = (nf4 + 2 * 2 * words * 8192 + 161 * 2 * 8192 for words in (32000, V))
    assert found.terms["base_weights"] == newer
    quotes(
        '"A 70B model fits a 24 GB card with QLoRA"',
        gib(newer),
        f"{newer / 1e9:.2f} GB",
        gib(older),
        gib(found.peak_allocated_bytes),
        gib(found.terms["optimizer"]),
    )


def test_rank_16_on_all_linear_layers_is_41_9_million_parameters() -> None:
    sums = 2 * (H + H) + 2 * (H + K) + 3 * (H + F)
    attention = 2 * (H + H) + 2 * (H + K)
    assert traced().trainable_parameters == 16 * sums * LAYERS == ADAPTER
    assert traced(rank=8).trainable_parameters == ADAPTER // 2
    assert traced(targets=QV).trainable_parameters == 16 * (2 * H + H + K) * LAYERS
    mistral = ModelShape.from_config(find_config("mistral-7b-v0.1", base_dir=Path()).config)
    lane = LaneShape(rank=16, targets=QKVO, lora_dropout=0.0)
    assert trainable_parameters(mistral, lane) == 16 * attention * LAYERS == 13_631_488
    quotes(
        '"83.9 M trainable parameters at r = 16"',
        *(f"{count:,}" for count in (ADAPTER, 83_886_080, 13_631_488)),
    )


@pytest.mark.parametrize(
    ("model", "per_parameter", "less"),
    [
        (EIGHT, "0.710", "64.5 %"),
        ("qwen2.5-0.5b", "0.925", "53.7 %"),
    ],
)
def test_nf4_takes_more_than_half_a_byte_a_parameter(
    model: str, per_parameter: str, less: str
) -> None:
    found = traced() if model == EIGHT else traced(model=model, dropout=0.0, length=128)
    share = found.terms["base_weights"] / found.base_parameters
    assert (f"{share:.3f}", percent(1 - share / 2)) == (per_parameter, less)
    title = '"NF4 takes half a byte a parameter", "4 bit cuts the weights by 75 %"'
    quotes(title, per_parameter, less)
    if model == EIGHT:
        quotes(title, gib(found.base_parameters / 2), gib(found.terms["base_weights"]))


def test_checkpointing_has_no_one_factor() -> None:
    def factor(**settings: object) -> float:
        with_it = traced(**settings)
        without = traced(checkpointing=False, **settings)
        return with_it.terms["activations"] / without.terms["activations"]

    wide = {"rows": 4, "length": 2048}
    factors = [f"{factor():.3f}", f"{factor(stack='lora-tune', **wide):.3f}"]
    assert factors == ["0.033", "0.084"]
    falls = [1 - peak() / peak(checkpointing=False), 1 - peak(**wide) / kept()]
    assert [f"{100 * fall:.0f} %" for fall in falls] == ["37 %", "75 %"]
    quotes('"Gradient checkpointing multiplies activations by 0.15"', *factors, "37 %", "75 %")


def test_dropout_is_free_only_where_a_checkpointed_step_peaks_at_the_loss() -> None:
    assert peak() == peak(dropout=0.0)
    assert traced().peak_phase == "loss"
    own, without = (
        peak(stack="lora-tune", rows=4, length=2048, dropout=dropout) for dropout in (0.05, 0.0)
    )
    assert own > without
    cost = kept() - kept(dropout=0.0)
    # copies and masks: 18h + 3f a token and layer with, 4h + 2f without; layer 0 keeps no masks of q, k, v
    assert cost == 4 * 2048 * (LAYERS * (14 * H + F) - 3 * H)
    quotes(
        '"Dropout is free"',
        gib(own),
        gib(without),
        gib(kept()),
        gib(kept(dropout=0.0)),
        gib(cost),
    )


def test_kbit_preparation_costs_memory() -> None:
    short = peak(stack="trainer-kbit") - peak()
    # two bytes more a word of embeddings and head, a norm's weight, a checkpoint, a rotary entry;
    # and autocast's bfloat16 copy of the head
    outside = 2 * 2 * V * H + 2 * 65 * H + 2 * V * H
    assert short == outside + 2 * H * LAYERS * 512 + 2 * 2 * 128 * 512
    long = outside + 2 * H * LAYERS * 4 * 2048 + 2 * 2 * 128 * 2048  # as the page's table has it
    quotes(
        '"Prepare the model for k-bit training to save memory"',
        gib(short),
        gib(peak()),
        gib(peak(stack="trainer-kbit")),
        gib(long),
    )


def test_a_paged_8_bit_optimizer_saves_little() -> None:
    states = traced().terms["optimizer"]
    saved = peak() - peak(optimizer="paged-adamw-8bit")
    assert states == 8 * ADAPTER
    assert gib(saved, 3) == "0.233"
    quotes(
        '"A paged 8-bit optimizer makes it fit"',
        gib(states),
        percent(states / peak()),
        gib(saved),
        percent(saved / peak()),
    )


def test_rows_and_tokens_count_alike_unless_attention_is_eager() -> None:
    def both(**settings: object) -> tuple[int, int]:
        return peak(rows=4, **settings), peak(length=2048, **settings)

    rows, tokens = both()
    # rotary tables of the longer row, and its positions
    assert tokens - rows == (2 * 2 * 128 + 8) * (2048 - 512)
    share = percent(tokens / rows - 1, 3)
    assert share == "0.008 %"
    rows, tokens = both(checkpointing=False, attention="eager")
    # float32 and bfloat16 probabilities of every pair of positions, 2,048 tokens in all
    assert tokens - rows == pytest.approx(6 * HEADS * (2048 - 512) * 2048 * LAYERS, rel=1e-4)
    quotes(
        '"Halving the batch or halving the length saves the same"',
        share,
        gib(rows),
        gib(tokens),
    )


def test_accumulation_keeps_one_gradient() -> None:
    cost = peak(accumulation=True) - peak()
    assert cost == 4 * ADAPTER
    quotes('"Gradient accumulation costs no memory"', f"{cost:,}", percent(cost / peak()))
    ours = peak(stack="lora-tune")
    assert peak(stack="lora-tune", accumulation=True) == ours
    assert traced(stack="lora-tune").terms["gradients"] == 4 * ADAPTER


def test_the_engine_keeps_what_the_page_says_of_its_layer() -> None:
    asked = {"stack": "lora-tune", "rows": 4, "length": 2048, "checkpointing": False}
    tokens, inputs = 4 * 2048, 6 * H + F
    masks = peak(**asked) - peak(dropout=0.0, **asked)
    assert masks == LAYERS * tokens * inputs
    # twice the rank: the product and the copies of A and B; adapter, gradient and both states
    kept = LAYERS * 2 * 16 * (7 * tokens + 81_920)
    assert peak(rank=32, **asked) - peak(**asked) == kept + 16 * ADAPTER


# The worked example, the tables, and the output shown.


def answer(capsys: Capture, options: str) -> dict[str, object]:
    """Return what the command says, on a device of an unknown kind with room for everything."""
    previous, sys.argv = sys.argv, ["lora-tune", "estimate", *shlex.split(options)]
    sys.argv += ["--json", "--gpu", "1000GiB"]
    code: object = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = previous
    found = json.loads(capsys.readouterr().out)
    assert not code
    assert isinstance(found, dict)
    return found


def test_the_sums_of_the_worked_example_are_what_the_command_says(capsys: Capture) -> None:
    tokens, matrices = 512, 2 * 7 * LAYERS
    weights = LAYERS * (2 * H * H + 2 * H * K + 3 * H * F)
    nf4 = weights // 2 + weights // 64 + 4 * weights // 16384 + 224 * (64 + 1024 + 4)
    rotary = 2 * 2 * 128 * tokens
    terms = {
        "base_weights": nf4 + 2 * 2 * V * H + 65 * 2 * H,
        "adapters": 4 * ADAPTER,
        "gradients": 0,
        "optimizer": 8 * ADAPTER,
        "activations": LAYERS * 2 * H * tokens + (4 * H + 4) * tokens + rotary,
        "logits_and_loss": 12 * tokens * V,
        "workspace": (2 * 8_519_680 + 2**20)
        + (512 * matrices + 224 * (448 + 508) + 4 * 8 * tokens + 2 * 512),
    }
    options = f"{EIGHT} --stack trainer --dropout 0.05 --max-length 512"
    found = answer(capsys, options)
    assert found["terms"] == terms
    assert found["peak_allocated_bytes"] == sum(terms.values())
    per_token = 30 * H + 4 * K + 9 * F + 14 * 16 + 4 * HEADS + 8
    copies = 2 * 16 * (2 * (H + H) + 2 * (H + K) + 3 * (H + F))
    activations = LAYERS * (per_token * tokens + copies + 1024) + rotary - 3 * H * tokens
    without = answer(capsys, options + " --no-gradient-checkpointing")
    assert without["terms"] == terms | {"activations": activations}
    apart = activations - traced(checkpointing=False).terms["activations"]
    shown = [*terms.values(), sum(terms.values()), per_token, activations, apart]
    for number in (*shown, 14 * tokens * V, weights, nf4 + 2 * 2 * V * H + 65 * 2 * H):
        assert f"{number:,}" in PAGE, number


def table_rows() -> list[tuple[str, str, list[str]]]:
    """Return the rows whose first cell is options: options, the table's header, the other cells."""
    rows = []
    for table in re.findall(r"^\| options \|.*\n\|[-|]+\n(?:\|.*\n)+", PAGE, re.MULTILINE):
        header, _, *lines = table.splitlines()
        for line in lines:
            options, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows.append((options.strip("`"), header, cells))
    return rows


def test_the_tables_of_options_show_what_the_command_says(capsys: Capture) -> None:
    rows = table_rows()
    assert len(rows) > 15
    start = answer(capsys, f"{EIGHT} --dropout 0.05 --stack trainer --batch-size 4")
    most = start["peak_allocated_bytes"]
    for options, header, cells in rows:
        if "saves" in header:
            found = answer(capsys, f"{EIGHT} --dropout 0.05 {options}")["peak_allocated_bytes"]
            saved = gib(most - found) if found != most or cells[1] else ""  # type: ignore[operator]
            assert cells[:2] == [gib(found), saved], options  # type: ignore[arg-type]
            continue
        asked = re.findall(r"`([^`]+)`", header)
        for cell, more in zip(cells, asked, strict=True):
            found = answer(capsys, f"{EIGHT} --dropout 0.05 {options} {more}")
            assert cell == gib(found["peak_allocated_bytes"]), f"{options} {more}"  # type: ignore[arg-type]


def shown_commands() -> list[tuple[str, str]]:
    """Return the estimates that this page and the README show: the command, what it prints."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    in_readme = r"```\n(lora-tune estimate .*)\n```\n\n```\n((?:.*\n)+?)```"
    found = re.findall(in_readme, readme)
    assert found
    return found + re.findall(r"```console\n\$ (lora-tune .*)\n((?:.*\n)+?)```", PAGE)


@pytest.mark.parametrize(("command", "shown"), shown_commands())
def test_the_output_shown_is_what_the_command_prints(command: str, shown: str) -> None:
    printed = subprocess.run(
        [sys.executable, "-c", "from lora_tune.cli import main; main()", *command.split()[1:]],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = "\n".join(line.rstrip() for line in printed.splitlines())
    for part in shown.split("...\n"):
        assert part.strip("\n") in lines, f"{command} now prints:\n{lines}"
