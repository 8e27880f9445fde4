"""Low-rank factors of a delta, with the error told; and folders of adapters written layer by layer.

    D ~ B A     B [out, r], A [r, in]     of least |D - B A|_F for a rank r (Eckart, Young 1936)

A product of factors B A of a rank R below its sides is never multiplied out: with B = Q1 R1 and
A^T = Q2 R2 its singular values are those of the R x R matrix R1 R2^T. A dense D goes through the
eigenvectors of D D^T (or D^T D, the smaller one), summed in float64; B A = U U^T D is the best one
for any orthonormal U that spans the leading directions. `randomized` finds that span from a few
products with D (subspace iteration; Halko, Martinsson, Tropp 2011, arXiv 0909.4061), started from
signs that the Philox stream draws.

The error told is |D - B A|_F of the factors as they are stored, measured and not estimated.

Layers are independent, so threads take one each; each computes on one thread, and the factors have
the same bits for any number of threads (on one machine: another BLAS may differ in last bits).
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from cl_fast import options
from cl_fast.checkpoints.adapters import CONFIG_NAME, PREFIX, WEIGHTS_NAME, config_text
from cl_fast.checkpoints.remote import check_url, is_url
from cl_fast.checkpoints.safetensors import DTYPE_BITS, TensorInfo, build_header
from cl_fast.errors import OutputError
from cl_fast.merging.journal import WorkLock
from cl_fast.merging.output import OutputFolder, sync_tree, write_failure
from cl_fast.ops import keep_mask
from cl_fast.ops.streams import stream_key

if TYPE_CHECKING:
    from cl_fast.merging.sources import Source

__all__ = [
    "AdapterWriter",
    "Rank",
    "Svd",
    "any_dtype",
    "frobenius",
    "layer_by_layer",
    "product_error",
    "torch_load",
    "torch_read",
    "truncate",
    "truncate_product",
]

Svd: TypeAlias = Literal["auto", "exact", "randomized"]
Item = TypeVar("Item")
Result = TypeVar("Result")

_OVERSAMPLE = 16
_ITERATIONS = 4
_BLOCK = 1 << 22
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_OTHERS = {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Rank:
    """How many directions are kept.

    rank: so many; or energy: as few as hold this part of |D|_F^2, at most `most`.
    """

    rank: int | None = None
    energy: float | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("give either rank or energy")
        if self.rank is not None:
            options.at_least("rank", self.rank, 1)
            if self.most is not None:
                raise ValueError("max_rank goes with energy; rank is a number already")
        if self.energy is not None:
            options.share("energy", self.energy)
            if self.energy == 0:
                raise ValueError("energy must be above 0; got 0")
        if self.most is not None:
            options.at_least("max_rank", self.most, 1)

    @property
    def bound(self) -> int | None:
        """No more than this, or None."""
        return self.rank if self.rank is not None else self.most

    def choose(self, squares: Tensor, total: float) -> int:
        """How many, of squared singular values in falling order with this sum over all."""
        count = int((squares > squares[0] * 2.0**-90).sum()) if len(squares) else 0
        if self.rank is not None:
            return max(1, min(self.rank, count))
        assert self.energy is not None
        reached = squares[:count].cumsum(0) >= self.energy * total * (1 - 2.0**-40)
        needed = int(reached.float().argmax()) + 1 if bool(reached.any()) else count
        return max(1, min(needed, count, self.most or needed))


def frobenius(x: Tensor) -> float:
    """|x|_F, summed in float64."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in x.split(_rows(x))))


def _rows(x: Tensor) -> int:
    return max(1, _BLOCK // max(1, x[0].numel())) if len(x) else 1


def product_error(
    b: Tensor, a: Tensor, other_b: Tensor | None = None, other_a: Tensor | None = None
) -> float:
    """|B A - B' A'|_F of factors, in float64; |B A|_F without the second pair."""
    left, right = b.double(), a.double()
    if other_b is not None and other_a is not None:
        left = torch.cat([left, -other_b.double()], 1)
        right = torch.cat([right, other_a.double()], 0)
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return frobenius(left @ right)
    core = torch.linalg.qr(left)[1] @ torch.linalg.qr(right.t())[1].t()
    return float(torch.linalg.matrix_norm(core))


def truncate_product(b: Tensor, a: Tensor, rank: Rank) -> tuple[Tensor, Tensor]:
    """The best factors of a smaller rank for the product B A.

    Args:
        b, a: [out, R] and [R, in], of any floating type.
        rank: how many directions are kept.

    Returns:
        B' [out, r] and A' [r, in] in float64, each with the roots of the singular values.
    """
    b, a = b.double(), a.double()
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        return truncate(b @ a, rank, "exact")
    left, down = torch.linalg.qr(b)
    right, across = torch.linalg.qr(a.t())
    u, sigma, vh = torch.linalg.svd(down @ across.t())
    squares = sigma.square()
    r = rank.choose(squares, float(squares.sum()))
    root = sigma[:r].sqrt()
    return left @ (u[:, :r] * root), (root[:, None] * vh[:r]) @ right.t()


def truncate(
    delta: Tensor, rank: Rank, svd: Svd = "auto", *, seed: int = 0, name: str = ""
) -> tuple[Tensor, Tensor]:
    """The best factors, or nearly so, of a dense delta.

    Args:
        delta: [out, in], of a floating type.
        rank: how many directions are kept.
        svd: "exact"; "randomized", which needs a bound on the rank; "auto": randomized where that
            bound is below an eighth of the sides.
        seed, name: of the random start.

    Returns:
        B [out, r] and A [r, in] in float64.

    Raises:
        ValueError: randomized without a bound.
    """
    short = min(delta.shape)
    if svd == "auto":
        small = rank.rank is not None and 8 * (rank.rank + _OVERSAMPLE) < short
        svd = "randomized" if small else "exact"
    flipped = delta.shape[0] > delta.shape[1]
    d = delta.t() if flipped else delta
    if svd == "exact":
        basis, squares = _leading(d)
        total = float(squares.sum())
    else:
        if rank.bound is None:
            raise ValueError("svd='randomized' needs rank or max_rank")
        basis, squares = _randomized(d, min(short, rank.bound + _OVERSAMPLE), seed, name)
        total = frobenius(delta) ** 2
    r = rank.choose(squares, total)
    basis = basis[:, :r]
    root = squares[:r].sqrt().sqrt().clamp_min(1e-150)
    left, right = basis * root, _times(basis.t() / root[:, None], d)
    return (right.t(), left.t()) if flipped else (left, right)


def _leading(d: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and squared singular values of [m, n], in falling order."""
    gram = torch.zeros(d.shape[0], d.shape[0], dtype=torch.float64)
    step = max(1, _BLOCK // max(1, d.shape[0]))
    for part in d.split(step, 1):
        wide = part.double()
        gram += wide @ wide.t()
    squares, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), squares.flip(0).clamp_min(0)


def _times(left: Tensor, d: Tensor) -> Tensor:
    step = max(1, _BLOCK // max(1, d.shape[0]))
    return torch.cat([left @ part.double() for part in d.split(step, 1)], 1)


def _randomized(d: Tensor, size: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    n = d.shape[1]
    key = stream_key(seed, "truncate", name)
    signs = keep_mask(key, n * size, 1 << 31).reshape(n, size)
    wide = d.float()
    y = wide @ (signs.float() * 2 - 1)
    for _ in range(_ITERATIONS):
        q, _ = torch.linalg.qr(y)
        q, _ = torch.linalg.qr(wide.t() @ q)
        y = wide @ q
    q, _ = torch.linalg.qr(y.double())
    inner, squares = _leading(_times(q.t(), d))
    return q @ inner, squares


# Layers by threads.


def layer_by_layer(
    items: Iterable[Item], work: Callable[[Item], Result], threads: int | None
) -> Iterator[Result]:
    """`work` of each item, in order, by `threads` workers that compute on one thread each."""
    before = torch.get_num_threads()
    count = threads or _cores()
    waiting: deque[Future[Result]] = deque()
    try:
        with ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1)) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(work, item))
                    if len(waiting) > count:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    asked = os.environ.get("CL_FAST_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def any_dtype(name: str) -> torch.dtype:
    """The dtype that a safetensors name means, integers too."""
    from cl_fast.merging.executors import torch_dtype

    return _OTHERS[name] if name in _OTHERS else torch_dtype(name)


def torch_read(info: TensorInfo) -> Tensor:
    """A stored tensor."""
    from cl_fast.merging.sources import Source

    return torch_load(Source.of(info), *info.shape)


def torch_load(source: Source, *shape: int) -> Tensor:
    """A source as a tensor of `shape`."""
    from cl_fast.merging.executors import read_stored

    dtype = any_dtype(source.dtype)
    if not source.nbytes:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(read_stored(source), dtype=dtype).reshape(shape)


# Writing.


class AdapterWriter:
    """The folder of an adapter, filled layer by layer out of sight and moved in when it is whole.

    What is added goes to disk at once; the header is written when all is known.

    Raises:
        OutputError: the output exists (and not `overwrite`), or cannot be written.
    """

    def __init__(self, output: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        text = os.fspath(output)
        if is_url(text):
            check_url(text, OutputError)
            raise OutputError(
                f"{text}: an adapter is written to a folder of this machine; give a path, and "
                "copy the folder to the URL"
            )
        # As that of a merge, but not the same: an unfinished merge of that name is left alone.
        self._folder = OutputFolder(output)
        self._folder.work = self._folder.path.with_name(f".{self._folder.path.name}.cl_fast-lora")
        self._folder.model = self._folder.work / "model"
        self._folder.replaced = self._folder.work / "replaced"
        self.path = self._folder.path
        self._overwrite = overwrite
        self._entries: list[tuple[str, str, tuple[int, ...], int]] = []
        self._lock = WorkLock(self._folder.work, self.path)
        self._folder.create()
        self._lock.acquire()
        try:
            self._folder.recover()
            self._folder.check((), overwrite=overwrite)
            self._folder.clear()
            self._data = (self._folder.work / "data").open("w+b")
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError) and not isinstance(error, OutputError):
                raise self._failed(error) from error
            raise

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()
        self._discard()

    def _discard(self) -> None:
        self._folder.recover()
        self._folder.discard()
        self._lock.release()

    def _failed(self, error: OSError) -> OutputError:
        return write_failure(self.path, error)

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor, under the name that it has in the model (without PEFT's prefix)."""
        tensor = tensor.detach().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        self._append(name, _NAMES[tensor.dtype], tuple(tensor.shape), memoryview(data))

    def copy(self, name: str, info: TensorInfo) -> None:
        """A stored tensor, byte for byte."""
        from cl_fast.merging.executors import read_stored
        from cl_fast.merging.sources import Source

        data = memoryview(read_stored(Source.of(info)))
        self._append(name, info.dtype, tuple(info.shape), data)

    def _append(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        try:
            self._entries.append((PREFIX + name, dtype, shape, self._data.tell()))
            self._data.write(data)
        except OSError as error:
            raise self._failed(error) from error

    def finish(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Writes config and weights, and moves the folder in."""
        order = sorted(self._entries, key=lambda entry: (-DTYPE_BITS[entry[1]], entry[0]))
        words = {
            key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            for key, value in metadata.items()
        }
        header, _, size = build_header(
            [(name, dtype, shape) for name, dtype, shape, _ in order], {"format": "pt", **words}
        )
        ready = self._folder.model
        try:
            ready.mkdir()
            with (ready / WEIGHTS_NAME).open("wb") as file:
                file.write(header)
                for _, dtype, shape, start in order:
                    left = (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
                    self._data.seek(start)
                    while left:
                        piece = self._data.read(min(left, 4 << 20))
                        file.write(piece)
                        left -= len(piece)
                assert file.tell() == size
            (ready / CONFIG_NAME).write_bytes(config_text(config))
            sync_tree(ready)
            self._folder.publish(overwrite=self._overwrite, fsync=True)
        except OSError as error:
            raise self._failed(error) from error
