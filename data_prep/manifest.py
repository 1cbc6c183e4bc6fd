"""`manifest.json`: every file of a result with its size and hash, and what it was made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_mixcpt import __version__
from megatron_mixcpt.data_prep.config import PreprocessConfig, parse_config
from megatron_mixcpt.data_prep.parts import hash_file
from megatron_mixcpt.data_prep.plan import Plan
from megatron_mixcpt.errors import MixcptError, VerificationError
from megatron_mixcpt.files import write_whole

FORMAT = "mixcpt-manifest/1"
FILE_NAME = "manifest.json"
# What can change the bytes of a result, by package.
PACKAGES = ("tokenizers", "sentencepiece", "fastokens", "rensa", "pyarrow", "numpy")


@dataclass(frozen=True)
class FileEntry:
    """Bytes and xxh3-128 (hex) of a file of the result."""

    size: int
    hash: str


@dataclass(frozen=True)
class Input:
    """A file that the result was made from: its source, path, bytes and xxh3-128 (hex)."""

    source: str
    path: str
    size: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest says to those who read it again."""

    files: dict[str, FileEntry]
    """By path, relative to the folder."""
    inputs: list[Input]
    config: PreprocessConfig | None
    """The configuration that the result was made with; None for a view, which has none of its own."""


def read_manifest(out: Path) -> Manifest:
    """The manifest of the result in `out`.

    Raises MixcptError where there is none that can be read, VerificationError where it is not one.
    """
    path = out / FILE_NAME
    try:
        content = orjson.loads(path.read_bytes())
    except OSError as error:
        raise MixcptError(f"cannot read {path}: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise VerificationError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise VerificationError(f"{path} is not a {FORMAT} file")
    config = content.get("config")
    try:
        return Manifest(
            files={name: FileEntry(**entry) for name, entry in content["files"].items()},
            inputs=[Input(**entry) for entry in content.get("inputs", [])],
            config=None if config is None else parse_config({**config, "out": str(out)}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{path} has been changed: {error}") from None


def describe_file(path: Path, known_hash: str | None = None) -> FileEntry:
    """The entry of a file; a hash that is already known is not computed again."""
    return FileEntry(path.stat().st_size, known_hash or hash_file(path))


def write_manifest(
    out: Path, config: PreprocessConfig, plans: list[Plan], files: dict[str, FileEntry], sources: list[dict[str, Any]]
) -> Path:
    """Write the manifest; `files` are the data files already described, `sources` the counts of each source."""
    for name in sorted(path.relative_to(out).as_posix() for path in out.glob("tokenizer/*")):
        files[name] = describe_file(out / name)
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "config": config.model_dump(exclude={"out"}),
        "inputs": [
            {"source": plan.source, "path": file.path, "size": file.size, "hash": file.hash}
            for plan in plans
            for file in plan.files
        ],
        "sources": sources,
        "files": dict(sorted(files.items())),
    }
    return _write(out, manifest)


def write_view_manifest(out: Path, files: dict[str, FileEntry], fingerprint: str) -> Path:
    """Write the manifest of a folder of views over the mix with `fingerprint`."""
    for name in sorted(path.relative_to(out).as_posix() for path in out.glob("tokenizer/*")):
        files[name] = describe_file(out / name)
    manifest = {"format": FORMAT, "version": __version__, "view_of": fingerprint, "files": dict(sorted(files.items()))}
    return _write(out, manifest)


def _write(out: Path, manifest: dict[str, Any]) -> Path:
    return write_whole(out / FILE_NAME, orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
