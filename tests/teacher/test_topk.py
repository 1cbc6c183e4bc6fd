"""What is kept of the teacher's logits, against fp64; quantisation; and what the loss makes of it."""

import numpy as np
import pytest
import torch

from megatron_mixcpt.errors import MixcptError, VerificationError
from megatron_mixcpt.kernels import lssd_loss, topk_lssd_loss
from megatron_mixcpt.teacher.cache_format import STEP, check_record, dequantized, fill_record, quantized, record_dtype
from megatron_mixcpt.teacher.topk import sparsify
from tests.helpers.spawn import run_distributed

N, V, K = 40, 50, 6


def logits_and_labels(seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(N, V, generator=generator)
    logits[:8] = logits[:8].round()  # ties, at the maximum too
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[:4] = logits[:4].argmax(-1)
    return logits, labels


def sparse(logits, labels, k=K, temperature=1.0, **options):
    return sparsify(
        logits, labels, k, temperature=temperature, **{"group": None, "vocab_start": 0, "vocab_size": V} | options
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kept_tail_and_label_are_the_whole_distribution(temperature):
    logits, labels = logits_and_labels()
    ids, logp, gold, tail = sparse(logits, labels, temperature=temperature)
    exact = (logits.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(logp.double(), exact.gather(-1, ids), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gold.double(), exact.gather(-1, labels[:, None])[:, 0], atol=1e-6, rtol=1e-6)
    assert (logp - exact.topk(K).values).abs().max() < 2e-6
    explicit = torch.zeros(N, V, dtype=torch.bool).scatter_(1, ids, True).scatter_(1, labels[:, None], True)
    rest = exact.exp().masked_fill(explicit, 0).sum(-1)
    torch.testing.assert_close(tail.double().exp(), rest, atol=1e-6, rtol=0)
    first = (exact == exact.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(ids[:, 0], first), "the first choice is the lowest id on ties"


def _sharded(rank, world_size):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    logits, labels = logits_and_labels()
    padded = torch.cat([logits, torch.full((N, 2), 1e4)], -1)  # 52 columns, the last two are padding
    start, width = rank * 26, 26
    whole = sparse(logits, labels, k=30)  # more than a shard has
    shard = sparse(
        padded[:, start : start + width], labels, k=30, vocab_start=start, group=torch.distributed.group.WORLD
    )
    assert torch.equal(whole.ids[:, 0], shard.ids[:, 0])
    torch.testing.assert_close(whole.logp, shard.logp, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(whole.gold, shard.gold, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(whole.tail.exp(), shard.tail.exp(), atol=1e-6, rtol=0)
    assert all(len(set(row)) == 30 and max(row) < V for row in shard.ids.tolist())
    return shard.ids.tolist()


@pytest.mark.distributed
def test_vocabulary_shards_and_padding_change_nothing():
    one, other = run_distributed(_sharded, 2)
    assert one == other


def test_sixteen_bits_are_within_half_a_step_and_reach_minus_32():
    values = -np.linspace(0, 31.9, 1000, dtype=np.float32)
    assert np.abs(dequantized(quantized(values, 16)) - values).max() <= STEP / 2 + 1e-6
    assert dequantized(quantized(np.array([-np.inf, -50.0]), 16)) == pytest.approx(-32, abs=1e-3)
    assert np.array_equal(dequantized(quantized(values, 32)), values)


def test_a_close_second_choice_stays_second():
    records = np.zeros(1, record_dtype(1, 3, V, 16))
    logp = np.log(np.array([[0.4, 0.39999, 0.2]], dtype=np.float32))
    fill_record(records[0:1], np.array([[7, 2, 5]]), logp, np.log(np.array([0.2])), np.array([-32.0]), content=1)
    first, second, third = dequantized(records["logp"])[0, 0]
    assert first > second > third and first - second <= STEP * 1.01


@pytest.mark.parametrize(("length", "kept"), [(15, 5), (16, 5), (15, 4)])
@pytest.mark.parametrize("bits", [16, 32])
def test_records_of_odd_sizes_are_read_and_what_is_no_number_is_not_written(bits, length, kept):
    records = np.zeros(2, record_dtype(length, kept, 1000, bits))
    logp, gold = np.full((length, kept), -1.0), np.full(length, -2.0)
    fill_record(records[0:1], np.zeros((length, kept)), logp, gold, gold, content=3)
    # As a batch reads them: rows of a packed array.
    read = torch.from_numpy(dequantized(np.ascontiguousarray(records["gold"])))
    assert read[0].tolist() == pytest.approx([-2.0] * length)
    gold[0] = np.nan
    with pytest.raises(MixcptError, match="not a number"):
        fill_record(records[0:1], np.zeros((length, kept)), logp, gold, gold, content=3)


def test_a_damaged_record_and_one_of_another_sequence_are_told_apart():
    records = np.zeros(1, record_dtype(2, 3, V, 16))
    zeros = np.zeros((2, 3))
    fill_record(records[0:1], zeros, zeros, zeros[:, 0], zeros[:, 0], content=5)
    check_record(records[0], 5, "here")
    with pytest.raises(VerificationError, match="other data"):
        check_record(records[0], 6, "here")
    records["logp"][0, 1, 2] ^= 1
    with pytest.raises(VerificationError, match="damaged"):
        check_record(records[0], 5, "here")


@pytest.mark.parametrize("bits", [16, 32])
def test_the_loss_lacks_exactly_the_divergence_within_the_tail(bits):
    """KL over the kept tokens and one tail is below the whole KL by p_tail KL(p | tail || q | tail)."""
    logits, labels = logits_and_labels(scale=1.0)
    student = logits + 0.5 * torch.randn(N, V, generator=torch.Generator().manual_seed(1))
    ids, logp, gold, tail = sparse(logits, labels, k=32)
    if bits == 16:
        logp, gold, tail = (torch.from_numpy(dequantized(quantized(x.numpy(), 16))) for x in (logp, gold, tail))
        inside = (ids == labels[:, None]).any(-1)
        total = torch.cat([logp, gold.masked_fill(inside, -torch.inf)[:, None], tail[:, None]], -1).logsumexp(-1)
        logp, gold = logp - total[:, None], gold - total
    options = {"ce_weight": 0.0, "target": "plain"}
    found = topk_lssd_loss(student, ids, logp, gold, labels, **options)
    whole = lssd_loss(student, logits, labels, **options)
    p, q = logits.double().log_softmax(-1), student.double().log_softmax(-1)
    explicit = torch.zeros(N, V, dtype=torch.bool).scatter_(1, ids, True).scatter_(1, labels[:, None], True)
    p_rest, q_rest = (x.masked_fill(explicit, -torch.inf).logsumexp(-1) for x in (p, q))
    inner = (p.exp() * ((p - p_rest[:, None]) - (q - q_rest[:, None]))).masked_fill(explicit, 0).sum(-1)
    assert inner.min() >= 0 and inner.mean() > 1e-3, "the case shows something"
    # Rounding by at most STEP / 2, and renormalising by no more, moves the KL by first order in log(p / q).
    bound = 1e-6 if bits == 32 else STEP * (1 + (p - q).abs().amax(-1))
    assert ((whole - found - inner).abs() <= bound).all()
