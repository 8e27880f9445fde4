"""What one read of a base b and of models x_k tells about the task vectors d_k = x_k - b.

    products    <v_i, v_j> for v = (b, d_1, ..., d_K), i <= j     absolute    sum |v_i|
    largest     max |b|, |x_k|, |d_k|                             changed     elements with d_k != 0
    overlap     elements that two models change                   conflicts   ... with unlike signs
    shared      elements that two or more models change           disputed    ... with unlike signs
    bins        sampled |d_k| in eighths of a power of two        rows        those that moved most

d_k is rounded to float32 once. What is not finite in the base or in a model counts as unchanged.
The C++ core reads tiles through the page cache; `eager` is the same in plain torch, one whole
tensor at a time: equal counts, sums that differ in their last bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from cl_fast.errors import CheckpointError, OutputError
from cl_fast.merging.sources import Made, Source

if TYPE_CHECKING:
    import torch

__all__ = [
    "BIN_SHIFT",
    "MOST_ROWS",
    "SAMPLE_ALL",
    "Sums",
    "Surveyed",
    "bin_edge",
    "pair_index",
    "survey",
]

BIN_SHIFT = 20
"""Of a float32 code: eight bins per power of two."""
SAMPLE_ALL = 65536
"""Tensors of up to so many elements are not sampled; of larger ones 16 elements in 512 are."""
MOST_ROWS = 8
"""Rows that are told per tensor and model."""

_ROW = range(64, 131_073)  # widths whose rows are looked at one by one
_PIECE, _RUN, _WIDTH = 1024, 512, 16
_CHUNK = 1 << 22  # elements that the eager survey widens at a time

Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A tensor to look at. sources: of the base, then of each model, all of `shape`."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def row(self) -> int:
        """Elements in a row; 0 where rows are not looked at."""
        if len(self.shape) < 2 or self.numel == 0 or self.shape[-1] not in _ROW:
            return 0
        return self.shape[-1]


@dataclass(slots=True)
class Sums:
    """What a survey found, of one tensor or of several together. K models; see the module.

    Attributes:
        largest_at: flat index of the largest |b| and |x_k|; -1 where all is zero, or where the
            sums are of several tensors.
        nonfinite: NaN and infinite elements of the base and of each model.
        overlap, conflicts: of the pairs (1, 2), (1, 3), ..., (K - 1, K).
        sampled: elements of each model that `bins` counts.
        bins: per model the first bin and the counts from it on; zeros are not in it.
        rows: per model (row, sum d^2, sum b^2), the largest first.
    """

    elements: int
    products: list[float]
    absolute: list[float]
    largest: list[float]
    largest_at: list[int]
    nonfinite: list[int]
    changed: list[int]
    overlap: list[int]
    conflicts: list[int]
    shared: int
    disputed: int
    sampled: int
    bins: list[tuple[int, list[int]]] = field(default_factory=list)
    rows: list[list[tuple[int, float, float]]] = field(default_factory=list)

    @classmethod
    def empty(cls, models: int) -> Sums:
        pairs = models * (models - 1) // 2
        return cls(
            elements=0,
            products=[0.0] * ((models + 1) * (models + 2) // 2),
            absolute=[0.0] * (models + 1),
            largest=[0.0] * (2 * models + 1),
            largest_at=[-1] * (models + 1),
            nonfinite=[0] * (models + 1),
            changed=[0] * models,
            overlap=[0] * pairs,
            conflicts=[0] * pairs,
            shared=0,
            disputed=0,
            sampled=0,
        )

    def add(self, other: Sums) -> None:
        """Takes in the sums of another tensor; without its bins and rows."""
        self.elements += other.elements
        self.shared += other.shared
        self.disputed += other.disputed
        self.sampled += other.sampled
        self.products = [x + y for x, y in zip(self.products, other.products, strict=True)]
        self.absolute = [x + y for x, y in zip(self.absolute, other.absolute, strict=True)]
        self.largest = [max(x, y) for x, y in zip(self.largest, other.largest, strict=True)]
        for name in ("nonfinite", "changed", "overlap", "conflicts"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, [x + y for x, y in zip(mine, theirs, strict=True)])


def pair_index(i: int, j: int, n: int) -> int:
    """Of i <= j among n vectors in `Sums.products`."""
    return i * n - i * (i - 1) // 2 + (j - i)


def bin_edge(index: int) -> float:
    """The smallest magnitude of a bin."""
    code = index << BIN_SHIFT
    if code >= 0x7F800000:
        return inf
    return ctypes.c_float.from_buffer(ctypes.c_uint32(code)).value


def survey(
    tensors: Sequence[Surveyed],
    *,
    core: ModuleType | None,
    threads: int | None = None,
    io: str = "mmap",
    tick: Tick = lambda _: None,
) -> list[Sums]:
    """The sums of every tensor, in their order.

    Args:
        core: the C++ core; None: plain torch.
        threads: None: the cores of this process. The result is the same for any number.
        io: how the core reads: "mmap", "pread" or "direct".
        tick: called with the bytes read since the last call.

    Raises:
        CheckpointError: a file ended early, or cannot be read.
        OutputError: there is neither the core nor torch.
    """
    if core is not None:
        return _native(core, tensors, threads, io, tick)
    return _eager(tensors, threads, tick)


# --------------------------------------------------------------------------------------- native


def _native(
    core: ModuleType, tensors: Sequence[Surveyed], threads: int | None, io: str, tick: Tick
) -> list[Sums]:
    found: dict[str, Sums] = {}
    plain = [tensor for tensor in tensors if not _made(tensor)]
    for group in (plain, *([tensor] for tensor in tensors if _made(tensor))):
        if group:
            found |= _native_group(core, group, threads, io, tick)
    return [found[tensor.name] for tensor in tensors]


def _native_group(
    core: ModuleType, tensors: Sequence[Surveyed], threads: int | None, io: str, tick: Tick
) -> dict[str, Sums]:
    from cl_fast.backends import native
    from cl_fast.merging.watching import watch

    made = {source: source.make(threads) for tensor in tensors for source in _made(tensor)}
    job = core.Survey(threads=threads or native.threads(), top=MOST_ROWS)
    files: dict[str, tuple[int, int]] = {}

    def place(source: Source) -> tuple[str, int, int, int]:
        if source in made:
            address = ctypes.addressof(ctypes.c_char.from_buffer(made[source]))
            return source.dtype, address, -1, 0
        if source.path not in files:
            files[source.path] = job.file(source.path, io), Path(source.path).stat().st_size
        handle, size = files[source.path]
        if source.offset + source.nbytes > size:
            raise CheckpointError(
                f"{source.path}: ended before a tensor of {source.nbytes} bytes at offset "
                f"{source.offset}; the file is truncated or was changed while it was read"
            )
        return source.dtype, 0, handle, source.offset

    indices = [
        job.add(tensor.numel, tensor.row, [place(source) for source in tensor.sources])
        for tensor in tensors
    ]
    watch(job, job.run, tick, sum(s.stored for tensor in tensors for s in tensor.sources))
    return {
        tensor.name: Sums(elements=tensor.numel, **job.result(index))
        for tensor, index in zip(tensors, indices, strict=True)
    }


def _made(tensor: Surveyed) -> list[Made]:
    return [source for source in tensor.sources if isinstance(source, Made)]


# ---------------------------------------------------------------------------------------- eager


def _eager(tensors: Iterable[Surveyed], threads: int | None, tick: Tick) -> list[Sums]:
    try:
        import torch
    except ImportError as error:
        raise OutputError(
            "nothing can read the tensors: the C++ core is not used, and torch, which the eager "
            "reference needs, is not installed"
        ) from error
    if threads is not None:
        torch.set_num_threads(threads)
    listed = []
    for tensor in tensors:
        listed.append(_eager_one(tensor, threads))
        tick(sum(source.stored for source in tensor.sources))
    return listed


def _eager_one(tensor: Surveyed, threads: int | None) -> Sums:
    import torch

    from cl_fast.merging.executors import read_stored, torch_dtype

    models, n = len(tensor.sources) - 1, tensor.numel
    sums = Sums.empty(models)
    sums.elements = n
    sums.bins, sums.rows = [(0, [])] * models, [[] for _ in range(models)]
    if n == 0:
        return sums
    stored = [
        torch.frombuffer(
            source.make(threads) if isinstance(source, Made) else read_stored(source),
            dtype=torch_dtype(source.dtype),
        )
        for source in tensor.sources
    ]
    bins = torch.zeros(models, 1 << 11, dtype=torch.int64)
    squares = []
    chunk = max(1, _CHUNK // tensor.row) * tensor.row if tensor.row else _CHUNK
    for first in range(0, n, chunk):
        wide = [values[first : first + chunk].float() for values in stored]
        sums.add(_eager_part(wide, first, sums))
        places = _sampled(tensor, first, len(wide[0]))
        sums.sampled += len(places)
        base, finite = wide[0], torch.isfinite(wide[0])
        for k, values in enumerate(wide[1:]):
            delta = _finite(values - base)
            codes = delta[places].abs().view(torch.int32) >> BIN_SHIFT
            bins[k] += torch.bincount(codes, minlength=1 << 11)
            if tensor.row:
                rows = torch.where(finite, base, 0.0).view(-1, tensor.row).double()
                moved = delta.view(-1, tensor.row).double()
                lengths = moved.square().sum(1), rows.square().sum(1)
                squares.append((k, first // tensor.row, *lengths))
    for k in range(models):
        filled = bins[k, 1:].nonzero().reshape(-1)
        if len(filled):
            low, high = int(filled[0]) + 1, int(filled[-1]) + 2
            sums.bins[k] = (low, bins[k, low:high].tolist())
        parts = [(first, d, b) for j, first, d, b in squares if j == k]
        rows_of = [
            (first + row, float(d[row]), float(b[row]))
            for first, d, b in parts
            for row in torch.argsort(d, descending=True, stable=True)[:MOST_ROWS].tolist()
            if d[row] > 0
        ]
        sums.rows[k] = sorted(rows_of, key=lambda row: (-row[1], row[0]))[:MOST_ROWS]
    return sums


def _finite(values: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.where(torch.isfinite(values), values, 0.0)


def _eager_part(wide: list[torch.Tensor], first: int, so_far: Sums) -> Sums:
    """The sums of one part; `so_far.largest_at` is brought up to date."""
    import torch

    models = len(wide) - 1
    sums = Sums.empty(models)
    base = wide[0]
    vectors = [_finite(base), *(_finite(values - base) for values in wide[1:])]
    bad_base = ~torch.isfinite(base)
    sums.nonfinite[0] = int(bad_base.sum())
    double = torch.stack(vectors).double()
    products = double @ double.T
    n = models + 1
    for i in range(n):
        sums.absolute[i] = float(double[i].abs().sum())
        for j in range(i, n):
            sums.products[pair_index(i, j, n)] = float(products[i, j])
        own = _finite(wide[i]).abs()
        sums.largest[i] = float(own.max())
        if sums.largest[i] > so_far.largest[i]:
            so_far.largest_at[i] = first + int(own.argmax())
    signs = [torch.sign(delta).to(torch.int8) for delta in vectors[1:]]
    pair = 0
    for k in range(models):
        sums.largest[n + k] = float(vectors[k + 1].abs().max())
        own_bad = ~torch.isfinite(wide[k + 1])
        overflow = ~torch.isfinite(wide[k + 1] - base) & ~bad_base
        sums.nonfinite[k + 1] = int((own_bad | overflow).sum())
        sums.changed[k] = int((signs[k] != 0).sum())
        for other in range(k + 1, models):
            both = (signs[k] != 0) & (signs[other] != 0)
            sums.overlap[pair] = int(both.sum())
            sums.conflicts[pair] = int((signs[k] * signs[other] < 0).sum())
            pair += 1
    stacked = torch.stack(signs)
    sums.shared = int(((stacked != 0).sum(0) > 1).sum())
    sums.disputed = int(((stacked > 0).any(0) & (stacked < 0).any(0)).sum())
    return sums


def _sampled(tensor: Surveyed, first: int, count: int) -> torch.Tensor:
    """Which of `count` elements from flat index `first` on are in the sample, as the core has it.

    Each row (the whole tensor where there are none) falls into pieces of 1024, each of them into
    runs of 512; of a run that starts at flat index i the sixteen elements from
    16 * (i * 0x9E3779B97F4A7C15 mod 2^64 >> 59) on are taken, as far as they lie in the run.
    """
    import torch

    index = torch.arange(first, first + count)
    if tensor.numel <= SAMPLE_ALL:
        return index - first
    row = tensor.row or tensor.numel
    column = index % row
    in_run = column % _PIECE % _RUN
    start = index - in_run
    place = (start * (0x9E3779B97F4A7C15 - (1 << 64)) >> 59) & 31
    return ((in_run // _WIDTH) == place).nonzero().reshape(-1)
