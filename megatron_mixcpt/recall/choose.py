"""The choice of the next token: a function of logits, temperature, top-p and one uniform number a row."""

from __future__ import annotations

import torch

NUCLEUS = 512
"""Most likely tokens that are sorted at first; rows whose nucleus is larger are sorted whole."""


def choose(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: float, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token a row by inverting its cumulative distribution.

    Args:
        logits: [b, v], any float type.
        temperature: fp32 [b], above 0.
        top_p: the smallest set of most likely tokens that holds this share is drawn from; 1: all.
        uniform: fp64 [b] in [0, 1).

    Returns tokens int64 [b], and fp32 [b] their log-probabilities under the model itself (temperature 1, no top-p).
    """
    logits = logits.float()
    scaled = logits / temperature[:, None]
    tokens = _from_all(scaled, uniform) if top_p >= 1.0 else _from_nucleus(scaled, top_p, uniform)
    logp = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
    return tokens, logp


def _from_all(scaled: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    return _invert(scaled.double().softmax(1), uniform)


def _from_nucleus(scaled: torch.Tensor, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    whole = scaled.logsumexp(1, keepdim=True).double()
    values, ids = scaled.topk(min(NUCLEUS, scaled.shape[1]), dim=1)
    probabilities = (values.double() - whole).exp()  # [b, k], falling
    tokens = _pick(probabilities, ids, top_p, uniform)
    wide = (probabilities.sum(1) < top_p).nonzero()[:, 0]
    if len(wide) and scaled.shape[1] > NUCLEUS:
        values, ids = scaled[wide].sort(dim=1, descending=True)
        probabilities = (values.double() - whole[wide]).exp()
        tokens[wide] = _pick(probabilities, ids, top_p, uniform[wide])
    return tokens


def _pick(probabilities: torch.Tensor, ids: torch.Tensor, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    before = probabilities.cumsum(1) - probabilities
    kept = torch.where(before < top_p, probabilities, torch.zeros_like(probabilities))
    return ids.gather(1, _invert(kept, uniform)[:, None])[:, 0]


def _invert(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first place whose cumulative share exceeds `uniform`; int64 [b]. Never one of probability 0."""
    cumulative = probabilities.cumsum(1)
    last = (cumulative < cumulative[:, -1:]).sum(1)  # first place that reaches the total
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.minimum(torch.searchsorted(cumulative, target, right=True)[:, 0], last)
