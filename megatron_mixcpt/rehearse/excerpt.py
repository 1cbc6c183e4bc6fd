"""A few short samples of every source of a mixture, as a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.format import IndexedWriter, open_indexed

SEQUENCES = 64  # a source, at most


def write_excerpt(mix: Path, folder: Path, seq_length: int) -> Path:
    """Write the first samples of every source of `mix`, cut to `seq_length` tokens; returns the excerpt's mix.json."""
    folder.mkdir(parents=True)
    content = json.loads(mix.read_text())
    for number, source in enumerate(content["sources"]):
        source.pop("pairs", None)  # which `mixcpt align` alone reads
        for split in ("train", "valid"):
            if source.get(split) and source[split]["sequences"]:
                prefix = mix.parent / source[split]["prefix"]
                source[split] |= _cut(prefix, folder, f"{number}-{split}", seq_length)
    content |= {"seq_length": seq_length, "fingerprint": f"{content['fingerprint']}-excerpt"}
    content["tokenizer"]["path"] = "tokenizer"  # not there: the model's vocabulary is the one it needs already
    path = folder / "mix.json"
    path.write_text(json.dumps(content))
    return path


def _cut(prefix: Path, folder: Path, name: str, seq_length: int) -> dict[str, Any]:
    tokens, flags = open_indexed(prefix), open_indexed(Path(f"{prefix}.flags"))
    count = min(len(tokens), SEQUENCES)
    with (
        IndexedWriter(folder / name, tokens.dtype) as out,
        IndexedWriter(folder / f"{name}.flags", flags.dtype) as marks,
    ):
        for index in range(count):
            out.add(np.asarray(tokens[index][:seq_length]))
            marks.add(np.asarray(flags[index][:seq_length]))
        marks.finish()
        digest = out.finish()
    return {"prefix": name, "sequences": count, "tokens": count * seq_length, "hash": digest}
