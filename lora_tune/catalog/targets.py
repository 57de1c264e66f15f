"""Target-module sets: which linear layers of a model a named set means.

Sets are resolved against the linear layers that the model really has, never from the model's name
alone, and refused when they match nothing or only part of a group: PEFT would adapt what
it finds and say nothing. Suffixes are dotted suffixes of full module names, which is
PEFT's rule for a list of target modules (``peft.tuners.tuners_utils.check_target_module_exists``).

Names of the layers: read in the modeling files of transformers 5.23.0.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lora_tune.errors import TargetModulesError, nearest

SET_NAMES = ("attention-qv", "attention", "mlp", "all-linear")
"""Named sets, ordered by the share of the model they adapt."""

_TOWER_MARKS = ("vision", "visual", "audio")
_LAYER_INDEX = re.compile(r"^(?P<stem>(?:[^.\d][^.]*\.)*)(?P<index>\d+)\.(?P<suffix>.+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFamily:
    """The module suffixes of an architecture; an empty group does not exist on it."""

    attention_qv: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    why_missing: str = ""  # why an empty group is empty

    def suffixes(self, set_name: str) -> tuple[str, ...]:
        """Return the group of a named set other than ``all-linear``."""
        groups = {"attention-qv": self.attention_qv, "attention": self.attention, "mlp": self.mlp}
        return groups[set_name]


class _Match(NamedTuple):
    modules: tuple[str, ...]
    problem: str  # empty: the set is complete


_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA = TargetFamily(
    attention_qv=("q_proj", "v_proj"), attention=_QKVO, mlp=("gate_proj", "up_proj", "down_proj")
)
_EXPERTS = TargetFamily(
    attention_qv=("q_proj", "v_proj"),
    attention=_QKVO,
    mlp=(),
    why_missing="its experts are 3-D parameters, not linear layers",
)
_NEOX = TargetFamily(
    attention_qv=(),
    attention=("query_key_value", "dense"),
    mlp=("dense_h_to_4h", "dense_4h_to_h"),
    why_missing="query, key and value are fused in query_key_value",
)

FAMILIES: dict[str, TargetFamily] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "smollm3",
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            # Its routed experts are 3-D parameters, but the shared expert has linear layers; the
            # shared expert's one-wide gate belongs to all-linear only.
            "qwen2_moe",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss"), _EXPERTS),
    **dict.fromkeys(("gpt_neox", "falcon", "bloom"), _NEOX),
    "phi3": TargetFamily(
        attention_qv=(),
        attention=("qkv_proj", "o_proj"),
        mlp=("gate_up_proj", "down_proj"),
        why_missing="query, key and value are fused in qkv_proj",
    ),
    # c_proj is the output of the attention and of the MLP: only the longer suffix tells which.
    "gpt2": TargetFamily(
        attention_qv=(),
        attention=("attn.c_attn", "attn.c_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        why_missing="query, key and value are fused in c_attn",
    ),
    "opt": TargetFamily(
        attention_qv=("q_proj", "v_proj"),
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc1", "fc2"),
    ),
}


def resolve_target_set(
    name_or_names: str | tuple[str, ...],
    *,
    model_type: str,
    linears: Sequence[str],
    where: str = "space.target_modules",
) -> tuple[str, ...]:
    """Return the full names of the modules that a target set adapts, in the order of ``linears``.

    Args:
        name_or_names: A named set, a module suffix, or several suffixes or full names.
        model_type: As in the model's config.json; an unknown one is resolved by the llama names
            where the model has them.
        linears: Full names of the model's linear layers, output head excluded.
        where: What the user wrote the set in, for the message.

    Raises:
        TargetModulesError: The set matches nothing, only part of its group in some layer, or
            layers of a vision or audio tower.

    >>> linears = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    >>> resolve_target_set("attention", model_type="gpt2", linears=linears)
    ('h.0.attn.c_attn', 'h.0.attn.c_proj')
    """
    if isinstance(name_or_names, str) and name_or_names in SET_NAMES:
        match = _match_set(name_or_names, model_type, linears)
    else:
        names = (name_or_names,) if isinstance(name_or_names, str) else name_or_names
        match = _match_names(names, model_type, linears)
    if match.problem:
        raise TargetModulesError(
            f"{where}: {match.problem} Its linear layers: "
            f"{', '.join(_last_parts(linears))}. {_fitting_sets(model_type, linears)}"
        )
    return match.modules


def named_sets(model_type: str, linears: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the named sets that exist on the model, smallest first, as full module names."""
    matches = {name: _match_set(name, model_type, linears) for name in SET_NAMES}
    return {name: match.modules for name, match in matches.items() if not match.problem}


def set_label(name_or_names: str | tuple[str, ...]) -> str:
    """Return a target set's name in tables: a list of modules is joined by plus signs.

    >>> set_label("mlp"), set_label(("q_proj", "v_proj"))
    ('mlp', 'q_proj+v_proj')
    """
    return name_or_names if isinstance(name_or_names, str) else "+".join(name_or_names)


def in_tower(module: str) -> bool:
    """Say whether a module belongs to a vision or audio tower, by its path."""
    return any(mark in part for part in module.casefold().split(".") for mark in _TOWER_MARKS)


def layer_suffix(module: str) -> str:
    """Return a module's name inside its decoder layer, or its full name outside the layers.

    >>> layer_suffix("model.layers.12.self_attn.q_proj"), layer_suffix("model.project_in")
    ('self_attn.q_proj', 'model.project_in')
    """
    match = _LAYER_INDEX.match(module)
    return match["suffix"] if match else module


def matches_suffix(module: str, suffix: str) -> bool:
    """Say whether a full name equals the suffix or ends with it after a dot (PEFT's rule)."""
    return module == suffix or module.endswith("." + suffix)


def short_names(modules: tuple[str, ...], linears: tuple[str, ...]) -> tuple[str, ...]:
    """Return the shortest names that PEFT's rule (dotted suffixes) matches to just these modules.

    Args:
        modules: Full names of the modules that are adapted.
        linears: Full names of all linear layers; empty when they are not known.

    Returns:
        Last parts such as ``q_proj``, else names inside a layer, else the full names.

    >>> linears = ("l.0.attn.q", "l.0.attn.v", "l.0.mlp.q", "l.1.attn.q", "l.1.attn.v", "l.1.mlp.q")
    >>> short_names(("l.0.attn.v", "l.1.attn.v"), linears)
    ('v',)
    >>> short_names(("l.0.attn.q", "l.1.attn.q"), linears)
    ('attn.q',)
    >>> short_names(("l.1.attn.q",), linears)
    ('l.1.attn.q',)
    """
    last_parts = tuple(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    inside = tuple(dict.fromkeys(layer_suffix(module) for module in modules))
    for names in (last_parts, inside):
        found = {m for m in linears if any(matches_suffix(m, name) for name in names)}
        if found == set(modules):
            return names
    return modules


def _match_set(name: str, model_type: str, linears: Sequence[str]) -> _Match:
    if name == "all-linear":
        modules = tuple(module for module in linears if not in_tower(module))
        return _Match(modules, "" if modules else f"this model ({model_type}) has no linear layer.")
    family = FAMILIES.get(model_type, _LLAMA)
    suffixes = family.suffixes(name)
    if not suffixes:
        return _Match(
            (), f'"{name}" does not exist on this model ({model_type}): {family.why_missing}.'
        )
    modules = tuple(m for m in linears if any(matches_suffix(m, s) for s in suffixes))
    return _Match(modules, _problem_of_set(name, model_type, suffixes, modules, linears))


def _problem_of_set(
    name: str,
    model_type: str,
    suffixes: tuple[str, ...],
    modules: tuple[str, ...],
    linears: Sequence[str],
) -> str:
    if not modules:
        unknown = "" if model_type in FAMILIES else ", whose layers are not in the catalogue"
        return f'"{name}" ({", ".join(suffixes)}) matches nothing on this model ({model_type}{unknown}).'
    if tower := [module for module in modules if in_tower(module)]:
        return f'"{name}" matches layers of a vision or audio tower, such as {tower[0]}.'
    layers = dict.fromkeys(layer for m in linears if not in_tower(m) and (layer := _layer(m)))
    stems = {_stem(module) for module in modules}
    for layer in layers:
        if _stem(layer + ".x") not in stems:
            continue
        here = [module for module in modules if module.startswith(layer + ".")]
        if lacking := [s for s in suffixes if not any(matches_suffix(m, s) for m in here)]:
            return (
                f'"{name}" matches only part of its group in {layer} of this model ({model_type}): '
                f"no {', '.join(lacking)}."
            )
    return ""


def _match_names(names: tuple[str, ...], model_type: str, linears: Sequence[str]) -> _Match:
    for name in names:
        found = [module for module in linears if matches_suffix(module, name)]
        if not found:
            hint = nearest(name, SET_NAMES)
            return _Match(
                (), f'"{name}" matches no linear layer of this model ({model_type}){hint or "."}'
            )
        if tower := [module for module in found if in_tower(module)]:
            return _Match(
                (),
                f'"{name}" matches layers of a vision or audio tower, such as '
                f"{tower[0]}; those are not trained here.",
            )
    modules = tuple(m for m in linears if any(matches_suffix(m, name) for name in names))
    return _Match(modules, "" if modules else "the list of modules is empty.")


def _fitting_sets(model_type: str, linears: Sequence[str]) -> str:
    """Return the sentence that lists the named sets a user may write instead."""
    shown = [
        name if name == "all-linear" else f"{name} ({', '.join(_short_suffixes(modules, linears))})"
        for name, modules in named_sets(model_type, linears).items()
    ]
    return f"Named sets that fit: {', '.join(shown)}." if shown else "No named set fits."


def _short_suffixes(modules: Iterable[str], linears: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest suffixes that tell the modules' kinds from all other kinds."""
    kinds = dict.fromkeys(layer_suffix(module) for module in linears)
    lasts = [kind.rpartition(".")[2] for kind in kinds]
    shown: dict[str, None] = {}
    for kind in dict.fromkeys(layer_suffix(module) for module in modules):
        last = kind.rpartition(".")[2]
        shown[last if lasts.count(last) == 1 else kind] = None
    return tuple(shown)


def _last_parts(linears: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({module.rpartition(".")[2] for module in linears}))


def _layer(module: str) -> str:
    """Return ``model.layers.3`` for a module inside that layer, else an empty string."""
    match = _LAYER_INDEX.match(module)
    return f"{match['stem']}{match['index']}" if match else ""


def _stem(module: str) -> str:
    match = _LAYER_INDEX.match(module)
    return match["stem"] if match else ""
