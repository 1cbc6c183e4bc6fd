"""Which linear layers an adapter stands beside, what tensors it has, and how they are cut over tensor ranks.

megatron-core fuses queries, keys and values into `linear_qkv`, gate and up projection into `linear_fc1`. An adapter has
its own matrix A, and for ALoRA its own attention, for each of the projections in there, as if they were separate: only
so can it be written as Hugging Face's separate layers without rounding. Where a family fuses them itself (Phi-3), they
are one projection.

Whole tensors of the adapter of one linear layer (P targeted projections in it, rank r):

    down            [P * r, in]            A of each projection, one above the other
    up              [rows, r]              B in the order of the layer's own rows; linear_fc1: [gate and up, ffn, r]
    attention_in    [P, 3 * r, r]          ALoRA: queries, keys, values of the attention over z = A x
    attention_out   [P, r, r]              ALoRA: its output projection

Of a layer's experts each has matrices of its own, which lie one behind the other: `[experts, ...]`.

Needs no megatron-core.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.init import named_generator
from megatron_mixcpt.architecture.layout import Place, is_of_experts, whole_shapes
from megatron_mixcpt.architecture.stages import Stages
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.names import hf_names, part_rows

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.experts.linear_fc1",
    "mlp.experts.linear_fc2",
)


@dataclass(frozen=True)
class AdaptedLinear:
    """The adapter of one linear layer, over the whole model.

    Attributes:
        linear: name of the layer, numbered over the whole model: `decoder.layers.3.mlp.linear_fc1`.
        targets: the Hugging Face layers in it that are adapted: `model.layers.3.mlp.gate_proj`; of experts those of
            each after those of the one before.
        rows: for each part of it (queries, keys, values; gate, up), whether adapted or not, (its rows a group, the
            index among the `projections` of the one that it is of, or None). linear_qkv repeats them `groups` times.
        experts: how many have such a layer each; 0: it is no expert's.
    """

    linear: str
    targets: tuple[str, ...]
    rows: tuple[tuple[int, int | None], ...]
    groups: int
    in_features: int
    config: AdapterConfig
    experts: int = 0

    @property
    def row_parallel(self) -> bool:
        return self.linear.endswith(("linear_proj", "linear_fc2"))

    @property
    def gated(self) -> bool:
        return self.linear.endswith("linear_fc1")

    @property
    def projections(self) -> int:
        """Targeted ones: of the layer, or of one expert's."""
        return len(self.targets) // max(self.experts, 1)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """`{name: (whole shape, axis that tensor ranks share or None where each has all of it)}`."""
        count, rank = self.projections, self.config.rank
        adapted = sum(rows for rows, target in self.rows if target is not None) * self.groups
        up: tuple[tuple[int, ...], int | None]
        if self.gated:
            parts = sum(target is not None for _, target in self.rows)
            up = ((parts, adapted // parts, rank), 1)
        else:
            up = ((adapted, rank), None if self.row_parallel else 0)
        tensors: dict[str, tuple[tuple[int, ...], int | None]] = {
            "down": ((count * rank, self.in_features), 1 if self.row_parallel else None),
            "up": up,
        }
        if self.config.method == "alora":
            tensors["attention_in"] = ((count, 3 * rank, rank), None)
            tensors["attention_out"] = ((count, rank, rank), None)
        if self.experts:
            tensors = {
                name: ((self.experts, *shape), None if axis is None else axis + 1)
                for name, (shape, axis) in tensors.items()
            }
        return tensors

    def local_shape(self, name: str, place: Place) -> tuple[int, ...]:
        """Of a rank's part of a whole tensor."""
        shape, axis = self.tensors()[name]
        local = [length // place.tensors if index == axis else length for index, length in enumerate(shape)]
        if self.experts:
            local[0] //= place.experts
        return tuple(local)

    def shard(self, name: str, whole: Tensor, place: Place) -> Tensor:
        """A rank's part of a whole tensor."""
        axis = self.tensors()[name][1]
        if self.experts:
            whole = whole.chunk(place.experts)[place.expert]
        return whole if axis is None else whole.chunk(place.tensors, dim=axis)[place.tensor]

    def key(self, name: str) -> str:
        """Name of a whole tensor in checkpoints."""
        return f"adapter.{self.linear}.{name}"

    def row_targets(self) -> Tensor:
        """For each row of the whole linear layer, or of one expert's, the index of the projection that adapts it, or
        -1: int64 `[rows]`."""
        group = [-1 if target is None else target for rows, target in self.rows for _ in range(rows)]
        return torch.tensor(group).repeat(self.groups)

    def initial(self, name: str, seed: int) -> Tensor:
        """The whole tensor at the start, the same on every grid: B is zero, the others uniform with bound
        1 / sqrt(inputs) (the initialisation of torch's Linear and of PEFT's A)."""
        shape = self.tensors()[name][0]
        if name == "up":
            return torch.zeros(shape)
        bound = 1.0 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=named_generator(self.key(name), seed))


def adapted_linears(arch: Architecture, config: AdapterConfig) -> list[AdaptedLinear]:
    """The adapters of the whole model, layer by layer.

    Raises ConfigError, naming what there is, where a target matches nothing, a router, or a part of a layer's experts.
    """
    wholes = whole_shapes(arch)
    unmatched = set(config.targets)
    linears, known = [], set()
    for layer in range(arch.num_layers):
        _refuse_routers(arch, config, layer)
        for short in LINEARS:
            linear = f"decoder.layers.{layer}.{short}"
            if f"{linear}.weight" not in wholes:
                continue
            targets: list[str] = []
            for part in _layers_of(linear, arch):
                known.add(part.rsplit(".", 1)[1])
                matching = {pattern for pattern in config.targets if _matches(part, pattern)}
                unmatched -= matching
                if matching:
                    targets.append(part)
            if targets:
                linears.append(_adapted(linear, targets, wholes[f"{linear}.weight"], arch, config))
    if unmatched:
        raise ConfigError(
            f"adapter.targets: {', '.join(sorted(unmatched))} matches no layer; a target is a pattern of the last part "
            f"({', '.join(sorted(known))}) or of the whole name (model.layers.0.self_attn.q_proj)"
        )
    _refuse_parts_of_experts(arch, config, linears)
    return linears


def linear_layers(arch: Architecture) -> list[str]:
    """All Hugging Face layers that can have an adapter."""
    wholes = whole_shapes(arch)
    linears = (f"decoder.layers.{layer}.{short}" for layer in range(arch.num_layers) for short in LINEARS)
    return [part for linear in linears if f"{linear}.weight" in wholes for part in _layers_of(linear, arch)]


def _layers_of(linear: str, arch: Architecture) -> list[str]:
    """The Hugging Face layers in one of LINEARS, or in a router."""
    return [name.removesuffix(".weight") for name in hf_names(f"{linear}.weight", arch)]


def _adapted(
    linear: str, targets: list[str], whole: tuple[int, ...], arch: Architecture, config: AdapterConfig
) -> AdaptedLinear:
    """`whole`: the shape of the layer's weight."""
    experts = whole[0] if is_of_experts(linear) else 0
    groups = arch.num_query_groups if linear.endswith("linear_qkv") else 1
    parts = part_rows(f"{linear}.weight", max(experts, 1) * whole[-2], arch)
    parts = parts[: len(parts) // max(experts, 1)]  # of the first expert, as of all
    index = {f"{target}.weight": number for number, target in enumerate(targets)}
    rows = tuple((count // groups, index.get(name)) for name, count in parts)
    return AdaptedLinear(linear, tuple(targets), rows, groups, whole[-1], config, experts)


def _refuse_routers(arch: Architecture, config: AdapterConfig, layer: int) -> None:
    if not arch.has_experts(layer):
        return
    (router,) = _layers_of(f"decoder.layers.{layer}.mlp.router", arch)
    for pattern in config.targets:
        if _matches(router, pattern):
            raise ConfigError(
                f"adapter.targets: {pattern} is also of a router ({router}), which takes no adapter: it has one row an "
                "expert, hardly more than an adapter of it, and stays as it is, so that tokens go to the experts that "
                "the base model sends them to until what comes before it has changed. Name linear layers, for example "
                f"adapter.targets: {_example(arch, layer)}; train.router=trained trains it, without an adapter section"
            )


def _example(arch: Architecture, layer: int) -> str:
    names = (_layers_of(f"decoder.layers.{layer}.mlp.experts.{short}", arch) for short in ("linear_fc1", "linear_fc2"))
    experts = dict.fromkeys(part.rsplit(".", 1)[1] for parts in names for part in parts)
    return f"[q_proj, k_proj, v_proj, o_proj, {', '.join(experts)}]"


def _refuse_parts_of_experts(arch: Architecture, config: AdapterConfig, linears: list[AdaptedLinear]) -> None:
    adapted = {linear.linear: linear.targets for linear in linears if linear.experts}
    for layer in sorted({int(linear.split(".")[2]) for linear in adapted}):
        for short in ("linear_fc1", "linear_fc2"):
            linear = f"decoder.layers.{layer}.mlp.experts.{short}"
            there = set(adapted.get(linear, ()))
            missing = [part for part in _layers_of(linear, arch) if part not in there]
            if missing:
                raise ConfigError(
                    f"adapter.targets names some layers of the experts of layer {layer} and not {missing[0]}: all of "
                    "them are adapted or none, in each expert, since transformers has them in one piece and PEFT reads "
                    f"no part of it. Set adapter.targets: {_example(arch, layer)}, or name those of attention alone"
                )
    if adapted and config.method == "alora":
        raise ConfigError(
            f"adapter.method=alora: {next(iter(adapted.values()))[0]} is an expert's, which sees the tokens that its "
            "router sends it and not those before them, which ALoRA's attention takes in: set adapter.method=lora, or "
            "name the layers of attention alone, adapter.targets: [q_proj, k_proj, v_proj, o_proj]"
        )


@functools.lru_cache(maxsize=2**16)
def _matches(layer: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(layer, pattern) or fnmatch.fnmatchcase(layer.rsplit(".", 1)[1], pattern)


def check_adapter_layout(arch: Architecture, config: AdapterConfig, tensor: int, stages: Stages) -> None:
    """Raise ConfigError, naming the way out, where the adapters cannot be cut over `tensor` ranks x `stages`."""
    if config.method == "alora" and arch.full_layers:
        raise ConfigError(
            "adapter.method=alora: some layers of this model have a window and some have none, which ALoRA's attention "
            "does not follow: set adapter.method=lora"
        )
    linears = adapted_linears(arch, config)
    adapted = {int(linear.linear.split(".")[2]) for linear in linears}
    for rank in range(stages.pipeline):
        if not stages.layers_of(rank) & adapted:
            layers = " and ".join(f"{part[0]} to {part[-1]}" for part in stages.parts_of(rank))
            raise ConfigError(
                f"adapter.targets leaves pipeline stage {rank} (layers {layers}) nothing to train: lower "
                "parallel.pipeline, or target layers of each stage"
            )
    partial = any(
        target is None for linear in linears if linear.linear.endswith("linear_qkv") for _, target in linear.rows
    )
    if tensor > arch.num_query_groups and partial:
        raise ConfigError(
            f"parallel.tensor={tensor} cuts through the model's {arch.num_query_groups} query groups: there "
            "adapter.targets must name all of q_proj, k_proj and v_proj or none; or lower parallel.tensor"
        )


def num_parameters(arch: Architecture, config: AdapterConfig) -> int:
    """Of the whole model's adapters: what is trained."""
    return sum(math.prod(shape) for linear in adapted_linears(arch, config) for shape, _ in linear.tensors().values())


def describe_adapter(arch: Architecture, config: AdapterConfig) -> str:
    """What is trained, in a line."""
    trained = num_parameters(arch, config)
    share = trained / (arch.num_parameters + trained)
    heads = f", {config.num_heads} heads" if config.method == "alora" else ""
    return (
        f"{config.method} of rank {config.rank}{heads} on {', '.join(config.targets)}: {trained / 1e6:.2f} M trainable "
        f"parameters, {share:.2%} of all"
    )
