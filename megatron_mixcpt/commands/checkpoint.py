"""`mixcpt checkpoint list|verify|prune RUN`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mixcpt.errors import ConfigError, VerificationError

NAME = "checkpoint"
HELP = """Look after the checkpoints of a run: list them, compare every byte with the manifest, or remove old ones."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in (
        ("list", "step, size and origin of every checkpoint, damaged ones that were set aside included"),
        ("verify", "read every byte and compare it with the manifest; exit code 3 where one differs"),
        ("prune", "remove all but the newest, and the result of a forgetting budget"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        action.add_argument("path", metavar="RUN", help="run directory, or for verify one checkpoint")
        if name == "prune":
            action.add_argument("--keep", type=int, default=1, metavar="K", help="newest to keep (default 1)")
            action.add_argument("--keep-every", type=int, default=0, metavar="N", help="and those of every n-th step")


def run(args: argparse.Namespace) -> int:
    return {"list": _list, "verify": _verify, "prune": _prune}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from megatron_mixcpt.checkpoint.info import read_info
    from megatron_mixcpt.checkpoint.store import list_quarantined, size_of

    for checkpoint in _checkpoints(Path(args.path)):
        try:
            info = read_info(checkpoint)
        except VerificationError as error:
            print(f"{checkpoint.name}  damaged: {error}")
            continue
        training = info.training
        layout = " ".join(f"{key}={value}" for key, value in training.layout.items()) if training else ""
        tokens = sum(training.tokens_by_source.values()) if training else 0
        gib = size_of(checkpoint) / 2**30
        print(f"{checkpoint.name}  {gib:.3f} GiB  {tokens} tokens  version {info.version}  {layout}")
    for checkpoint in list_quarantined(Path(args.path) / "checkpoints"):
        print(f"{checkpoint.name}  {size_of(checkpoint) / 2**30:.3f} GiB  set aside: it did not verify")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_mixcpt.checkpoint.manifest import find_damage
    from megatron_mixcpt.checkpoint.store import describe, is_checkpoint

    path = Path(args.path)
    checkpoints = [path] if is_checkpoint(path) else _checkpoints(path)
    damaged = []
    for checkpoint in checkpoints:
        damage = find_damage(checkpoint)
        print(f"{checkpoint.name}: " + (f"damaged: {describe(damage, 10)}" if damage else "good"))
        if damage:
            damaged.append(checkpoint.name)
    if damaged:
        raise VerificationError(
            f"{len(damaged)} of {len(checkpoints)} checkpoints are damaged: {', '.join(damaged)}; "
            "training resumes from the newest good one"
        )
    return 0


def _prune(args: argparse.Namespace) -> int:
    from megatron_mixcpt.checkpoint.manifest import find_damage
    from megatron_mixcpt.checkpoint.store import describe, prune, result_step, step_of

    if args.keep < 1:
        raise ConfigError(f"--keep {args.keep}: at least one checkpoint is kept; remove the run directory by hand")
    checkpoints, parent = _checkpoints(Path(args.path)), Path(args.path) / "checkpoints"
    result = result_step(parent)
    for kept in checkpoints[: args.keep] + [old for old in checkpoints[args.keep :] if step_of(old) == result]:
        damage = find_damage(kept)
        if damage:
            raise VerificationError(
                f"{kept.name}, which would be kept, is damaged; nothing removed: {describe(damage)}"
            )
    for removed in prune(parent, args.keep, args.keep_every, result):
        print(f"{removed.name}: removed")
    return 0


def _checkpoints(run: Path) -> list[Path]:
    from megatron_mixcpt.checkpoint.store import list_checkpoints

    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise ConfigError(f"{run}: no run directory with checkpoints")
    return found
