"""Configurations to begin with: known good ones, before any sampler.

In published sweeps of 27 models the learning rate explains 77 % of the variance of the loss, and three
learning rates at the largest rank beat every blind sampler: see the anchors A1 to A3. A6 is the folklore
default that people copy, and what gains are measured against. Source: the learning-rate and rank sweep of
thinking-machines-lab/tinker-cookbook (``recipes/chat_sl/results/sft_sweep.md``), re-analysed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from lora_tune.catalog.targets import (
    FAMILIES,
    in_tower,
    named_sets,
    resolve_target_set,
    set_label,
)
from lora_tune.errors import StudyFileError, TargetModulesError, nearest
from lora_tune.records import SuggestedParams, TargetSet, TrialConfig
from lora_tune.search.space import REFERENCE_ALPHA, SearchSpace
from lora_tune.study.spec import AnchorName, AnchorSection

ANCHOR_NAMES: tuple[AnchorName, ...] = ("A1", "A2", "A3", "A4", "A5", "A6")
LARGEST_ANCHOR_RANK = 128
SMALL_DATA_ROWS = 2000  # below this, anchors start at rank 16 or less
SMALL_DATA_RANK = 16
LARGE_BATCH = 64
CENTRE_LARGE_BATCH = 3e-4  # best or next to best for 32 of 35 models at batch 128
CENTRE_SMALL_BATCH = 2e-4  # between folklore (2e-4) and the square-root rule (1.1e-4)

# The default that people copy: q and v of the LoRA paper (arXiv 2106.09685) with the rank, alpha and learning
# rate of most published examples (QLoRA, arXiv 2305.14314, trains at 2e-4).
FOLKLORE_RANK = 16
FOLKLORE_ALPHA = 32.0
FOLKLORE_DROPOUT = 0.05
FOLKLORE_LEARNING_RATE = 2e-4
_FUSED_LAYERS = tuple(
    dict.fromkeys(family.attention[0] for family in FAMILIES.values() if not family.attention_qv)
)
_FOLKLORE_LAYERS = (
    frozenset({"q_proj", "v_proj"}),
    *(frozenset({suffix.rpartition(".")[2]}) for suffix in _FUSED_LAYERS),
)


class Anchor(NamedTuple):
    """A named configuration of the space."""

    name: str
    params: SuggestedParams


class AnchorPlan(NamedTuple):
    """The anchors in the order in which they are tried, and sentences on what was moved or left out."""

    anchors: tuple[Anchor, ...]
    notes: tuple[str, ...]


class _Wish(NamedTuple):
    """A configuration as it is wanted, whether the space has it or not."""

    rank: int
    lora_alpha: float
    lora_dropout: float
    target_set: str
    learning_rate: float

    @property
    def step(self) -> float:
        return self.learning_rate * self.lora_alpha / REFERENCE_ALPHA


def make_anchors(
    space: SearchSpace,
    wanted: Sequence[AnchorName | AnchorSection] = ANCHOR_NAMES,
    *,
    effective_batch_size: int,
    num_train: int,
) -> list[Anchor]:
    """Return the anchors of ``plan_anchors`` without its notes."""
    plan = plan_anchors(
        space, wanted, effective_batch_size=effective_batch_size, num_train=num_train
    )
    return list(plan.anchors)


def plan_anchors(
    space: SearchSpace,
    wanted: Sequence[AnchorName | AnchorSection] = ANCHOR_NAMES,
    *,
    effective_batch_size: int,
    num_train: int,
) -> AnchorPlan:
    """Return the configurations to begin with, in the order of ``wanted`` and without repetitions.

    A1 the largest rank that fits on the largest target set, alpha 32, no dropout, centre step; A2 and
    A3 three times and a third of the step; A4 two ranks lower; A5 A1 on ``mlp``; A6 the folklore
    default. An anchor of the user's own takes what it does not give from A1. Values are moved to the
    nearest choice of the space, the effective step kept; A5 and A6 are left out where the space does
    not have them.

    Args:
        space: The search space, with what fits.
        wanted: ``[search] anchors``: names and tables.
        effective_batch_size: Below 64 the centre step is 2e-4 instead of 3e-4.
        num_train: Training rows; below 2,000 no anchor by name has a rank above 16.

    Raises:
        StudyFileError: An anchor's target set is not one of the space's.
    """
    named = _named(space, effective_batch_size=effective_batch_size, num_train=num_train)
    anchors: list[Anchor] = []
    notes: list[str] = []
    for position, entry in enumerate(wanted):
        if isinstance(entry, AnchorSection):
            label = f"search.anchors[{position}]"
            wish = _own(entry, named["A1"], space, label, notes)
            name = f"own {sum(isinstance(e, AnchorSection) for e in wanted[: position + 1])}"
        else:
            name, label, wish = entry, f"anchor {entry}", named.get(entry)
            if wish is None:
                notes.append(_why_left_out(entry, space))
        if wish is None:
            continue
        params = _nearest(space, wish)
        same = next((anchor.name for anchor in anchors if anchor.params == params), None)
        if isinstance(entry, AnchorSection):
            notes += _moves(space, wish, params, label)
            if same is not None:
                notes.append(
                    f"{label} is the same configuration as anchor {same}: it is tried once."
                )
        if same is None:
            anchors.append(Anchor(name, params))
    return AnchorPlan(tuple(anchors), tuple(notes))


def folklore_default(
    *,
    model_type: str,
    linears: Sequence[str],
    seed: int,
    fits: Callable[[TrialConfig], bool] = lambda config: True,
) -> TrialConfig | None:
    """Return the configuration that people copy, on this model: what gains are measured against.

    q and v, or the fused layer where there is one; rank 16, alpha 32, dropout 0.05, learning rate 2e-4.
    It equals the anchor A6 of a space that can express it, seeds included.

    Args:
        model_type: As in the model's config.json.
        linears: Full names of the model's linear layers, output head excluded.
        seed: Of the study: initialisation, dropout and data order.
        fits: Says whether a configuration fits the memory budget. The rank is halved until one does;
            alpha and learning rate stay, since one learning rate suits all ranks at a fixed alpha.

    Returns:
        The configuration; None if the model has no such layers, or not even rank 1 fits.
    """
    found = _folklore_modules(model_type, [name for name in linears if not in_tower(name)])
    if found is None:
        return None
    target_set, modules = found
    rank = FOLKLORE_RANK
    while rank:
        config = TrialConfig(
            rank=rank,
            lora_alpha=FOLKLORE_ALPHA,
            lora_dropout=FOLKLORE_DROPOUT,
            target_set=target_set,
            target_modules=modules,
            learning_rate=FOLKLORE_LEARNING_RATE,
            init_seed=seed,
            dropout_seed=seed,
            data_seed=seed,
        )
        if fits(config):
            return config
        rank //= 2
    return None


def is_folklore(config: TrialConfig, *, rank: int = FOLKLORE_RANK) -> bool:
    """Say whether a configuration is the folklore default, whatever its seeds.

    Args:
        config: As it is trained.
        rank: Of ``folklore_default`` on this model, lower than 16 where 16 does not fit.
    """
    return (
        config.rank == rank
        and math.isclose(config.lora_alpha, FOLKLORE_ALPHA)
        and math.isclose(config.lora_dropout, FOLKLORE_DROPOUT)
        and math.isclose(config.learning_rate, FOLKLORE_LEARNING_RATE)
        and not config.use_rslora
        and _is_query_value(config.target_modules)
    )


def _named(space: SearchSpace, *, effective_batch_size: int, num_train: int) -> dict[str, _Wish]:
    """Return the anchors by name that make sense in this space."""
    centre = CENTRE_LARGE_BATCH if effective_batch_size >= LARGE_BATCH else CENTRE_SMALL_BATCH
    largest = space.target_sets[-1]
    ceiling = SMALL_DATA_RANK if num_train < SMALL_DATA_ROWS else LARGEST_ANCHOR_RANK
    fitting = [rank for rank in space.ranks if rank <= min(largest.max_rank, ceiling)]
    top = fitting[-1] if fitting else space.ranks[0]
    low = space.ranks[max(0, space.ranks.index(top) - 2)]
    first = _Wish(top, REFERENCE_ALPHA, 0.0, largest.name, centre)
    named = {
        "A1": first,
        "A2": first._replace(learning_rate=3 * centre),
        "A3": first._replace(learning_rate=centre / 3),
        "A4": first._replace(rank=low),
    }
    for target in space.target_sets:
        if target.name == "mlp":
            named["A5"] = first._replace(target_set="mlp")
        if _expresses_folklore(space, target):
            named["A6"] = _folklore_wish(target.name)
    return named


def _own(
    section: AnchorSection, first: _Wish, space: SearchSpace, label: str, notes: list[str]
) -> _Wish | None:
    """Return an anchor of the user's own; None, and a note, if its target set does not fit the memory."""
    target_set = first.target_set
    if section.target_modules is not None:
        target_set = set_label(section.target_modules)
        if target_set in space.sets_that_do_not_fit:
            notes.append(f"{label} is left out: {target_set} does not fit the memory budget.")
            return None
        names = [target.name for target in space.target_sets]
        if target_set not in names:
            hint = nearest(target_set, names) or "."
            raise StudyFileError(
                f'{label}.target_modules is "{target_set}", which the space does not have{hint} '
                f"Choose one of: {', '.join(names)}; or add it to space.target_modules."
            )
    given = section.model_dump(exclude_none=True, exclude={"target_modules"})
    return first._replace(target_set=target_set, **given)


def _nearest(space: SearchSpace, wish: _Wish) -> SuggestedParams:
    """Return the configuration of the space that is nearest, with a rank that fits and the wish's step."""
    target = space.target_set(wish.target_set)
    fitting = [rank for rank in space.ranks if rank <= target.max_rank]
    rank = min(fitting, key=lambda choice: abs(math.log(choice / wish.rank)))
    return SuggestedParams(
        rank=rank,
        alpha_ratio=space.nearest_ratio(wish.lora_alpha, rank),
        lora_dropout=min(space.dropouts, key=lambda choice: abs(choice - wish.lora_dropout)),
        target_set=target.name,
        effective_step=min(max(wish.step, space.step_bounds[0]), space.step_bounds[1]),
    )


def _moves(space: SearchSpace, wish: _Wish, params: SuggestedParams, label: str) -> list[str]:
    """Return the sentence that says which values were moved, if any were."""
    config = space.effective(params)
    pairs = {
        "rank": (wish.rank, config.rank),
        "lora_alpha": (wish.lora_alpha, config.lora_alpha),
        "lora_dropout": (wish.lora_dropout, config.lora_dropout),
        "learning_rate": (wish.learning_rate, config.learning_rate),
    }
    moved = [
        f"{key} {before:g} to {after:.4g}"
        for key, (before, after) in pairs.items()
        if not math.isclose(before, after, abs_tol=1e-12)
    ]
    if not moved:
        return []
    return [
        f"{label} is moved to the nearest configuration of the space that fits: {', '.join(moved)}."
    ]


def _why_left_out(name: str, space: SearchSpace) -> str:
    if name == "A5":
        return "anchor A5 is left out: the space has no target set mlp that fits."
    return (
        f"anchor A6, the default that gains are measured against (q and v, rank {FOLKLORE_RANK}, "
        f"alpha {FOLKLORE_ALPHA:g}, dropout {FOLKLORE_DROPOUT}, learning rate "
        f"{FOLKLORE_LEARNING_RATE:g}), is not in the space: it is trained in the confirmation alone."
    )


def _folklore_wish(target_set: str) -> _Wish:
    return _Wish(
        FOLKLORE_RANK, FOLKLORE_ALPHA, FOLKLORE_DROPOUT, target_set, FOLKLORE_LEARNING_RATE
    )


def _expresses_folklore(space: SearchSpace, target: TargetSet) -> bool:
    """Say whether the space has the folklore default itself, on this target set."""
    if not _is_query_value(target.modules):
        return False
    return is_folklore(space.effective(_nearest(space, _folklore_wish(target.name))))


def _is_query_value(modules: Sequence[str]) -> bool:
    return frozenset(name.rpartition(".")[2] for name in modules) in _FOLKLORE_LAYERS


def _folklore_modules(
    model_type: str, linears: Sequence[str]
) -> tuple[Literal["attention-qv"] | str, tuple[str, ...]] | None:
    """Return the set's name and modules: q and v, or the layer in which they are fused."""
    if modules := named_sets(model_type, linears).get("attention-qv"):
        return "attention-qv", modules
    family = FAMILIES.get(model_type)
    fused = family.attention[:1] if family is not None else _FUSED_LAYERS
    for suffix in fused:
        try:
            found = resolve_target_set((suffix,), model_type=model_type, linears=linears)
        except TargetModulesError:
            continue
        return set_label((suffix,)), found
    return None
