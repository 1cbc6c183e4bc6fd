"""Which checkpoint to load: the newest whose every byte is as it was written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megatron_mixcpt.checkpoint.manifest import MANIFEST, find_damage
from megatron_mixcpt.checkpoint.store import (
    describe,
    is_checkpoint,
    list_checkpoints,
    list_quarantined,
    quarantine,
    result_of,
)
from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.runtime.first_rank import from_first

TRUST_HINT = (
    "if you know where it comes from, mixcpt train --trust loads it without a manifest (it can run any program)"
)


def warn(line: str) -> None:
    print(line, file=sys.stderr)


def newest_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, or a run directory's result or newest one, whether or not it verifies.

    Raises ConfigError where there is none.
    """
    return _candidates(path)[0]


def find_checkpoint(
    path: Path,
    *,
    trust: bool = False,
    allow_older: bool = False,
    tell: Callable[[str], None] = warn,
    together: bool = False,
) -> Path:
    """`path` itself if it is a checkpoint, or the newest one of a run directory. Changes nothing on disk.

    Where a run with a forgetting budget has chosen its result, that comes first.

    Args:
        trust: accept checkpoints without a manifest, unverified.
        allow_older: of a run directory, take the newest one that verifies in place of the newest.
        tell: called with a line for each newer checkpoint that was passed over.
        together: collective; reading is spread over the ranks, and all get the same answer or error.

    Raises ConfigError where there never was one, VerificationError where it does not verify.
    """
    candidates = from_first(lambda: _candidates(path)) if together else _candidates(path)
    if allow_older:
        return _first_good(candidates, trust, tell, together)[0]
    newest = candidates[0]
    damage = _damage(newest, trust, together)
    if not damage:
        return newest
    hint = ""
    if len(candidates) > 1:
        hint = f". To take an older one, name it ({candidates[1]}) or give --allow-older where the command has it"
    raise VerificationError(_refusal(newest, damage) + hint)


def _candidates(path: Path) -> list[Path]:
    if is_checkpoint(path) or (path / MANIFEST).exists():
        return [path]
    candidates = list_checkpoints(path / "checkpoints")
    if not candidates:
        if not path.is_dir():
            raise ConfigError(
                f"{path}: no such directory; `mixcpt train` and `align` write runs, `mixcpt convert` checkpoints"
            )
        raise ConfigError(f"{path}: neither a checkpoint nor a run directory that has saved one")
    result = result_of(path / "checkpoints")
    return candidates if result is None else [result, *(other for other in candidates if other != result)]


def newest_good(parent: Path, *, trust: bool, tell: Callable[[str], None]) -> Path | None:
    """Collective: the newest checkpoint of `parent` that verifies, or None where there never was any.

    Newer ones that do not verify are set aside. Reading is spread over the ranks. Raises VerificationError where there
    are checkpoints but none is good: starting anew then is the user's decision.
    """
    import torch

    rank = torch.distributed.get_rank()
    # All ranks walk the same list: rank 0's, taken before any of them writes.
    candidates = from_first(lambda: list_checkpoints(parent))
    if not candidates:
        bad = from_first(lambda: list_quarantined(parent))
        if bad:
            raise VerificationError(
                f"{parent}: no good checkpoint is left, only {', '.join(path.name for path in bad)}, set aside because "
                "they did not verify: restore one from a backup, or move run_dir away to start anew"
            )
        return None
    good, bad_ones = _first_good(candidates, trust, tell if rank == 0 else silent, together=True)
    if rank == 0:
        for path in bad_ones:
            tell(f"{path.name}: set aside as {quarantine(path).name}")
    torch.distributed.barrier()
    return good


def _first_good(
    candidates: list[Path], trust: bool, tell: Callable[[str], None], together: bool = False
) -> tuple[Path, list[Path]]:
    refused: list[tuple[Path, list[str]]] = []
    for index, path in enumerate(candidates):
        damage = _damage(path, trust, together)
        if not damage:
            return path, [bad for bad, _ in refused]
        following = candidates[index + 1].name if index + 1 < len(candidates) else "nothing, it is the oldest"
        tell(f"warning: {path.name} is damaged, falling back to {following}: {describe(damage)}")
        refused.append((path, damage))
    path, damage = refused[0]
    raise VerificationError(f"none of {len(refused)} checkpoints verifies; the newest: " + _refusal(path, damage))


def _damage(path: Path, trust: bool, together: bool = False) -> list[str]:
    if trust and not (path / MANIFEST).exists():
        return []
    if not together:
        return find_damage(path)
    import torch

    from megatron_mixcpt.checkpoint.touch import Amount, in_touch

    amount, rank = Amount(), torch.distributed.get_rank()
    parts: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    mine = in_touch(lambda: find_damage(path, rank, len(parts), amount), amount)
    torch.distributed.all_gather_object(parts, mine)
    return list(dict.fromkeys(line for part in parts for line in part))


def _refusal(path: Path, damage: list[str]) -> str:
    hint = f". {TRUST_HINT}" if not (path / MANIFEST).exists() else ""
    return f"{path} is damaged: {describe(damage)}{hint}"


def silent(line: str) -> None:
    pass
