"""Options that several commands have."""

from __future__ import annotations

import argparse

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
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(f"--shard: write I/N, for example 1/8 (got {text!r})") from None
    if not 1 <= index <= count:
        raise ConfigError(f"--shard: I must be between 1 and N (got {text!r})")
    return index - 1, count
