"""Optimizer state in the model's own shape, whatever the optimizer's layout.

Megatron's formats for its optimizers are not interchangeable, and with torch's Adam, which keeps a step count a
parameter, its distributed optimizer cannot be restored from the reshardable one and is restored wrongly from the other.
Here every optimizer, plain or sharded over data-parallel ranks, is saved as the same three fp32 tensors a parameter, of
its shape, and one step count. Each rank saves the elements that it holds, and reads those. A checkpoint therefore loads
into any TP x PP x DP layout and any of the optimizers; its names are those of megatron-core's plain optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor

MASTER = "fp32_param"  # fp32 weights, where the model's own are of lower precision
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Held:
    """Elements `begin:end` of the tensor that an optimizer keeps beside `param`; `values` is that part, flat."""

    name: str
    param: Tensor
    values: Tensor
    begin: int
    end: int
    shared: bool
    """Data-parallel ranks have the same."""


class _Slot:
    """Where one model parameter's optimizer tensors live on this rank.

    `main` is the tensor the inner optimizer updates: the parameter itself, its fp32 master, or (distributed optimizer)
    the flat slice `begin:end` of its master.
    """

    def __init__(self, inner: torch.optim.Optimizer, param: Tensor, main: Tensor, begin: int, end: int) -> None:
        self.inner, self.param, self.main, self.begin, self.end = inner, param, main, begin, end

    def tensor(self, name: str) -> Tensor:
        if name != MASTER:
            return self.inner.state[self.main][name]
        # An optimizer whose state is offloaded keeps the values elsewhere (train.host_adam).
        return self.inner.master(self.main) if hasattr(self.inner, "master") else self.main.detach()


def optimizer_step_count(optimizer: MegatronOptimizer) -> int:
    """Steps taken; raises RuntimeError where parameters disagree, which no sound optimizer does."""
    found = [
        single.optimizer.state.get(main, {}).get("step", group.get("step", 0))
        for single in singles(optimizer)
        for group in single.optimizer.param_groups
        for main in group["params"]
    ]
    tensors = [
        count for count in found if isinstance(count, Tensor)
    ]  # torch's Adam: one a parameter; TE, Apex: a group's
    counts = {int(count) for count in found if not isinstance(count, Tensor)}
    counts |= set(map(int, torch.stack(tensors).tolist())) if tensors else set()  # read from the device at once
    if len(counts) > 1:
        raise RuntimeError(f"parameters have taken different numbers of optimizer steps: {sorted(counts)}")
    return counts.pop() if counts else 0


def optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Held]:
    """Every tensor of the optimizer's state of which this rank holds a part, always in the same order."""
    allocate_state(optimizer)
    for single in singles(optimizer):
        shared = not isinstance(single, DistributedOptimizer)
        for param, slot in _slots_of(single):
            for name in _names(param):
                yield Held(name, param, slot.tensor(name).view(-1), slot.begin, slot.end, shared)


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that has taken no step its zero moments, as its own first step would."""
    for single in singles(optimizer):
        _allocate_moments(single)


def assert_steps_are_separate(optimizer: MegatronOptimizer) -> None:
    """Raise RuntimeError where parameters share one step count: Adam would count every step many times."""
    counts = [
        single.optimizer.state[main]["step"]
        for single in singles(optimizer)
        for group in single.optimizer.param_groups
        for main in group["params"]
        if isinstance(single.optimizer.state[main].get("step"), Tensor)
    ]
    if len({count.data_ptr() for count in counts}) != len(counts):
        raise RuntimeError("parameters share the storage of their optimizer step")


def set_step_count(optimizer: MegatronOptimizer, step: int) -> None:
    """As if the optimizer had taken `step` steps."""
    for single in singles(optimizer):
        for group in single.optimizer.param_groups:
            if "step" in group:
                group["step"] = step
            for main in group["params"]:
                state = single.optimizer.state[main]
                if "step" in state:
                    # A tensor of its own for each parameter: torch's Adam adds to it in place.
                    state["step"] = torch.full_like(state["step"], step)


def common_state(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """What megatron-core keeps in `common.pt` of its plain optimizers, so that it can read this checkpoint."""
    groups, masters = [], False
    for single in singles(optimizer):
        groups += [  # without what holds for the device
            {k: v for k, v in group.items() if k not in ("params", "fused")} for group in single.optimizer.param_groups
        ]
        masters |= any(MASTER in _names(param) for param, _ in _slots_of(single))
    step = torch.tensor(float(optimizer_step_count(optimizer)))
    state = {"state": {"common_step": step}, "param_groups": groups}
    return {"optimizer": state} if masters else state


def _names(param: Tensor) -> tuple[str, ...]:
    return MOMENTS if param.dtype == torch.float32 else (MASTER, *MOMENTS)


def singles(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers with parameters on this rank that make up `optimizer`."""
    singles = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [single for single in singles if not getattr(single, "is_stub_optimizer", False)]


def _slots_of(single: Any) -> Iterator[tuple[Tensor, _Slot]]:
    """Every trained parameter of which this rank holds state, always in the same order."""
    inner = single.optimizer
    if isinstance(single, DistributedOptimizer):
        ranges = {
            param: ranges["param"]
            for buffer in single.gbuf_ranges
            for buckets in buffer.values()
            for bucket in buckets
            for param, ranges in bucket["param_map"].items()
        }
        for chunk in single.model_chunks:
            for param in chunk.parameters():
                if not param.requires_grad or param not in ranges:
                    continue
                group_index, order = single.model_param_group_index_map[param]
                main = inner.param_groups[group_index]["params"][order]
                yield param, _Slot(inner, param, main, ranges[param].start, ranges[param].end)
        return
    masters = {}
    if isinstance(single, Float16OptimizerWithFloat16Params):
        for params, mains in zip(single.float16_groups, single.fp32_from_float16_groups):
            masters.update({id(main): param for param, main in zip(params, mains)})
    for group in inner.param_groups:
        for main in group["params"]:
            param = masters.get(id(main), main)
            yield param, _Slot(inner, param, main, 0, param.numel())


def _allocate_moments(single: Any) -> None:
    for group in single.optimizer.param_groups:
        for main in group["params"]:
            if not single.optimizer.state.get(main):
                state = {name: torch.zeros_like(main, memory_format=torch.preserve_format) for name in MOMENTS}
                if isinstance(single.optimizer, torch.optim.Adam):
                    state["step"] = torch.zeros((), device=main.device if group["fused"] else "cpu")
                single.optimizer.state[main] = state
