"""Shapes, shards and options that hypothesis makes up, against the fp64 oracle; shards are simulated in one process."""

import os

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_mixcpt.kernels.arguments import make_constants
from megatron_mixcpt.kernels.backend import choose_backend
from megatron_mixcpt.kernels.constants import TARGETS
from tests.kernels.oracle import loss_and_gradient, oracle

QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def cases(draw):
    vocab = draw(st.one_of(st.integers(1, 40), st.sampled_from([127, 2047, 2048, 2049, 4100])))
    num_tokens = draw(st.integers(1, 5))
    cuts = draw(st.lists(st.integers(0, vocab), max_size=3))
    case = dict(
        seed=draw(st.integers(0, 2**31)),
        vocab=vocab,
        num_tokens=num_tokens,
        starts=sorted({0, *cuts}),
        valid=draw(st.integers(1, vocab)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        scale=draw(st.sampled_from([0.1, 3.0, 20.0])),
        offset=draw(st.sampled_from([0.0, 100.0, -100.0])),
        holes=draw(st.booleans()),
        per_token=draw(st.booleans()),
    )
    options = dict(
        temperature=draw(st.sampled_from([0.5, 1.0, 1.7, 4.0])),
        target=draw(st.sampled_from(TARGETS)),
        margin=draw(st.sampled_from([0.05, 0.2, 1.0])),
    )
    return case, options


def make_tokens(case, device):
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["num_tokens"], case["vocab"])
    student = torch.randn(shape, generator=generator) * case["scale"] + case["offset"]
    teacher = torch.randn(shape, generator=generator) * case["scale"] - case["offset"]
    labels = torch.randint(0, case["valid"], shape[:1], generator=generator)
    if case["holes"]:  # columns that neither model can produce, but for the labels
        hole = (torch.rand(shape, generator=generator) < 0.5).scatter(-1, labels[:, None], False)
        student, teacher = student.masked_fill(hole, -torch.inf), teacher.masked_fill(hole, -torch.inf)
    ignored = torch.rand(shape[0], generator=generator) < 0.2
    weights = [torch.rand(shape[0], generator=generator).to(device) for _ in range(2)]
    upstream = torch.randn(shape[0], generator=generator)
    tokens = student.to(case["dtype"]), teacher.to(case["dtype"]), labels.masked_fill(ignored, -100), upstream
    return [value.to(device) for value in tokens], dict(zip(("ce_weight", "kd_weight"), weights))


def in_shards(student, teacher, labels, upstream, starts, valid_vocab, **options):
    """(loss, gradient) with the vocabulary cut at `starts`: what the ranks of a tensor-parallel group compute."""
    backend = choose_backend(student.device)
    slices = [slice(start, end) for start, end in zip(starts, [*starts[1:], student.shape[-1]])]
    all_constants, words = [], []
    for part in slices:
        constants = make_constants(
            labels,
            part.stop - part.start,
            has_teacher=True,
            group=None,
            vocab_start=part.start,
            valid_vocab=valid_vocab,
            **options,
        )
        all_constants.append(constants)
        words.append(
            torch.empty(backend.num_splits(labels.numel()), constants.num_words, labels.numel()).to(labels.device)
        )
        backend.stats(student[:, part], teacher[:, part], labels, constants, words[-1])
    shards = torch.cat(words)
    losses, gradient = [], torch.full_like(student, 7.0)
    for part, constants, own in zip(slices, all_constants, words):
        losses.append(backend.combine(shards, own[0], labels, constants, False)["loss"])
        backend.gradient(student[:, part], teacher[:, part], labels, own[0], upstream, constants, gradient[:, part])
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    return losses[0], gradient


def _whole_margin(**changes):
    """The label takes all of the target's mass, and the mix must not round to more than 1."""
    case = dict(seed=1, vocab=3, num_tokens=1, starts=[0], valid=3, dtype=torch.float32, scale=0.1, offset=100.0)
    options = dict(temperature=0.5, target="mft", margin=1.0)
    return {**case, "holes": False, "per_token": False, **changes}, options


@QUICK
@given(cases())
@example(_whole_margin())
@example(_whole_margin(vocab=34, valid=7, seed=0, scale=3.0))
@example(_whole_margin(vocab=8, offset=0.0))
def test_loss_and_gradient_of_any_sharding(device, case_and_options):
    case, options = case_and_options
    (student, teacher, labels, upstream), weights = make_tokens(case, device)
    options |= weights if case["per_token"] else {}
    loss, gradient = in_shards(student, teacher, labels, upstream, case["starts"], case["valid"], **options)
    expected, expected_gradient, _ = loss_and_gradient(
        oracle, student.double(), teacher, labels, upstream, valid_vocab=case["valid"], **options
    )
    # The relative error of a logit near 100 is 2^-24, and it enters the loss and the probabilities as it is.
    error = 3e-5 * max(1.0, case["scale"]) / min(1.0, options["temperature"])
    torch.testing.assert_close(loss.double(), expected, rtol=3e-5, atol=error)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[case["dtype"]]
    if os.environ["MIXCPT_LSSD"] == "triton" and device.type == "cpu":
        rounding *= 2  # Triton's interpreter truncates to bfloat16, a GPU rounds
    scale = max(expected_gradient.abs().max().item(), upstream.abs().max().item())
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=rounding, atol=2e-6 * scale + 1e-7 * bool(rounding)
    )


@QUICK
@given(cases())
def test_cutting_the_vocabulary_changes_no_more_than_rounding(device, case_and_options):
    case, options = case_and_options
    (student, teacher, labels, upstream), _ = make_tokens(case, device)
    whole = in_shards(student.float(), teacher.float(), labels, upstream, [0], case["valid"], **options)
    cut = in_shards(student.float(), teacher.float(), labels, upstream, case["starts"], case["valid"], **options)
    scale = max(whole[1].abs().max().item(), upstream.abs().max().item())
    torch.testing.assert_close(cut[0], whole[0], rtol=3e-5, atol=3e-5 * max(1.0, case["scale"]))
    torch.testing.assert_close(cut[1], whole[1], rtol=0, atol=1e-6 * scale)
