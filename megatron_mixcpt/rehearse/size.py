"""How many ranks a run in small has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Ranks of a rehearsal."""

    tensor: int
    pipeline: int
    data: int
    context: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data
