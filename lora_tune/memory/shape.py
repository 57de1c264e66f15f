"""ModelShape: a base model as sizes, which is all that the memory estimate needs.

Two ways to one: from a config.json, for the decoders whose closed form is known (``COVERED``), or
from linear layers that the caller counted on the real model, for all others.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lora_tune.catalog.targets import (
    SET_NAMES,
    layer_suffix,
    matches_suffix,
    resolve_target_set,
)
from lora_tune.errors import ModelError, TargetModulesError
from lora_tune.memory.config_keys import ConfigKeys
from lora_tune.memory.families import COVERED, shape_fields
from lora_tune.records import LinearShape

__all__ = ["COVERED", "ModelShape", "adapted_copies", "target_suffixes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes and structure of a decoder. Hashable, so that what is derived from it can be cached.

    All layers have the same tensors. What differs between layers is attention's reach
    (``sliding_layers``) and whether positions are rotated (``num_rotary_layers``).
    """

    model_type: str
    num_layers: int
    hidden: int
    intermediate: int  # width of the dense MLP; of a mixture of experts see ``expert_intermediate``
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool  # the head is the embedding
    attention_bias: bool  # the query, key and value projections have one
    mlp_bias: bool
    qk_norm: bool  # queries and keys are normalized per head, before the rotation
    layer_linears: tuple[LinearShape, ...]  # of one layer, named inside it: self_attn.q_proj
    outer_linears: tuple[LinearShape, ...] = ()  # outside the layers, full names; no head
    layer_tensors: tuple[int, ...] = ()  # elements of a layer's other parameters: norms, biases,
    #                                      routers, fused experts
    num_biases: int = 0  # how many of them, the last ones, are biases of ``layer_linears``
    quantizable: bool = (
        True  # False: transformers leaves the linear layers in 16 bit (Falcon's own)
    )
    outer_tensors: tuple[int, ...] = ()  # elements of embeddings, final norm, untied head
    buffers: tuple[int, ...] = ()  # elements of the model's float32 buffers: rotary, embed_scale
    covered: bool = True
    layer_prefix: str = "model.layers."  # full name of a linear: prefix, index, dot, name inside

    # Norms and residual stream.
    norm: str = "rms"  # "rms" or "layer" (with mean and bias)
    norm_offset: bool = False  # Gemma: all in float32, times (1 + weight), then cast
    sandwich_norms: bool = False  # Gemma 2, 3: the outputs of attention and MLP are normalized too
    parallel_residual: bool = False  # attention and MLP read the same residual and are added to it
    parallel_norms: int = 0  # norms before them then: 1 shared (Falcon 7B) or 2; 0 if not parallel
    # Attention.
    fused_qkv: bool = False  # one linear for query, key and value
    attention_softcap: bool = False  # scores through tanh (Gemma 2): no fused attention
    sliding_window: int | None = None  # tokens that a sliding layer sees; None: no sliding layer
    sliding_layers: tuple[bool, ...] = ()  # layer by layer, whether it slides; empty: none does
    rotary_dim: int = 0  # dimensions of a head that are rotated; 0: none
    num_rotary_layers: int = 0  # all, but for SmolLM3's layers without positions
    num_rotary_tables: int = 0  # pairs (cos, sin) made in a forward pass; 2: one a layer type
    learned_positions: int = 0  # rows of a position embedding (GPT-2); 0: none
    # MLP.
    activation: str = "silu"  # name in transformers' ACT2FN
    gated_mlp: bool = True  # activation(gate) * up, rather than activation(up)
    fused_gate_up: bool = False  # one linear for gate and up
    num_experts: int = 0  # 0: a dense MLP
    experts_per_token: int = 0
    expert_intermediate: int = 0  # width of one expert; gate, up and down are 3-D parameters
    shared_expert_intermediate: int = 0  # width of the expert that every token passes; 0: none
    # Around the layers.
    embed_scale: bool = False  # the embedding's output is multiplied by sqrt(hidden) (Gemma)
    final_softcap: bool = False  # logits through tanh (Gemma 2)
    embedding_dropout: float = 0.0  # the base model's own, in training mode (GPT-2: 0.1)
    hidden_dropout: float = 0.0  # on the outputs of attention and MLP
    attention_dropout: float = 0.0  # on attention's probabilities

    @property
    def num_sliding_layers(self) -> int:
        """Layers whose attention slides."""
        return sum(self.sliding_layers)

    @property
    def takes_rows_in_line(self) -> bool:
        """Whether the engine puts all rows of a pass in one line (``engine/attention.py``).

        The attention must be torch's SDPA, called through transformers' interface: not Falcon's own.
        """
        return self.model_type != "falcon" and not self.attention_softcap

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; the values have the same."""
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """The linear layers of one decoder layer, then those outside the layers."""
        return self.layer_linears + self.outer_linears

    @property
    def copies(self) -> tuple[int, ...]:
        """How often the model has each of ``linears``."""
        return (self.num_layers,) * len(self.layer_linears) + (1,) * len(self.outer_linears)

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Full names of all linear layers but the head, in the order of the model's modules.

        That order has the linears outside the layers first or last; here they come last.
        """
        inside = (
            f"{self.layer_prefix}{i}.{linear.name}"
            for i in range(self.num_layers)
            for linear in self.layer_linears
        )
        return (*inside, *(linear.name for linear in self.outer_linears))

    @property
    def num_parameters(self) -> int:
        """All parameters of the base model; a tied head counts once."""
        linear = sum(
            count * shape.in_features * shape.out_features
            for shape, count in zip(self.linears, self.copies, strict=True)
        )
        return linear + self.num_layers * sum(self.layer_tensors) + sum(self.outer_tensors)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "ModelShape":
        """Return the shape of a covered decoder from its config.json.

        Keys that are missing take the defaults of transformers 5.23 where published configs leave
        them out; sizes that every config has must be there.

        Raises:
            UncoveredModelError: The model type has no closed form, or its layers differ.
            ModelError: A key is missing or is no size.
        """
        return cls(**shape_fields(config))

    @classmethod
    def from_linears(
        cls,
        config: Mapping[str, object],
        linears: Sequence[LinearShape],
        num_other_parameters: int,
    ) -> "ModelShape":
        """Return the sizes of a decoder without a closed form, from its counted linear layers.

        Good for counting parameters; its memory is for the trace. Layers that differ are all taken
        to be like the largest one.

        Args:
            config: The model's config.json.
            linears: Every linear layer by full name with its layer index, output head excluded.
            num_other_parameters: All other parameters: embeddings, norms, biases, untied head.

        Raises:
            ModelError: A size is missing from the config, or there are no layers.
        """
        layers: dict[str, list[LinearShape]] = {}
        outer = []
        for linear in linears:
            suffix = layer_suffix(linear.name)
            if suffix == linear.name:
                outer.append(linear)
                continue
            layer = linear.name.removesuffix(suffix)
            layers.setdefault(layer, []).append(_renamed(linear, suffix))
        if not layers:
            raise ModelError("the model has no linear layer inside numbered decoder layers")
        largest = max(layers.values(), key=_num_weights)
        keys = ConfigKeys(config)
        hidden, heads = keys.size("hidden"), keys.size("num_heads")
        return cls(
            model_type=keys.model_type,
            num_layers=len(layers),
            hidden=hidden,
            intermediate=keys.size("intermediate", max(linear.out_features for linear in largest)),
            num_heads=heads,
            num_kv_heads=keys.size("num_kv_heads", heads),
            head_dim=keys.size("head_dim", hidden // heads),
            vocab_size=keys.size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=False,
            mlp_bias=False,
            qk_norm=False,
            layer_linears=tuple(largest),
            outer_linears=tuple(outer),
            outer_tensors=(num_other_parameters,),
            covered=False,
        )


@lru_cache(maxsize=4096)
def adapted_copies(shape: ModelShape, targets: tuple[str, ...]) -> tuple[int, ...]:
    """Return how many copies of each of ``shape.linears`` the targets adapt.

    Args:
        shape: The base model.
        targets: Module suffixes (every layer) or full module names (that layer only).

    Raises:
        TargetModulesError: A target is none of the model's linear layers.

    >>> shape = ModelShape.from_config(
    ...     {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
    ...      "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    ... )
    >>> adapted_copies(shape, ("q_proj", "model.layers.1.mlp.up_proj"))
    (2, 0, 0, 0, 0, 1, 0)
    """
    names = [linear.name for linear in shape.linears]
    copies = [0] * len(names)
    everywhere = [False] * len(names)
    for target in dict.fromkeys(targets):
        inside = layer_suffix(target)
        found = [i for i, name in enumerate(names) if matches_suffix(name, inside)]
        if not found:
            known = ", ".join(names)
            raise TargetModulesError(
                f'target module "{target}" is no linear layer of this {shape.model_type} model. '
                f"Its linear layers: {known}."
            )
        for i in found:
            if inside == target:
                everywhere[i] = True
            else:
                copies[i] += 1
    limits = zip(copies, everywhere, shape.copies, strict=True)
    return tuple(limit if all_layers else min(n, limit) for n, all_layers, limit in limits)


def target_suffixes(
    shape: ModelShape, targets: str, *, where: str = "--targets"
) -> tuple[str, ...]:
    """Return the names by which ``adapted_copies`` knows the modules of a target set.

    A module that is adapted in every layer is named inside its layer, any other in full.

    Args:
        shape: The base model.
        targets: A named set, or module suffixes or full names separated by commas.
        where: What the user wrote it in, for the message.

    Raises:
        TargetModulesError: The set matches nothing, or only part of its group.

    >>> shape = ModelShape.from_config(
    ...     {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
    ...      "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    ... )
    >>> target_suffixes(shape, "attention-qv")
    ('self_attn.q_proj', 'self_attn.v_proj')
    >>> target_suffixes(shape, "model.layers.1.mlp.up_proj,q_proj")
    ('self_attn.q_proj', 'model.layers.1.mlp.up_proj')
    """
    parts = tuple(part.strip() for part in targets.split(",") if part.strip())
    wanted = parts[0] if len(parts) == 1 and parts[0] in SET_NAMES else parts
    modules = resolve_target_set(
        wanted, model_type=shape.model_type, linears=shape.linear_names, where=where
    )
    found = Counter(layer_suffix(module) for module in modules)
    limits = dict(zip((linear.name for linear in shape.linears), shape.copies, strict=True))
    everywhere = {name for name, count in found.items() if count == limits[name]}
    return (
        *(name for name in limits if name in everywhere),
        *(module for module in modules if layer_suffix(module) not in everywhere),
    )


def _num_weights(linears: Sequence[LinearShape]) -> int:
    return sum(linear.in_features * linear.out_features for linear in linears)


def _renamed(linear: LinearShape, name: str) -> LinearShape:
    return LinearShape(name=name, in_features=linear.in_features, out_features=linear.out_features)
