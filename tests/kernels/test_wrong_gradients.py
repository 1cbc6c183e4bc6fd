"""Two ways in which public tensor-parallel losses get their gradients wrong, and that these tests would see them."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable

from megatron_mixcpt.kernels import lssd_loss
from tests.helpers.spawn import run_distributed
from tests.kernels.oracle import loss_and_gradient, oracle
from tests.kernels.problems import problem


def plain_all_reduce(student, teacher, labels, *, group, vocab_start):
    """KL whose normaliser is summed by a plain all_reduce: the other ranks' use of it has no path back to this rank."""
    log_p, p = _teacher_log_p(teacher, group)
    total = student.exp().sum(-1)
    dist.all_reduce(total.detach(), group=group)
    part = (p * (log_p - student + total.log().unsqueeze(-1))).sum(-1)
    whole = part.detach().clone()
    dist.all_reduce(whole, group=group)
    return part + (whole - part.detach())


def all_reduce_of_the_loss(student, teacher, labels, *, group, vocab_start):
    """KL whose parts are summed by an all_reduce under autograd: its backward sums the upstream gradients too."""
    log_p, p = _teacher_log_p(teacher, group)
    total = differentiable.all_reduce(student.exp().sum(-1), group=group)
    return differentiable.all_reduce((p * (log_p - student + total.log().unsqueeze(-1))).sum(-1), group=group)


def _teacher_log_p(teacher, group):
    total = teacher.exp().sum(-1)
    dist.all_reduce(total, group=group)
    log_p = teacher - total.log().unsqueeze(-1)
    return log_p, log_p.exp()


def ours(*args, **options):
    return lssd_loss(*args, target="plain", ce_weight=0.0, **options)


def run_three(rank, world_size):
    dist.init_process_group("gloo")
    student, teacher, labels, upstream = problem((5,), 64, "cpu", scale=1.0, ignore=False)
    part = slice(rank * 64 // world_size, (rank + 1) * 64 // world_size)
    results = []
    for function in (ours, plain_all_reduce, all_reduce_of_the_loss):
        tracked = student[:, part].clone().requires_grad_()
        loss = function(tracked, teacher[:, part], labels, group=dist.group.WORLD, vocab_start=part.start)
        results.append((loss.detach(), torch.autograd.grad(loss, tracked, upstream)[0]))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_collectives_inside_autograd_give_wrong_gradients_and_ours_does_not(world_size):
    ranks = run_distributed(run_three, world_size)
    student, teacher, labels, upstream = problem((5,), 64, "cpu", scale=1.0, ignore=False)
    expected, expected_gradient, _ = loss_and_gradient(
        oracle, student, teacher, labels, upstream, target="plain", ce_weight=0.0
    )
    scale = expected_gradient.abs().max()
    gradients = [torch.cat([rank[index][1] for rank in ranks], -1) for index in range(3)]
    errors = [((gradient - expected_gradient).abs().max() / scale).item() for gradient in gradients]
    for index in range(3):  # all the losses look right
        torch.testing.assert_close(ranks[0][index][0].double(), expected, rtol=1e-5, atol=1e-5)
    assert errors[0] < 1e-6
    assert errors[1] > 0.1
    torch.testing.assert_close(gradients[2], expected_gradient * world_size, rtol=1e-4, atol=1e-5)
