"""What pipeline schedules keep waiting: parts of the model in flight, and ranks without work."""

from __future__ import annotations

from megatron_mixcpt.architecture.stages import Stages


def most_in_flight(stages: Stages, rank: int, num_micro: int) -> tuple[int, int]:
    """Layers, and parts of the model, that wait on `rank` for their gradients at once, each once a micro-batch.

    Of the moment with the most layers, in the order in which megatron-core's schedules go.
    """
    pipeline, interleave = stages.pipeline, stages.interleave
    sizes = [len(part) for part in stages.parts_of(rank)]
    groups = [min(pipeline, num_micro - first) for first in range(0, num_micro, pipeline)]
    order = [part for group in groups for part in range(interleave) for _ in range(group)]
    if interleave == 1:
        ahead = pipeline - rank - 1
    else:
        ahead = 2 * (pipeline - rank - 1) + (interleave - 1) * pipeline
    waiting, most = [0] * interleave, (0, 0)
    for number, part in enumerate(order):
        waiting[part] += 1
        most = max(most, (sum(count * size for count, size in zip(waiting, sizes)), sum(waiting)))
        if number >= ahead:
            waiting[interleave - 1 - order[number - ahead]] -= 1
    return most


def idle_share(pipeline: int, interleave: int, num_micro: int) -> float:
    """The pipeline's bubble: the share of a step in which a rank waits while the pipeline fills and drains, where all
    parts take as long."""
    return (pipeline - 1) / (interleave * num_micro + pipeline - 1)
