"""Every numerical hazard known to trip up fused losses: offsets, ties, infinities, NaN, rows that do not count."""

import math

import pytest
import torch

from megatron_mixcpt.kernels import lssd_loss
from megatron_mixcpt.kernels.arguments import make_constants
from megatron_mixcpt.kernels.backend import choose_backend
from megatron_mixcpt.kernels.constants import L_S, L_T, M_S, M_T, TARGETS
from tests.kernels.oracle import LOSS_ERROR, check, loss_and_gradient, oracle
from tests.kernels.problems import problem, with_details


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


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tiles_that_the_student_cannot_produce_cost_infinity_wherever_the_teacher_has_mass(device, temperature):
    student, teacher, labels, _ = problem((3,), 9000, device, ignore=False)
    labels[:] = 8500
    student[:, :8400] = -math.inf  # tiles, one after another
    teacher[0, 5:8300] = -math.inf  # in most columns of them
    teacher[1, :8399] = -200.0  # a mass that no float can hold
    teacher[2, 100:] = -math.inf  # all that it has is there
    _, details = lssd_loss(student, teacher, labels, temperature=temperature, return_details=True)
    assert details["kl"].isposinf().all() and details["ce"].isfinite().all()


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
