"""Adam in host memory: moments and fp32 master weights leave the device, torch's fused AdamW for the CPU updates them.

Megatron's optimizers stay as they are (gradients, norm, clipping, sharding, parameter groups); only what they update
with is replaced. On the device a master weight is an empty shell that gradients can be attached to; it stands for the
host's values while Megatron copies them into the model. (ZeRO-Offload, arXiv 2101.06840.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

from megatron_mixcpt.checkpoint.optimizer_state import singles

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


class HostAdam(torch.optim.Optimizer):
    """AdamW on host copies of the parameters of another optimizer, whose groups (and so learning rates) it shares.

    Args:
        groups: parameter groups; each parameter's `.grad` is on its device.
        masters: those parameters that are fp32 copies of lower-precision weights. Their values live on the host.
        copies: whether parameters and host are different memories; where they are one, nothing is moved.
    """

    def __init__(self, groups: list[dict[str, Any]], masters: list[Tensor], *, copies: bool) -> None:
        super().__init__([nn.Parameter(torch.empty(0))], {})  # which would refuse slices of parameters as its own
        self.param_groups = groups
        self._copies = copies
        self._master_ids = {id(master) for master in masters}
        self._host = {id(p): nn.Parameter(self._to_host(p), requires_grad=False) for p in self._parameters()}
        host_groups = [{"params": [self._host[id(p)] for p in group["params"]]} for group in self.param_groups]
        self._adam = torch.optim.AdamW(host_groups, fused=True)
        for p in self._parameters():
            host = self._host[id(p)]
            moments = {name: torch.zeros_like(host.data) for name in ("exp_avg", "exp_avg_sq")}
            self.state[p] = self._adam.state[host] = {"step": torch.tensor(0.0), **moments}
            if copies and id(p) in self._master_ids:
                p.data = p.data.new_empty(()).expand(p.shape)  # the shell

    def master(self, p: Tensor) -> Tensor:
        """Values of a parameter: on the host for a master, which has none on its device."""
        return self._host[id(p)].data if id(p) in self._master_ids else p.detach()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        for group, host_group in zip(self.param_groups, self._adam.param_groups):
            host_group.update({name: group[name] for name in HYPERPARAMETERS})
            for p in group["params"]:
                self._host[id(p)].grad = None if p.grad is None else self._gradient(p)
                if self._copies and id(p) not in self._master_ids:
                    self._host[id(p)].data.copy_(p)  # the model's own weights: whoever loads them need not know of us
        self._adam.step()
        for p in self._parameters():
            self._host[id(p)].grad = None
            if self._copies and id(p) not in self._master_ids:
                p.copy_(self._host[id(p)].data)

    def lend_masters(self, use: Callable[[], None]) -> None:
        """Call `use` while each master holds its host values: what it copies goes from the host to the device."""
        masters = [p for p in self._parameters() if id(p) in self._master_ids]
        shells = [p.data for p in masters]
        for p in masters:
            p.data = self._host[id(p)].data
        try:
            use()
        finally:
            for p, shell in zip(masters, shells):
                p.data = shell

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _to_host(self, p: Tensor) -> Tensor:
        if not self._copies:
            return p.data
        host = torch.empty(p.shape, dtype=torch.float32, pin_memory=p.is_cuda)
        return host.copy_(p.data)

    def _gradient(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        return p.grad.to("cpu", torch.float32)


def offload(optimizer: MegatronOptimizer, model: DistributedDataParallel, *, copies: bool | None = None) -> None:
    """Move the state of a fresh optimizer to the host, for good.

    Args:
        copies: as in HostAdam; None tells by the device.
    """
    if copies is None:
        copies = next(model.parameters()).device.type != "cpu"
    for single in singles(optimizer):
        adam = HostAdam(single.optimizer.param_groups, _masters(single), copies=copies)
        single.optimizer = adam
        if copies and hasattr(single, "_copy_main_params_to_model_params"):
            _lend(single, adam)


def _lend(single: Any, adam: HostAdam) -> None:
    """Whoever copies between masters and model gets the masters' values."""
    down, up = single._copy_main_params_to_model_params, single._copy_model_params_to_main_params
    single._copy_main_params_to_model_params = lambda: adam.lend_masters(down)
    single._copy_model_params_to_main_params = lambda *args, **kwargs: adam.lend_masters(lambda: up(*args, **kwargs))


def _masters(single: Any) -> list[Tensor]:
    if isinstance(single, DistributedOptimizer):
        groups = single.shard_fp32_from_float16_groups
    elif isinstance(single, Float16OptimizerWithFloat16Params):
        groups = single.fp32_from_float16_groups
    else:
        groups = []
    return [master for group in groups for master in group if master is not None]
