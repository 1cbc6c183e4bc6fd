"""Options that several commands have."""

from __future__ import annotations

import argparse


def add_allow_older(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-older",
        action="store_true",
        help="where the newest checkpoint of a run is damaged, take the newest good one",
    )
