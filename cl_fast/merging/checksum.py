"""CRC-64/NVME of tensor bytes: what the journal and the manifest of a merge record.

The polynomial is 0xAD93D23594C93659, bits reflected, start and final xor all ones; the check
value of ``b"123456789"`` is 0xAE8B14860A799888. A CRC is used because the core computes it at
memory speed while the bytes are in cache anyway, and because CRCs of neighbouring pieces combine:
``crc(A + B) = crc(A) * x^(8 len(B)) + crc(B)`` modulo the polynomial, so tiles may finish in any
order. It finds damage; it is not a signature against somebody who wants to deceive.

Three implementations of the one function: the native core, a table for a byte at a time, and, for
large buffers without the native core, many lanes side by side in torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["combine", "crc64", "crc64_eager", "crc64_of_file"]

_POLY = 0x9A6C9329AC4BC9B5  # 0xAD93D23594C93659 with its bits reflected
_ONES = 0xFFFFFFFFFFFFFFFF
_PIECE = 8 << 20  # bytes of a file read at a time
_FETCHED = 64 << 20  # of a URL: several requests side by side
_LANES_FROM = 4096  # below this many bytes the table is faster than setting up lanes

_table: list[int] = []


def _byte_table() -> list[int]:
    if not _table:
        for byte in range(256):
            value = byte
            for _ in range(8):
                value = (value >> 1) ^ _POLY if value & 1 else value >> 1
            _table.append(value)
    return _table


def _multiply(a: int, b: int) -> int:
    """a * b modulo the polynomial, in the reflected representation (bit 63 is x^0)."""
    product = 0
    bit = 1 << 63
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLY if b & 1 else b >> 1
    return product


def _power(n_bytes: int) -> int:
    """x^(8 n_bytes) modulo the polynomial: the factor that n_bytes more bytes apply to a CRC."""
    factor = 1 << 63
    square = 1 << 55  # x^8
    while n_bytes:
        if n_bytes & 1:
            factor = _multiply(square, factor)
        square = _multiply(square, square)
        n_bytes >>= 1
    return factor


def combine(a: int, b: int, len_b: int) -> int:
    """CRC of a concatenation, from the CRCs of its two parts and the second one's length."""
    return _multiply(_power(len_b), a) ^ b


def crc64(buffer: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC-64/NVME of `buffer`, continuing from `crc` (0 to start).

    Takes any contiguous buffer; returns an int in [0, 2**64). Uses the native core when it is
    there; otherwise `crc64_eager`.
    """
    from cl_fast.backends import native

    core = native.load()
    if core is not None:
        return int(core.crc64(buffer, crc))
    return crc64_eager(buffer, crc)


def crc64_of_file(path: str | os.PathLike[str], offset: int, nbytes: int) -> int:
    """CRC-64/NVME of `nbytes` bytes at `offset` of a file (or at a URL), read in pieces.

    Raises EOFError, with the number of bytes that were there, when the file ends before.
    """
    if isinstance(path, str) and "://" in path:
        from cl_fast.checkpoints.remote import fetch

        crc = 0
        for start in range(0, nbytes, _FETCHED):
            crc = crc64(fetch(path, offset + start, min(_FETCHED, nbytes - start)), crc)
        return crc
    buffer = memoryview(bytearray(min(nbytes, _PIECE)))
    crc = done = 0
    with Path(path).open("rb", buffering=0) as file:
        file.seek(offset)
        while done < nbytes:
            got = file.readinto(buffer[: min(_PIECE, nbytes - done)])
            if not got:
                raise EOFError(done)
            crc = crc64(buffer[:got], crc)
            done += got
    return crc


def crc64_eager(buffer: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """`crc64` without the native core; needs torch from 4096 bytes on."""
    view = memoryview(buffer).cast("B")
    start = 0
    for lanes in (1 << 16, 1 << 8):
        per_lane = (len(view) - start) // (lanes * 8) * 8
        if len(view) - start >= max(_LANES_FROM, lanes * 64):
            part = view[start : start + lanes * per_lane]
            crc = combine(crc, _lanes(part, lanes, per_lane), len(part))
            start += len(part)
    table = _byte_table()
    crc ^= _ONES
    for byte in view[start:]:
        crc = table[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ _ONES


def _lanes(view: memoryview, lanes: int, per_lane: int) -> int:
    """CRC of `lanes` stretches of `per_lane` bytes (a multiple of 8), all advanced together."""
    import torch

    def signed(values: list[int]) -> torch.Tensor:
        return torch.tensor([v - (1 << 64) if v >> 63 else v for v in values], dtype=torch.int64)

    # Eight bytes a step: table[j][b] is byte b followed by j zero bytes.
    tables = [_byte_table()]
    for _ in range(7):
        tables.append([tables[0][v & 255] ^ (v >> 8) for v in tables[-1]])
    lookups = [signed(tables[7 - position]) for position in range(8)]
    words = torch.frombuffer(bytearray(view), dtype=torch.int64).view(lanes, -1).t().contiguous()
    state = torch.full((lanes,), -1, dtype=torch.int64)
    for step in range(per_lane // 8):
        state = state ^ words[step]
        following = lookups[0][state & 255]
        for position in range(1, 8):
            following ^= lookups[position][(state >> (8 * position)) & 255]
        state = following
    state = ~state
    length = per_lane
    while state.numel() > 1:
        factor = _power(length)
        columns = signed([_multiply(factor, 1 << bit) for bit in range(64)])
        left, right = state[0::2], state[1::2].clone()
        for bit in range(64):
            right ^= -((left >> bit) & 1) & columns[bit]
        state = right
        length *= 2
    return int(state[0]) & _ONES
