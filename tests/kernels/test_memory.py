"""What the losses allocate beyond their inputs and the gradient does not grow with the number of tokens."""

import pytest
import torch

from benchmarks.lssd_memory import PeakMemory
from megatron_mixcpt.kernels import linear_lssd_loss, lssd_loss, topk_lssd_loss

VOCAB, FLAT, BYTES_PER_TOKEN = 4096, 14 * 2**20, 200


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("MIXCPT_LSSD", "reference")


def peak(run):
    with PeakMemory() as memory:
        run()
    return memory.peak


@pytest.mark.parametrize("num_tokens", [64, 1024, 4096])
@pytest.mark.parametrize(("grad_buffer", "num_buffers"), [("new", 1), ("teacher", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_need_one_buffer_or_none(num_tokens, grad_buffer, num_buffers, dtype):
    student = torch.randn(num_tokens, VOCAB, dtype=dtype).requires_grad_()
    teacher = torch.randn(num_tokens, VOCAB, dtype=dtype)
    labels = torch.randint(0, VOCAB, (num_tokens,))
    upstream = torch.ones(num_tokens)
    used = peak(
        lambda: torch.autograd.grad(lssd_loss(student, teacher, labels, grad_buffer=grad_buffer), student, upstream)
    )
    buffers = num_buffers * student.numel() * student.element_size()
    assert buffers <= used < buffers + FLAT + BYTES_PER_TOKEN * num_tokens


def test_no_strides_make_it_copy_the_logits():
    num_tokens = 4096
    student = torch.randn(4, num_tokens // 4, VOCAB).transpose(0, 1).requires_grad_()
    teacher = torch.randn(num_tokens // 4, 4, VOCAB + 128)[..., :VOCAB]
    labels = torch.randint(0, VOCAB, (4, num_tokens // 4)).t()
    used = peak(lambda: lssd_loss(student, teacher, labels))
    assert used < FLAT + BYTES_PER_TOKEN * num_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_loss_never_holds_the_logits(dtype):
    hidden, chunk = 16, 64
    heads = [torch.randn(VOCAB, hidden, dtype=dtype) for _ in range(2)]
    heads[0].requires_grad_()

    def used(num_tokens):
        inputs = [torch.randn(num_tokens, hidden, dtype=dtype) for _ in range(2)]
        inputs[0].requires_grad_()
        labels = torch.randint(0, VOCAB, (num_tokens,))

        def run():
            loss = linear_lssd_loss(inputs[0], heads[0], inputs[1], heads[1], labels, chunk_tokens=chunk)
            torch.autograd.grad(loss, (inputs[0], heads[0]), torch.ones(num_tokens))

        return peak(run)

    small, large = used(256), used(4096)
    assert large - small < (4096 - 256) * (BYTES_PER_TOKEN + 4 * hidden)
    two_chunks, scratch = 2 * chunk * VOCAB * 4, 3 * 2**22
    gradients = 3 * VOCAB * hidden * 4  # fp32 sum, one product, what is returned; 16-bit heads are also read in fp32
    assert small < two_chunks + scratch + 2 * gradients + 256 * (BYTES_PER_TOKEN + 4 * hidden)


def test_topk_loss_needs_one_buffer():
    num_tokens, k = 2048, 8
    student = torch.randn(num_tokens, VOCAB).requires_grad_()
    logp, ids = torch.log_softmax(torch.randn(num_tokens, VOCAB), -1).topk(k)
    labels = ids[:, 3].clone()
    used = peak(lambda: topk_lssd_loss(student, ids, logp, logp[:, 3], labels).sum().backward())
    assert used < student.numel() * 4 + FLAT + num_tokens * (BYTES_PER_TOKEN + 100 * (k + 1))
