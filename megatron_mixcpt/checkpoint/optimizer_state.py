"""Optimizer state in the model's own shape, whatever the optimizer's layout.

Megatron's formats for its optimizers are not interchangeable, and with torch's Adam, which keeps a step count a
parameter, its distributed optimizer cannot be restored from the reshardable one and is restored wrongly from the other.
Here every optimizer, plain or sharded over data-parallel ranks, is saved as the same three fp32 tensors a parameter,
sharded like the parameter itself, and one step count. A checkpoint therefore loads into any TP x PP x DP layout and any
of the optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor

MASTER = "master"  # fp32 weights, where the model's own are of lower precision
MOMENTS = ("exp_avg", "exp_avg_sq")


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
    counts = set()
    for single in singles(optimizer):
        for group in single.optimizer.param_groups:
            for main in group["params"]:
                state = single.optimizer.state.get(main, {})
                count = state.get("step", group.get("step", 0))  # torch's Adam: a tensor a parameter; TE, Apex: a group
                counts.add(int(count))
    if len(counts) > 1:
        raise RuntimeError(f"parameters have taken different numbers of optimizer steps: {sorted(counts)}")
    return counts.pop() if counts else 0


def optimizer_sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool
) -> dict[str, dict[str, Any]]:
    """Sharded tensors of the optimizer's state, collective over data-parallel ranks.

    Args:
        model_state: `model.sharded_state_dict()`.
        loading: give every data-parallel rank empty tensors to load into; else the values to save, on the first rank.

    Returns:
        `{parameter number: {"master" | "exp_avg" | "exp_avg_sq": sharded tensor of the parameter's shape}}`
    """
    sharded_params = _sharded_by_param(model_state)
    state: dict[str, dict[str, Any]] = {}
    allocate_state(optimizer)
    for number, (single, param, slot) in enumerate(_slots(optimizer)):
        group = single.data_parallel_group if isinstance(single, DistributedOptimizer) else None
        sharded = sharded_params[id(param)]
        for name in _names(param):
            whole = _whole(param, slot, name, group, loading)
            if whole is not None:
                tensor = make_sharded_optimizer_tensor(sharded, whole, prefix=f"optimizer.{name}")
                state.setdefault(str(number), {})[name] = tensor
    return state


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


@torch.no_grad()
def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, dict[str, Tensor]], step: int) -> None:
    """Copy what dist_checkpointing filled into `optimizer_sharded_state(..., loading=True)`, and set the step count."""
    for number, (_, param, slot) in enumerate(_slots(optimizer)):
        if slot is None:
            continue
        for name in _names(param):
            tensor = slot.tensor(name)
            tensor.copy_(loaded[str(number)][name].flatten()[slot.begin : slot.end].view_as(tensor))
    for single in singles(optimizer):
        for group in single.optimizer.param_groups:
            if "step" in group:
                group["step"] = step
            for main in group["params"]:
                state = single.optimizer.state[main]
                if "step" in state:
                    # A tensor of its own for each parameter: torch's Adam adds to it in place.
                    state["step"] = step if isinstance(state["step"], int) else torch.tensor(float(step))


def _names(param: Tensor) -> tuple[str, ...]:
    return MOMENTS if param.dtype == torch.float32 else (MASTER, *MOMENTS)


def singles(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers with parameters on this rank that make up `optimizer`."""
    singles = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [single for single in singles if not getattr(single, "is_stub_optimizer", False)]


def _slots(optimizer: MegatronOptimizer) -> Iterator[tuple[Any, Tensor, _Slot | None]]:
    """Every trained parameter of this rank, always in the same order, with the optimizer it belongs to.

    Its slot is None where other data-parallel ranks hold all of it.
    """
    for single in singles(optimizer):
        for param, slot in _slots_of(single):
            yield single, param, slot


def _slots_of(single: Any) -> Iterator[tuple[Tensor, _Slot | None]]:
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
                if not param.requires_grad:
                    continue
                if param not in ranges:
                    yield param, None
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


def _whole(
    param: Tensor, slot: _Slot | None, name: str, group: torch.distributed.ProcessGroup | None, loading: bool
) -> Tensor | None:
    """The state tensor in the parameter's shape: to be filled (loading), or gathered on the first rank of `group`."""
    if loading:
        return torch.empty(param.shape, dtype=torch.float32)
    if group is None:
        assert slot is not None
        return slot.tensor(name)
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    if slot is not None:
        whole[slot.begin : slot.end] = slot.tensor(name).flatten()
    # Each element is non-zero on one rank at most, so the sum is exact.
    first = torch.distributed.get_global_rank(group, 0)
    torch.distributed.reduce(whole, dst=first, group=group)
    return whole.view(param.shape).cpu() if group.rank() == 0 else None


def _sharded_by_param(model_state: dict[str, Any]) -> dict[int, ShardedTensor]:
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(tensor.data): tensor for tensor in nested_values(sharded)}


def _allocate_moments(single: Any) -> None:
    for group in single.optimizer.param_groups:
        for main in group["params"]:
            if not single.optimizer.state.get(main):
                state = {name: torch.zeros_like(main, memory_format=torch.preserve_format) for name in MOMENTS}
                if isinstance(single.optimizer, torch.optim.Adam):
                    state["step"] = torch.tensor(0.0)
                single.optimizer.state[main] = state
