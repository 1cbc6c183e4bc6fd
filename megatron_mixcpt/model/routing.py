"""What the routers of a mixture of experts do over a step: losses that keep experts in use, and each expert's load.

Shapes: t tokens, e experts, k experts of a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.model.base_routing import BaseRouting


@dataclass(frozen=True)
class RouterSettings:
    """Whether routers are trained, and the weights of their losses (`train.router_balance`, `train.router_z`)."""

    trained: bool = True
    balance: float = 0.0
    z: float = 0.0


class Routing:
    """Shared by the routers of a stage.

    The balance loss is e * sum_i f_i P_i, with f_i the share of all choices that fell on expert i and P_i the mean
    probability of it, over the tokens of a micro-batch: 1 where all are in equal use (Switch Transformers,
    https://arxiv.org/abs/2101.03961). The z loss is the mean square of the log-sum-exp of a token's logits
    (https://arxiv.org/abs/2202.08906). Each layer adds both.
    """

    def __init__(self, arch: Architecture, settings: RouterSettings, *, sequence_parallel: bool) -> None:
        self.settings = settings if settings.trained else RouterSettings(trained=False)
        self._arch, self._sequence = arch, sequence_parallel
        self._scale: float | Tensor = 1.0
        device = torch.cuda.current_device()
        # Of each layer: choices and sums of probabilities by expert, choices that the base does not make, and of how
        # many, sum of squared log-sum-exps, tokens.
        self._sums = torch.zeros(arch.num_layers, 2 * arch.num_experts + 4, dtype=torch.float64, device=device)
        self.base: BaseRouting | None = None
        """What these choices are compared with."""
        self._told: BaseRouting | None = None

    @property
    def has_losses(self) -> bool:
        return self.settings.balance > 0.0 or self.settings.z > 0.0

    def begin_step(self, counted: float | Tensor) -> None:
        """`counted`: of all tokens of the step the share that the objective's mean is taken over; the trainer divides
        the sum of everything by their number."""
        self._scale = counted
        self._sums.zero_()

    @contextlib.contextmanager
    def telling(self, base: BaseRouting) -> Iterator[None]:
        """Of the base model, a teacher: `base` keeps what its routers choose meanwhile."""
        self._told = base
        try:
            yield
        finally:
            self._told = None

    def observe(self, layer: int, logits: Tensor, probabilities: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """`shares` as they are; their backward adds the losses' gradients.

        Args:
            logits, probabilities: `[..., e]`; experts, shares: `[..., k]`.
        """
        if not torch.is_grad_enabled():  # a teacher's or a measuring pass, or one that is computed again
            if self._told is not None:
                self._told.keep(layer, experts)
            return shares
        settings, count = self.settings, self._arch.num_experts
        probability = probabilities.flatten(0, -2)  # [t, e]
        choices = choices_of(experts, count)
        square = torch.logsumexp(logits.flatten(0, -2).float(), -1).square().sum()
        with torch.no_grad():
            tokens = torch.full_like(square, len(probability))
            changed, compared = (tokens.new_zeros(()), 0) if self.base is None else self.base.changed(layer, experts)
            counts = torch.stack([changed.float(), torch.full_like(square, compared), square, tokens])
            self._sums[layer] += torch.cat([choices, probability.sum(0), counts]).double()
        loss = settings.z * square
        if settings.balance > 0.0:
            # Other ranks have the other tokens of these rows: with the choices of all, each adds its own part.
            whole = self._over_rows(choices)
            loss = loss + settings.balance * count * (probability @ (whole / whole.sum())).sum()
        return _Added.apply(shares, self._scale * loss) if self.has_losses else shares

    def _over_rows(self, choices: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        if self._sequence:
            group = parallel_state.get_tensor_and_context_parallel_group()
        choices = choices.double()
        if group.size() > 1:
            torch.distributed.all_reduce(choices, group=group)
        return choices.float()

    def sums(self) -> Tensor:
        """This rank's part of the step so far, whose sum over all ranks `routing_metrics` takes."""
        counts = self._sequence or parallel_state.get_tensor_model_parallel_rank() == 0
        return self._sums if counts else torch.zeros_like(self._sums)


class _Added(torch.autograd.Function):
    """x, whose backward is also that of a loss beside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, gradient.new_ones(())


def choices_of(experts: Tensor, count: int) -> Tensor:
    """How often each of `count` experts is chosen in `experts [..., k]`: int64 `[e]`. Does not wait for the device."""
    chosen = experts.flatten()
    return torch.zeros(count, dtype=torch.int64, device=chosen.device).scatter_add_(0, chosen, torch.ones_like(chosen))


def routing_metrics(rows: Sequence[Sequence[float]], arch: Architecture) -> dict[str, float]:
    """What metrics.jsonl gets of a step. `rows`: `Routing.sums` of all ranks together, by layer."""
    count, chosen = arch.num_experts, arch.experts_per_token
    metrics: dict[str, float] = {}
    balances, squares, loads, changes = [], [], [], []
    for layer, row in enumerate(rows):
        tokens = row[-1]
        if not tokens:
            continue
        load = [count * choices / (chosen * tokens) for choices in row[:count]]
        balances.append(sum(of * p / tokens for of, p in zip(load, row[count : 2 * count])))
        squares.append(row[-2] / tokens)
        loads += load
        metrics |= {f"moe/load_max/{layer}": max(load), f"moe/load_min/{layer}": min(load)}
        if row[-3]:
            changes.append(row[-4] / row[-3])
            metrics[f"moe/changed/{layer}"] = changes[-1]
    if not loads:
        return {}
    if changes:
        metrics["moe/changed"] = sum(changes) / len(changes)
    return {
        "moe/balance": sum(balances) / len(balances),
        "moe/z": sum(squares) / len(squares),
        "moe/load_max": max(loads),
        "moe/idle": sum(load == 0.0 for load in loads) / len(loads),
        **metrics,
    }
