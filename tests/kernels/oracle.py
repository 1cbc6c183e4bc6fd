"""The textbook loss: dense, in fp64, swapping the logits themselves and differentiating with autograd."""

import os

import torch
from torch import Tensor

from tests.kernels.problems import with_details

LOSS_ERROR, GRADIENT_ERROR = 3e-5, 1e-6  # relative to the loss; to the largest gradient


def oracle(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    target: str = "swap",
    margin: float = 0.2,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, details) of whole-vocabulary logits `[..., V]`, differentiable in the student."""
    student = student.double()[..., :valid_vocab]
    ignored = labels == ignore_index
    label = labels.masked_fill(ignored, 0).unsqueeze(-1)
    ce = -torch.log_softmax(student, -1).gather(-1, label).squeeze(-1)
    loss = torch.where(ignored, 0.0, ce_weight * ce)
    details = {"ce": ce}
    if teacher is not None:
        target_log_p, p, argmax = _target(teacher.double()[..., :valid_vocab], label, temperature, target, margin)
        log_q = torch.log_softmax(student / temperature, -1)
        mass = target_log_p.exp()
        kl = torch.where(mass == 0, 0.0, mass * (target_log_p - log_q)).sum(-1)
        loss = loss + torch.where(ignored, 0.0, kd_weight * kl)
        base_log_p = torch.log_softmax(teacher.double()[..., :valid_vocab], -1)  # at temperature 1, unedited
        base = base_log_p.exp()
        moved = base * (base_log_p - torch.log_softmax(student, -1))
        details |= {
            "kl": kl,
            "kl_base": torch.where(base == 0, 0.0, moved).sum(-1),
            "p_argmax": p.gather(-1, argmax).squeeze(-1),
            "p_label": p.gather(-1, label).squeeze(-1),
            "swapped": (argmax != label).squeeze(-1),
        }
    return loss, {name: value.detach().masked_fill(ignored, 0) for name, value in details.items()}


def _target(teacher, label, temperature, target, margin):
    argmax = (teacher == teacher.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)  # the first of ties
    p = torch.softmax(teacher / temperature, -1)
    if target == "swap":
        edited = teacher.scatter(-1, argmax, teacher.gather(-1, label))
        edited = edited.scatter(-1, label, teacher.gather(-1, argmax))
        return torch.log_softmax(edited / temperature, -1), p, argmax
    if target == "plain":
        return torch.log_softmax(teacher / temperature, -1), p, argmax
    p_a, p_y = p.gather(-1, argmax), p.gather(-1, label)
    overtake = (p_a - p_y + margin) / (1 + p_a - p_y)
    mix = torch.where(argmax == label, margin / (1 - p_y), overtake).clamp(max=1)  # at margin 1, rounding can exceed 1
    mixed = ((1 - mix) * p).scatter_add(-1, label, mix)
    return mixed.log(), p, argmax


def loss_and_gradient(function, student, teacher, labels, upstream, **options):
    """(loss, gradient of sum(upstream * loss) in the student, details)."""
    student = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss, details = function(student, teacher, labels, **options)
    (gradient,) = torch.autograd.grad(loss, student, upstream.to(loss.dtype))
    return loss.detach(), gradient, details


def check(student, teacher, labels, upstream, **options):
    """Loss, gradient and details agree with the oracle on the same inputs."""
    loss, gradient, details = loss_and_gradient(with_details, student, teacher, labels, upstream, **options)
    options.pop("grad_buffer", None)
    expected, expected_gradient, expected_details = loss_and_gradient(
        oracle, student, teacher, labels, upstream, **options
    )
    assert loss.dtype == torch.float32 and gradient.dtype == student.dtype
    torch.testing.assert_close(loss.double(), expected, rtol=LOSS_ERROR, atol=LOSS_ERROR)
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[student.dtype]
    if os.environ["MIXCPT_LSSD"] == "triton" and student.device.type == "cpu":
        rounding *= 2  # Triton's interpreter truncates to bfloat16, a GPU rounds
    scale = (expected_gradient.abs().max() if expected_gradient.any() else upstream.abs().max()).item()
    torch.testing.assert_close(
        gradient.double(),
        expected_gradient.double(),
        rtol=rounding,
        atol=GRADIENT_ERROR * scale + 1e-7 * bool(rounding),
    )
    for name, value in expected_details.items():
        torch.testing.assert_close(details[name].to(value.dtype), value, rtol=LOSS_ERROR, atol=LOSS_ERROR)
