"""The loss on one shard against the fp64 oracle, and every numerical hazard known to trip up fused losses."""

import math
import os

import pytest
import torch

from megatron_mixcpt.kernels import lssd_loss
from megatron_mixcpt.kernels.arguments import make_constants
from megatron_mixcpt.kernels.backend import choose_backend
from megatron_mixcpt.kernels.constants import L_S, L_T, M_S, M_T, TARGETS
from tests.kernels.oracle import loss_and_gradient, oracle
from tests.kernels.problems import problem, with_details

LOSS_ERROR, GRADIENT_ERROR = 3e-5, 1e-6  # relative to the loss; to the largest gradient


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


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_large_offsets_cost_no_precision(device, offset, temperature):
    student, teacher, labels, upstream = problem((8,), 500, device)
    check(student + offset, teacher - offset, labels, upstream, temperature=temperature)


@pytest.mark.parametrize("target", TARGETS)
def test_ties_at_the_maximum_go_to_the_lowest_id(device, target):
    student, teacher, labels, upstream = problem((6,), 5000, device, ignore=False)
    for row, columns in enumerate([(3, 4), (7, 4097), (0, 4999), (4095, 4096), (2, 3), (1, 2500)]):
        teacher[row, list(columns)] = 40.0
    labels[:3] = torch.tensor([4, 4097, 17])
    check(student, teacher, labels, upstream, target=target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_minus_infinity_in_the_teacher_has_no_mass(device, target, temperature):
    student, teacher, labels, upstream = problem((6,), 9000, device, ignore=False)
    teacher[0, 10:] = -math.inf  # whole tiles
    teacher[1, :8999] = -math.inf
    teacher[2, ::2] = -math.inf
    labels[:4] = torch.tensor([11, 5, 2, 8])
    student[3, 20:8000] = teacher[3, 20:8000] = -math.inf  # no mass on either side
    teacher[3, 8] = 50.0
    student[4, :3000] = teacher[4, :3000] = -math.inf  # whole tiles, before any finite logit of either
    labels[4] = 4000
    check(student, teacher, labels, upstream, target=target, temperature=temperature)


@pytest.mark.parametrize("target", TARGETS)
def test_first_tiles_that_only_one_model_can_produce(device, target):
    student, teacher, labels, upstream = problem((3,), 5000, device, ignore=False)
    labels[:] = torch.tensor([4000, 4000, 4500])
    teacher[0, :2500] = -math.inf
    teacher[1, :2500], student[1, :2500] = -1000.0, -math.inf  # a mass that no float can hold is none
    student[2, :2500] = -math.inf
    rows = slice(0, 2)
    check(student[rows], teacher[rows], labels[rows], upstream[rows], target=target)
    details = lssd_loss(student, teacher, labels, target=target, return_details=True)[1]
    expected = oracle(student, teacher, labels, target=target)[1]
    assert details["kl"][2].isposinf()
    torch.testing.assert_close(details["ce"].double(), expected["ce"], rtol=LOSS_ERROR, atol=LOSS_ERROR)


@pytest.mark.parametrize("target", TARGETS)
def test_minus_infinity_in_the_student_makes_the_loss_infinite(device, target):
    student, teacher, labels, _ = problem((4,), 300, device, ignore=False)
    argmax = teacher.argmax(-1)
    labels[:] = (argmax + 1) % 300
    student[0, (argmax[0] + 5) % 300] = -math.inf  # some column
    student[1, labels[1]] = -math.inf
    student[2, argmax[2]] = -math.inf
    loss, details = lssd_loss(student, teacher, labels, target=target, return_details=True)
    assert details["kl"][:3].isposinf().all() and details["kl"][3].isfinite()
    assert loss[:3].isposinf().all() and details["ce"][1].isposinf()
    assert lssd_loss(student, teacher, labels, target=target, kd_weight=0.0)[0].isfinite()


def test_weight_of_zero_removes_an_infinite_term(device):
    student, teacher, labels, _ = problem((2,), 300, device, ignore=False)
    student[0, labels[0]] = teacher[0, labels[0]] = -math.inf  # infinite cross-entropy beside a finite divergence
    student[1, (labels[1] + 1) % 300] = -math.inf  # the other way round
    loss, details = lssd_loss(student, teacher, labels, target="plain", return_details=True)
    assert loss.isposinf().all()
    assert details["ce"].isinf().tolist() == [True, False] and details["kl"].isinf().tolist() == [False, True]
    weights = torch.tensor([0.0, 1.0], device=device)
    finite = lssd_loss(student, teacher, labels, target="plain", ce_weight=weights, kd_weight=1 - weights)
    torch.testing.assert_close(finite, torch.stack([details["kl"][0], details["ce"][1]]))
    assert lssd_loss(student, teacher, labels, target="plain", ce_weight=0.0)[0] == details["kl"][0]
    assert lssd_loss(student, teacher, labels, target="plain", kd_weight=0.0)[1] == details["ce"][1]


def test_teacher_without_weight_has_no_part_in_the_gradient(device):
    student, teacher, labels, upstream = problem((3,), 300, device, ignore=False)
    teacher[1] = math.nan
    weight = torch.tensor([1.0, 0.0, 0.5], device=device)
    loss, gradient, _ = loss_and_gradient(with_details, student, teacher, labels, upstream, kd_weight=weight)
    ce_loss, ce_gradient, _ = loss_and_gradient(with_details, student, None, labels, upstream)
    torch.testing.assert_close((loss[1], gradient[1]), (ce_loss[1], ce_gradient[1]))
    assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("column", [0, 4500])
def test_nan_propagates_within_its_row_only(device, where, column):
    student, teacher, labels, _ = problem((3,), 5000, device, ignore=False)
    (student if where == "student" else teacher)[1, column] = math.nan
    loss, gradient, _ = loss_and_gradient(with_details, student, teacher, labels, torch.ones(3, device=device))
    assert loss[1].isnan() and gradient[1].isnan().any()
    assert loss[[0, 2]].isfinite().all() and gradient[[0, 2]].isfinite().all()


def test_ignored_and_weightless_rows_are_never_read(device):
    student, teacher, labels, upstream = problem((4,), 300, device, ignore=False)
    labels[1], upstream[2] = -100, 0
    student[1], teacher[1] = math.nan, math.nan
    loss, gradient, details = loss_and_gradient(with_details, student, teacher, labels, upstream)
    assert loss[1] == 0 and all(value[1] == 0 for value in details.values())
    assert (gradient[1:3] == 0).all() and gradient[[0, 3]].isfinite().all()
    student[2], teacher[2] = math.nan, math.nan
    _, gradient, _ = loss_and_gradient(with_details, student, teacher, labels, upstream)
    assert (gradient[1:3] == 0).all()


def test_kernels_take_no_statistics_of_ignored_rows(device):
    fused = pytest.importorskip("megatron_mixcpt.kernels.fused")
    if choose_backend(device) is not fused:
        pytest.skip("the reference masks afterwards what it takes from blocks of rows")
    student, teacher, labels, _ = problem((4,), 300, device, ignore=False)
    labels[1] = -100
    constants = make_constants(labels, 300, has_teacher=True, group=None)
    words = torch.empty(1, constants.num_words, 4, device=device)
    fused.stats(student, teacher, labels, constants, words)
    assert words[0, M_S, 1] == -math.inf and (words[0, [L_S, L_T], 1] == 0).all()
    assert words[0, [M_S, M_T]][:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("ignore_index", [-1, 5])
def test_ignore_index_may_be_any_number(device, ignore_index):
    student, teacher, labels, upstream = problem((8,), 50, device, ignore=False)
    labels[2:5] = ignore_index
    check(student, teacher, labels, upstream, ignore_index=ignore_index)


def test_label_outside_the_vocabulary_gives_nan(device):
    student, teacher, labels, _ = problem((3,), 60, device, ignore=False)
    labels[0], labels[1] = 60, -7
    loss = lssd_loss(student, teacher, labels)
    assert loss[:2].isnan().all() and loss[2].isfinite()
    labels[0] = 55
    assert lssd_loss(student, teacher, labels, valid_vocab=55)[0].isnan()


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
