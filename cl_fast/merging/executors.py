"""Two ways to carry out the tensors of a plan, with the same bytes as result.

NativeExecutor hands a whole shard to the C++ core, which streams tiles through its own threads
while the main thread shows progress and listens for Ctrl-C; memory is bounded by the tiles.
EagerExecutor takes one whole tensor at a time through plain torch (`combine_reference`): slower,
memory of the largest tensor times the number of models, but no compiler needed.

Both return one record per tensor with the CRC-64 of what they read and of what they wrote.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from cl_fast.errors import CheckpointError, NonFiniteError, OutputError
from cl_fast.merging.aligned import Aligned
from cl_fast.merging.checksum import crc64
from cl_fast.merging.description import bytes_text
from cl_fast.merging.journal import TensorRecord
from cl_fast.merging.output import write_all, write_failure
from cl_fast.merging.rules import PART, Blend, Whole, whole_memory
from cl_fast.merging.sources import (
    READ_AHEAD,
    Fetched,
    Made,
    Packed,
    Source,
    made,
    made_whole,
)
from cl_fast.merging.watching import watch
from cl_fast.ops.policy import LONGEST_SCALED_ROW, row_length, selection_counts
from cl_fast.ops.streams import keep_threshold

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cl_fast.merging.plan import Plan, TensorPlan, Term

NOTHING = 0x7FFFFFFF
"""A threshold code that no number exceeds: a model-wide trim that keeps nothing."""

__all__ = [
    "IO_MODES",
    "NAN_POLICIES",
    "CodeRange",
    "Engine",
    "Executor",
    "HasTensors",
    "Io",
    "Nan",
    "ShardJob",
    "SpreadExecutor",
    "make_executor",
    "model_codes",
    "thresholds_by_counts",
]

Io = Literal["auto", "mmap", "pread", "direct"]
Nan = Literal["refuse", "propagate", "zero"]
IO_MODES: tuple[Io, ...] = ("auto", "mmap", "pread", "direct")
NAN_POLICIES: tuple[Nan, ...] = ("refuse", "propagate", "zero")

Tick = Callable[[int], None]
"""Called with the bytes read and written since the last call."""

CodeRange = tuple[int, int, int]
"""Magnitude codes from the first to the second number, in bins of 2**third; empty: not counted."""

_UNCOUNTED: CodeRange = (0, -1, 0)
_HIGH_BITS: CodeRange = (0, 0x7FFFFFFF, 16)


class Executor(Protocol):
    """Carries out tensors of one plan. `codes` are the model-wide thresholds, or None."""

    name: str

    def model_thresholds(self, plan: Plan, tick: Tick) -> list[int]:
        """The threshold code of every term position when the trim spans the whole model."""
        ...

    def write(
        self, tensors: Sequence[TensorPlan], path: Path, codes: Sequence[int] | None, tick: Tick
    ) -> list[TensorRecord]:
        """Computes `tensors` into the existing file `path`, each at its planned offset."""
        ...

    def compute(
        self, tensor: TensorPlan, codes: Sequence[int] | None
    ) -> tuple[bytearray, TensorRecord]:
        """Computes one tensor into memory."""
        ...

    def gram(self, tensors: Sequence[TensorPlan], tick: Tick) -> list[list[float]]:
        """The Gram matrix of the models (or deltas) of each tensor, packed by rows from the
        diagonal on (`cl_fast.ops.blending.unpack_gram`)."""
        ...

    def count_codes(
        self, tensors: Sequence[TensorPlan], ranges: Sequence[CodeRange]
    ) -> list[bytes]:
        """For every term position how many magnitude codes of `tensors` (all combined) lie in each
        bin of its range: uint64 in the machine's order, bin by bin from the lowest; empty for an
        empty range."""
        ...


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A file of weights to fill: its number in the plan, its tensors, its place."""

    number: int
    tensors: tuple[TensorPlan, ...]
    path: Path


class HasTensors(Protocol):
    """A plan, or as much of one as choosing an executor needs."""

    @property
    def tensors(self) -> Sequence[TensorPlan]:
        """What will be carried out."""
        ...


@runtime_checkable
class SpreadExecutor(Executor, Protocol):
    """An executor that works at several files at once, on other machines."""

    def prepare(self, plan: Plan, work: Path, *, fsync: bool) -> None:
        """Called before any work. `work` is the working folder, which exists and is locked.

        Raises OutputError where a machine cannot take part: it does not see `work`, or the inputs.
        """
        ...

    def write_shards(
        self, jobs: Sequence[ShardJob], codes: Sequence[int] | None, tick: Tick
    ) -> Iterator[tuple[int, list[TensorRecord]]]:
        """Fills the existing files and yields number and records of each when it is whole.

        When the iterator is closed, or fails, what was still at work has ended or has been told to.
        """
        ...


class Engine(Protocol):
    """What makes the executor of a run; :func:`make_executor` is the one of this machine."""

    def __call__(
        self,
        plan: Plan,
        *,
        backend: str | None,
        threads: int | None,
        memory: int | None,
        io: Io,
        nan: Nan,
    ) -> Executor:
        """Raises OutputError when it cannot be had."""
        ...


def make_executor(
    plan: HasTensors,
    *,
    backend: str | None,
    threads: int | None,
    memory: int | None,
    io: Io,
    nan: Nan,
) -> Executor:
    """The executor for `backend`: "native", "eager", or None for the faster one that is there.

    Raises OutputError when the backend is not there, has not this policy, or cannot keep within
    `memory`.
    """
    from cl_fast.backends import native, native_or_say, say_once

    core = None
    needs_eager = any(
        tensor.policy.trim_scope == "model" and tensor.policy.rescale == "l1"
        for tensor in plan.tensors
    )
    words = "rescale_by: l1 together with trim_scope: model is served by the eager reference only"
    if not needs_eager and any(
        (tensor.policy.sparsify, tensor.policy.rescale) == ("magprune", "keep_rate")
        and tensor.kind == "combine"
        and row_length(tensor.shape) > LONGEST_SCALED_ROW
        for tensor in plan.tensors
    ):
        needs_eager = True
        words = (
            f"rescale_by: keep_rate of a della method on rows of more than {LONGEST_SCALED_ROW} "
            "elements is served by the eager reference only"
        )
    if backend == "native":
        core = native.load()
        if core is None:
            raise OutputError(f"backend 'native' is not available: {native.reason()}")
        if needs_eager:
            raise OutputError(f"backend 'native' is not available: {words}")
    elif backend is None and needs_eager:
        say_once(f"{words}, which is slower")
    elif backend is None:
        core = native_or_say()
    needs_torch = next((t.rule for t in plan.tensors if isinstance(t.rule, Whole)), None)
    if needs_torch is not None:
        try:
            import torch
        except ImportError as error:
            raise OutputError(
                f"merge_method {needs_torch.name!r} with these settings is carried out by "
                "torch, which is not installed"
            ) from error
        if memory is not None:
            needed, name = max((whole_memory(t, threads), t.name) for t in plan.tensors)
            if needed > memory:
                raise OutputError(
                    f"--memory {bytes_text(memory)} is too little for merge_method "
                    f"{needs_torch.name!r}, which holds whole tensors: {name} needs about "
                    f"{bytes_text(needed)}; give more"
                )
    if core is not None:
        if memory is not None:
            needed, name = max(
                (sum(source.memory for source in made_whole(t)), t.name) for t in plan.tensors
            )
            if needed > memory:
                raise OutputError(
                    f"--memory {bytes_text(memory)} is too little for the edited tensor {name}, "
                    f"which is made whole and needs about {bytes_text(needed)}; give more"
                )
        return NativeExecutor(core, threads=threads, memory=memory, io=io, nan=nan)
    try:
        import torch
    except ImportError as error:
        raise OutputError(
            f"nothing can carry out the merge: {native.reason() or 'backend eager was asked for'}; "
            "and torch, which the eager reference needs, is not installed"
        ) from error
    if io not in ("auto", "pread"):
        raise OutputError(f"--io {io} needs the C++ core; the eager reference reads with pread")
    if memory is not None:
        needed, tensor = max((_eager_bytes(t), t.name) for t in plan.tensors)
        if needed > memory:
            raise OutputError(
                f"--memory {bytes_text(memory)} is too little for the eager reference, which "
                f"holds whole tensors: {tensor} needs about {bytes_text(needed)}; give more, or "
                "install cl_fast with its C++ core"
            )
    if threads is not None:
        torch.set_num_threads(threads)
    return EagerExecutor(nan=nan)


def thresholds_by_counts(
    plan: Plan, count: Callable[[Sequence[CodeRange]], Sequence[Any]]
) -> list[int]:
    """The thresholds of a model-wide trim from histograms of the whole model, in two rounds.

    The first counts the high 15 bits of the codes, the second the low 16 bits inside the bin that
    holds the k-th largest: exact, and only sums travel, so many machines can make a part of each.

    Args:
        plan: with `model_keep`.
        count: the histograms over all tensors of the plan that are combined, as uint64 arrays.
    """
    found = _without_selection(plan)
    active = [code is None for code in found]
    if not any(active):
        return [-1 if code is None else code for code in found]
    high = count([_HIGH_BITS if wanted else _UNCOUNTED for wanted in active])
    bins = [
        _bin_of_rank(high[k], plan.model_keep[k]) if wanted else (0, 0)
        for k, wanted in enumerate(active)
    ]
    low = count(
        [
            (bins[k][0] << 16, bins[k][0] << 16 | 0xFFFF, 0) if wanted else _UNCOUNTED
            for k, wanted in enumerate(active)
        ]
    )
    return [
        bins[k][0] << 16 | _bin_of_rank(low[k], bins[k][1])[0] if code is None else code
        for k, code in enumerate(found)
    ]


def _without_selection(plan: Plan) -> list[int | None]:
    """The thresholds that need no look at the weights: -1 where all is kept, `NOTHING`."""
    combined = [tensor for tensor in plan.tensors if tensor.kind == "combine"]
    return [
        -1
        if all(tensor.terms[position].density >= 1.0 for tensor in combined)
        else (None if keep else NOTHING)
        for position, keep in enumerate(plan.model_keep)
    ]


def _bin_of_rank(counts: Any, rank: int) -> tuple[int, int]:
    """The bin that holds the element of this rank (1 is the largest), and its rank inside it."""
    left = rank
    for position in range(len(counts) - 1, -1, -1):
        here = int(counts[position])
        if here >= left:
            return position, left
        left -= here
    raise ValueError(f"rank {rank} of {rank - left} elements")


def model_codes(tensor: TensorPlan, codes: Sequence[int] | None) -> list[int]:
    """The given threshold of each term: -1 where this tensor selects its own, or none."""
    if codes is None:
        return [-1] * len(tensor.terms)
    return [
        code if term.density < 1.0 else -1 for term, code in zip(tensor.terms, codes, strict=True)
    ]


def sources(tensor: TensorPlan) -> list[tuple[str, Source]]:
    """Every input of a tensor with the name of its model, in the order of the records."""
    listed = [] if tensor.base is None else [("the base", tensor.base)]
    return listed + [(f"model {term.model}", term.source) for term in tensor.terms]


def check_finite(tensor: TensorPlan, record: TensorRecord, nan: Nan) -> None:
    """Raises NonFiniteError naming model, file, tensor and count, as the policy says."""
    if nan == "propagate" or not any(record.nonfinite):
        return
    *read, written = record.nonfinite
    if nan == "refuse":
        for (model, source), count in zip(sources(tensor), read, strict=True):
            if count:
                deltas = tensor.base is not None and tensor.policy.difference
                zero = "no change of the base" if deltas and source is not tensor.base else "0"
                raise NonFiniteError(
                    f"{source.path}: tensor {tensor.name} of {model} holds {count} NaN or infinite "
                    f"values; repair it, or give --nan zero (they count as {zero}) or --nan "
                    "propagate (the result is NaN or infinite there)"
                )
    if written:
        raise NonFiniteError(
            f"tensor {tensor.name}: {written} merged values overflow {tensor.dtype} and would be "
            "infinite; choose out_dtype: bfloat16 or float32 in the recipe, or --nan propagate"
        )


def check_checksums(tensor: TensorPlan, record: TensorRecord) -> None:
    """Raises CheckpointError where what was read is not what a packed delta says it must be."""
    for (model, source), crc in zip(sources(tensor), record.sources, strict=True):
        if source.crc64 is None or source.crc64 == crc:
            continue
        if source is not tensor.base:
            raise CheckpointError(
                f"{source.path}: the values of tensor {tensor.name} of {model} are not those that "
                f"were packed (checksum {crc:016x}, the header says {source.crc64:016x}); copy or "
                "pack the delta again"
            )
        deltas = [term.source.path for term in tensor.terms if isinstance(term.source, Packed)]
        raise CheckpointError(
            f"{source.path}: tensor {tensor.name} is not that of the base of "
            f"{deltas[0] if deltas else 'the packed delta'} (checksum {crc:016x}, the delta says "
            f"{source.crc64:016x}); give the base that it was packed on"
        )


def _mismatch(tensor: TensorPlan, terms: Sequence[int]) -> CheckpointError:
    models = ", ".join(tensor.terms[i].model for i in terms)
    reference = "the base" if tensor.base is not None else f"model {tensor.terms[0].model}"
    return CheckpointError(
        f"tensor {tensor.name} is not of a floating type, so it is copied and must be the same "
        f"everywhere; it differs from that of {reference} in: {models}"
    )


def _truncated(source: Source, got: int) -> CheckpointError:
    return CheckpointError(
        f"{source.path}: ended after {got} of {source.nbytes} bytes of a tensor at offset "
        f"{source.offset}; the file is truncated or was changed while it was read"
    )


# --------------------------------------------------------------------------------------- native


class NativeExecutor:
    """One job of the C++ core for each shard, and one for each tensor that must be made first."""

    name = "native"

    def __init__(
        self, core: ModuleType, *, threads: int | None, memory: int | None, io: Io, nan: Nan
    ) -> None:
        from cl_fast.backends import native

        self._core = core
        self._asked = threads
        self._threads = threads or native.threads()
        self._memory = memory
        self._io = "mmap" if io == "auto" else io
        self._nan = nan

    def model_thresholds(self, plan: Plan, tick: Tick) -> list[int]:
        """See `Executor`; all tensors of the model in one job, nearly always in one read.

        What lies at URLs is not held whole for that: its histograms are counted tensor by tensor,
        in two reads.
        """
        if any(isinstance(source, Fetched) for t in plan.tensors for source in made(t)):
            return thresholds_by_counts(plan, lambda ranges: self._counted(plan, ranges, tick))
        job = self._job(self._nan)
        files: dict[str, tuple[int, int]] = {}
        combined = [tensor for tensor in plan.tensors if tensor.kind == "combine"]
        ready = self._make(combined)
        size = 0
        for tensor in combined:
            # A selection writes nothing, but a task must name a place.
            self._add(job, tensor, None, files, ready, out=(1, -1, 0))
            size += sum(source.stored for _, source in sources(tensor))
        wanted = [max(1, keep) for keep in plan.model_keep]
        codes: list[int] = []
        watch(job, lambda: codes.extend(job.select_model(wanted)), tick, size)
        return [
            int(code) if known is None else known
            for code, known in zip(codes, _without_selection(plan), strict=True)
        ]

    def write(
        self, tensors: Sequence[TensorPlan], path: Path, codes: Sequence[int] | None, tick: Tick
    ) -> list[TensorRecord]:
        """See `Executor`."""
        plain = [t for t in tensors if not made_whole(t) and not isinstance(t.rule, Whole)]
        found = dict(
            zip((t.name for t in plain), self._write(plain, path, codes, tick), strict=True)
        )
        rest = [tensor for tensor in tensors if tensor.name not in found]
        with _ReadAhead(rest, self._memory) as ahead:
            for tensor in rest:
                if isinstance(tensor.rule, Whole):
                    found[tensor.name] = self._write_whole(tensor, path, tick)
                    continue
                ready = self._make([tensor], ahead.take(tensor))
                [found[tensor.name]] = self._write([tensor], path, codes, tick, ready)
        return [found[tensor.name] for tensor in tensors]

    def _write_whole(self, tensor: TensorPlan, path: Path, tick: Tick) -> TensorRecord:
        data, record = compute_whole(tensor, self._nan, self._threads)
        fd = os.open(path, os.O_RDWR)
        try:
            write_all(fd, data, tensor.offset)
        except OSError as error:
            raise write_failure(path, error) from error
        finally:
            os.close(fd)
        tick(sum(source.nbytes for _, source in sources(tensor)) + len(data))
        return record

    def gram(self, tensors: Sequence[TensorPlan], tick: Tick) -> list[list[float]]:
        """See `Executor`."""
        ready = self._make(tensors)
        job = self._job("propagate")
        files: dict[str, tuple[int, int]] = {}
        tasks = [
            self._add(job, tensor, None, files, ready, out=(0, -1, 0), gram="only")
            for tensor in tensors
        ]
        size = sum(source.nbytes for tensor in tensors for _, source in sources(tensor))
        watch(job, job.run, tick, size)
        return [list(job.result(task)["gram"]) for task in tasks]

    def _counted(self, plan: Plan, ranges: Sequence[CodeRange], tick: Tick) -> list[Any]:
        """Histograms over the whole model; the tensors that are made, one after the other."""
        import numpy as np

        combined = [tensor for tensor in plan.tensors if tensor.kind == "combine"]
        groups = [[t for t in combined if not made(t)], *([t] for t in combined if made(t))]
        totals: list[Any] = [0] * len(ranges)
        with _ReadAhead([t for t in combined if made(t)], self._memory) as ahead:
            for group in groups:
                if not group:
                    continue
                ready = self._make(group, ahead.take(group[0]))
                for position, part in enumerate(self._count(group, ranges, ready)):
                    totals[position] = totals[position] + np.frombuffer(part, dtype=np.uint64)
                tick(sum(source.nbytes for t in group for _, source in sources(t)) // 2)
        return totals

    def _write(
        self,
        tensors: Sequence[TensorPlan],
        path: Path,
        codes: Sequence[int] | None,
        tick: Tick,
        ready: dict[Source, bytearray] | None = None,
    ) -> list[TensorRecord]:
        if not tensors:
            return []
        ready = {} if ready is None else ready
        job = self._job(self._nan)
        files: dict[str, tuple[int, int]] = {}
        output = job.output(str(path))
        tasks = [
            self._add(job, tensor, codes, files, ready, out=(0, output, tensor.offset))
            for tensor in tensors
        ]
        size = sum(t.nbytes + sum(source.stored for _, source in sources(t)) for t in tensors)
        try:
            watch(job, _run(job, dict(zip(tasks, tensors, strict=True))), tick, size)
        except OSError as error:
            if error.filename == str(path):
                raise write_failure(path, error) from error
            raise
        results = [job.result(task) for task in tasks]
        if self._nan == "refuse":
            for tensor, result in zip(tensors, results, strict=True):
                if any(result["nonfinite"]):
                    # The job stopped at the first tile with NaN: count them all for the message.
                    # The file is thrown away, so this tensor may as well be written there.
                    job = self._job("propagate")
                    output = job.output(str(path))
                    task = self._add(job, tensor, codes, {}, ready, out=(0, output, tensor.offset))
                    watch(job, _run(job, {task: tensor}), lambda _: None, 0)
                    self._record(job.result(task), tensor)
        return [self._record(result, t) for result, t in zip(results, tensors, strict=True)]

    def compute(
        self, tensor: TensorPlan, codes: Sequence[int] | None
    ) -> tuple[bytearray, TensorRecord]:
        """See `Executor`."""
        if isinstance(tensor.rule, Whole):
            return compute_whole(tensor, self._nan, self._threads)
        data = bytearray(max(1, tensor.nbytes))
        ready = self._make([tensor])
        job = self._job(self._nan)
        task = self._add(job, tensor, codes, {}, ready, out=(_address(data), -1, 0))
        watch(job, _run(job, {task: tensor}), lambda _: None, 0)
        result = job.result(task)
        # A job that stopped at a NaN has not read all.
        whole = self._nan != "refuse" or not any(result["nonfinite"])
        return data[: tensor.nbytes], self._record(result, tensor, whole=whole)

    def count_codes(
        self, tensors: Sequence[TensorPlan], ranges: Sequence[CodeRange]
    ) -> list[bytes]:
        """See `Executor`."""
        return self._count(tensors, ranges, self._make(tensors))

    def _count(
        self,
        tensors: Sequence[TensorPlan],
        ranges: Sequence[CodeRange],
        ready: dict[Source, bytearray],
    ) -> list[bytes]:
        job = self._job(self._nan)
        files: dict[str, tuple[int, int]] = {}
        for tensor in tensors:
            # Counting writes nothing, but a task must name a place.
            self._add(job, tensor, None, files, ready, out=(1, -1, 0))
        counts: list[bytes] = []
        watch(job, lambda: counts.extend(job.count_codes(list(ranges))), lambda _: None, 0)
        return counts

    def _make(
        self, tensors: Sequence[TensorPlan], have: Mapping[Source, bytearray] | None = None
    ) -> dict[Source, bytearray]:
        """The bytes of all sources of these tensors that no file holds; some are there already."""
        ready = dict(have or {})
        for tensor in tensors:
            for source in made_whole(tensor):
                if source not in ready:
                    ready[source] = _made(tensor, source, self._nan, self._asked)
                if not ready[source]:
                    ready[source] = bytearray(1)  # empty, but it must have an address
        return ready

    def _job(self, nan: Nan) -> Any:
        return self._core.Job(
            threads=self._threads, nan=nan, checksums=True, memory=self._memory or 0
        )

    def _add(
        self,
        job: Any,
        tensor: TensorPlan,
        codes: Sequence[int] | None,
        files: dict[str, tuple[int, int]],
        ready: dict[Source, bytearray],
        out: tuple[int, int, int],
        gram: str | None = None,
    ) -> int:
        def place(source: Source) -> tuple[str, int, int, int]:
            return self._place(job, source, files, ready, copy=copy)

        # A copy is of bytes, whatever the type.
        policy, copy = tensor.policy, tensor.kind == "copy"
        ptr, file, offset = out
        task = job.add_task(
            n=tensor.nbytes if copy else tensor.numel,
            out_dtype="BYTES" if copy else tensor.dtype,
            out_ptr=ptr,
            out_file=file,
            out_offset=offset,
            base=None if tensor.base is None else place(tensor.base),
            difference=policy.difference and not copy,
            sparsify=policy.sparsify,
            trim_ties=policy.trim_ties,
            rescale=policy.rescale,
            elect=policy.elect,
            elect_on=policy.elect_on,
            reduce=policy.reduce,
            divisor=policy.divisor,
            lam=tensor.lam,
            kind=tensor.kind,
            row=row_length(tensor.shape),
            gram=gram or ("blend" if isinstance(tensor.rule, Blend) else "none"),
        )
        for term, code in zip(tensor.terms, model_codes(tensor, codes), strict=True):
            if copy and term.source == tensor.base:
                continue  # a patch leaves this tensor alone: it is read once
            dtype, ptr, file, offset = place(term.source)
            top, keep = (0, 0) if copy else selection_counts(
                policy, tensor.numel, term.density, term.gamma
            )  # fmt: skip
            packed = None
            if isinstance(source := term.source, Packed):
                from cl_fast.merging.deltas import native_blocks

                blocks = native_blocks(source)  # alive until the core has its copy
                address, length = blocks.buffer_info()
                packed = (
                    place(source.values),
                    source.key,
                    source.threshold,
                    address,
                    length,
                    source.factor,
                    source.as_,
                    place(source.base),
                )
            job.add_term(
                task,
                dtype=dtype,
                ptr=ptr,
                file=file,
                offset=offset,
                weight=term.weight,
                density=term.density,
                key=term.key,
                keep_threshold=keep_threshold(term.density) if term.density < 1.0 else 1 << 32,
                keep_count=keep,
                fixed_code=code,
                drop_count=top,
                epsilon=term.epsilon,
                packed=packed,
            )
        return int(task)

    def _place(
        self,
        job: Any,
        source: Source,
        files: dict[str, tuple[int, int]],
        ready: dict[Source, bytearray],
        *,
        copy: bool,
    ) -> tuple[str, int, int, int]:
        """Type, address, file and offset of a source. A method, since a function that calls itself
        holds itself, and the job with its open files, until garbage is collected."""
        if isinstance(source, Packed):
            return source.dtype, 0, -1, 0
        if isinstance(source, Aligned) and source.streamed:
            nothing = "BYTES", 0, -1, 0
            tables = [
                (self._place(job, stored, files, ready, copy=copy) if rows else nothing, rows)
                for stored, rows in source.tables()
            ]
            handle = job.rows(source.row_bytes, source.codes, tables, source.made_rows())
            return "BYTES" if copy else source.dtype, 0, handle, 0
        if source in ready:
            return "BYTES" if copy else source.dtype, _address(ready[source]), -1, 0
        if source.path not in files:
            handle = job.file(source.path, self._io)
            files[source.path] = handle, Path(source.path).stat().st_size
        handle, size = files[source.path]
        if source.offset + source.nbytes > size:
            raise _truncated(source, max(0, size - source.offset))
        return "BYTES" if copy else source.dtype, 0, handle, source.offset

    def _record(
        self, result: dict[str, Any], tensor: TensorPlan, *, whole: bool = True
    ) -> TensorRecord:
        read = [int(crc) for crc in result["crc_in"]]
        first = 0 if tensor.base is None else 1
        own = [
            k
            for k, term in enumerate(tensor.terms)
            if tensor.kind != "copy" or term.source != tensor.base
        ]
        if result["mismatch"]:
            raise _mismatch(tensor, [own[source - first] for source in result["mismatch"]])
        if len(own) < len(tensor.terms):
            crcs = dict(zip(own, read[first:], strict=True))
            read = read[:1] + [crcs.get(k, read[0]) for k in range(len(tensor.terms))]
        bad = tuple(int(count) for count in result["nonfinite"])
        record = TensorRecord(
            name=tensor.name,
            crc64=int(result["crc_out"]),
            sources=tuple(read),
            nonfinite=bad if any(bad) else (),
        )
        if whole:
            check_checksums(tensor, record)
        check_finite(tensor, record, self._nan)
        return record


def _run(job: Any, tensors: dict[int, TensorPlan]) -> Callable[[], None]:
    """`job.run`, with the weights of the tensors (by task) that take theirs from a Gram matrix."""

    def blend(task: int, gram: list[float]) -> list[float]:
        tensor = tensors[task]
        assert isinstance(tensor.rule, Blend)
        return tensor.rule.weights(gram, [term.weight for term in tensor.terms])

    wanted = any(isinstance(tensor.rule, Blend) for tensor in tensors.values())
    return functools.partial(job.run, blend if wanted else None)


class _ReadAhead:
    """Fetches what `tensors` need from URLs in their order, some of it before it is asked for.

    A context manager; at its end nothing more is fetched.
    """

    def __init__(self, tensors: Sequence[TensorPlan], memory: int | None) -> None:
        wanted = {
            t.name: list(dict.fromkeys(s for s in made_whole(t) if isinstance(s, Fetched)))
            for t in tensors
        }
        self._left = deque((name, source) for name, own in wanted.items() for source in own)
        self._ready: dict[str, dict[Fetched, Future[bytearray]]] = {name: {} for name in wanted}
        self._count = {name: len(own) for name, own in wanted.items()}
        largest = max((sum(s.nbytes for s in own) for own in wanted.values()), default=0)
        self._most = READ_AHEAD if memory is None else max(0, memory - largest)
        self._held = 0
        self._pool = ThreadPoolExecutor(8, "cl_fast read-ahead") if self._left else None

    def __enter__(self) -> _ReadAhead:
        self._fill("")
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error[0] is None, cancel_futures=True)

    def take(self, tensor: TensorPlan) -> dict[Source, bytearray]:
        """The sources of the next tensor. Raises CheckpointError where a store cannot be read."""
        if not self._count.get(tensor.name):
            return {}
        self._fill(tensor.name)
        found: dict[Source, bytearray] = {}
        for source, future in self._ready.pop(tensor.name).items():
            found[source] = future.result()
            self._held -= source.nbytes
        self._fill("")
        return found

    def _fill(self, name: str) -> None:
        """Asks for what fits the bound, and for all that the tensor `name` needs."""
        while self._left and (
            self._held + self._left[0][1].nbytes <= self._most
            or (name and len(self._ready[name]) < self._count[name])
        ):
            owner, source = self._left.popleft()
            assert self._pool is not None
            self._ready[owner][source] = self._pool.submit(source.make)
            self._held += source.nbytes


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


# ---------------------------------------------------------------------------------------- eager


class EagerExecutor:
    """Whole tensors through `cl_fast.ops.combining.combine_reference` in plain torch."""

    name = "eager"

    def __init__(self, *, nan: Nan) -> None:
        self._nan = nan

    def model_thresholds(self, plan: Plan, tick: Tick) -> list[int]:
        """See `Executor`; every pass reads each tensor of the model anew."""
        from cl_fast.ops.magnitude import select_code

        combined = [tensor for tensor in plan.tensors if tensor.kind == "combine"]

        def codes_of(position: int) -> Iterator[Tensor]:
            for tensor in combined:
                yield self._codes(tensor, position)
                tick(sum(s.nbytes for s in (tensor.base, tensor.terms[position].source) if s))

        codes = []
        for position, known in enumerate(_without_selection(plan)):
            if known is None:
                keep = plan.model_keep[position]
                known = select_code(functools.partial(codes_of, position), keep)
            codes.append(known)
        return codes

    def count_codes(
        self, tensors: Sequence[TensorPlan], ranges: Sequence[CodeRange]
    ) -> list[bytes]:
        """See `Executor`."""
        import torch

        counts = []
        for position, (low, high, shift) in enumerate(ranges):
            if high < low:
                counts.append(b"")
                continue
            bins = (high >> shift) - (low >> shift) + 1
            total = torch.zeros(bins, dtype=torch.int64)
            for tensor in tensors:
                codes = self._codes(tensor, position)
                inside = codes[(codes >= low) & (codes <= high)]
                total += torch.bincount((inside >> shift) - (low >> shift), minlength=bins)
            counts.append(total.numpy().tobytes())
        return counts

    def _codes(self, tensor: TensorPlan, position: int) -> Tensor:
        """The magnitude codes of one model's delta."""
        from cl_fast.ops.magnitude import magnitude_codes

        base = None if tensor.base is None else self._load(tensor, tensor.base)[1]
        term = tensor.terms[position]
        if isinstance(term.source, Packed):
            values = _load_packed(tensor, term)[1]
        else:
            values = self._load(tensor, term.source)[1]
        base, (values,), _ = _finite_inputs(base, [values], tensor, self._nan)
        delta = values.float()
        if tensor.policy.difference and base is not None:
            delta = delta - base.float()
        return magnitude_codes(delta)

    def write(
        self, tensors: Sequence[TensorPlan], path: Path, codes: Sequence[int] | None, tick: Tick
    ) -> list[TensorRecord]:
        """See `Executor`."""
        records = []
        fd = os.open(path, os.O_RDWR)
        try:
            for tensor in tensors:
                data, record = self.compute(tensor, codes)
                try:
                    write_all(fd, data, tensor.offset)
                except OSError as error:
                    raise write_failure(path, error) from error
                tick(sum(source.nbytes for _, source in sources(tensor)) + len(data))
                records.append(record)
        finally:
            os.close(fd)
        return records

    def compute(
        self, tensor: TensorPlan, codes: Sequence[int] | None
    ) -> tuple[bytearray, TensorRecord]:
        """See `Executor`."""
        import torch

        from cl_fast.ops.combining import combine_reference

        if isinstance(tensor.rule, Whole):
            return compute_whole(tensor, self._nan, torch.get_num_threads())
        inputs = [source for _, source in sources(tensor)]
        if tensor.kind == "copy":
            once = {source: self._load_bytes(tensor, source) for source in dict.fromkeys(inputs)}
            read = [once[source] for source in inputs]
            differs = [
                i - (tensor.base is not None) for i, data in enumerate(read) if data != read[0]
            ]
            if differs:
                raise _mismatch(tensor, differs)
            crcs = tuple(crc64(data) for data in read)
            record = TensorRecord(name=tensor.name, crc64=crcs[0], sources=crcs)
            check_checksums(tensor, record)
            return read[0], record

        masks: list[Tensor | None] = [None] * len(tensor.terms)
        factors = [1.0] * len(tensor.terms)
        loaded = [] if tensor.base is None else [self._load(tensor, tensor.base)]
        for k, term in enumerate(tensor.terms):
            if isinstance(term.source, Packed):
                crc, value, masks[k] = _load_packed(tensor, term)
                loaded.append((crc, value))
                factors[k] = _factor(term)
            else:
                loaded.append(self._load(tensor, term.source))
        base = None if tensor.base is None else loaded[0][1].view(tensor.shape)
        values = [
            value.view(tensor.shape) for _, value in loaded[len(inputs) - len(tensor.terms) :]
        ]
        crcs = tuple(crc for crc, _ in loaded)
        check_checksums(tensor, TensorRecord(name=tensor.name, crc64=0, sources=crcs))
        base, values, bad = _finite_inputs(base, values, tensor, self._nan)
        check_finite(
            tensor,
            TensorRecord(name=tensor.name, crc64=0, sources=crcs, nonfinite=(*bad, 0)),
            self._nan,
        )
        weights = [term.weight for term in tensor.terms]
        if isinstance(tensor.rule, Blend):
            from cl_fast.ops.inner_products import gram_reference

            start = base if tensor.policy.difference else None
            packed = _scaled(gram_reference(_unmasked(values, masks, start), start), factors)
            weights = tensor.rule.weights(packed, weights)
        out = combine_reference(
            base if tensor.policy.difference else None,
            values,
            weights=weights,
            policy=tensor.policy,
            density=[term.density for term in tensor.terms],
            gamma=[term.gamma for term in tensor.terms],
            epsilon=[term.epsilon for term in tensor.terms],
            keys=[term.key for term in tensor.terms],
            thresholds=model_codes(tensor, codes),
            masks=masks,
            factors=factors,
            lam=tensor.lam,
            out_dtype=torch_dtype(tensor.dtype),
        )
        out[torch.isnan(out)] = float("nan")  # one NaN, as the core writes it
        bad.append(int((~torch.isfinite(out)).sum()))
        data = bytearray(out.numel() * out.element_size())
        torch.frombuffer(data, dtype=out.dtype).copy_(out.reshape(-1))
        record = TensorRecord(
            name=tensor.name,
            crc64=crc64(data),
            sources=crcs,
            nonfinite=tuple(bad) if any(bad) else (),
        )
        check_finite(tensor, record, self._nan)
        return data, record

    def gram(self, tensors: Sequence[TensorPlan], tick: Tick) -> list[list[float]]:
        """See `Executor`."""
        from cl_fast.ops.inner_products import gram_reference

        found = []
        for tensor in tensors:
            values = [self._load(tensor, term.source)[1] for term in tensor.terms]
            deltas = tensor.policy.difference and tensor.base is not None
            base = self._load(tensor, tensor.base)[1] if deltas and tensor.base else None
            found.append(_scaled(gram_reference(values, base), [_factor(t) for t in tensor.terms]))
            tick(sum(source.nbytes for _, source in sources(tensor)))
        return found

    def _load(self, tensor: TensorPlan, source: Source) -> tuple[int, Tensor]:
        return _load(tensor, source, self._nan)

    def _load_bytes(self, tensor: TensorPlan, source: Source) -> bytearray:
        return _load_bytes(tensor, source, self._nan)


def _load_bytes(
    tensor: TensorPlan, source: Source, nan: Nan, threads: int | None = None
) -> bytearray:
    if isinstance(source, Made):
        return _made(tensor, source, nan, threads)
    return read_stored(source)


def _load(
    tensor: TensorPlan, source: Source, nan: Nan, threads: int | None = None
) -> tuple[int, Tensor]:
    """The CRC of a source's bytes, and its flat values."""
    import torch

    data = _load_bytes(tensor, source, nan, threads)
    if isinstance(source, Packed):  # the record is of what is stored
        from cl_fast.merging.deltas import read_packed

        return crc64(read_packed(source)[0]), torch.frombuffer(
            data, dtype=torch_dtype(source.dtype)
        )
    return crc64(data), torch.frombuffer(data, dtype=torch_dtype(source.dtype))


def compute_whole(tensor: TensorPlan, nan: Nan, threads: int) -> tuple[bytearray, TensorRecord]:
    """A tensor of a `Whole` rule by its function: the parts beside one another.

    Each part is worked on by one thread, so that no sum depends on how many there are.
    """
    import torch

    assert isinstance(tensor.rule, Whole)
    rule = tensor.rule
    loaded = [_load(tensor, source, nan, threads) for _, source in sources(tensor)]
    crcs = tuple(crc for crc, _ in loaded)
    check_checksums(tensor, TensorRecord(name=tensor.name, crc64=0, sources=crcs))
    base = None if tensor.base is None else loaded[0][1]
    values = [value for _, value in loaded[len(loaded) - len(tensor.terms) :]]
    base, values, bad = _finite_inputs(base, values, tensor, nan)
    check_finite(
        tensor,
        TensorRecord(name=tensor.name, crc64=0, sources=crcs, nonfinite=(*bad, 0)),
        nan,
    )
    data = bytearray(tensor.nbytes)
    out = torch.frombuffer(data, dtype=torch_dtype(tensor.dtype))
    weights = [term.weight for term in tensor.terms]
    columns = tensor.shape[-1] if tensor.shape else 1
    least = columns if rule.unit == "row" else 1
    step = tensor.numel if rule.unit == "tensor" else max(1, PART // least) * least
    shape = {"element": (-1,), "row": (-1, columns), "tensor": tensor.shape}[rule.unit]

    statistics = _load_statistics(tensor, rule, values)

    def part(first: int) -> None:
        cut = slice(first, min(first + step, tensor.numel))
        known = [x[cut] if rule.unit == "element" else x for x in statistics]
        start = None
        if base is not None and tensor.policy.difference:
            start = base[cut].reshape(shape)
        with torch.no_grad():
            parts = [x[cut].reshape(shape) for x in values]
            if not rule.own_parts:
                start = None if start is None else start.float()
                parts = [x.float() for x in parts]
            try:
                result = rule.apply(parts, start, weights, known)
            except ValueError as error:
                if not known:
                    raise
                raise CheckpointError(f"tensor {tensor.name}: {error}") from error
            out[cut] = result.reshape(-1).to(torch.float32).to(out.dtype)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, threads), "cl_fast rule") as pool:
            list(pool.map(part, range(0, tensor.numel, step)))
    finally:
        torch.set_num_threads(before)
    out[torch.isnan(out)] = float("nan")
    bad.append(int((~torch.isfinite(out)).sum()))
    record = TensorRecord(
        name=tensor.name,
        crc64=crc64(data),
        sources=crcs,
        nonfinite=tuple(bad) if any(bad) else (),
    )
    check_finite(tensor, record, nan)
    return data, record


def _load_statistics(tensor: TensorPlan, rule: Whole, values: Sequence[Tensor]) -> list[Tensor]:
    """The statistics of a rule, of the models that they were collected on."""
    import torch

    loaded = []
    for term, source, crc, value in zip(
        tensor.terms, rule.statistics, rule.crcs, values, strict=False
    ):
        if crc is not None:
            stored = value.float().contiguous().view(torch.uint8)
            if crc64(stored.numpy().data) != crc:
                raise CheckpointError(
                    f"{source.path}: its statistics of tensor {tensor.name} were collected on "
                    f"another model than {term.model} ({term.source.path}); collect them anew"
                )
        data = read_stored(source)
        found = torch.frombuffer(data, dtype=torch_dtype(source.dtype))
        loaded.append(found if rule.unit == "element" else found.view(rule.shape))
    return loaded


def _factor(term: Term) -> float:
    """What the delta of a packed source is multiplied by where it is used."""
    source = term.source
    return source.factor if isinstance(source, Packed) and source.as_ == "parts" else 1.0


def _scaled(packed: list[float], factors: Sequence[float]) -> list[float]:
    """The Gram matrix of deltas times their factors."""
    count, place = len(factors), iter(packed)
    return [next(place) * (factors[i] * factors[j]) for i in range(count) for j in range(i, count)]


def _unmasked(
    values: list[Tensor], masks: Sequence[Tensor | None], base: Tensor | None
) -> list[Tensor]:
    """Values whose delta is 0 where a mask says that it does not count."""
    import torch

    if base is None:
        return values
    start = base.float()
    return [
        value if mask is None else torch.where(mask.view(value.shape), value.float(), start)
        for value, mask in zip(values, masks, strict=True)
    ]


def _load_packed(tensor: TensorPlan, term: Term) -> tuple[int, Tensor, Tensor | None]:
    """The CRC of the kept values; a dense tensor; and which of its elements count, if not all.

    Where nothing selects by magnitude what was dropped is masked, otherwise it is the base's.
    """
    import torch

    from cl_fast.merging.deltas import expand, read_packed

    source = term.source
    assert isinstance(source, Packed)
    data, values, keep = read_packed(source)
    trims = tensor.policy.sparsify not in ("none", "drop") and term.density < 1.0
    if source.as_ == "parts" and tensor.policy.difference and not trims:
        dense = torch.zeros(source.numel, dtype=values.dtype)
        dense[keep] = values
        return crc64(data), dense, keep
    return crc64(data), torch.frombuffer(expand(source), dtype=torch_dtype(source.dtype)), None


def torch_dtype(name: str) -> torch.dtype:
    import torch

    return {
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }[name]


def read_stored(source: Source) -> bytearray:
    """The bytes of a stored tensor."""
    if isinstance(source, Made):
        return source.make()
    data = bytearray(source.nbytes)
    view, done = memoryview(data), 0
    with Path(source.path).open("rb", buffering=0) as file:
        while done < source.nbytes:
            got = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], source.offset + done)
            if got == 0:
                raise _truncated(source, done)
            done += got
    return data


def _made(tensor: TensorPlan, source: Made, nan: Nan, threads: int | None = None) -> bytearray:
    """The bytes of a source that no file holds.

    Where it is the result itself, nothing else looks for NaN in it, or for an overflow.
    """
    if isinstance(source, Fetched):
        return source.make(threads)
    data = source.make(threads)
    if tensor.kind == "copy" and nan != "propagate":
        import torch

        values = torch.frombuffer(data, dtype=torch_dtype(source.dtype))
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):
            count = int((~torch.isfinite(values)).sum())
            raise NonFiniteError(
                f"tensor {tensor.name}: {count} values of the base with {source.path} on it are "
                f"NaN or infinite in {source.dtype}; choose out_dtype: bfloat16 or float32, repair "
                "the base, or give --nan propagate"
            )
    return data


def _finite_inputs(
    base: Tensor | None, values: list[Tensor], tensor: TensorPlan, nan: Nan
) -> tuple[Tensor | None, list[Tensor], list[int]]:
    """The inputs after the nan policy, and how many elements were not finite in each.

    "zero" makes a non-finite base element 0 and a non-finite delta +0: that model changes nothing
    there. As in the core, a model's count is taken on its deltas where there are any.
    """
    import torch

    counts = []
    if base is not None:
        finite = torch.isfinite(base.float())
        counts.append(int((~finite).sum()))
        if nan == "zero" and counts[-1]:
            base = torch.where(finite, base.float(), 0.0)
    wide = base.float() if base is not None and tensor.policy.difference else None
    kept = []
    for value in values:
        finite = torch.isfinite(value.float() if wide is None else value.float() - wide)
        counts.append(int((~finite).sum()))
        if nan == "zero" and counts[-1]:
            value = torch.where(finite, value.float(), 0.0 if wide is None else wide)
        kept.append(value)
    return base, kept, counts


def _eager_bytes(tensor: TensorPlan) -> int:
    """Rough peak of one tensor in the eager path: the inputs, float32 deltas, values and votes."""
    stored = sum(source.nbytes for _, source in sources(tensor))
    stored += sum(source.memory - source.nbytes for source in made(tensor))
    if tensor.kind == "copy":
        return stored
    return stored + tensor.numel * (4 * (3 * len(tensor.terms) + 4)) + tensor.nbytes
