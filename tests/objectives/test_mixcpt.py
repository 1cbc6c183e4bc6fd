"""The stage-1 objective against a dense fp64 oracle written from the definitions."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mixcpt.config import LossConfig
from megatron_mixcpt.data_prep.format import KIND_CHOSEN, KIND_DOMAIN, KIND_GENERAL, KIND_INSTRUCTION, KIND_REJECTED
from megatron_mixcpt.objectives.mixcpt import STATISTICS, MixCPTLoss
from megatron_mixcpt.teacher.interface import DenseTarget

S, B, V, PADDED = 12, 3, 50, 64
BY_KIND = {
    "domain": {"ce": 1.0, "kd": 0.25},
    "instruction": {"ce": 0.5, "kd": 2.0},
    "preference": {"ce": 0.0, "kd": 1.0},
    "general": {"ce": 0.0, "kd": 1.5},
}
NAME_OF = {
    KIND_DOMAIN: "domain",
    KIND_INSTRUCTION: "instruction",
    KIND_CHOSEN: "preference",
    KIND_REJECTED: "preference",
    KIND_GENERAL: "general",
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(S, B, PADDED, generator=generator) for _ in range(2))
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[0, :4] = -100
    kinds = torch.randint(0, 5, (B, S), generator=generator)
    return student.requires_grad_(), teacher, labels, kinds


def oracle(student, teacher, label, config, kind):
    """Loss of one token from its logits, fp64: swap two probabilities, take the divergence."""
    factors = BY_KIND[NAME_OF[kind]] if config.by_kind else {"ce": 1.0, "kd": 1.0}
    kd_weight = 0.0 if config.target == "none" else config.kd_weight
    scale = 1.0 / (config.ce_weight + kd_weight) if config.normalize else 1.0
    student, teacher = student[:V].double(), teacher[:V].double()
    ce = -torch.log_softmax(student, 0)[label]
    p = torch.softmax(teacher / config.temperature, 0)
    if config.target == "swap":
        first = int(p.argmax())
        p[[first, int(label)]] = p[[int(label), first]]
    kl = (p * (p.log() - torch.log_softmax(student / config.temperature, 0))).sum()
    return scale * (config.ce_weight * factors["ce"] * ce + kd_weight * factors["kd"] * kl)


@pytest.mark.parametrize("target", ["swap", "plain", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("by_kind", [{}, BY_KIND])
def test_loss_and_gradient_match_the_definition(batch, target, normalize, by_kind):
    student, teacher, labels, kinds = batch
    config = LossConfig(
        target=target, kd_weight=3.0, ce_weight=0.5, temperature=2.0, normalize=normalize, by_kind=by_kind
    )
    loss = MixCPTLoss(config, None, group=None, vocab_start=0, vocab_size=V, device=torch.device("cpu"))
    statistics = torch.zeros(B, len(STATISTICS), dtype=torch.float64)
    given = DenseTarget(teacher.clone()) if target != "none" else None
    found = loss.of_logits(student, given, labels, kinds, statistics)
    upstream = torch.rand(B, S, generator=torch.Generator().manual_seed(1))
    (found * upstream).sum().backward()

    exact = student.detach().double().requires_grad_()
    expected = torch.stack(
        [
            torch.stack(
                [
                    oracle(exact[s, b], teacher[s, b], int(labels[b, s]), config, int(kinds[b, s]))
                    if labels[b, s] != -100
                    else exact[s, b].sum() * 0.0
                    for s in range(S)
                ]
            )
            for b in range(B)
        ]
    )
    (expected * upstream).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(student.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)
    assert (student.grad[..., V:] == 0).all()
    assert statistics[:, STATISTICS.index("tokens")].tolist() == [S - 4, S, S]
    torch.testing.assert_close(statistics[:, STATISTICS.index("loss")], expected.detach().sum(1), atol=1e-4, rtol=1e-5)


def test_normalization_keeps_the_scale_of_cross_entropy(batch):
    """With the teacher equal to the label's one-hot, CE + lambda KL is CE, whatever lambda is."""
    student, _, labels, kinds = batch
    certain = torch.full((S, B, PADDED), -60.0)
    certain.scatter_(2, labels.t().clamp(min=0).unsqueeze(2), 60.0)
    losses = []
    for kd_weight in (0.0, 1.0, 7.0):
        loss = MixCPTLoss(
            LossConfig(kd_weight=kd_weight), None, group=None, vocab_start=0, vocab_size=V, device=torch.device("cpu")
        )
        losses.append(loss.of_logits(student.detach(), DenseTarget(certain.clone()), labels, kinds))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], atol=1e-5, rtol=1e-5)


def build(**settings):
    config = LossConfig(**settings)
    return MixCPTLoss(config, None, group=None, vocab_start=0, vocab_size=V, device=torch.device("cpu"))


def test_with_a_fused_head_a_validation_computes_no_whole_logits_either(batch):
    """A validation has no teacher; whole logits there would need the memory that the option saves in training."""
    _, _, labels, kinds = batch
    hidden, head = torch.randn(S, B, 8), torch.randn(PADDED, 8)
    found = []
    for fused in (False, True):
        stage = SimpleNamespace(head_weight=lambda: head)
        if not fused:
            stage.output_logits = lambda hidden: hidden @ head.t()
        loss = build(fuse_lm_head=fused)
        statistics = torch.zeros(B, len(STATISTICS), dtype=torch.float64)
        loss.bind(stage, 0, SimpleNamespace(kinds=kinds), statistics)
        found.append((stage.loss(hidden, labels), statistics))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_weight_that_is_set_later_is_that_weight_from_the_start(batch, normalize):
    student, teacher, labels, kinds = batch
    moved = build(kd_weight=1.0, normalize=normalize, by_kind=BY_KIND)
    moved.weigh(5.0)
    losses = [
        loss.of_logits(student.detach(), DenseTarget(teacher.clone()), labels, kinds)
        for loss in (moved, build(kd_weight=5.0, normalize=normalize, by_kind=BY_KIND))
    ]
    assert torch.equal(*losses)
    moved.weigh(1.0)
    first = build(kd_weight=1.0, normalize=normalize, by_kind=BY_KIND)
    again = [loss.of_logits(student.detach(), DenseTarget(teacher.clone()), labels, kinds) for loss in (moved, first)]
    assert torch.equal(*again)


def test_statistics_hold_the_divergence_from_the_base_model_at_temperature_one(batch):
    student, teacher, labels, kinds = batch
    statistics = torch.zeros(B, len(STATISTICS), dtype=torch.float64)
    loss = build(temperature=2.0, kd_weight=0.3)
    loss.of_logits(student.detach(), DenseTarget(teacher.clone()), labels, kinds, statistics)
    log_p, log_q = (torch.log_softmax(logits.detach().double()[..., :V], -1) for logits in (teacher, student))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1) * (labels != -100).t()
    torch.testing.assert_close(statistics[:, STATISTICS.index("kl_base")], expected.sum(0), atol=1e-4, rtol=1e-5)
