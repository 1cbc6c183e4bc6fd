"""What several data tests need to look into results."""

import hashlib
import json
from pathlib import Path

import numpy as np

from megatron_mixcpt.data_prep.format import DOC_START, PAD, open_indexed


def digests(folder: Path) -> dict[str, str]:
    """Hashes of all result files of a run; working files (hidden ones) are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and not inside.parts[0].startswith("."):
            found[str(inside)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def load_mix(out: Path) -> dict:
    return json.loads((out / "mix.json").read_text())


def source_of(mix: dict, name: str) -> dict:
    return next(source for source in mix["sources"] if source["name"] == name)


def sequences_of(out: Path, prefix: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, flags) of every stored sequence."""
    tokens, flags = open_indexed(out / prefix), open_indexed(out / f"{prefix}.flags")
    assert len(tokens) == len(flags)
    return list(zip(tokens, flags))


def documents_of(out: Path, prefix: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, flags) of every document, cut at the document starts, without padding."""
    found = []
    for tokens, flags in sequences_of(out, prefix):
        starts = np.flatnonzero(flags & DOC_START).tolist()
        assert starts[0] == 0
        for begin, end in zip(starts, [*starts[1:], len(tokens)]):
            if not flags[begin] & PAD:
                found.append((tokens[begin:end], flags[begin:end]))
    return found
