"""`manifest.json`: every file of a result with its size and hash, and what it was made from."""

from pathlib import Path
from typing import Any

import orjson

from megatron_mixcpt import __version__
from megatron_mixcpt.data_prep.config import Config
from megatron_mixcpt.data_prep.parts import hash_file
from megatron_mixcpt.data_prep.plan import Plan
from megatron_mixcpt.files import write_whole

FORMAT = "mixcpt-manifest/1"
FILE_NAME = "manifest.json"
# What can change the bytes of a result, by package.
PACKAGES = ("tokenizers", "sentencepiece", "fastokens", "rensa", "pyarrow", "numpy")


def describe_file(path: Path, known_hash: str | None = None) -> dict[str, Any]:
    """Size and xxh3-128 of a file; a hash that is already known is not computed again."""
    return {"size": path.stat().st_size, "hash": known_hash or hash_file(path)}


def write_manifest(
    out: Path, config: Config, plans: list[Plan], files: dict[str, dict[str, Any]], sources: list[dict[str, Any]]
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


def write_view_manifest(out: Path, files: dict[str, dict[str, Any]], fingerprint: str) -> Path:
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
