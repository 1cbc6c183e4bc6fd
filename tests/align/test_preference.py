"""The preference losses against their formulas written down again, in fp64."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_mixcpt.config import AlignSettings
from megatron_mixcpt.objectives.preference import preference_loss
from tests.align.oracle import plain

VARIANTS = {
    "dpo": {},
    "dpo strong": {"beta": 2.0},
    "dpo smoothed": {"label_smoothing": 0.2},
    "dpo normalised": {"length_normalized": True, "beta": 3.0},
    "ipo": {"loss": "ipo"},
    "ipo normalised": {"loss": "ipo", "length_normalized": True},
}


def inputs():
    generator = torch.Generator().manual_seed(3)
    policy = (-20 * torch.rand(7, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = policy.detach() + 3 * torch.randn(7, 2, generator=generator, dtype=torch.float64)
    return policy, reference, torch.randint(1, 20, (7, 2), generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_the_formula(variant):
    policy, reference, lengths = inputs()
    loss, rewards = preference_loss(policy, reference, lengths, AlignSettings(method="dpo", **VARIANTS[variant]))
    expected = plain(policy, reference, lengths, **VARIANTS[variant])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), policy)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    assert not rewards.requires_grad and rewards.shape == (7, 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_where_nothing_was_learned_the_loss_is_log_2(smoothing):
    policy, _, lengths = inputs()
    settings = AlignSettings(method="dpo", label_smoothing=smoothing)
    loss, rewards = preference_loss(policy, policy.detach(), lengths, settings)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2.0)))
    assert not rewards.any()


@pytest.mark.parametrize("variant", ["dpo", "dpo strong", "dpo smoothed", "ipo"])
def test_losses_and_rewards_are_those_of_trl(variant):
    """Its `dpo_loss` knows no lengths: it takes means for IPO and sums else from its caller."""
    try:
        from trl import DPOTrainer

        dpo_loss = DPOTrainer.dpo_loss
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"no trl whose DPOTrainer has dpo_loss (as 0.15.2 with its transformers): {error}")
    settings = AlignSettings(method="dpo", **VARIANTS[variant])
    trainer = SimpleNamespace(
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        loss_type=settings.loss,
        reference_free=False,
        f_divergence_type="reverse_kl",
        f_divergence_params=None,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    policy, reference, lengths = inputs()
    loss, rewards = preference_loss(policy, reference, lengths, settings)
    expected, chosen, rejected = dpo_loss(trainer, *policy.unbind(1), *reference.unbind(1))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rewards, torch.stack([chosen, rejected], 1).detach(), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), policy)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_far_pairs_give_finite_losses_and_gradients():
    policy = torch.tensor([[-5000.0, 0.0], [0.0, -5000.0]], dtype=torch.float64, requires_grad=True)
    loss, _ = preference_loss(policy, torch.zeros(2, 2), torch.ones(2, 2), AlignSettings(method="dpo", beta=1.0))
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert loss.tolist() == [5000.0, 0.0] and gradient.isfinite().all()


def test_the_memory_of_log_probabilities_does_not_grow_with_logits():
    """Four times the tokens take hidden states and words, not logits, more."""
    from benchmarks.lssd_memory import PeakMemory
    from megatron_mixcpt.kernels import linear_lssd_loss

    vocab, width = 4000, 16

    def peak(num_tokens):
        hidden = torch.randn(num_tokens, width, requires_grad=True)
        head = torch.randn(vocab, width, requires_grad=True)
        labels = torch.arange(num_tokens) % vocab
        with PeakMemory() as memory:
            torch.autograd.grad(linear_lssd_loss(hidden, head, None, None, labels).sum(), (hidden, head))
        return memory.peak

    assert peak(8192) - peak(2048) < 0.05 * 6144 * vocab * 4
