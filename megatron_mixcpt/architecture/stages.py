"""Which layers each pipeline rank has, in the plain and in the interleaved schedule."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.throughput import layer_weights, recomputed_weights
from megatron_mixcpt.config import Config
from megatron_mixcpt.errors import ConfigError


@dataclass(frozen=True)
class Stages:
    """The model cut into parts, in order of depth; part i is on rank i modulo `pipeline`."""

    layers: tuple[int, ...]
    """Of each part, at least one."""
    pipeline: int

    @property
    def interleave(self) -> int:
        """Parts a rank has."""
        return len(self.layers) // self.pipeline

    def parts_of(self, rank: int) -> list[range]:
        """The numbers of the layers of each part that `rank` has."""
        firsts = [sum(self.layers[:part]) for part in range(len(self.layers))]
        return [
            range(firsts[part], firsts[part] + self.layers[part])
            for part in range(rank, len(self.layers), self.pipeline)
        ]

    def layers_of(self, rank: int) -> set[int]:
        """The numbers of all layers that `rank` has."""
        return {layer for part in self.parts_of(rank) for layer in part}

    def owner(self, layer: int) -> int:
        """The rank that has a layer."""
        return next(rank for rank in range(self.pipeline) if layer in self.layers_of(rank))

    def megatron_layout(self) -> list[list[str]]:
        """As megatron-core's `pipeline_model_parallel_layout` takes it."""
        parts = [["decoder"] * count for count in self.layers]
        parts[0].insert(0, "embedding")
        parts[-1].append("loss")
        return parts


def balanced(
    arch: Architecture, pipeline: int, interleave: int = 1, *, layer_passes: float = 3.0, head_passes: float = 3.0
) -> Stages:
    """Parts of the least unequal cost, counted in FLOPs: what layers and the output head compute; the embedding is a
    copy and an addition of `hidden` values a token.

    Args:
        layer_passes: forward passes, or what takes as long, that a step makes through a layer.
        head_passes: the same through the output head.
    """
    parts = pipeline * interleave
    layer = layer_passes * 2 * layer_weights(arch)
    costs = [layer] * parts
    costs[0] += 2 * arch.hidden_size
    costs[-1] += head_passes * 2 * arch.vocab_size * arch.hidden_size
    layers = [1] * parts

    def burden(part: int) -> tuple[float, float, int]:
        # Of equals the last, which has the fewest micro-batches in flight.
        return sum(costs[part % pipeline :: pipeline]), costs[part], -part

    for _ in range(arch.num_layers - parts):
        # Layers are alike: to give each to the rank that has least leaves the largest burden as small as it can be.
        part = min(range(parts), key=burden)
        layers[part] += 1
        costs[part] += layer
    return Stages(tuple(layers), pipeline)


def stages_of(config: Config, arch: Architecture) -> Stages:
    """As `parallel` says, or balanced by what a step of `config` computes.

    Raises ConfigError where the model has too few layers, or not those that `parallel.layers_per_stage` adds up to.
    """
    grid = config.parallel
    arch.check_layout(grid.tensor, grid.pipeline, grid.interleave, grid.expert)
    if grid.context > 1 and arch.rope_scaling is not None and arch.rope_scaling.kind == "longrope":
        raise ConfigError(
            "parallel.context: this model's rotary scaling (longrope) goes by the length of each document, which ranks "
            "that have parts of it do not know: set parallel.context=1"
        )
    if grid.layers_per_stage is not None:
        total = sum(grid.layers_per_stage)
        if total != arch.num_layers:
            raise ConfigError(
                f"parallel.layers_per_stage: {grid.layers_per_stage} adds up to {total} layers, the model has "
                f"{arch.num_layers}"
            )
        return Stages(tuple(grid.layers_per_stage), grid.pipeline)
    # The teacher's layers lie on the same ranks as the student's, unless another program's layout has them.
    beside = config.runs_teacher and config.teacher.source != "deepspeed"
    trained = 2.0 if config.adapter is not None else 3.0  # frozen weights have no gradient
    again = recomputed_weights(arch, config.train.recompute) / layer_weights(arch)
    return balanced(
        arch,
        grid.pipeline,
        grid.interleave,
        layer_passes=trained + beside + again,
        head_passes=trained + config.runs_teacher + (2.0 if config.fuses_lm_head else 0.0),
    )
