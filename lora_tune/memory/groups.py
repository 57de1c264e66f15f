"""Which lanes of a pack share a low-rank product, as the engine groups them.

Source: ``engine/pack.py``, ``_group_key`` (the order of the lanes); ``engine/lora.py``, ``PackLayout`` (the
groups).
"""

from collections.abc import Sequence
from typing import NamedTuple

from lora_tune.memory.request import LaneShape, MemoryRequest
from lora_tune.memory.shape import ModelShape, adapted_copies


class Group(NamedTuple):
    """Neighbouring lanes that share one product on a linear layer."""

    tokens: int  # from the first token of its first lane to the last of its last one
    ranks: tuple[int, ...]
    dropout: bool  # whether some of the lanes have it


def in_order(shape: ModelShape, lanes: Sequence[LaneShape]) -> tuple[LaneShape, ...]:
    """Return the lanes as they lie in a pass: by the number of their modules, then by rank.

    Raises:
        TargetModulesError: A lane names a module that the model does not have.
    """
    return tuple(
        sorted(lanes, key=lambda lane: (sum(adapted_copies(shape, lane.targets)), lane.rank))
    )


def lane_groups(
    lanes: Sequence[LaneShape], adapts: Sequence[bool], request: MemoryRequest
) -> tuple[Group, ...]:
    """Return the groups of the lanes that adapt a linear layer.

    A group ends where the ranks would add up to more than ``request.group_rank``; in float16 every lane has
    a product of its own, so that an overflow stays in its lane.

    Args:
        lanes: All lanes of the pack as they lie in a pass.
        adapts: For each of them, whether it adapts the layer.
        request: Decides the tokens of a lane and the largest sum of ranks.

    >>> lane = LaneShape(rank=48, targets=("q_proj",), lora_dropout=0.0)
    >>> request = MemoryRequest(
    ...     quantization="nf4", compute_dtype="bfloat16", lanes=(lane,) * 4, micro_batch_size=1,
    ...     max_length=10, gradient_checkpointing=True, gradient_accumulation=False,
    ... )
    >>> [group.ranks for group in lane_groups(request.lanes, (True,) * 4, request)]
    [(48, 48), (48, 48)]
    >>> lane_groups(request.lanes, (True, False, True, False), request)
    (Group(tokens=30, ranks=(48, 48), dropout=False),)
    """
    most = 0 if request.compute_dtype == "float16" else request.group_rank
    parts: list[list[int]] = []
    total = 0
    for number, lane in enumerate(lanes):
        if not adapts[number]:
            continue
        if not parts or total + lane.rank > most:
            parts.append([])
            total = 0
        parts[-1].append(number)
        total += lane.rank
    own = request.micro_batch_size * request.max_length
    return tuple(
        Group(
            tokens=(part[-1] - part[0] + 1) * own,
            ranks=tuple(lanes[number].rank for number in part),
            dropout=any(lanes[number].lora_dropout > 0 for number in part),
        )
        for part in parts
    )
