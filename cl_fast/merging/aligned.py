"""A matrix with one row per token, put in the order of another vocabulary.

    out[i] = inputs[k][r]                 a row of the model itself, or of another
             0, or a mean of rows         where no model has one, or several have

The core gathers the rows tile by tile while it merges, and no aligned matrix is ever whole; where
it cannot (rows of several types, rows that are made themselves, the eager reference) numpy makes
the matrix from the mapped files. The rows that no input has come from numpy in both cases, so the
bytes are the same.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.errors import CheckpointError
from cl_fast.merging.checksum import crc64_of_file
from cl_fast.merging.sources import Fetched, Made, Packed, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["GROUP", "MEAN", "ROW", "SHIFT", "ZERO", "Aligned"]

# What an output row is: `source << SHIFT | row`, or one of these, or a mean of some (below them).
SHIFT = 40
ROW = (1 << SHIFT) - 1
ZERO = -1
MEAN = -2
GROUP = -3  # and below: group 0, 1, ...

_BLOCK = 4 << 20  # bytes of output made in one go


@dataclass(frozen=True, slots=True)
class Aligned(Made):
    """A matrix of one row per token, in the order of the output's vocabulary.

    Attributes:
        rows, width: its shape.
        inputs: what its rows come from, all of ``width`` elements a row.
        codes: for every row an int64: ``k << 40 | r`` is row r of ``inputs[k]``; -1 zero; -2 the
            mean of all rows that are not -2; -3 - g the mean of ``groups[g]``.
        groups: codes of rows.

    Means are sums in float64 in the order of the rows, divided, rounded to float32 and then to
    ``dtype``.
    """

    rows: int
    width: int
    inputs: tuple[Source, ...]
    codes: bytes = field(repr=False)
    groups: tuple[tuple[int, ...], ...]

    @property
    def stored(self) -> int:
        """About what is read: a row for a row."""
        return self.nbytes

    @property
    def memory(self) -> int:
        """Itself, inputs that must be made, and blocks; stored inputs are mapped, not read."""
        inner = sum(source.memory for source in self.inputs if isinstance(source, Made))
        return self.nbytes + inner + 3 * _BLOCK + 16 * self.width

    @property
    def streamed(self) -> bool:
        """Whether all rows are stored, in this type; the core then gathers them tile by tile."""
        return all(
            not isinstance(source, Made) and source.crc64 is None and source.dtype == self.dtype
            for source in self.inputs
            if source.nbytes
        )

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0

    def tables(self) -> list[tuple[Source, int]]:
        """The inputs, and how many rows each has; of a streamed one."""
        size = max(1, self.row_bytes)
        return [(source, source.nbytes // size) for source in self.inputs]

    def made_rows(self) -> bytes:
        """The rows that no input has: zeros, the mean of all, the means of the groups."""
        if not self.groups and not _holds(self.codes, MEAN):
            return bytes(self.row_bytes)
        import numpy as np

        return _Gather(self, np.frombuffer(self.codes, "<i8"), None).made().tobytes()

    def make(self, threads: int | None = None) -> bytearray:
        """The aligned rows.

        Raises:
            CheckpointError: a file ended early, or is not what a packed delta says.
        """
        import numpy as np

        codes = np.frombuffer(self.codes, "<i8")
        gather = _Gather(self, codes, threads)
        data = bytearray(self.nbytes)
        out = np.frombuffer(data, _ITEM[self.dtype]).reshape(self.rows, self.width)
        for start in range(0, self.rows, gather.step):
            gather.fill(out[start : start + gather.step], codes[start : start + gather.step])
        if (codes < 0).any():
            out[codes < 0] = gather.made()[-1 - codes[codes < 0]]
        return data


def _holds(codes: bytes, code: int) -> bool:
    """Whether a code is among them."""
    listed = array("q", codes)
    if sys.byteorder == "big":
        listed.byteswap()
    return code in listed


class _Gather:
    """The rows of an aligned matrix, from the mapped inputs."""

    def __init__(self, aligned: Aligned, codes: NDArray[np.int64], threads: int | None) -> None:
        self._aligned, self._codes = aligned, codes
        self._kinds = [source.dtype for source in aligned.inputs]
        self._tables = [_table(source, aligned.width, threads) for source in aligned.inputs]
        self.step = max(1, _BLOCK // max(1, aligned.row_bytes))

    def fill(self, out: NDArray[Any], codes: NDArray[np.int64]) -> None:
        """Fills the rows of a block that are single rows of an input."""
        _gather(out, codes, self._tables, self._kinds, self._aligned)

    def made(self) -> NDArray[Any]:
        """Row -1 - code for every code below 0."""
        import numpy as np

        aligned, codes = self._aligned, self._codes
        out = np.zeros((2 + len(aligned.groups), aligned.width), _ITEM[aligned.dtype])
        for row, group in zip(out[2:], aligned.groups, strict=True):
            total = np.zeros(aligned.width)
            for code in group:
                k = code >> SHIFT
                total += _widen(self._tables[k][code & ROW], self._kinds[k])
            row[:] = _narrow((total / len(group)).astype(np.float32), aligned.dtype)
        if not (codes == MEAN).any():
            return out
        total, counted = np.zeros(aligned.width), 0
        for start in range(0, aligned.rows, self.step):
            part = codes[start : start + self.step]
            part = part[part != MEAN]
            block = np.empty((len(part), aligned.width), out.dtype)
            self.fill(block, part)
            block[part < 0] = out[-1 - part[part < 0]]
            # row after row, whatever the size of the blocks
            wide = _widen(block, aligned.dtype).astype(np.float64)
            total = np.add.reduce(np.concatenate((total[None], wide)), axis=0)
            counted += len(part)
        out[1] = _narrow((total / max(1, counted)).astype(np.float32), aligned.dtype)
        return out


_ITEM = {"F32": "<u4", "BF16": "<u2", "F16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}


def _table(source: Source, width: int, threads: int | None) -> NDArray[Any]:
    """The stored rows, mapped; those of a made source, made."""
    import numpy as np

    item = np.dtype(_ITEM[source.dtype])
    rows = source.nbytes // (item.itemsize * width) if width else 0
    if not source.nbytes:
        return np.zeros((rows, width), item)
    _check(source)
    if isinstance(source, Made):
        return np.frombuffer(source.make(threads), item).reshape(rows, width)
    size = Path(source.path).stat().st_size
    if source.offset + source.nbytes > size:
        raise CheckpointError(
            f"{source.path}: ended after {max(0, size - source.offset)} of {source.nbytes} bytes "
            f"of a tensor at offset {source.offset}; the file is truncated or was changed while "
            "it was read"
        )
    return np.memmap(source.path, item, "r", source.offset, (rows, width))


def _check(source: Source) -> None:
    """Compares what a packed delta says of a tensor with it. Raises CheckpointError."""
    told = source.base if isinstance(source, Packed) else source
    if told.crc64 is None or (isinstance(told, Made) and not isinstance(told, Fetched)):
        return
    found = crc64_of_file(told.path, told.offset, told.nbytes)
    if found != told.crc64:
        raise CheckpointError(
            f"{told.path}: a tensor at offset {told.offset} is not what the packed delta "
            f"{source.path} was made from (checksum {found:016x}, it says {told.crc64:016x}); give "
            "the base that it was packed on"
        )


def _gather(
    out: NDArray[Any],
    codes: NDArray[np.int64],
    tables: Sequence[NDArray[Any]],
    kinds: Sequence[str],
    aligned: Aligned,
) -> None:
    """Fills the rows of a block that are single rows of an input."""
    import numpy as np

    owners = np.where(codes >= 0, codes >> SHIFT, -1)
    rows = codes & ROW
    for owner in np.unique(owners[owners >= 0]):
        table, kind = tables[owner], kinds[owner]
        whole = bool((owners == owner).all())
        at = slice(None) if whole else np.flatnonzero(owners == owner)
        wanted = rows[at]
        first, count = int(wanted[0]), len(wanted)
        if wanted[-1] - first == count - 1 and bool((np.diff(wanted) == 1).all()):
            found = table[first : first + count]
        elif whole and kind == aligned.dtype:
            np.take(table, wanted, axis=0, out=out, mode="clip")
            continue
        else:
            found = np.take(table, wanted, axis=0)
        out[at] = found if kind == aligned.dtype else _narrow(_widen(found, kind), aligned.dtype)


def _widen(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored values as float32; exact."""
    import numpy as np

    if dtype == "F32":
        return np.ascontiguousarray(values).view(np.float32)
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F16":
        return np.ascontiguousarray(values).view(np.float16).astype(np.float32)
    if dtype == "F8_E5M2":
        return (values.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
    widened: NDArray[np.float32] = _e4m3()[values]
    return widened


def _e4m3() -> NDArray[np.float32]:
    import numpy as np

    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    small = mantissa * 2.0**-9
    value = np.where(exponent == 0, small, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


def _narrow(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 rounded to nearest even as the stored bits of a type."""
    import numpy as np

    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
