"""A model in one GGUF file: which it is, how transformers is told of it, and that it is parsed once.

transformers parses the file, tens of thousands of tokenizer entries one by one, for configuration, weights and
tokenizer anew, and makes one table of names for every tensor: half of the time of a conversion.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_mixcpt.errors import ConfigError

REPEATED = ("GGUFReader", "get_tensor_name_map")  # of the package gguf; transformers looks them up at every use


def gguf_file(hf_dir: Path) -> Path | None:
    """The GGUF file of a directory that has one and no config.json."""
    files = sorted(hf_dir.glob("*.gguf"))
    if (hf_dir / "config.json").exists() or not files:
        return None
    if len(files) > 1:
        raise ConfigError(f"{hf_dir} holds {len(files)} GGUF files: leave the one to use in a directory of its own")
    return files[0]


def unread_rotation(hf_dir: str | Path, head_dim: int) -> str | None:
    """What a GGUF file says of rotary positions that transformers does not take from it, in words; None: nothing.

    head_dim: numbers of a head that the model, as transformers reads it, rotates.
    """
    file = gguf_file(Path(hf_dir))
    assert file is not None
    reader = importlib.import_module("gguf").GGUFReader(str(file))
    family = reader.get_field("general.architecture").contents()

    def value(key: str) -> Any:
        found = reader.get_field(f"{family}.rope.{key}")
        return None if found is None else found.contents()

    if value("scaling.type") not in (None, "none") and value("scaling.factor") != 1.0:
        return f"{family}.rope.scaling.type {value('scaling.type')}"
    if value("dimension_count") not in (None, head_dim):
        return f"{family}.rope.dimension_count {value('dimension_count')}"
    factors = (tensor for tensor in reader.tensors if tensor.name.startswith(("rope_freqs.", "rope_factors_")))
    return next((tensor.name for tensor in factors if (tensor.data != 1.0).any()), None)


def gguf_option(hf_dir: str | Path) -> dict[str, str]:
    """What transformers must be told to open a directory with one GGUF file; nothing for others."""
    file = gguf_file(Path(hf_dir))
    if file is None:
        return {}
    if importlib.util.find_spec("gguf") is not None:  # without it transformers says what to install
        package = importlib.import_module("gguf")
        for name in REPEATED:
            repeated = getattr(package, name)
            if not hasattr(repeated, "cache_info"):
                setattr(package, name, lru_cache(maxsize=1)(repeated))
    return {"gguf_file": file.name}
