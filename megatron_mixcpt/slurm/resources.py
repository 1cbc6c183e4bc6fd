"""What a job asks SLURM for, and how its ranks are started."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_mixcpt.config import NonNegative, Positive, Section

SAVE_MARGIN = 60  # seconds between the end of the ranks' time to save and the job's end
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


class Resources(Section):
    """Options of `mixcpt launch`, and keys of a chain's stages."""

    nodes: Positive = 1
    """Nodes."""
    gpus_per_node: NonNegative = 8
    """GPUs of a node; 0 on clusters without."""
    tasks_per_node: Positive | None = None
    """Ranks of a node; one a GPU, or one a node without GPUs, when not given."""
    cpus_per_task: Positive = 8
    """Cores of a rank."""
    mem: str | None = None
    """Memory of a node, as 64G; all that it has, or 32G for a task that preprocesses, when not given."""
    time: str = "24:00:00"
    """Time limit, as SLURM writes it: minutes, hours:minutes:seconds, days-hours."""
    partition: str | None = None
    """Partition; the cluster's default when not given."""
    account: str | None = None
    """Account that pays; the user's default when not given."""
    container: str | None = None
    """Image for pyxis/enroot: registry#name:tag or a .sqsh file."""
    container_mounts: list[str] = Field(default=[])
    """Folders that the container sees beside the working directory, as /data:/data."""
    modules: list[str] = Field(default=[])
    """Environment modules to load."""
    style: Literal["srun", "torchrun"] = "srun"
    """Who starts the ranks of a node."""
    max_restarts: NonNegative = 20
    """Times that the job may go back into the queue."""
    grace: Annotated[int, Field(gt=SAVE_MARGIN, le=65535)] = 300
    """Seconds before the time limit at which the ranks are told to save and end: a step and a save must fit in."""
    python: str | None = None
    """Interpreter that the job uses; this one, or `python` in a container, when not given."""
    options: dict[str, str] = Field(default={})
    """Further sbatch options, as {qos: high, exclusive: ""}."""

    @model_validator(mode="after")
    def _time_for_the_run(self) -> Resources:
        if seconds(self.time) <= self.grace:
            raise ValueError(f"time {self.time} is no longer than the grace of {self.grace} s: nothing would run")
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def size(self) -> str:
        """Nodes and what of them, in words."""
        count = self.ranks_per_node
        ranks = f", {count} rank{'s' * (count > 1)} each" if count != max(self.gpus_per_node, 1) else ""
        return f"{self.nodes} x {f'{self.gpus_per_node} GPUs' if self.gpus_per_node else 'CPU'}{ranks}"

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def seconds(time: str) -> float:
    """Seconds of a SLURM time limit: `90`, `90:30`, `12:00:00`, `2-12`, `2-12:30`, `2-12:30:00`; of `0` and `UNLIMITED`
    infinitely many. Raises ValueError."""
    if time == "0" or time.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = TIME.fullmatch(time)
    if not match:
        raise ValueError(f"time {time!r}: write minutes, hours:minutes:seconds or days-hours, as 24:00:00")
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"]:
        hours, minutes, rest = [*parts, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + rest
    if len(parts) < 3:
        return parts[0] * 60 + (parts[1] if len(parts) > 1 else 0)
    return (parts[0] * 60 + parts[1]) * 60 + parts[2]
