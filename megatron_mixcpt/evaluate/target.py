"""What `mixcpt eval` and `mixcpt generate` are pointed at: a run, a checkpoint, or a Hugging Face directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.huggingface.gguf import gguf_file
from megatron_mixcpt.runtime.scratch import scratch_folder


def is_hf_directory(path: Path) -> bool:
    """Whether transformers itself can open `path`; one GGUF file in it will do."""
    return (path / "config.json").is_file() or gguf_file(path) is not None


def architecture_of(path: Path, *, allow_older: bool = False) -> Architecture:
    """Of a Hugging Face directory or of the newest checkpoint of a run, which is verified.

    Args:
        allow_older: see `find_checkpoint`.

    Raises:
        ConfigError: it is neither.
        VerificationError: the checkpoint is damaged.
    """
    from megatron_mixcpt.checkpoint import find_checkpoint, read_info

    if is_hf_directory(path):
        return architecture_from_hf(path)
    return read_info(find_checkpoint(path, allow_older=allow_older)).architecture


@dataclass(frozen=True)
class Target:
    """What is measured, what it started from, and the mix.json with held-out text, as far as they are known."""

    model: Path
    base: Path | None
    mix_path: Path | None


def find_target(model: str, base: str | None, mix: str | None, *, allow_older: bool) -> Target:
    """What is not given is what the run says of itself; `model` is a run, a checkpoint or a Hugging Face directory.

    Args:
        allow_older: see `find_checkpoint`; the model is then the checkpoint that was found.

    Raises:
        ConfigError: it is none of the three.
        VerificationError: the checkpoint is damaged, or what it started from holds other weights now.
    """
    path, start, mix_path = Path(model), base and Path(base), mix and Path(mix)
    if not is_hf_directory(path):
        from megatron_mixcpt.checkpoint.origin import check_start, find_origin

        origin = find_origin(path, allow_older=allow_older)
        if start is None and origin.config is not None:
            check_start(origin.checkpoint, origin.info, origin.config.model)
        path = origin.checkpoint if allow_older else path
        start = start or origin.base
        mix_path = mix_path or (Path(origin.config.data.mix) if origin.config else None)
    return Target(path, start or None, mix_path or None)


@contextlib.contextmanager
def as_hf_directory(path: Path, *, allow_older: bool = False) -> Iterator[Path]:
    """`path` as a directory for `loading.load_directory`; a run or checkpoint is exported to a temporary one.

    Args:
        allow_older: see `find_checkpoint`.

    Raises:
        ConfigError: it is none of the three.
    """
    from megatron_mixcpt.hf_alora import is_alora

    if is_hf_directory(path) or is_alora(path):
        yield path
        return
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory; give a run, a checkpoint or a Hugging Face directory")
    from megatron_mixcpt.checkpoint.origin import find_origin
    from megatron_mixcpt.convert.export import export, export_adapter

    with scratch_folder("mixcpt-") as folder:
        out = folder / path.resolve().name
        origin = find_origin(path, allow_older=allow_older)
        adapter = origin.adapter
        if adapter is not None and adapter.method == "alora":  # which cannot be merged
            export_adapter(origin.checkpoint, out)
        else:
            export(origin.checkpoint, out)
        yield out
