"""Bytes of input files as lines: plain, gzip (several members) and zstandard (several frames), in bounded memory."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mixcpt.errors import MixcptError

BLOCK_BYTES = 1 << 20
UTF8_BOM = b"\xef\xbb\xbf"


def compression(path: Path) -> str | None:
    """'gzip', 'zstd' or None, by the first bytes of the file and not by its name."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "zstd" if head == b"\x28\xb5\x2f\xfd" else None


def raw_blocks(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    """The bytes [begin, end) of an open file."""
    file.seek(begin)
    left = end - begin
    while left:
        block = file.read(min(BLOCK_BYTES, left))
        if not block:
            raise MixcptError(f"{file.name} became shorter while it was read; run the same command again")
        left -= len(block)
        yield block


def decompressed_blocks(path: Path, method: str) -> Iterator[bytes]:
    """The decompressed bytes of a whole file. Raises MixcptError if it is damaged or ends early: nothing is dropped."""
    make = _decompressor(method)
    with open(path, "rb") as file:
        state, started = make(), False
        while data := file.read(BLOCK_BYTES // 4):
            while data:
                if not started and not data.strip(b"\0"):
                    data = b""  # padding after the last member
                    break
                started = True
                try:
                    block = state.decompress(data)
                except Exception as error:  # zlib.error, zstandard.ZstdError
                    raise MixcptError(f"{path} is damaged ({error}); fetch it again") from None
                if block:
                    yield block
                data = b""
                if state.eof:
                    data, state, started = state.unused_data, make(), False
        if started:
            raise MixcptError(f"{path} ends in the middle of its {method} data; fetch it again")


def _decompressor(method: str) -> Callable[[], Any]:
    if method == "gzip":
        return lambda: zlib.decompressobj(wbits=31)
    import zstandard

    return lambda: zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()


def split_lines(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes | int]:
    """Lines without their newline. A line longer than `max_bytes` is not held: its length comes instead."""
    carry = b""
    dropped = 0  # bytes of an over-long line that were let go
    for block in blocks:
        lines = (carry + block).split(b"\n")
        carry = lines.pop()
        if dropped and lines:
            yield dropped + len(lines[0])
            dropped, lines = 0, lines[1:]
        for line in lines:
            yield line if len(line) <= max_bytes else len(line)
        if dropped or len(carry) > max_bytes:
            dropped += len(carry)
            carry = b""
    if dropped:
        yield dropped
    elif carry:
        yield carry
