"""`manifest.json`: size and hash of every file of a checkpoint, so that nothing damaged is ever loaded.

megatron-core's checkpoints carry no checksums: a flipped bit loads silently, and their `.metadata` is a pickle, which
runs whatever it says. Here every byte is compared with the manifest before anything else reads it. The manifest covers
itself: it holds the hash of its own remaining content, and any other spelling of the same content is refused.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from megatron_mixcpt import __version__
from megatron_mixcpt.errors import VerificationError

if TYPE_CHECKING:
    from megatron_mixcpt.checkpoint.touch import Amount

MANIFEST = "manifest.json"
FORMAT = "mixcpt-manifest/1"
FACTS = ("step", "config_hash", "data_fingerprint", "layout")  # repeated from checkpoint.json, where they are there
BLOCK = 4 << 20
THREADS = min(8, os.cpu_count() or 1)  # xxh3 is faster than any disk: they wait for it in parallel

PAUSES = (1.0, 5.0)  # seconds before what could not be read is tried again

Entry = dict[str, Any]  # {"size": bytes, "xxh3_128": hex}
Result = TypeVar("Result")


def hash_file(path: Path, amount: Amount | None = None) -> Entry:
    """Size and xxh3-128 of a file; counts its bytes in `amount`. Raises OSError."""
    state, size = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):  # type: ignore[attr-defined]
            state.update(block[:count])
            size += count
            if amount is not None:
                amount.done += count
    return {"size": size, "xxh3_128": state.hexdigest()}


def write_manifest(folder: Path, info: dict[str, Any], known: dict[str, Entry] | None = None) -> None:
    """Describe all files of `folder`.

    Args:
        info: the content of checkpoint.json; step, configuration, data and layout are repeated from it.
        known: entries of files that were hashed while they were written; the others are read.
    """
    known = known or {}
    names = [name for name in _files(folder) if name != MANIFEST]
    read = [name for name in names if name not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        entries = known | dict(zip(read, pool.map(lambda name: hash_file(folder / name), read)))
    body = {
        "format": FORMAT,
        **{key: info[key] for key in FACTS if key in info},
        "libraries": _libraries(),
        "files": {name: entries[name] for name in sorted(names)},
    }
    (folder / MANIFEST).write_text(_render(body))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content. Raises VerificationError where it is missing or not exactly as it was written."""
    path = folder / MANIFEST
    try:
        text = _patiently(path.read_bytes).decode()
        content = json.loads(text)
    except FileNotFoundError:
        raise VerificationError(f"{path}: missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise VerificationError(f"{path}: cannot be read: {error}") from None
    if path.is_symlink():
        raise VerificationError(f"{path}: a link, not the file that was written")
    if not isinstance(content, dict) or content.pop("hash", None) is None or _render(content) != text:
        raise VerificationError(f"{path}: does not match its own hash")
    if content.get("format") != FORMAT:
        raise VerificationError(f"{path}: format {content.get('format')!r}, this version reads {FORMAT!r}")
    return content


def fingerprint(folder: Path) -> str | None:
    """Tells the content of a checkpoint from that of any other; None where it has no manifest."""
    path = folder / MANIFEST
    return xxhash.xxh3_128_hexdigest(path.read_bytes()) if path.exists() else None


def find_damage(folder: Path, part: int = 0, parts: int = 1, amount: Amount | None = None) -> list[str]:
    """What is wrong with a checkpoint, a line a file; empty where every byte is as it was written.

    `part` of `parts`: hash only this share of the files, to spread the reading over ranks. Bytes are counted in
    `amount` while they are read.
    """
    try:
        expected: dict[str, Entry] = read_manifest(folder)["files"]
    except VerificationError as error:
        return [str(error)]
    found = set(_files(folder)) - {MANIFEST}
    damage = [f"{folder / name}: not in the manifest" for name in sorted(found - expected.keys())]
    damage += [f"{folder / name}: missing" for name in sorted(expected.keys() - found)]
    mine = sorted(found & expected.keys())[part::parts]
    with ThreadPoolExecutor(THREADS) as pool:
        compared = pool.map(lambda name: _compare(folder / name, expected[name], amount), mine)
        damage += [line for line in compared if line]
    return damage


def _compare(path: Path, expected: Entry, amount: Amount | None) -> str | None:
    if path.is_symlink():
        return f"{path}: a link, not the file that was written"
    try:
        size = _patiently(path.stat).st_size
        if size != expected["size"]:
            return f"{path}: {size} bytes, not the {expected['size']} that were written"
        if _patiently(lambda: hash_file(path, amount)) != expected:
            return f"{path}: content differs from what was written (xxh3-128)"
    except OSError as error:
        return f"{path}: cannot be read: {error}"
    return None


def _patiently(read: Callable[[], Result]) -> Result:
    """What `read` returns. A shared file system that fails now may not fail in a moment, and a checkpoint that cannot
    be read is set aside; raises OSError where it goes on failing."""
    for pause in PAUSES:
        try:
            return read()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError:
            time.sleep(pause)
    return read()


def _files(folder: Path) -> Iterable[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def _render(body: dict[str, Any]) -> str:
    digest = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    return json.dumps({**body, "hash": digest}, indent=1) + "\n"


def _libraries() -> dict[str, str]:
    names = ("torch", "megatron-core", "numpy")
    return {"python": platform.python_version(), "megatron-mixcpt": __version__} | {n: version(n) for n in names}
