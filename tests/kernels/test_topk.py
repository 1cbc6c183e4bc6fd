"""The loss against a cached sparse teacher: the full loss where it is complete, the coarse KL where it is not."""

import itertools

import pytest
import torch
import torch.distributed as dist

from megatron_mixcpt.kernels import topk_lssd_loss
from megatron_mixcpt.kernels.constants import TARGETS
from tests.helpers.spawn import run_distributed
from tests.kernels.oracle import loss_and_gradient, oracle
from tests.kernels.problems import problem

VOCAB = 300


def cached(teacher, labels, k, temperature=1.0, valid=None):
    """(ids, logp, gold_logp) as a cache would hold them."""
    logp = torch.log_softmax(teacher.double()[..., :valid] / temperature, -1)
    best, ids = logp.topk(k)
    gold = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ids, best.float(), gold.float()


def topk(student, teacher, labels, k=10, **options):
    sparse = cached(teacher, labels, k, options.get("temperature", 1.0), options.get("valid_vocab"))
    return topk_lssd_loss(student, *sparse, labels, return_details=True, **options)


def coarse_oracle(student, teacher, labels, k=10, *, temperature=1.0, ce_weight=1.0, kd_weight=1.0, **options):
    """The textbook loss with everything outside of the explicit set merged into one column of both distributions."""
    ids, _, _ = cached(teacher, labels, k)
    explicit = torch.zeros(teacher.shape, dtype=torch.bool, device=teacher.device).scatter(-1, ids, True)
    explicit = explicit.scatter(-1, labels.clamp(min=0).unsqueeze(-1), True)

    def merged(logits):
        logits = logits.double() / temperature
        rest = logits.masked_fill(explicit, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits.masked_fill(~explicit, -torch.inf), rest], -1)

    # The oracle would take the rest for the teacher's argmax if it had the largest mass: tokens() excludes that.
    kl_loss, details = oracle(merged(student), merged(teacher), labels, ce_weight=0.0, kd_weight=kd_weight, **options)
    ce_loss, ce_details = oracle(student, None, labels, ce_weight=ce_weight)
    return kl_loss + ce_loss, details | ce_details


def tokens(device, seed=0):
    student, teacher, labels, upstream = problem((4, 5), VOCAB, device, seed=seed, scale=2.0)
    teacher[..., 7] = 10  # ahead of the rest of the vocabulary together, which has a tenth of the mass
    labels[0, 0], labels[0, 1] = 7, 299
    return student, teacher, labels, upstream


def check(result, expected, names=("ce", "kl", "kl_base", "p_argmax", "p_label", "swapped")):
    torch.testing.assert_close(result[0].double(), expected[0], rtol=3e-5, atol=3e-5)
    scale = expected[1].abs().max().item()
    torch.testing.assert_close(result[1].double(), expected[1].double(), rtol=0, atol=1e-6 * scale)
    for name in names:
        torch.testing.assert_close(result[2][name].double(), expected[2][name].double(), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_complete_cache_is_the_full_loss(device, target, temperature):
    student, teacher, labels, upstream = tokens(device)
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).to(device)
    weight[1] = 0
    options = dict(target=target, temperature=temperature, ce_weight=0.7, kd_weight=weight)
    result = loss_and_gradient(topk, student, teacher, labels, upstream, k=VOCAB, **options)
    loss, gradient, details = loss_and_gradient(oracle, student, teacher, labels, upstream, **options)
    details["kl_base"] = oracle(student, teacher, labels, temperature=temperature, target="plain")[1]["kl"]
    check(result, (loss, gradient, details))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("k", [1, 10, 64])
def test_incomplete_cache_is_the_coarse_loss(device, target, k):
    student, teacher, labels, upstream = tokens(device)
    result = loss_and_gradient(topk, student, teacher, labels, upstream, k=k, target=target)
    check(result, loss_and_gradient(coarse_oracle, student, teacher, labels, upstream, k=k, target=target))


def test_coarse_divergence_is_never_more_and_grows_with_k(device):
    student, teacher, labels, _ = tokens(device)
    details = [topk(student, teacher, labels, k=k)[1] for k in (1, 4, 16, 64, 300)]
    divergences = [torch.stack([detail["kl"], detail["kl_base"]]) for detail in details]
    for coarse, fine in itertools.pairwise(divergences):
        assert (coarse <= fine + 1e-5).all()
    assert (divergences[0] < divergences[-1] - 0.01).any()


def test_padding_and_sixteen_bit_logits(device):
    student, teacher, labels, upstream = tokens(device)
    labels = labels.clamp(max=279)
    student = student.bfloat16()
    result = loss_and_gradient(topk, student, teacher, labels, upstream, k=280, valid_vocab=280)
    expected = loss_and_gradient(oracle, student, teacher, labels, upstream, valid_vocab=280)
    torch.testing.assert_close(result[0].double(), expected[0], rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(result[1], expected[1], rtol=2**-7, atol=1e-6)
    assert result[1].dtype == torch.bfloat16 and (result[1][..., 280:] == 0).all()


def test_gradient_rows_sum_to_zero_and_idle_rows_are_zero(device):
    student, teacher, labels, upstream = tokens(device)
    upstream[3, 0] = 0
    _, gradient, _ = loss_and_gradient(topk, student, teacher, labels, upstream, k=5, temperature=2.0)
    assert gradient.double().sum(-1).abs().max() < 1e-5
    assert (gradient[labels == -100] == 0).all() and (gradient[3, 0] == 0).all()


def test_label_outside_the_vocabulary_gives_nan(device):
    student, teacher, labels, _ = tokens(device)
    sparse = cached(teacher, labels, 5)
    labels[1, 1] = VOCAB
    loss = topk_lssd_loss(student, *sparse, labels, ce_weight=0.0)
    assert loss[1, 1].isnan() and loss.isnan().sum() == 1


def run_shards(rank, world_size):
    dist.init_process_group("gloo")
    student, teacher, labels, upstream = tokens("cpu")
    starts = [0, 8, 9, 250, VOCAB] if world_size == 4 else [0, 290, VOCAB]
    columns = slice(starts[rank], starts[rank + 1])
    results = []
    for k, temperature in ((12, 2.0), (VOCAB, 1.0)):
        tracked = student[..., columns].clone().requires_grad_()
        loss = topk_lssd_loss(
            tracked, *cached(teacher, labels, k, temperature), labels, temperature=temperature,
            group=dist.group.WORLD, vocab_start=columns.start,
        )  # fmt: skip
        results.append((loss.detach(), torch.autograd.grad(loss, tracked, upstream)[0]))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_give_the_loss_of_the_whole(world_size, monkeypatch):
    monkeypatch.setenv("MIXCPT_LSSD", "reference")
    ranks = run_distributed(run_shards, world_size)
    student, teacher, labels, upstream = tokens("cpu")
    for index, (k, temperature) in enumerate(((12, 2.0), (VOCAB, 1.0))):
        loss, gradient, _ = loss_and_gradient(topk, student, teacher, labels, upstream, k=k, temperature=temperature)
        for rank in ranks:
            torch.testing.assert_close(rank[index][0], loss, rtol=3e-5, atol=3e-5)
        joined = torch.cat([rank[index][1] for rank in ranks], -1)
        torch.testing.assert_close(joined, gradient, rtol=0, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(3, 4, dtype=torch.int16)}, "ids"),
        ({"ids": torch.zeros(2, 4, dtype=torch.int64)}, "logp"),
        ({"logp": torch.zeros(3, 5)}, r"logp \[3, 5\]"),
        ({"gold_logp": torch.zeros(3, 1)}, r"gold_logp \[3, 1\]"),
        ({"ids": torch.zeros(3, 0, dtype=torch.int64), "logp": torch.zeros(3, 0)}, "ids"),
    ],
    ids=str,
)
def test_wrong_argument_is_named(changes, message):
    arguments = dict(
        student=torch.randn(3, 9), ids=torch.zeros(3, 4, dtype=torch.int64), logp=torch.zeros(3, 4),
        gold_logp=torch.zeros(3), labels=torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        topk_lssd_loss(**(arguments | changes))
