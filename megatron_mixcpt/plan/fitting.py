"""Whether a run fits into its devices and, where it does not, which keys to change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.throughput import PEAK_BF16
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.plan.estimate import make_plan

MEMORY = {"B200": 180, "H200": 141, "H100 PCIe": 80, "H100": 80, "A100": 80}
"""GiB of a device; `--gpu a100-40g` names another."""
RESERVED, LEAST = 0.05, 0.5
"""Share of the memory, and GiB, that the plan leaves to libraries, their context and fragmentation."""
CHANGES: list[dict[str, Any]] = [
    {"train.distributed_optimizer": True},
    {"parallel.sequence": True},
    {"train.micro_batch_size": 1},
    {"loss.fuse_lm_head": True},
    {"train.recompute": "full"},
    {"optimizer.offload": "cpu"},
    {"parallel.expert": 2},
    {"parallel.expert": 4},
    {"parallel.expert": 8},
    {"parallel.tensor": 2},
    {"parallel.tensor": 4},
    {"parallel.tensor": 8},
    {"parallel.pipeline": 2},
    {"parallel.pipeline": 4},
    {"adapter.method": "lora", "teacher.source": "adapter_off"},
]
"""What lowers memory, the cheapest in time first."""

Check = Callable[[Config], object]
"""Raises ConfigError for what a run would refuse."""


def device(text: str) -> tuple[str, float]:
    """`--gpu`: name in PEAK_BF16 and GiB of `H100`, `h100-80g` or `a100-40g`. Raises ConfigError."""
    match = re.fullmatch(r"(?P<name>.+?)(-(?P<memory>\d+)g(i?b)?)?", text, re.IGNORECASE)
    names = {name.lower(): name for name in PEAK_BF16}
    if not match or match["name"].lower() not in names:
        raise ConfigError(
            f"--gpu {text}: known are {', '.join(PEAK_BF16)}, also with memory, as h100-80g; give others' peak with "
            "--peak-tflops"
        )
    name = names[match["name"].lower()]
    return name, float(match["memory"] or MEMORY[name])


def usable(memory: float) -> float:
    """GiB of a device with `memory` GiB that a run may take."""
    return memory - max(LEAST, RESERVED * memory)


def verdict(config: Config, arch: Architecture, mix: Mix, world_size: int, memory: float, check: Check) -> list[str]:
    """Whether the fullest rank has room in `memory` GiB and, where it has not, changes with which it would; what
    `check` refuses is none."""
    room = usable(memory)
    taken = _fullest(config, arch, mix, world_size)
    left = f"{taken:.1f} of {memory:g} GiB on the fullest rank, {memory - room:.1f} of them left to libraries"
    if taken <= room:
        return [f"fits: {left}"]
    lines = [f"does not fit: {left}"]
    fitting = [(text, size) for text, size in _alone(config, arch, mix, world_size, check) if size <= room]
    if fitting:
        return [*lines, *(f"with {text}: {size:.1f} GiB" for text, size in fitting[:4])]
    for text, size in _together(config, arch, mix, world_size, check):
        if size <= room:
            return [*lines, f"with {text}: {size:.1f} GiB"]
    return [*lines, f"no change of these alone is enough on {world_size} ranks: more of them, or a smaller model"]


def _alone(config: Config, arch: Architecture, mix: Mix, world_size: int, check: Check) -> Iterator[tuple[str, float]]:
    for change in CHANGES:
        changed = _changed(config, change, check)
        if changed is not None:
            yield _named(change), _fullest(changed, arch, mix, world_size)


def _together(
    config: Config, arch: Architecture, mix: Mix, world_size: int, check: Check
) -> Iterator[tuple[str, float]]:
    """One change after the other, each on top of those before that lowered anything."""
    sum_of: dict[str, Any] = {}
    smallest = _fullest(config, arch, mix, world_size)
    for change in CHANGES:
        changed = _changed(config, sum_of | change, check)
        if changed is None:
            continue
        size = _fullest(changed, arch, mix, world_size)
        if size < smallest:
            sum_of, smallest = sum_of | change, size
            yield _named(sum_of), size


def _fullest(config: Config, arch: Architecture, mix: Mix, world_size: int) -> float:
    return max(stage.total for stage in make_plan(config, arch, mix, world_size).stages) / 2**30


def _changed(config: Config, change: dict[str, Any], check: Check) -> Config | None:
    """The configuration with other keys; None where that is nothing new, or would be refused."""
    values = config.model_dump(mode="json", by_alias=True)
    before = {key: _section(values, key).get(key.rpartition(".")[2]) for key in change}
    if before == change or any(
        isinstance(old, int) and isinstance(change[key], int) and "parallel" in key and old >= change[key]
        for key, old in before.items()
    ):
        return None
    for key, value in change.items():
        _section(values, key)[key.rpartition(".")[2]] = value
    try:
        changed = validate(Config, values, "plan")
        check(changed)
    except ConfigError:
        return None
    return changed


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    name = key.partition(".")[0]
    if not isinstance(values.get(name), dict):
        values[name] = {}
    return values[name]


def _named(change: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in change.items()
    )
