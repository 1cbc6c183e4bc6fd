"""What mixed means: each source asks for a weight, a number of tokens or of epochs; integers come out exactly."""

from dataclasses import dataclass, replace

import numpy as np

from megatron_mixcpt.data_prep.config import SHARE_KEYS, PreprocessConfig
from megatron_mixcpt.data_prep.mix import Source, SourceShare
from megatron_mixcpt.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """What one source asks for. Exactly one of weight, tokens, epochs is set; `available` counts its tokens."""

    name: str
    available: int
    weight: float | None = None
    tokens: int | None = None
    epochs: float | None = None
    max_epochs: float | None = None


@dataclass(frozen=True)
class Share:
    """What one source gets: its share of the mixture (all shares sum to 1), the tokens and epochs that means."""

    name: str
    share: float
    tokens: int
    epochs: float


def requested(request: Request) -> dict[str, float]:
    """The one of weight, tokens and epochs that is set, by its name."""
    return {key: value for key in SHARE_KEYS if (value := getattr(request, key)) is not None}


def weighted(config: PreprocessConfig, sources: list[Source]) -> list[Source]:
    """The sources with their weights (shares of the tokens, summing to 1), and what each asked for and gets. Those that
    are only held out have weight 0."""
    requests = [
        Request(asked.name, count(source, config.share_of), asked.weight, asked.tokens, asked.epochs, asked.max_epochs)
        for asked, source in zip(config.sources, sources)
        if source.train is not None
    ]
    trained = [source for source in sources if source.train is not None]
    shares = resolve_shares(requests, config.total_tokens)
    # The trainer counts tokens: a share of targets becomes the share of the tokens they come with.
    amounts = [
        share.share / request.available * count(source, "tokens")
        for share, request, source in zip(shares, requests, trained)
    ]
    given = {
        source.name: replace(
            source,
            weight=share.share if config.share_of == "tokens" else amount / sum(amounts),
            share=SourceShare(config.share_of, requested(request), share.share, share.tokens, share.epochs),
        )
        for source, request, share, amount in zip(trained, requests, shares, amounts)
    }
    return [given.get(source.name, source) for source in sources]


def count(source: Source, what: str) -> int:
    """Its training tokens, or the `targets` among them."""
    assert source.train is not None
    return source.train.tokens if what == "tokens" else source.train.target_tokens


def resolve_shares(requests: list[Request], total: int | None = None) -> list[Share]:
    """Turn requests into shares.

    Sources that ask for tokens or epochs have fixed amounts. Weights share what is left of `total`; if nothing is
    fixed they need not sum to 1. Without `total`, weights beside fixed amounts are fractions of the whole mixture,
    and with weights alone the total is one pass over what the scarcest source allows.

    Raises ConfigError when the requests cannot be met, or need more than `max_epochs` of a source.
    """
    for request in requests:
        if request.available <= 0:
            raise ConfigError(f"source {request.name} has no training tokens; give it more data or leave it out")
    fixed = np.array([_fixed_tokens(request) for request in requests], dtype=np.int64)
    weights = np.array([request.weight or 0.0 for request in requests])
    if total is None:
        total = _natural_total(requests, fixed, weights)
    left = total - int(fixed.sum())
    if left < 0:
        raise ConfigError(f"the sources ask for {fixed.sum()} tokens, more than total_tokens {total}")
    exact = fixed.astype(np.float64)
    if weights.any():
        amounts = fixed + apportion(left, weights)
        exact += left * weights / weights.sum()
    elif left:
        raise ConfigError(
            f"the sources ask for {fixed.sum()} tokens, total_tokens is {total}; give one source a weight"
        )
    else:
        amounts = fixed
    shares = []
    for request, amount, wanted in zip(requests, amounts.tolist(), exact.tolist()):
        epochs = amount / request.available
        if request.max_epochs is not None and epochs > request.max_epochs + 1e-9:
            raise ConfigError(
                f"source {request.name} would be repeated {epochs:.2f} times, max_epochs is {request.max_epochs:g}; "
                "lower its share or total_tokens, add data, or raise max_epochs"
            )
        shares.append(Share(request.name, wanted / total, amount, epochs))
    return shares


def _fixed_tokens(request: Request) -> int:
    if request.tokens is not None:
        return request.tokens
    return round(request.epochs * request.available) if request.epochs is not None else 0


def _natural_total(requests: list[Request], fixed: np.ndarray, weights: np.ndarray) -> int:
    if not weights.any():
        return int(fixed.sum())
    if fixed.any():
        if weights.sum() >= 1:
            raise ConfigError(
                "beside sources with tokens or epochs, weights are fractions of the whole and must sum to less than 1; "
                f"they sum to {weights.sum():g}"
            )
        return round(int(fixed.sum()) / (1 - weights.sum()))
    normal = weights / weights.sum()
    return max(1, int(min(request.available / weight for request, weight in zip(requests, normal))))


def apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Integers in proportion to `weights` that sum to exactly `total` (largest remainders; ties to the earlier)."""
    weights = np.asarray(weights, dtype=np.float64)
    exact = total * (weights / weights.sum())
    counts = np.floor(exact).astype(np.int64)
    short = total - int(counts.sum())
    counts[np.argsort(-(exact - counts), kind="stable")[:short]] += 1
    return counts
