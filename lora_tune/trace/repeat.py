"""The history of a deep model from that of a shallow one.

Decoder layers repeat with a period (1 for most, 2 for Gemma-2, 6 for Gemma-3). A traced model has two
layers at the front, one period in the middle, and at least two layers at the end; the middle is
repeated as often as the real model has it. A storage is named by the block that made it and its
number there, so that a copy's events name the storages of its own layer: block (forward, i) of copy
c becomes (forward, i + c * period), and what a block says about its neighbours moves with it.
This holds if neighbouring layers make the same storages in the same order, which is checked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lora_tune.trace.tracker import STATIC, Block, BlockName, History, Storage, StorageKey

HEAD_LAYERS = 2  # layer 0 differs: nothing before the first adapter needs a gradient
TAIL_LAYERS = 2  # the last layer's output goes to the final norm
LONGEST_PERIOD = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """How many layers are traced, and how often the middle ones stand for more."""

    num_layers: int  # of the real model
    traced: int
    period: int

    @property
    def copies(self) -> int:
        """How often the middle is repeated beyond the once that it was traced."""
        return (self.num_layers - self.traced) // self.period if self.period else 0

    def is_middle(self, layer: int) -> bool:
        """Say whether a traced layer is repeated."""
        return bool(self.copies) and HEAD_LAYERS <= layer < HEAD_LAYERS + self.period

    def real_layers(self, layer: int) -> range:
        """Return the numbers that a traced layer has in the real model."""
        if self.is_middle(layer):
            return range(layer, layer + self.copies * self.period + 1, self.period)
        shift = self.copies * self.period if layer >= HEAD_LAYERS else 0
        return range(layer + shift, layer + shift + 1)


def choose_depth(kinds: Sequence[object], *, full_depth: bool) -> Depth:
    """Return how deep to trace a model whose layers are of these kinds.

    Layer 0 may be of any kind; from layer 1 on the kinds must repeat.
    """
    layers = len(kinds)
    for period in range(1, LONGEST_PERIOD + 1):
        traced = HEAD_LAYERS + period + TAIL_LAYERS
        traced += (layers - traced) % period
        if full_depth or traced >= layers:
            break
        if all(kinds[i] == kinds[i + period] for i in range(1, layers - period)):
            return Depth(num_layers=layers, traced=traced, period=period)
    return Depth(num_layers=layers, traced=layers, period=0)


def repeat_layers(history: History, depth: Depth) -> History | None:
    """Return the history of the real model, or None if its layers turn out not to be alike."""
    if not depth.copies:
        return history
    if not _layers_are_alike(history, depth):
        return None
    writer = _Writer(depth)
    blocks: list[Block] = []
    for group in _grouped(history.blocks, depth):
        blocks += writer.write(group)
    return None if writer.failed else History(_repeated_static(history.static, depth), blocks)


def _repeated_static(static: Sequence[Storage], depth: Depth) -> list[Storage]:
    """Return the static storages of the real model, in the order in which it would make them."""
    result: list[Storage] = []
    run: list[Storage] = []

    def end_run() -> None:
        for shift in range(0, depth.copies * depth.period + 1, depth.period):
            result.extend(replace(s, layer=(s.layer or 0) + shift) for s in run)
        run.clear()

    for storage in static:
        if storage.layer is not None and depth.is_middle(storage.layer):
            run.append(storage)
            continue
        end_run()
        layer = storage.layer
        result.append(replace(storage, layer=depth.real_layers(layer)[0]) if layer else storage)
    end_run()
    return [replace(s, key=StorageKey(STATIC, number)) for number, s in enumerate(result)]


def _grouped(blocks: Sequence[Block], depth: Depth) -> Iterator[list[Block]]:
    """Yield runs of middle blocks of one kind together, every other block alone."""
    run: list[Block] = []
    for block in blocks:
        middle = block.name.kind != "outside" and depth.is_middle(block.name.layer)
        if run and (not middle or run[-1].name.kind != block.name.kind):
            yield run
            run = []
        if middle:
            run.append(block)
        else:
            yield [block]
    if run:
        yield run


class _Writer:
    """Writes blocks with the layer numbers of the real model."""

    def __init__(self, depth: Depth) -> None:
        self.depth = depth
        self.storages: dict[StorageKey, Storage] = {}
        self.dead: set[StorageKey] = set()
        self.failed = False

    def write(self, group: list[Block]) -> list[Block]:
        depth, name = self.depth, group[0].name
        if name.kind == "outside":
            return [self._outside(group[0])]
        if not depth.is_middle(name.layer):
            shift = depth.copies * depth.period if name.layer >= HEAD_LAYERS else 0
            return [self._shifted(group[0], shift)]
        numbers = range(depth.copies + 1)
        order = numbers if name.kind == "forward" else reversed(numbers)
        return [self._shifted(block, c * depth.period) for c in order for block in group]

    def _shifted(self, block: Block, shift: int) -> Block:
        """Return the block with every layer number raised by ``shift``."""
        kind, layer = block.name
        out = Block(BlockName(kind, layer + shift), block.phase, num_made=block.num_made)
        for made, storage in block.events:
            if storage.key.block.kind in ("outside", "static"):
                key = storage.key
            else:
                key = _moved(storage.key, shift)
            self._put(out, made, storage, key)
        return out

    def _outside(self, block: Block) -> Block:
        """Return the block with what it says of a middle layer said of all its copies."""
        out = Block(block.name, block.phase, num_made=block.num_made)
        for made, storage in block.events:
            name = storage.key.block
            if name.kind in ("outside", "static"):
                self._put(out, made, storage, storage.key)
                continue
            for real in self.depth.real_layers(name.layer):
                self._put(out, made, storage, _moved(storage.key, real - name.layer))
        return out

    def _put(self, out: Block, made: bool, storage: Storage, key: StorageKey) -> None:
        if made:
            storage = replace(storage, key=key)
            self.storages[key] = storage
        elif key in self.dead or key not in self.storages:
            self.failed = True  # a layer ends something that is not its own
            return
        else:
            storage = self.storages[key]
            self.dead.add(key)
        out.events.append((made, storage))


def _moved(key: StorageKey, shift: int) -> StorageKey:
    kind, layer = key.block
    return StorageKey(BlockName(kind, layer + shift), key.number)


def _layers_are_alike(history: History, depth: Depth) -> bool:
    """Say whether the blocks beside the middle make what their counterparts in it make."""
    made: dict[BlockName, list[tuple[int, str]]] = {}
    for block in history.blocks:
        sizes = [(s.num_bytes, s.op) for is_made, s in block.events if is_made]
        made.setdefault(block.name, []).extend(sizes)
    first, after = HEAD_LAYERS, HEAD_LAYERS + depth.period
    pairs = [
        (BlockName("forward", first - 1), BlockName("forward", after - 1)),
        (BlockName("backward", first), BlockName("backward", after)),
    ]
    return all(a in made and made[a] == made.get(b) for a, b in pairs)
