"""What all ranks know about a step before any of them acts on it, by one all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mixcpt.objectives.task import COUNT, LOSS

LANES, LANE_BITS = 4, 16  # a 64-bit sum travels in fp64 as four exact pieces


@dataclass(frozen=True)
class StepTotals:
    """The global batch's sums, the same on every rank."""

    rows: list[list[float]]
    """By source, then the objective's columns."""
    digest: int
    """Sum of the samples' digests modulo 2^64: which samples these were, whatever rank read them."""
    stopping: bool
    """Some rank was asked to stop."""
    saving: bool
    """By some rank's clock a checkpoint is due."""
    routed: list[list[float]]
    """Of a mixture of experts, by layer: see `Routing.sums`."""

    @property
    def loss(self) -> float:
        """Mean over what the objective counts: target tokens, or pairs."""
        return sum(row[LOSS] for row in self.rows) / max(sum(row[COUNT] for row in self.rows), 1.0)


def agree(
    totals: torch.Tensor, digest: int, *, stop: bool, save: bool = False, routed: torch.Tensor | None = None
) -> StepTotals:
    """Collective.

    Args:
        totals: this rank's `[num_sources, columns]` fp64 sums, zeros where another rank counts.
        digest: of this rank's samples; 0 where another rank counts.
        stop, save: whether this rank was asked to stop, or finds that a checkpoint is due.
        routed: this rank's `Routing.sums`, fp64.
    """
    lanes = [float(digest >> LANE_BITS * lane & (1 << LANE_BITS) - 1) for lane in range(LANES)]
    extra = torch.tensor([*lanes, float(stop), float(save)], dtype=totals.dtype, device=totals.device)
    routed = totals.new_zeros(0, 1) if routed is None else routed
    message = torch.cat([totals.flatten(), extra, routed.flatten()])
    torch.distributed.all_reduce(message)
    values, columns = message.tolist(), routed.shape[1]
    count = totals.numel()
    rows = [values[i : i + totals.shape[1]] for i in range(0, count, totals.shape[1])]
    behind = count + len(extra)
    by_layer = [values[i : i + columns] for i in range(behind, len(values), columns)]
    total = sum(int(lane) << LANE_BITS * index for index, lane in enumerate(values[count : count + LANES]))
    return StepTotals(rows, total % 2**64, values[behind - 2] > 0, values[behind - 1] > 0, by_layer)
