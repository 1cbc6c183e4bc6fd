"""Tensor parallelism: whatever the number and the sizes of the vocabulary shards, loss and gradient stay the same."""

import os

import pytest
import torch
import torch.distributed as dist

from megatron_mixcpt.kernels import lssd_loss
from tests.helpers.spawn import run_distributed
from tests.kernels.oracle import loss_and_gradient, oracle
from tests.kernels.problems import problem, with_details

VOCAB, VALID = 1003, 1000
# First ids of the shards: equal, unequal, one column wide, entirely padding.
SHARDINGS = {
    1: [[0, 1003]],
    2: [[0, 502, 1003], [0, 1, 1003], [0, 1001, 1003]],
    4: [[0, 251, 502, 753, 1003], [0, 7, 8, 999, 1003]],
    8: [[0, 2, 3, 400, 401, 800, 999, 1000, 1003]],
}
CASES = [
    dict(target=target, temperature=temperature, ce_weight=0.7, kd_weight=1.3, grad_buffer=grad_buffer)
    for target, temperature, grad_buffer in [
        ("swap", 1.0, "new"),
        ("swap", 2.0, "teacher"),
        ("plain", 0.5, "new"),
        ("mft", 1.0, "teacher"),
        ("mft", 2.0, "new"),
    ]
]


def hazards():
    """Tokens `[3, 4]` with ties across shards, shards that are all -inf, and labels on shard borders."""
    student, teacher, labels, upstream = problem((3, 4), VOCAB, "cpu", seed=5)
    labels = labels.clamp(max=VALID - 1)
    teacher[0, 0, [251, 502, 999]] = 30.0
    teacher[0, 1, [0, 1]] = 30.0
    teacher[0, 2, 1:] = -torch.inf
    teacher[0, 3, :999] = -torch.inf
    student[1, 0, 600:] = teacher[1, 0, 600:] = -torch.inf
    teacher[2, 2, :251], student[2, 2, :251], labels[2, 2] = -10000.0, -torch.inf, 600  # no mass in any float
    labels[0] = torch.tensor([999, 1, 0, 502])
    labels[1] = torch.tensor([7, 501, 251, 8])
    upstream[:2] = torch.tensor([[1.5, -2.0, 0.5, 1.0], [-1.0, 3.0, 0.25, 1.0]])
    return student, teacher, labels, upstream


def run_shards(rank, world_size):
    """Every sharding and case on this rank: a list of (loss, details, gradient of the shard)."""
    dist.init_process_group("gloo")
    if os.environ["MIXCPT_LSSD"] == "triton":
        from megatron_mixcpt.kernels import fused

        fused.MAX_SPLITS = 2
    student, teacher, labels, upstream = hazards()
    results = []
    for starts in SHARDINGS[world_size]:
        columns = slice(starts[rank], starts[rank + 1])
        for case in CASES:
            shard = student[..., columns].clone(), teacher[..., columns].clone()
            options = case | dict(group=dist.group.WORLD, vocab_start=starts[rank], valid_vocab=VALID)
            loss, gradient, details = loss_and_gradient(with_details, *shard, labels, upstream, **options)
            results.append((loss, gradient, details))
        loss, gradient, _ = loss_and_gradient(
            lssd_loss_pair, student[..., columns], None, labels, upstream,
            group=dist.group.WORLD, vocab_start=starts[rank], valid_vocab=VALID,
        )  # fmt: skip
        results.append((loss, gradient, {}))
    return results


def lssd_loss_pair(*args, **options):
    return lssd_loss(*args, **options), {}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_loss_and_gradient_do_not_depend_on_the_sharding(world_size, device):
    ranks = run_distributed(run_shards, world_size)
    student, teacher, labels, upstream = hazards()
    index = 0
    for starts in SHARDINGS[world_size]:
        for case in [*CASES, None]:
            options = {key: value for key, value in (case or {}).items() if key != "grad_buffer"}
            expected, expected_gradient, expected_details = loss_and_gradient(
                oracle, student, teacher if case else None, labels, upstream, valid_vocab=VALID, **options
            )
            for rank in range(world_size):
                loss, gradient, details = ranks[rank][index]
                torch.testing.assert_close(loss, ranks[0][index][0], rtol=0, atol=0)  # the same bits on every rank
                torch.testing.assert_close(loss.double(), expected, rtol=3e-5, atol=3e-5)
                torch.testing.assert_close(
                    gradient,
                    expected_gradient[..., starts[rank] : starts[rank + 1]],
                    rtol=0,
                    atol=1e-6 * expected_gradient.abs().max().item(),
                )
                for name, value in details.items():
                    torch.testing.assert_close(value.double(), expected_details[name].double(), rtol=3e-5, atol=3e-5)
            index += 1


def run_without_vocab_start(rank, world_size):
    dist.init_process_group("gloo")
    dist.barrier()  # rank 0, which holds the store, is about to end
    if rank == 0:
        return ""
    student, teacher, labels, _ = problem((3,), 20, "cpu")
    with pytest.raises(ValueError, match="vocab_start=0 on rank 1") as raised:
        lssd_loss(student, teacher, labels, group=dist.group.WORLD)
    return str(raised.value)


@pytest.mark.distributed
def test_forgotten_vocab_start_is_an_error():
    assert run_distributed(run_without_vocab_start, 2)[1]
