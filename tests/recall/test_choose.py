"""The choice of a token against its definition, computed in fp64 with a full sort."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mixcpt.recall.choose import NUCLEUS, choose


def probabilities(logits, temperature, top_p):
    """fp64 [v]: what a token's probability ought to be."""
    p = torch.softmax(logits.double() / temperature, 0).numpy()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0.0
    return p / p.sum()


@pytest.mark.parametrize("size", [7, 2 * NUCLEUS])
@pytest.mark.parametrize("spread", [0.3, 4.0])
@pytest.mark.parametrize("top_p", [0.2, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_each_token_owns_as_much_of_the_uniform_numbers_as_its_probability(size, spread, top_p, temperature):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * spread
    steps = 2000
    uniform = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    rows = logits.expand(steps, size)
    tokens, _ = choose(rows, torch.full((steps,), temperature), top_p, uniform)
    found = np.bincount(tokens.numpy(), minlength=size) / steps
    expected = probabilities(logits, temperature, top_p)
    # Every token's share of an even grid is exact to one point, or, where rounding moves the nucleus, to its last one.
    assert np.abs(found - expected).max() <= 1.5 / steps + 1e-6
    assert not found[expected == 0].any()


def test_log_probabilities_are_those_of_the_model_itself():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 3
    temperature = torch.tensor([0.3, 0.7, 1.0, 1.5, 3.0])
    tokens, logp = choose(logits, temperature, 0.8, torch.rand(5, dtype=torch.float64))
    expected = torch.log_softmax(logits.double(), 1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), expected, atol=1e-5, rtol=0)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1e-3, 0.5, 1.0]),
)
def test_a_token_of_probability_zero_is_never_drawn(values, uniform, top_p):
    logits = torch.tensor([values])
    token, logp = choose(logits, torch.ones(1), top_p, torch.tensor([uniform], dtype=torch.float64))
    assert probabilities(logits[0], 1.0, 1.0)[token[0]] > 0
    assert torch.isfinite(logp).all()


def test_a_row_is_drawn_as_if_it_were_alone():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 3 * NUCLEUS, generator=generator) * torch.logspace(-1, 1, 9)[:, None]
    temperature, uniform = torch.linspace(0.5, 2, 9), torch.rand(9, generator=generator, dtype=torch.float64)
    together, _ = choose(logits, temperature, 0.9, uniform)
    alone = [choose(logits[i : i + 1], temperature[i : i + 1], 0.9, uniform[i : i + 1])[0].item() for i in range(9)]
    assert together.tolist() == alone
