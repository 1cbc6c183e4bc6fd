"""Options that several commands have."""

from __future__ import annotations

import argparse
import math

from megatron_mixcpt.errors import ConfigError


def add_allow_older(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-older",
        action="store_true",
        help="where the newest checkpoint of a run is damaged, take the newest good one",
    )


def parse_shard(text: str) -> tuple[int, int]:
    """'2/8' -> (1, 8). Raises ConfigError."""
    try:
        index, shards = (int(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(f"--shard: write I/N, for example 1/8 (got {text!r})") from None
    if not 1 <= index <= shards:
        raise ConfigError(f"--shard: I must be between 1 and N (got {text!r})")
    return index - 1, shards


def count(text: str) -> int:
    """An integer from 1 on."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def not_negative(text: str) -> int:
    """An integer from 0 on."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    if not 0.0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError("must be a number above 0")
    return value


def share(text: str) -> float:
    """A number above 0, and 1 at most."""
    if not 0.0 < (value := float(text)) <= 1.0:
        raise argparse.ArgumentTypeError("must be above 0, and 1 at most")
    return value
