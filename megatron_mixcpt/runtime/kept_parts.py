"""Numbers that take long to compute, part by part, each kept on disk with a hash: an interruption costs one part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from megatron_mixcpt.files import write_whole
from megatron_mixcpt.runtime.first_rank import from_first
from megatron_mixcpt.runtime.parallel import ParallelState


def compute_parts(
    folder: Path,
    fingerprint: str,
    num_parts: int,
    compute: Callable[[int], np.ndarray],
    state: ParallelState,
    done: Callable[[int, bool], None],
) -> list[np.ndarray]:
    """All parts, fp64 arrays, the same on every rank. Collective.

    Args:
        folder: where rank 0 keeps the parts.
        fingerprint: of everything the parts follow from; parts with another one are computed again.
        compute: the whole array of a part, on every rank; called by all ranks in the same order.
        done: called with each finished part's number, and whether it was computed now.
    """
    kept = from_first(lambda: [_read(folder / f"{i:06d}.part", fingerprint) for i in range(num_parts)])
    parts: list[np.ndarray] = []
    for index, found in enumerate(kept):
        part = compute(index) if found is None else found
        if found is None and state.rank == 0:
            _write(folder / f"{index:06d}.part", fingerprint, part)
        parts.append(part)
        done(index, found is None)
    return parts


def _write(path: Path, fingerprint: str, values: np.ndarray) -> None:
    data = np.ascontiguousarray(values, dtype=np.float64).tobytes()
    head = {"fingerprint": fingerprint, "shape": values.shape, "hash": xxhash.xxh3_128_hexdigest(data)}
    write_whole(path, json.dumps(head).encode() + b"\n" + data)


def _read(path: Path, fingerprint: str) -> np.ndarray | None:
    """The part, or None where it is missing, damaged or made from something else."""
    try:
        head, _, data = path.read_bytes().partition(b"\n")
        known = json.loads(head)
        if known["fingerprint"] != fingerprint or known["hash"] != xxhash.xxh3_128_hexdigest(data):
            return None
        return np.frombuffer(data, dtype=np.float64).reshape(known["shape"]).copy()
    except (OSError, ValueError, KeyError, TypeError):
        return None
