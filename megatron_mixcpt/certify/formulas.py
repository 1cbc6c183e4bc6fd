"""The textbook: every loss and the optimizer as dense formulas, in the dtype of what they are given; imports torch.

Shapes: t tokens, v vocabulary, n pairs, e experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label]: logits `[t, v]`, labels `[t]` -> `[t]`."""
    return -torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities `[t, v]` -> `[t]`; 0 log 0 is 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def distillation_target(
    teacher: Tensor, labels: Tensor, choice: Tensor, *, target: str, temperature: float, margin: float
) -> Tensor:
    """Log-probabilities `[t, v]` that the student is held to.

    Args:
        teacher: logits `[t, v]`.
        choice: `[t]` the teacher's first choice, the lowest id on ties.
        target: swap: logits of choice and label exchanged (arXiv 2407.10804); plain: none; mft: a share of the label's
            certainty mixed in, so that the label leads the old choice by `margin` (arXiv 2506.15702).
    """
    rows, label = torch.arange(len(labels)), labels
    if target == "swap":
        swapped = teacher.clone()
        swapped[rows, choice], swapped[rows, label] = teacher[rows, label], teacher[rows, choice]
        teacher = swapped
    log_p = torch.log_softmax(teacher / temperature, -1)
    if target in ("swap", "plain"):
        return log_p
    if target != "mft":
        raise ValueError(f"the target {target!r} has no formula here")
    p = log_p.exp()
    p_choice, p_label = p[rows, choice], p[rows, label]
    leads = choice == label
    rest = torch.where(leads, 1.0 - p_label, 1.0)
    share = torch.where(leads, margin / rest, (p_choice - p_label + margin) / (1.0 + p_choice - p_label)).clamp(max=1.0)
    mixed = (1.0 - share).unsqueeze(-1) * p
    mixed[rows, label] += share
    return mixed.log()


def preference(
    policy: Tensor, reference: Tensor, lengths: Tensor, *, loss: str, beta: float, smoothing: float, per_token: bool
) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7), with label smoothing, or IPO (arXiv 2310.12036, equation 17): `[n]`.

    Args:
        policy, reference: log-probabilities of chosen and rejected answers `[n, 2]`.
        lengths: tokens of each `[n, 2]`; with `per_token` they divide them.
    """
    ratio = policy - reference
    if per_token:
        ratio = ratio / lengths
    h = ratio[:, 0] - ratio[:, 1]
    if loss == "ipo":
        return (h - 0.5 / beta) ** 2
    right, wrong = torch.sigmoid(beta * h).log(), torch.sigmoid(-beta * h).log()
    return -(1.0 - smoothing) * right - smoothing * wrong


def balance(logits: Tensor, chosen: int) -> Tensor:
    """e * sum_i f_i P_i (arXiv 2101.03961, equation 4) of a router's logits `[t, e]`, whose tokens go to their `chosen`
    likeliest experts each: f_i the share of all choices that fell on expert i, P_i its mean probability; a scalar."""
    experts = logits.shape[1]
    probabilities = torch.softmax(logits, -1)
    choices = probabilities.topk(chosen, -1).indices.flatten()
    shares = torch.nn.functional.one_hot(choices, experts).to(logits.dtype).mean(0)
    return experts * (shares * probabilities.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean square of the log-sum-exp of a router's logits `[t, e]` (arXiv 2202.08906, equation 5): a scalar."""
    return torch.logsumexp(logits, -1).square().mean()


def learning_rate(
    step: int, *, peak: float, least: float, warmup: int, steps: int, schedule: str, decay_fraction: float
) -> float:
    """Of step `step`, from 0: linear warm-up, then a half cosine, a plateau with linear decay (wsd), or constant."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        done = (step - warmup) / (steps - warmup)
        return least + (peak - least) * 0.5 * (1.0 + math.cos(math.pi * done))
    begin = max(warmup, steps - round(decay_fraction * steps))
    return peak - (peak - least) * max(0.0, step - begin) / max(steps - begin, 1)


class AdamW:
    """AdamW with decoupled decay (arXiv 1711.05101) after clipping by the global norm; vectors are not decayed."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        betas: tuple[float, float],
        eps: float,
        decay: float,
        clip: float,
    ) -> None:
        self.weights = dict(weights)
        self._first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._betas, self._eps, self._decay, self._clip = betas, eps, decay, clip
        self._taken = 0

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """One step at learning rate `rate`."""
        self._taken += 1
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        factor = min(1.0, self._clip / (norm + 1e-6)) if self._clip > 0 else 1.0
        beta1, beta2 = self._betas
        for name, weight in self.weights.items():
            gradient = factor * gradients[name].to(weight.dtype)
            first = self._first[name].mul_(beta1).add_((1 - beta1) * gradient)
            second = self._second[name].mul_(beta2).add_((1 - beta2) * gradient**2)
            first, second = first / (1 - beta1**self._taken), second / (1 - beta2**self._taken)
            decay = self._decay if weight.dim() > 1 else 0.0
            self.weights[name] = weight - rate * (first / (second.sqrt() + self._eps) + decay * weight)
