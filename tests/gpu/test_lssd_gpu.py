"""What only a GPU can show of the losses. All of tests/kernels runs there too: `pytest -m gpu`."""

import pytest
import torch

from megatron_mixcpt.kernels import linear_lssd_loss, lssd_loss, topk_lssd_loss
from tests.helpers.spawn import run_distributed
from tests.kernels.oracle import loss_and_gradient, oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def tokens(num_tokens, vocab, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (
        torch.randn(num_tokens, vocab, generator=generator, device="cuda", dtype=dtype) for _ in range(2)
    )
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator, device="cuda")
    labels[::7] = -100
    return student, teacher, labels, torch.randn(num_tokens, generator=generator, device="cuda")


def losses():
    """name -> (function of (student, teacher, labels) giving the loss) for every public loss."""

    def topk(student, teacher, labels):
        logp, ids = torch.log_softmax(teacher.float(), -1).topk(8)
        return topk_lssd_loss(student, ids, logp, logp[:, 0], labels)

    def linear(student, teacher, labels):
        head = torch.ones(512, student.shape[-1], device="cuda", dtype=student.dtype)
        return linear_lssd_loss(student, head, teacher, head, labels % 512, chunk_tokens=64)

    return {"logits": lssd_loss, "topk": topk, "linear": linear}


@pytest.mark.parametrize("name", ["logits", "topk", "linear"])
def test_nothing_waits_for_the_device(name):
    student, teacher, labels, upstream = tokens(256, 4096)
    student.requires_grad_()
    loss = losses()[name]
    torch.autograd.grad(loss(student, teacher, labels), student, upstream)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(loss(student, teacher, labels), student, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forward_and_backward_in_a_cuda_graph():
    student, teacher, labels, upstream = tokens(128, 8192)
    student.requires_grad_()

    def step():
        return torch.autograd.grad(lssd_loss(student, teacher, labels, temperature=2.0), student, upstream)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
        teacher.copy_(torch.randn_like(teacher))
        labels.copy_((labels + 1) % 8192)
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


def test_forty_bytes_a_token_beyond_the_inputs():
    student, teacher, labels, upstream = tokens(8192, 16384)
    student.requires_grad_()

    def step():
        return torch.autograd.grad(lssd_loss(student, teacher, labels, grad_buffer="teacher"), student, upstream)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before <= 40 * 8192 + 2048  # allocations are rounded to 512 bytes


@pytest.mark.parametrize("vocab", [7, 1000, 4095, 16032, 18992, 32768, 128256, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabularies_of_real_models(vocab, dtype):
    student, teacher, labels, upstream = tokens(37, vocab, dtype)
    loss, gradient, _ = loss_and_gradient(lambda *a, **k: (lssd_loss(*a, **k), {}), student, teacher, labels, upstream)
    expected, expected_gradient, _ = loss_and_gradient(oracle, student.double(), teacher, labels, upstream)
    torch.testing.assert_close(loss.double(), expected, rtol=3e-5, atol=3e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rounding, atol=1e-6 * scale)


def test_more_than_two_to_the_31_logits():
    num_tokens, vocab = 17_000, 128_256
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    student, teacher, labels, upstream = tokens(num_tokens, vocab)
    last = slice(num_tokens - 64, None)
    expected = loss_and_gradient(
        lambda *a: (lssd_loss(*a), {}), student[last].clone(), teacher[last].clone(), labels[last], upstream[last]
    )
    student.requires_grad_()
    loss = lssd_loss(student, teacher, labels, grad_buffer="teacher")
    torch.testing.assert_close(loss[last].detach(), expected[0], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    torch.testing.assert_close(gradient[last], expected[1], rtol=2**-7, atol=1e-6)


def test_linear_loss_peak_does_not_grow_with_tokens():
    head = torch.randn(32768, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    peaks = []
    for num_tokens in (2048, 16384):
        hidden = torch.randn(num_tokens, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
        teacher = torch.randn_like(hidden)
        labels = torch.randint(0, 32768, (num_tokens,), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = linear_lssd_loss(hidden, head, teacher, head.detach(), labels, chunk_tokens=1024)
        gradients = torch.autograd.grad(loss, (hidden, head), torch.ones_like(loss))
        peaks.append(torch.cuda.max_memory_allocated() - before - gradients[0].numel() * 2)
        del loss, gradients
    assert peaks[1] - peaks[0] < (16384 - 2048) * 100
    assert peaks[0] < 2.2 * 1024 * 32768 * 4 + 3 * head.numel() * 4


def run_rank(rank, world_size):
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    student, teacher, labels, upstream = (value.to(f"cuda:{rank}") for value in tokens(64, 4096))
    columns = slice(rank * 4096 // world_size, (rank + 1) * 4096 // world_size)
    tracked = student[:, columns].clone().requires_grad_()
    loss = lssd_loss(
        tracked, teacher[:, columns], labels, group=dist.group.WORLD, vocab_start=columns.start, grad_buffer="new"
    )
    (gradient,) = torch.autograd.grad(loss, tracked, upstream)
    return loss.detach().cpu(), gradient.cpu()


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_over_nccl():
    ranks = run_distributed(run_rank, 2)
    student, teacher, labels, upstream = tokens(64, 4096)
    loss, gradient, _ = loss_and_gradient(lambda *a: (lssd_loss(*a), {}), student, teacher, labels, upstream)
    for rank_loss, _ in ranks:
        torch.testing.assert_close(rank_loss, loss.cpu(), rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(torch.cat([part for _, part in ranks], -1), gradient.cpu(), rtol=2**-7, atol=1e-6)
