"""Megatron's optimizer for our model: AdamW, plain or sharded over the data-parallel group."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_mixcpt.checkpoint.optimizer_state import singles
from megatron_mixcpt.config import OptimizerSection, TrainConfig
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.train.schedule import learning_rate


def build_optimizer(
    model: DistributedDataParallel, config: TrainConfig, placement: OptimizerSection | None = None
) -> MegatronOptimizer:
    """AdamW with decoupled weight decay; norms and biases are not decayed (Megatron's grouping).

    Raises ConfigError where megatron-core has taken up another library's optimizer.
    """
    if not USING_PYTORCH_OPTIMIZER:
        raise ConfigError(
            "megatron-core has taken up the optimizer of Transformer Engine or Apex, with which nothing is tested: "
            "call megatron_mixcpt.quick_import.quicken() before anything imports megatron.core, as `mixcpt` does"
        )
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=config.dtype == "bf16",
        params_dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32,
        use_distributed_optimizer=config.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    if placement is not None and placement.offload == "cpu":
        from megatron_mixcpt.train.host_adam import offload

        offload(optimizer, model)
    elif next(model.parameters()).is_cuda:
        for single in singles(optimizer):
            for group in single.optimizer.param_groups:
                group["fused"] = True  # torch's own choice takes a copy of the second moments for a moment
    return optimizer


def optimizer_step(
    optimizer: MegatronOptimizer,
    step: int,
    config: TrainConfig,
    admits: Callable[[float], bool] = math.isfinite,
    rate_factor: float = 1.0,
) -> float:
    """Clip and apply the finished gradients at step `step`'s learning rate, times `rate_factor`.

    Returns the gradient norm before clipping.

    Where `admits(norm)` is false, no weight changes. Every rank sees the same norm, so all decide alike.
    """
    optimizer.prepare_grads()
    norm = gradient_norm(optimizer)
    if not admits(norm):
        return norm
    if config.clip_grad > 0.0:
        parameters = [parameter for single in singles(optimizer) for parameter in single.get_parameters()]
        clip_grad_by_total_norm_fp32(parameters, max_norm=config.clip_grad, total_norm=norm)
    lr = rate_factor * learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    optimizer.step_with_ready_grads()
    return norm


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Collective: the norm of the whole gradient, the largest of all ranks', or NaN where one of them is not finite.

    Computed on the device, which the host reads once: megatron-core without Apex reads the norm of every parameter.
    Replicas have equal gradients after their reduction, unless a device or link failed; with norms of their own they
    would go on as two different models.
    """
    # Experts over ranks have an optimizer of their own, whose ranks are others.
    norm = torch.stack([_squares(single) for single in _chained(optimizer)]).sum().sqrt()
    finite = norm.isfinite()
    message = torch.stack([torch.where(finite, norm, 0.0), (~finite).double()])
    torch.distributed.all_reduce(message, op=torch.distributed.ReduceOp.MAX)
    largest, bad = message.tolist()
    return math.nan if bad else largest


def _squares(single: Any) -> Tensor:
    """Collective: the sum of squares over all parameters of one of `_chained`, an fp64 scalar."""
    here = not getattr(single, "is_stub_optimizer", False)
    grads = single.get_main_grads_for_grad_norm() if here else []
    return sum_of_squares(grads, single.get_grad_stats_parallel_group())


def _chained(optimizer: MegatronOptimizer) -> list[Any]:
    """The same on every rank, those included that have no parameters on this one."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def sum_of_squares(grads: list[Tensor], group: torch.distributed.ProcessGroup) -> Tensor:
    """Collective over `group`, whose ranks hold different gradients: the sum over all of them, an fp64 scalar.

    Squares are added within a gradient in fp32, over gradients and ranks in fp64, in the same order every time.
    """
    if grads:
        total = torch.stack(torch._foreach_norm(grads)).double().square().sum()
    else:  # no weight of this stage is trained
        total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=group)
    return total
