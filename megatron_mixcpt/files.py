"""Files and directories that are there whole or not at all: written beside, flushed, renamed.

Whoever reads sees what was there before or all of the new; a process that dies, at any moment, leaves nothing half
under a name. What cannot be written is said by the name of what was being written.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mixcpt.errors import ConfigError, MixcptError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what writing alone can end with
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)

MADE = "mixcpt.json"  # in a directory: what it was made of
PROBE = 65536  # bytes that a folder must have room for


class WriteError(MixcptError):
    """A file or directory could not be written; what was there under its name before still is."""


@contextmanager
def writing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when the block ends without an error, and nothing when it does not.

    One process at a time may write a path. Missing folders are made.

    Args:
        durable: on disk before it appears. False for what is checked against a hash before it is used.

    Raises:
        WriteError: there is no room, or no permission.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with _told_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _removed(temporary):
            with open(temporary, "wb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write all of a small file, or leave what is there, as `writing`. Returns `path`."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


def write_json(path: Path, value: Any) -> Path:
    """`write_whole` of a value as JSON for people to read."""
    return write_whole(path, json.dumps(value, indent=2) + "\n")


def claim(out: Path) -> None:
    """Make an empty output directory. Raises ConfigError where there is something in it, WriteError where it cannot."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: choose another --out or remove it")
    with _told_of(out):
        out.mkdir(parents=True, exist_ok=True)


def check_writable(folder: Path) -> None:
    """Make `folder` and try to write in it, before hours go into what it is to hold. Raises WriteError."""
    with _told_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE))


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block ends without an error; else nothing of it stays.

    Raises:
        ConfigError: there is something at `out` already.
        WriteError: there is no room, or no permission.
    """
    empty = out.is_dir()
    claim(out)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        with _told_of(out), _removed(partial):
            partial.mkdir()
            yield partial
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            os.replace(partial, out)
            sync(out.parent)
    except BaseException:
        if not empty:
            out.rmdir()
        raise


def record_made(out: Path, made: dict[str, Any]) -> None:
    """Write down in `out` what it was made of, for `is_made`."""
    write_json(out / MADE, made)


def is_made(out: Path, made: dict[str, Any]) -> bool:
    """Whether `out` holds just that already, so that a chain that is started again need not make it again."""
    try:
        return json.loads((out / MADE).read_text()) == made
    except (OSError, ValueError):
        return False


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: OSError) -> str:
    """In words what the system said, and what to do where a disk is full."""
    full = "; free some space and run the same command again" if error.errno in FULL else ""
    return f"{error.strerror or error}{full}"


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Errors of writing name `path`, also where a library wrapped them; those of reading something else pass."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and _of_writing(cause, path):
                raise WriteError(f"{path}: cannot be written: {reason(cause)}") from error
            cause = cause.__cause__ or cause.__context__
        raise


def _of_writing(error: OSError, path: Path) -> bool:
    """Whether there was no room, or no permission for `path` (aside) or a folder above it."""
    if error.errno in FULL or not isinstance(error.filename, str | bytes | os.PathLike):
        return error.errno in FULL
    name = Path(os.fsdecode(error.filename))
    return error.errno in FORBIDDEN and (name in path.parents or name.name.startswith(path.name))


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    """`path` goes where the block fails."""
    try:
        yield
    except BaseException:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        raise
