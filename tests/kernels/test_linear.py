"""The loss from hidden states against the oracle on the logits they make, in chunks and in shards."""

import pytest
import torch
import torch.distributed as dist

from megatron_mixcpt.kernels import linear_lssd_loss, lssd_loss
from tests.helpers.spawn import run_distributed
from tests.kernels.oracle import oracle

HIDDEN, TEACHER_HIDDEN, VOCAB, VALID = 16, 24, 300, 290


def inputs(device="cpu", shape=(8, 3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)

    def random(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    hidden, head = random(*shape, HIDDEN), random(VOCAB, HIDDEN)
    t_hidden, t_head = random(*shape, TEACHER_HIDDEN), random(VOCAB, TEACHER_HIDDEN)
    labels = torch.randint(0, VALID, shape, generator=generator).to(device)
    labels[0] = (t_hidden[0].float() @ t_head.float().t())[:, :VALID].argmax(-1)
    labels[2, 1] = -100
    upstream = torch.randn(shape, generator=generator).to(device)
    upstream[1, 0] = 0
    return (hidden, head, t_hidden, t_head), labels, upstream


def expected(tensors, labels, upstream, **options):
    hidden, head, t_hidden, t_head = (tensor.double() for tensor in tensors)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    loss, details = oracle(hidden @ head.t(), t_hidden @ t_head.t(), labels, **options)
    return loss.detach(), torch.autograd.grad(loss, (hidden, head), upstream.double()), details


def close(value, reference, error):
    torch.testing.assert_close(value.double(), reference.double(), rtol=0, atol=error * reference.abs().max().item())


@pytest.mark.parametrize("chunk_tokens", [1, 5, 24, 1000])
@pytest.mark.parametrize(("target", "temperature"), [("swap", 1.0), ("swap", 2.0), ("mft", 0.5)])
def test_agrees_with_the_oracle_in_any_chunks(device, chunk_tokens, target, temperature):
    tensors, labels, upstream = inputs(device)
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)).to(device)
    options = dict(target=target, temperature=temperature, kd_weight=weight, valid_vocab=VALID)
    tracked = [tensor.clone().requires_grad_() for tensor in tensors]
    loss, details = linear_lssd_loss(*tracked, labels, chunk_tokens=chunk_tokens, return_details=True, **options)
    gradients = torch.autograd.grad(loss, tracked[:2], upstream)
    expected_loss, expected_gradients, expected_details = expected(tensors, labels, upstream, **options)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=3e-5, atol=3e-5)
    for gradient, reference in zip(gradients, expected_gradients):
        close(gradient, reference, 2e-6)
    for name, value in expected_details.items():
        torch.testing.assert_close(details[name].to(value.dtype), value, rtol=3e-5, atol=3e-5)


def test_sixteen_bit_inputs_lose_less_than_sixteen_bit_logits(device):
    """Beside the product in bf16, whose logits are rounded, the error in the hidden states' gradient is far smaller."""
    tensors, labels, upstream = inputs(device, dtype=torch.bfloat16)
    tensors = (tensors[0], tensors[1], tensors[0] + 0.01 * tensors[0].sign(), tensors[1])  # student near teacher
    _, (reference, head_reference), _ = expected(tensors, labels, upstream, ce_weight=0.0, target="plain")

    def errors(function):
        hidden, head = tensors[0].clone().requires_grad_(), tensors[1].clone().requires_grad_()
        gradients = torch.autograd.grad(function(hidden, head), (hidden, head), upstream)
        return [((g - r).norm() / r.norm()).item() for g, r in zip(gradients, (reference, head_reference))]

    fused = errors(lambda x, w: linear_lssd_loss(x, w, *tensors[2:], labels, ce_weight=0.0, target="plain"))
    rounded = errors(
        lambda x, w: lssd_loss(x @ w.t(), tensors[2] @ tensors[3].t(), labels, ce_weight=0.0, target="plain")
    )
    assert fused[0] < 0.02 and fused[1] < 0.02
    assert rounded[0] > 3 * fused[0]


def test_head_gradient_is_added_to_the_given_buffer(device):
    tensors, labels, upstream = inputs(device, dtype=torch.bfloat16)
    tracked = [tensor.clone().requires_grad_() for tensor in tensors[:2]]
    buffer = torch.ones(VOCAB, HIDDEN, device=device)
    loss = linear_lssd_loss(*tracked, *tensors[2:], labels, head_grad=buffer, chunk_tokens=7)
    loss.backward(upstream)
    _, (_, reference), _ = expected(tensors, labels, upstream)
    assert tracked[1].grad is None and tracked[0].grad is not None
    close(buffer - 1, reference, 1e-2)


def test_autocast_does_not_round_the_logits(device):
    tensors, labels, _ = inputs(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = linear_lssd_loss(*tensors, labels)
    torch.testing.assert_close(loss, linear_lssd_loss(*tensors, labels), rtol=0, atol=0)


def test_only_what_needs_a_gradient_gets_one(device):
    tensors, labels, upstream = inputs(device)
    hidden = tensors[0].clone().requires_grad_()
    linear_lssd_loss(hidden, *tensors[1:], labels).backward(upstream)
    assert hidden.grad is not None and all(tensor.grad is None for tensor in tensors[1:])
    assert not linear_lssd_loss(*tensors, labels).requires_grad


def run_shards(rank, world_size, sequence_parallel):
    dist.init_process_group("gloo")
    (hidden, head, t_hidden, t_head), labels, upstream = inputs()
    rows = slice(rank * VOCAB // world_size, (rank + 1) * VOCAB // world_size)
    part = slice(None)
    if sequence_parallel:
        part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    hidden, head = hidden[part].clone().requires_grad_(), head[rows].clone().requires_grad_()
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3))
    loss, details = linear_lssd_loss(
        hidden, head, t_hidden[part], t_head[rows], labels, kd_weight=weight, group=dist.group.WORLD,
        vocab_start=rows.start, valid_vocab=VALID, chunk_tokens=10, sequence_parallel=sequence_parallel,
        return_details=True,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, (hidden, head), upstream), details


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_shards_of_vocabulary_and_sequence(world_size, sequence_parallel, monkeypatch):
    monkeypatch.setenv("MIXCPT_LSSD", "reference")
    ranks = run_distributed(run_shards, world_size, sequence_parallel)
    tensors, labels, upstream = inputs()
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3))
    loss, (grad_hidden, grad_head), details = expected(tensors, labels, upstream, kd_weight=weight, valid_vocab=VALID)
    for rank_loss, gradients, rank_details in ranks:
        torch.testing.assert_close(rank_loss.double(), loss, rtol=3e-5, atol=3e-5)
        for name in ("kl", "kl_base"):
            torch.testing.assert_close(rank_details[name].double(), details[name], rtol=3e-5, atol=3e-5)
        if not sequence_parallel:
            close(gradients[0], grad_hidden, 2e-6)
    if sequence_parallel:
        close(torch.cat([gradients[0] for _, gradients, _ in ranks]), grad_hidden, 2e-6)
    close(torch.cat([gradients[1] for _, gradients, _ in ranks]), grad_head, 2e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_head": torch.randn(VOCAB, 3)}, ValueError, "student_hidden and student_head do not fit"),
        ({"teacher_head": torch.randn(VOCAB, TEACHER_HIDDEN).half()}, ValueError, "teacher_hidden and teacher_head"),
        ({"teacher_head": torch.randn(VOCAB - 1, TEACHER_HIDDEN)}, ValueError, "299 rows for 300"),
        ({"teacher_head": torch.randn(9, TEACHER_HIDDEN), "valid_vocab": VALID}, ValueError, "9 rows for 290"),
        ({"student_hidden": torch.randn(4, HIDDEN)}, ValueError, r"dimensions \[8, 3\]"),
        ({"student_hidden": torch.randn(8, 3, HIDDEN).double()}, TypeError, "student_hidden is torch.float64"),
        ({"head_grad": torch.zeros(VOCAB, HIDDEN).bfloat16()}, ValueError, "head_grad must be float32"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens=0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_wrong_argument_is_named(changes, error, message):
    tensors, labels, _ = inputs()
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    with pytest.raises(error, match=message):
        linear_lssd_loss(**(dict(zip(names, tensors), labels=labels) | changes))


@pytest.mark.parametrize("chunk_tokens", [5, 1000])
def test_without_a_teacher_it_is_the_cross_entropy_of_the_logits(device, chunk_tokens):
    (hidden, head, *_), labels, upstream = inputs(device)
    tracked = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    loss = linear_lssd_loss(*tracked, None, None, labels, chunk_tokens=chunk_tokens, valid_vocab=VALID)
    plain = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    logits = (plain[0] @ plain[1].t())[..., :VALID]
    expected_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(loss.double(), expected_loss.view(labels.shape), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss, tracked, upstream)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected_loss, plain, upstream.flatten().double())):
        close(gradient, reference, 2e-6)
    with pytest.raises(ValueError, match="give both or neither"):
        linear_lssd_loss(hidden, head, hidden, None, labels)
