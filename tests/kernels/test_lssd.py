"""The loss on one shard against the fp64 oracle: values, gradients, shapes, memory, what it promises of a target."""

import os

import pytest
import torch

from megatron_mixcpt.kernels import lssd_loss
from megatron_mixcpt.kernels.constants import TARGETS
from tests.kernels.oracle import check, loss_and_gradient, oracle
from tests.kernels.problems import problem, with_details


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.3, 2.0)], ids=str)
def test_agrees_with_the_oracle(device, target, temperature, weights):
    check(
        *problem((11,), 1000, device),
        target=target,
        temperature=temperature,
        ce_weight=weights[0],
        kd_weight=weights[1],
    )


@pytest.mark.parametrize("target", ["swap", "mft"])
def test_weights_are_per_token(device, target):
    student, teacher, labels, upstream = problem((4, 5), 333, device)
    generator = torch.Generator().manual_seed(1)
    ce, kd = (torch.rand(4, 5, generator=generator).to(device) for _ in range(2))
    ce[0], kd[1], ce[2], kd[2] = 0, 0, 0, 0
    check(student, teacher, labels, upstream, target=target, ce_weight=ce, kd_weight=kd, temperature=2.0)
    check(student, teacher, labels, upstream, target=target, ce_weight=ce, kd_weight=0.5)


def test_without_teacher_it_is_cross_entropy(device):
    student, _, labels, upstream = problem((17,), 777, device)
    check(student, None, labels, upstream)
    check(student, None, labels.clamp(max=699), upstream, valid_vocab=700, ce_weight=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_buffer", ["new", "teacher"])
def test_dtypes_and_gradient_buffers(device, dtype, grad_buffer):
    student, teacher, labels, upstream = problem((9,), 1000, device, dtype)
    expected_inputs = student.clone(), teacher.clone()
    tracked = student.clone().requires_grad_()
    loss = lssd_loss(tracked, teacher, labels, grad_buffer=grad_buffer)
    torch.testing.assert_close((tracked.detach(), teacher), expected_inputs, rtol=0, atol=0)  # forward writes nothing
    (gradient,) = torch.autograd.grad(loss, tracked, upstream)
    assert (gradient.data_ptr() == teacher.data_ptr()) == (grad_buffer == "teacher")
    check(*expected_inputs, labels, upstream)
    _, expected, _ = loss_and_gradient(with_details, *expected_inputs, labels, upstream)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize("vocab", [1, 7, 1000, 4095])
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_odd_sizes(device, vocab, num_tokens):
    if num_tokens:
        check(*problem((num_tokens,), vocab, device, seed=vocab, ignore=False), temperature=2.0)
    student, teacher, labels, upstream = problem((num_tokens,), vocab, device)
    loss, gradient, _ = loss_and_gradient(with_details, student, teacher, labels, upstream)
    assert loss.shape == (num_tokens,) and gradient.shape == (num_tokens, vocab)


@pytest.mark.parametrize("vocab", [16032, 18992, 32768, 128256])
def test_vocabulary_shards_of_real_models(device, vocab):
    check(*problem((2,), vocab, device, torch.bfloat16, seed=vocab, ignore=False))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "padded columns": lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5],
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 0, 1, 2))[:, 1:-2],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "column-major": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}


@pytest.mark.parametrize("student_layout", LAYOUTS)
@pytest.mark.parametrize("teacher_layout", ["transposed", "padded rows", "column-major"])
def test_any_strides(device, student_layout, teacher_layout):
    student, teacher, labels, upstream = problem((5, 3), 130, device)
    student, teacher = LAYOUTS[student_layout](student), LAYOUTS[teacher_layout](teacher)
    labels, upstream = (value.t().contiguous().t() for value in (labels, upstream))
    check(student, teacher, labels, upstream)


def test_more_than_two_leading_dimensions(device):
    student, teacher, labels, upstream = problem((2, 3, 4), 65, device)
    check(student.transpose(0, 2), teacher.transpose(0, 2), labels.transpose(0, 2), upstream.transpose(0, 2))
    check(student[0, 0, 0], teacher[0, 0, 0], labels[0, 0, 0], upstream[0, 0, 0])


def test_padding_differs_between_teacher_and_student(device):
    student, teacher, labels, upstream = problem((6,), 100, device, seed=3)
    wide = torch.nn.functional.pad(student, (0, 28), value=50.0)
    _, gradient, _ = loss_and_gradient(with_details, wide, teacher, labels, upstream, valid_vocab=100)
    _, expected, _ = loss_and_gradient(with_details, student, teacher, labels, upstream)
    torch.testing.assert_close(gradient[:, :100], expected, rtol=0, atol=1e-7)
    assert (gradient[:, 100:] == 0).all()
    check(wide, torch.nn.functional.pad(teacher, (0, 60), value=90.0), labels, upstream, valid_vocab=100)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("target", TARGETS)
def test_gradient_rows_sum_to_zero(device, target, temperature):
    student, teacher, labels, upstream = problem((6,), 4100, device)
    _, gradient, _ = loss_and_gradient(
        with_details, student, teacher, labels, upstream, target=target, temperature=temperature
    )
    assert gradient.double().sum(-1).abs().max() < 1e-6 * upstream.abs().max() * 4


def test_student_equal_to_teacher(device):
    """Where the teacher already ranks the label first nothing moves; elsewhere exactly two logits do."""
    student, _, labels, upstream = problem((8,), 600, device, ignore=False)
    upstream = upstream + 3
    labels[:4] = student[:4].argmax(-1)
    loss, gradient, details = loss_and_gradient(with_details, student, student.clone(), labels, upstream, ce_weight=0.0)
    p_a, p_y = details["p_argmax"].double(), details["p_label"].double()
    torch.testing.assert_close(loss.double(), (p_a - p_y) * (p_a / p_y).log(), rtol=1e-5, atol=2e-6)
    assert gradient[:4].abs().max() < 1e-6
    assert ((gradient[4:].abs() > 1e-5).sum(-1) == details["swapped"][4:] * 2).all()


def test_mft_target_of_the_whole_margin_is_the_label_alone(device):
    student, teacher, labels, upstream = problem((600,), 3, device, scale=0.1, ignore=False)
    check(student, teacher, labels, upstream, target="mft", margin=1.0)


def test_mft_target_leads_by_exactly_the_margin(device):
    """At its minimum over q the label leads the old argmax by the margin: the gradient at q = p' is zero there."""
    _, teacher, labels, upstream = problem((8,), 50, device, ignore=False, scale=1.0)
    p = torch.softmax(teacher.double(), -1)
    p_a, p_y = p.amax(-1), p.gather(-1, labels[:, None]).squeeze(-1)
    same = teacher.argmax(-1) == labels
    mix = torch.where(same, 0.2 / (1 - p_y), (p_a - p_y + 0.2) / (1 + p_a - p_y))
    target = (1 - mix)[:, None] * p
    target = target.scatter_add(-1, labels[:, None], mix[:, None])
    lead = target.gather(-1, labels[:, None]).squeeze(-1) - (1 - mix) * p_a
    torch.testing.assert_close(lead[~same], torch.full_like(lead[~same], 0.2))
    _, gradient, _ = loss_and_gradient(
        with_details, target.log().float(), teacher, labels, upstream, target="mft", ce_weight=0.0
    )
    assert gradient.abs().max() < 1e-6


def test_gradient_reaches_the_student_alone_and_losses_add_up(device):
    student, teacher, labels, upstream = problem((6,), 90, device, ignore=False)
    student.requires_grad_()
    teacher.requires_grad_()
    loss = lssd_loss(student, teacher, labels)
    (loss * upstream).sum().backward(retain_graph=True)
    assert teacher.grad is None
    once = student.grad.clone()
    (loss * upstream).sum().backward()  # a second loss from the same call
    torch.testing.assert_close(student.grad, 2 * once)


def test_overwritten_teacher_logits_cannot_be_used_twice(device):
    student, teacher, labels, _ = problem((3,), 40, device, ignore=False)
    student.requires_grad_()
    loss = lssd_loss(student, teacher, labels, grad_buffer="teacher")
    other = lssd_loss(student, teacher, labels)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


def test_same_call_gives_the_same_bits(device):
    inputs = problem((5,), 3000, device)
    first, second = (loss_and_gradient(with_details, *inputs, temperature=2.0) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_rows_beyond_two_to_the_31_elements(device):
    """Row strides of 2^30 elements: a 32-bit offset would wrap. Only the pages that are touched take memory."""
    student, teacher, labels, upstream = problem((4,), 64, device, torch.bfloat16, ignore=False)
    far = []
    for logits in (student, teacher):
        huge = torch.empty(3 * 2**30 + 64, dtype=logits.dtype, device=device).as_strided((4, 64), (2**30, 1))
        far.append(huge.copy_(logits))
    loss = lssd_loss(*far, labels)
    near = lssd_loss(student, teacher, labels)
    torch.testing.assert_close(loss, near, rtol=0, atol=0)
    tracked = far[0].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(lssd_loss(tracked, far[1], labels, grad_buffer="teacher"), tracked, upstream)
    _, expected, _ = loss_and_gradient(with_details, student, teacher, labels, upstream)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize("target", ["swap", "mft"])
def test_rows_split_over_programs_give_the_same_loss(device, target, monkeypatch):
    """A few rows cannot fill a GPU: each then becomes several shards, some of them empty, some partly ignored."""
    fused = pytest.importorskip("megatron_mixcpt.kernels.fused")
    student, teacher, labels, upstream = problem((5,), 9000, device)
    teacher[0, [4095, 4096, 8999]] = 40.0
    for splits in (2, 8):
        monkeypatch.setattr(fused, "MAX_SPLITS", splits)
        assert fused.num_splits(5) == splits and fused.num_splits(4096) == 1
        check(student, teacher, labels, upstream, target=target, temperature=2.0)
        check(student, None, labels.clamp(max=8000), upstream, valid_vocab=8001)


def plain_pytorch(student, teacher, labels):
    """The loss written out in the logits' own dtype."""
    argmax, label = teacher.argmax(-1, keepdim=True), labels.unsqueeze(-1)
    swapped = teacher.scatter(-1, argmax, teacher.gather(-1, label)).scatter(-1, label, teacher.gather(-1, argmax))
    log_p, log_q = torch.log_softmax(swapped, -1), torch.log_softmax(student, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.nn.functional.cross_entropy(student, labels, reduction="none") + kl, {}


@pytest.mark.parametrize(("dtype", "share_of_gradient_error"), [(torch.bfloat16, 0.7), (torch.float32, 1.0)], ids=str)
def test_loses_no_more_than_plain_pytorch_against_fp64(device, dtype, share_of_gradient_error):
    """What is left of the error from 16-bit logits is the rounding of the gradient itself; fp32 has little to lose."""
    student, teacher, labels, upstream = problem((16,), 4099, device, dtype, ignore=False)
    if os.environ["MIXCPT_LSSD"] == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        share_of_gradient_error *= 2  # Triton's interpreter truncates to bfloat16, a GPU rounds
    loss, gradient, _ = loss_and_gradient(with_details, student, teacher, labels, upstream)
    plain_loss, plain_gradient, _ = loss_and_gradient(plain_pytorch, student, teacher, labels, upstream)
    expected, expected_gradient, _ = loss_and_gradient(oracle, student.double(), teacher, labels, upstream)
    share_of_loss_error = 0.001 if dtype == torch.bfloat16 else 2.0
    assert (loss - expected).abs().max() <= share_of_loss_error * (plain_loss - expected).abs().max()
    error, plain_error = ((g.double() - expected_gradient).norm() for g in (gradient, plain_gradient))
    assert error <= share_of_gradient_error * plain_error


def test_labels_and_weights_may_be_columns_of_something(device):
    """Strided, or of stride 0: kernels read them one after the other."""
    generator = torch.Generator().manual_seed(1)
    logits, teacher = torch.randn(2, 4, 10, generator=generator).to(device)
    columns, weights = torch.tensor([[3, 1], [0, 9], [7, 2], [5, 5]]).to(device), torch.rand(4, 2).to(device)
    found = []
    for own in (lambda x: x, torch.Tensor.contiguous):
        student = logits.clone().requires_grad_()
        given = {"ce_weight": own(weights[:, 0]), "kd_weight": own(torch.tensor(0.5, device=device).expand(4))}
        loss = lssd_loss(student, teacher, own(columns[:, 0]), **given)
        loss.sum().backward()
        found.append((loss.detach(), student.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
