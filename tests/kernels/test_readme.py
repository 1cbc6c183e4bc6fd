"""The three snippets of kernels/README.md, as they stand there, against the oracle."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.spawn import run_distributed
from tests.kernels.oracle import oracle

README = Path(__file__).parents[2] / "kernels" / "README.md"
VOCAB = 256


def snippet(heading: str) -> dict:
    """The names that the code under a heading defines."""
    section = README.read_text().split(f"## {heading}\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 13
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    return names


def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 6, VOCAB, generator=generator) for _ in range(2))
    labels = torch.randint(0, VOCAB, (4, 6), generator=generator)
    return student, teacher, labels, (torch.rand(4, 6, generator=generator) < 0.7).float()


def run_megatron(rank, world_size):
    from megatron_mixcpt.runtime.parallel import parallel_context

    mixcpt_loss = snippet("In a Megatron-LM script")["mixcpt_loss"]
    student, teacher, labels, mask = logits()
    columns = slice(rank * VOCAB // world_size, (rank + 1) * VOCAB // world_size)
    with parallel_context(tensor=world_size):
        shard = student[..., columns].transpose(0, 1).requires_grad_()  # [s, b, v/tp] over [b, s, v/tp]
        loss = mixcpt_loss(shard, teacher[..., columns].transpose(0, 1), labels, mask)
        return loss.item(), torch.autograd.grad(loss, shard)[0].transpose(0, 1)


def run_titan(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world_size,))
    mixcpt_loss = snippet("In torchtitan, on DTensor shards")["mixcpt_loss"]
    student, teacher, labels, _ = logits()
    student, teacher = (distribute_tensor(x[..., :255], mesh, [Shard(-1)]) for x in (student, teacher))
    student.requires_grad_()
    loss = mixcpt_loss(student, teacher, labels % 255)
    loss.backward()
    return loss.item(), student.grad.to_local()


@pytest.mark.distributed
@pytest.mark.parametrize(("run", "vocab"), [(run_megatron, VOCAB), (run_titan, 255)], ids=["Megatron-LM", "torchtitan"])
def test_snippet_on_two_ranks(run, vocab, monkeypatch):
    monkeypatch.setenv("MIXCPT_LSSD", "reference")
    ranks = run_distributed(run, 2)
    student, teacher, labels, mask = logits()
    mask = mask if run is run_megatron else torch.ones_like(mask)
    student = student[..., :vocab].double().requires_grad_()
    expected = (oracle(student, teacher[..., :vocab], labels % vocab)[0] * mask).sum() / mask.sum()
    (gradient,) = torch.autograd.grad(expected, student)
    assert all(abs(loss - expected.item()) < 1e-5 for loss, _ in ranks)
    torch.testing.assert_close(torch.cat([part for _, part in ranks], -1).double(), gradient, rtol=0, atol=1e-7)


def test_plain_loop_learns_the_labels(monkeypatch):
    monkeypatch.setenv("MIXCPT_LSSD", "reference")
    torch.manual_seed(0)
    train = snippet("In a plain PyTorch loop")["train"]
    model = torch.nn.Sequential(torch.nn.Embedding(20, 16), torch.nn.Linear(16, 20))
    teacher = torch.nn.Sequential(torch.nn.Embedding(20, 16), torch.nn.Linear(16, 20))
    teacher.load_state_dict(model.state_dict())
    tokens = torch.arange(9).repeat(2, 1)
    before = [parameter.clone() for parameter in teacher.parameters()]
    train(model, teacher, torch.optim.AdamW(model.parameters(), lr=0.05), [tokens] * 40)
    assert (model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]).all()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))
