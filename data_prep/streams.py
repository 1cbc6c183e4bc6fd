"""Bytes of input files as lines: plain, gzip (several members) and zstandard (several frames), in bounded memory."""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mixcpt.errors import MixcptError

BLOCK_BYTES = 1 << 20
READ_BYTES = 1 << 14  # of compressed data: it may unpack to a hundred times as much
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
    make, inflate = (_gzip_state, _gzip_inflate) if method == "gzip" else (_zstd_state, _zstd_inflate)
    with open(path, "rb") as file:
        state, started, more = make(), False, False
        while data := file.read(READ_BYTES):
            while more or (data and (started or data.strip(b"\0"))):  # zeros after the last member are padding
                started = True
                try:
                    block, data = inflate(state, data)
                except Exception as error:  # zlib.error, zstandard.ZstdError
                    raise MixcptError(f"{path} is damaged ({error}); fetch it again") from None
                more = len(block) >= BLOCK_BYTES  # there may be output left although all input is used
                if block:
                    yield block
                if state.eof:
                    data, state, started, more = state.unused_data, make(), False, False
        if started:
            raise MixcptError(f"{path} ends in the middle of its {method} data; fetch it again")


def _gzip_state() -> Any:
    return zlib.decompressobj(wbits=31)


def _gzip_inflate(state: Any, data: bytes) -> tuple[bytes, bytes]:
    """At most one block of output, and the input not yet used."""
    return state.decompress(data, BLOCK_BYTES), state.unconsumed_tail


def _zstd_state() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()


def _zstd_inflate(state: Any, data: bytes) -> tuple[bytes, bytes]:
    return state.decompress(data), b""  # it cannot be told to stop early, hence the small READ_BYTES


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


def cut_at_lines(blocks: Iterable[bytes], target: int, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Cut a stream after the last line end in each `target` bytes of it: (size, line ends, bytes) of each part, without
    the bytes where there are more than `limit`."""
    held, size, lines = bytearray(), 0, 0

    def hold(piece: bytearray) -> None:
        nonlocal size, lines
        size, lines = size + len(piece), lines + piece.count(b"\n")
        if size > limit:
            held.clear()
        else:
            held.extend(piece)

    for block in _of_size(blocks, target):
        end = block.rfind(b"\n") + 1
        if end:
            hold(block[:end])
            yield size, lines, bytes(held) if size <= limit else None
            size = lines = 0
            held.clear()
        hold(block[end:])
    if size:
        yield size, lines, bytes(held) if size <= limit else None


def _of_size(blocks: Iterable[bytes], size: int) -> Iterator[bytearray]:
    """The same bytes in blocks of `size`, but for the last."""
    block = bytearray()
    for piece in blocks:
        block += piece
        while len(block) >= size:
            yield block[:size]
            del block[:size]
    if block:
        yield block
