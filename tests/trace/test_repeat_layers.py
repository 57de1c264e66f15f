"""Depths to trace, and what becomes of a history when layers are repeated.

Depths are worked out by hand; a small written history shows what is copied, and damaged
histories must be refused rather than repeated.
"""

import pytest

from lora_tune.trace.repeat import Depth, choose_depth, repeat_layers
from lora_tune.trace.tracker import STATIC, Block, BlockName, History, Storage, StorageKey

DEPTH = Depth(num_layers=8, traced=5, period=1)


@pytest.mark.parametrize(
    ("kinds", "traced", "period"),
    [
        ("a" * 32, 5, 1),
        ("a" * 6, 5, 1),
        ("a" * 5, 5, 0),  # nothing to repeat
        ("a" * 2, 2, 0),
        ("ab" * 13, 6, 2),
        ("ab" * 13 + "a", 7, 2),  # 27 layers: an odd number is traced
        ("bbbbbf" * 5 + "bbbb", 10, 6),  # 34 layers of Gemma-3
        ("bbbbbf" * 4 + "bb", 14, 6),  # 26 layers
        ("x" + "a" * 31, 5, 1),  # layer 0 may differ
        ("a" * 16 + "b" * 16, 32, 0),  # nothing repeats
    ],
)
def test_as_few_layers_are_traced_as_stand_for_all(kinds: str, traced: int, period: int) -> None:
    depth = choose_depth(list(kinds), full_depth=False)
    assert (depth.traced, depth.period) == (traced, period)
    assert depth.traced + depth.copies * depth.period == len(kinds)
    assert choose_depth(list(kinds), full_depth=True).traced == len(kinds)


def test_every_layer_of_the_model_is_stood_for_once() -> None:
    for depth in (DEPTH, Depth(num_layers=34, traced=10, period=6)):
        real = [number for layer in range(depth.traced) for number in depth.real_layers(layer)]
        assert sorted(real) == list(range(depth.num_layers))


def storage(kind: str, layer: int, number: int, num_bytes: int = 1000) -> Storage:
    return Storage(StorageKey(BlockName(kind, layer), number), num_bytes, "activations", "op")


def written_history() -> History:
    """Five layers: each keeps one storage until its own backward, and passes its output on."""
    static = [Storage(StorageKey(STATIC, layer), 10, "base", "", layer) for layer in range(5)]
    blocks = [Block(BlockName("outside", 0), "forward")]
    outputs = [storage("outside", 0, 0)]
    blocks[0].events.append((True, outputs[0]))
    kept = []
    for layer in range(5):
        kept.append(storage("forward", layer, 0))
        outputs.append(storage("forward", layer, 1))
        events = [(True, kept[-1]), (True, outputs[-1]), (False, outputs[-2])]
        blocks.append(Block(BlockName("forward", layer), "forward", events, 2))
    blocks.append(Block(BlockName("outside", 1), "loss", [(False, outputs[-1])]))
    blocks += [
        Block(BlockName("backward", layer), "backward", [(False, kept[layer])])
        for layer in reversed(range(5))
    ]
    return History(static, blocks)


def test_the_middle_layer_is_repeated_with_storages_of_its_own() -> None:
    repeated = repeat_layers(written_history(), DEPTH)
    assert repeated is not None
    order = [block.name.layer for block in repeated.blocks if block.name.kind == "forward"]
    assert order == list(range(8))
    back = [block.name.layer for block in repeated.blocks if block.name.kind == "backward"]
    assert back == list(reversed(range(8)))
    assert [s.layer for s in repeated.static] == list(range(8))
    alive: set[StorageKey] = set()
    most = 0
    for block in repeated.blocks:
        for made, found in block.events:
            assert made != (found.key in alive)
            alive ^= {found.key}
            most = max(most, len(alive))
    assert not alive
    assert most == 8 + 2  # one kept by each layer; an input and an output


def test_a_layer_that_makes_something_else_is_not_repeated() -> None:
    history = written_history()
    odd = next(b for b in history.blocks if b.name == BlockName("forward", 1))
    odd.events[0] = (True, storage("forward", 1, 0, num_bytes=2000))
    assert repeat_layers(history, DEPTH) is None


def test_a_layer_that_ends_what_is_not_its_own_is_not_repeated() -> None:
    history = written_history()
    middle = next(b for b in history.blocks if b.name == BlockName("backward", 2))
    shared = storage("outside", 0, 1)
    history.blocks[0].events.append((True, shared))
    middle.events.append((False, shared))
    assert repeat_layers(history, DEPTH) is None
