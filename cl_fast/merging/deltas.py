"""Packed deltas: finetuned models without what DARE drops of them, written, applied and merged.

    pack    base, finetuned -> the kept values, and checksums of them and of the base
    apply   base, delta     -> base + delta: what dare_linear gives of that one model, bit for bit
    unpack  base, delta     -> the delta itself, dense, in float32

In a plan a packed delta looks like a checkpoint whose tensors are `Packed` sources, or the base's
own where they are equal. The core reads kept values tile by tile, so no merge ever expands a delta,
on disk or in memory. What was dropped is +0, and the rescale factor multiplies the weight, exactly
as where DARE drops in the merge itself.

The offsets, the header and the base's small tensors are compared with their checksums before
anything is written; the kept values and the rest of the base while the merge reads them, which
costs no further read. Nothing is at the output before all of them agree.
"""

from __future__ import annotations

import array
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from cl_fast._version import __version__
from cl_fast.checkpoints.checkpoint import Checkpoint, absolute
from cl_fast.checkpoints.deltas import (
    BLOCK,
    NAME,
    RESCALES,
    STREAM,
    DeltaFile,
    DeltaTensor,
    blocks_of,
    header_of,
    is_delta,
    read_delta,
)
from cl_fast.checkpoints.safetensors import (
    DTYPE_BITS,
    Header,
    TensorInfo,
    strict_json,
    tensor_nbytes,
)
from cl_fast.checkpoints.sidecar import Sidecar, plan_sidecars
from cl_fast.errors import CheckpointError, NonFiniteError, OutputError, RecipeError
from cl_fast.merging.checksum import crc64, crc64_of_file
from cl_fast.merging.inputs import Derived
from cl_fast.merging.journal import WorkLock
from cl_fast.merging.output import (
    OutputFolder,
    sync_file,
    sync_folder,
    write_all,
    write_failure,
)
from cl_fast.merging.sources import Fetched, Packed, Source
from cl_fast.ops.policy import DTYPES
from cl_fast.ops.streams import keep_threshold, stream_key

if TYPE_CHECKING:
    import torch

    from cl_fast.merging.engine import Progress, Result
    from cl_fast.merging.plan import Plan, TensorPlan

__all__ = [
    "DeltaCheckpoint",
    "apply_delta",
    "check_delta",
    "open_delta",
    "pack_delta",
    "plan_delta",
    "unpack_delta",
]

Rescale = Literal["l1", "keep_rate", "none"]

#: Bytes of the base, kept values, kept elements of each block, sums of |d| so far.
_Run = tuple[bytearray, memoryview, Sequence[int], tuple[float, float]]

_RUN = 64 * BLOCK  # elements that are packed at a time
_SMALL = 1 << 20  # base tensors up to this many bytes are compared before the merge
_LONGEST = -1.2345678901234567e-300  # no float is longer in JSON


# ------------------------------------------------------------------------------- in merges


@dataclass(frozen=True, slots=True)
class DeltaCheckpoint(Derived):
    """A base with a packed delta on it, as far as headers tell.

    Attributes:
        base: the checkpoint below.
        delta: the file.
        apart: whether its tensors are read for themselves, as base + delta, and not as parts of
            a merge that compares what it reads: then `check` has to read all.
        whole: whether it is a model of its own, `BASE+DELTA`.
    """

    delta: DeltaFile
    apart: bool = False
    whole: bool = False

    def dense(self) -> DeltaCheckpoint:
        return replace(self, apart=True)

    @property
    def pair(self) -> bool:
        return self.whole

    @property
    def folder(self) -> Path:
        return self.base.folder if self.whole or not self.path.is_dir() else self.path

    def alone(self, reference: str) -> DeltaCheckpoint:
        """As a model of its own, of the base's types."""
        tensors = {
            name: info._replace(dtype=below.dtype, nbytes=below.nbytes)
            if self.delta.tensors[name].kind == "kept"
            else info
            for name, info in self.tensors.items()
            for below in (self.base.tensors[name],)
        }
        return replace(
            self,
            reference=reference,
            files=(*self.files, *self.base.files),
            tensors=tensors,
            whole=True,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all that the file stores."""
        return sum(info.nbytes for info in self.delta.header.tensors.values())

    @property
    def role(self) -> str:
        return "delta"

    @property
    def words(self) -> str:
        """What it is, for people."""
        changed = sum(tensor.kind != "same" for tensor in self.delta.tensors.values())
        return (
            f"packed delta (drop {self.delta.drop_rate:g}, seed {self.delta.seed}, stream "
            f"{self.delta.model!r}, {changed} of {len(self.delta.tensors)} tensors)"
        )

    def source(self, name: str) -> Source:
        """The kept values on the base's tensor; one of integers as it is stored."""
        tensor, info = self.delta.tensors[name], self.tensors[name]
        path = self.delta.header.path
        base = replace(Source.of(self.base.tensors[name]), crc64=tensor.base_crc)
        if tensor.values is None and (tensor.dtype not in DTYPES or not tensor.numel):
            return base
        if tensor.values is not None and tensor.offsets is None:
            return replace(Source.of(tensor.values), crc64=tensor.values_crc)
        # A tensor that equals the base's has a delta of +0, which is added as any other is: that
        # makes +0 of a -0, as it does where DARE drops in the merge itself.
        values = blocks = Source(path, 0, tensor.dtype, 0)
        if tensor.values is not None and tensor.offsets is not None:
            values = Source.of(tensor.values)
            blocks = replace(Source.of(tensor.offsets), crc64=tensor.offsets_crc)
        packed = Packed(
            path=path,
            offset=0,
            dtype=info.dtype,
            nbytes=info.nbytes,
            crc64=tensor.values_crc,
            values=values,
            blocks=blocks,
            base=base,
            numel=tensor.numel,
            key=tensor.key,
            threshold=self.delta.threshold if values.nbytes else 0,
            factor=tensor.factor,
            as_="parts",
        )
        return packed.as_model() if self.apart else packed

    @property
    def content(self) -> str:
        """The hash of the header, which holds the checksums of all else."""
        return self.delta.header.digest

    def sidecars(self, dtype: str | None) -> tuple[Sidecar, ...]:
        """What the finetuned model had beside its weights and the base had not, or otherwise.

        `dtype` is the type of the output where it has one, for config.json.
        """
        if not self.delta.path.is_dir():
            return ()
        config = self.delta.path / "config.json"
        content = strict_json(config.read_bytes(), str(config)) if config.is_file() else None
        beside = Checkpoint(self.reference, self.delta.path, (), {}, content)
        return plan_sidecars(beside, self.delta.path, dtype)[0]

    def check(self) -> None:
        """Compare offsets, and the base, with their checksums.

        Where the merge reads values and base in any case it compares while it does, and only the
        small tensors of the base are looked at here.

        Raises:
            CheckpointError: the file is damaged, or was packed on another base.
        """
        for tensor in self.delta.tensors.values():
            if tensor.offsets is not None:
                read_blocks(replace(Source.of(tensor.offsets), crc64=tensor.offsets_crc))
            info = self.base.tensors[tensor.name]
            if info.nbytes > _SMALL and tensor.kind != "whole" and not self.apart:
                continue
            if self.apart:
                _check_values(self.delta, tensor)
            found = _crc_of(info)
            if found != tensor.base_crc:
                raise other_base(str(self.path), tensor.name, info.path, found, tensor.base_crc)


def open_delta(base: Checkpoint, reference: str, *, key: str) -> DeltaCheckpoint:
    """A packed delta on its base. `key` is the recipe key that named it, for messages.

    Raises:
        CheckpointError: the file is damaged, or the base has other tensors.
    """
    path = absolute(reference)
    delta = read_delta(path)
    for name, tensor in delta.tensors.items():
        info = base.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{key}: {path} changes tensor {name!r}, which {base.path} does not have; give "
                "the base that it was packed on"
            )
        if (info.dtype, info.shape) != (tensor.base_dtype, tensor.shape):
            raise CheckpointError(
                f"{key}: {path} was packed on a tensor {name!r} of {tensor.base_dtype} "
                f"{list(tensor.shape)}, in {base.path} it is {info.dtype} {list(info.shape)}; give "
                "the base that it was packed on"
            )
    return DeltaCheckpoint(
        reference,
        path,
        (delta.header,),
        _tensors(base, delta),
        base.config,
        base,
        delta,
    )


def own(path: Path) -> tuple[tuple[Header, ...], str]:
    """The header of a delta's file, and the hash of all that it holds.

    Raises:
        CheckpointError: it is damaged.
    """
    delta = check_delta(path)
    return (delta.header,), delta.header.digest


def _tensors(base: Checkpoint, delta: DeltaFile) -> dict[str, TensorInfo]:
    """What the tensors of base + delta are to a merge."""
    tensors = {}
    for name, tensor in delta.tensors.items():
        if tensor.kind == "same":
            tensors[name] = base.tensors[name]
        elif tensor.values is not None and tensor.offsets is None:
            tensors[name] = tensor.values._replace(name=name)
        else:
            dtype = tensor.dtype if tensor.dtype == tensor.base_dtype else "F32"
            tensors[name] = TensorInfo(
                name, dtype, tensor.shape, delta.header.path, 0, tensor_nbytes(dtype, tensor.shape)
            )
    return tensors


def other_base(
    delta: str, name: str, path: str, found: int | None, wanted: int | None
) -> CheckpointError:
    """The words for a base that is not the one that a delta was packed on."""
    return CheckpointError(
        f"{delta} is for another base: tensor {name!r} of {path} is not what it was packed on "
        f"(checksum {found or 0:016x}, the delta says {wanted or 0:016x}); give the base that was "
        "packed, or pack the finetuned model on this one"
    )


def check_delta(path: str | os.PathLike[str]) -> DeltaFile:
    """Read all of a packed delta and compare it with its checksums.

    Raises:
        CheckpointError: naming the tensor whose values or offsets are not those that were packed.
    """
    delta = read_delta(path)
    for tensor in delta.tensors.values():
        if tensor.offsets is not None:
            read_blocks(replace(Source.of(tensor.offsets), crc64=tensor.offsets_crc))
        _check_values(delta, tensor)
    return delta


def _check_values(delta: DeltaFile, tensor: DeltaTensor) -> None:
    if tensor.values is not None and _crc_of(tensor.values) != tensor.values_crc:
        raise CheckpointError(
            f"{delta.header.path}: the values of tensor {tensor.name!r} are not those that were "
            "packed (their checksum differs); copy or pack the delta again"
        )


def _crc_of(info: TensorInfo) -> int:
    try:
        return crc64_of_file(info.path, info.offset, info.nbytes)
    except EOFError as error:
        raise CheckpointError(
            f"{info.path}: tensor {info.name!r} ended after {error} of {info.nbytes} bytes; the "
            "file is truncated or was changed while it was read"
        ) from error


def read_blocks(source: Source) -> bytearray:
    """The offsets of a tensor as they are stored: little-endian int64, checked.

    Raises:
        CheckpointError: they are not those that were written, or run backwards.
    """
    from cl_fast.merging.executors import read_stored

    data = read_stored(source)
    if source.crc64 is not None and crc64(data) != source.crc64:
        raise CheckpointError(
            f"{source.path}: the offsets at byte {source.offset} are not those that were packed "
            "(their checksum differs); copy or pack the delta again"
        )
    return data


def _numbers(data: bytes | bytearray) -> array.array[int]:
    numbers = array.array("q")
    numbers.frombytes(bytes(data))
    if sys.byteorder != "little":
        numbers.byteswap()
    return numbers


def native_blocks(source: Packed) -> array.array[int]:
    """The offsets of a packed source for the core.

    Raises:
        CheckpointError: they are not those of its kept values.
    """
    if not source.values.nbytes and not source.blocks.nbytes:
        return array.array("q", bytes(8 * blocks_of(source.numel)))
    numbers = _numbers(read_blocks(source.blocks))
    kept = source.values.nbytes * 8 // DTYPE_BITS[source.values.dtype]
    steps = (b - a for a, b in pairwise(numbers))
    if numbers[0] != 0 or numbers[-1] != kept or any(not 0 <= step <= BLOCK for step in steps):
        raise CheckpointError(
            f"{source.path}: the offsets at byte {source.blocks.offset} do not lead to its "
            f"{kept} values; the delta is damaged, pack it again"
        )
    return numbers


# ------------------------------------------------------------------------ in plain torch


def read_packed(
    source: Packed,
) -> tuple[bytearray, torch.Tensor, torch.Tensor]:
    """The stored bytes of the kept values, the values, and which elements they are.

    Raises:
        CheckpointError: values and stream do not belong together.
    """
    import torch

    from cl_fast.merging.executors import read_stored, torch_dtype
    from cl_fast.ops.dropping import keep_mask, signed_key

    blocks = native_blocks(source)
    data = read_stored(source.values)
    if source.crc64 is not None and crc64(data) != source.crc64:
        raise CheckpointError(
            f"{source.path}: the values of a tensor at byte {source.values.offset} are not those "
            "that were packed (their checksum differs); copy or pack the delta again"
        )
    keep = keep_mask(signed_key(source.key), source.numel, source.threshold)
    padded = torch.nn.functional.pad(keep, (0, -source.numel % BLOCK)).view(-1, BLOCK)
    if padded.sum(1).cumsum(0).tolist() != list(blocks[1:]):
        raise CheckpointError(
            f"{source.path}: block offsets that are not those of its random stream; the delta is "
            "damaged, pack it again"
        )
    dtype = torch_dtype(source.values.dtype)
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return data, values, keep


def expand(source: Packed) -> bytearray:
    """The dense bytes of a packed source; see `Packed` for what they are."""
    import torch

    from cl_fast.merging.executors import read_stored, torch_dtype

    _, values, keep = read_packed(source)
    base = torch.frombuffer(read_stored(source.base), dtype=torch_dtype(source.base.dtype))
    data = bytearray(source.nbytes)
    out = torch.frombuffer(data, dtype=torch_dtype(source.dtype))
    if source.as_ == "parts":
        out.copy_(base)
        out[keep] = values.to(out.dtype)
        return data
    kept = base[keep].float()
    delta = (values.float() - kept) * torch.tensor(source.factor, dtype=torch.float64).float()
    if source.as_ == "model":
        out.copy_(base)
        out += 0.0  # which makes +0 of a -0
        delta = kept + delta
    else:
        out.zero_()
    out[keep] = delta
    return data


# ------------------------------------------------------------------------------------ pack


def pack_delta(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    drop_rate: float,
    seed: int = 0,
    rescale: Rescale = "l1",
    stream: str | None = None,
    threads: int | None = None,
    backend: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DeltaFile:
    """Drop elements of finetuned - base at random and write what is kept, without loading a model.

    The elements are those that `dare_linear` keeps of a model of the same name with the same seed
    and a density of 1 - drop_rate. Their values are the finetuned model's own bits. Memory is a
    few megabytes whatever the size of the model; each input is read once, and equal tensors once
    more.

    Args:
        base: folder or .safetensors file of what was finetuned.
        finetuned: likewise, with the same tensors.
        output: a .safetensors file; or a folder to make, which also gets those files beside the
            weights (config, tokenizer) in which the finetuned model differs from the base.
        drop_rate: the fraction to drop, in (0, 1).
        seed: of the random stream, as in a recipe.
        rescale: the factor on the kept deltas: "l1" (sum |d| / sum |d kept| of each tensor, the
            default of dare_linear), "keep_rate" (1 / density) or "none".
        stream: the name that keys the random stream; None: the last component of `finetuned`, as
            in a recipe. Give models that are merged with one another different ones.
        threads: None: the cores of this process (`CL_FAST_THREADS`).
        backend: "native", "eager" or None for the faster one that is there; same bytes.
        overwrite: replace an existing output.
        progress: called with "pack", bytes done, bytes in all.

    Returns:
        The header of what was written.

    Raises:
        CheckpointError: an input is missing, damaged, or they do not fit one another.
        NonFiniteError: NaN or infinity in an input.
        RecipeError: an argument out of its range.
        OutputError: the output exists, or cannot be written.
    """
    if not isinstance(drop_rate, float | int) or not 0.0 < drop_rate < 1.0:
        raise RecipeError(f"drop_rate: must be above 0 and below 1; got {drop_rate!r}")
    if rescale not in RESCALES:
        raise RecipeError(f"rescale: must be one of {', '.join(RESCALES)}; got {rescale!r}")
    threshold = keep_threshold(1.0 - drop_rate)
    if not 0 < threshold < 1 << 32:
        raise RecipeError(
            f"drop_rate: {drop_rate!r} drops {'everything' if threshold == 0 else 'nothing'}; "
            "give one between 2**-32 and 1 - 2**-32"
        )
    if stream is not None and (not stream or "\0" in stream):
        raise RecipeError(f"stream: {stream!r} names no random stream")
    target = absolute(os.fspath(output))
    plan = _plan_pack(base, finetuned, target, 1.0 - drop_rate, seed)
    packer = _Packer(
        plan,
        stream=plan.models[0] if stream is None else stream,
        threshold=threshold,
        rescale=rescale,
        core=_core(backend),
        threads=threads,
        progress=progress,
    )
    packer.metadata |= {"drop_rate": repr(float(drop_rate))}
    _check_target(plan, target, overwrite=overwrite)
    if target.suffix == ".safetensors":
        _write_file(target, packer)
    else:
        _write_folder(target, packer, _different_files(plan), overwrite=overwrite)
    return read_delta(target)


def _core(backend: str | None) -> ModuleType | None:
    from cl_fast.backends import native, native_or_say

    if backend not in (None, "native", "eager"):
        raise RecipeError(f"backend: must be native or eager; got {backend!r}")
    if backend == "eager":
        return None
    if backend == "native":
        core = native.load()
        if core is None:
            raise OutputError(f"backend 'native' is not available: {native.reason()}")
        return core
    return native_or_say()


def _plan_pack(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    target: Path,
    density: float,
    seed: int,
) -> Plan:
    """The merge that would drop the same elements: all of its checks are wanted here."""
    from cl_fast.merging.plan import make_plan
    from cl_fast.merging.recipe import parse_recipe

    for name, reference in (("base", base), ("finetuned", finetuned)):
        if is_delta(absolute(os.fspath(reference))):
            raise CheckpointError(
                f"{name}: {os.fspath(reference)!r} is a packed delta and no checkpoint; give the "
                "model itself"
            )
    recipe = {
        "merge_method": "dare_linear",
        "base_model": os.fspath(base),
        "models": [
            {"model": os.fspath(finetuned), "parameters": {"weight": 1.0, "density": density}}
        ],
        "out_dtype": "float32",
    }
    plan = make_plan(parse_recipe(recipe), target, seed=seed)
    for checkpoint in plan.inputs:
        if isinstance(checkpoint, Derived):
            raise CheckpointError(
                f"finetuned: {checkpoint.path} is {checkpoint.words} and no checkpoint; give the "
                "model itself"
            )
    return plan


def _check_target(plan: Plan, target: Path, *, overwrite: bool) -> None:
    if target.suffix != ".safetensors":
        from cl_fast.merging.engine import check_output

        return check_output(plan, overwrite=overwrite)
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise OutputError(f"{target}: is not a plain file; give another output")
    if target.exists() and not overwrite:
        raise OutputError(
            f"{target}: exists; give another output, or --overwrite to replace it once the new "
            "one is complete"
        )
    inputs = {Path(header.path).resolve() for cp in plan.inputs for header in cp.files}
    if target.resolve() in inputs:
        raise OutputError(f"{target}: is one of the inputs, which are never written to")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: there is no folder {target.parent}; make it first")
    return None


def _different_files(plan: Plan) -> list[Sidecar]:
    """What stands beside the finetuned weights and not, or otherwise, beside the base's."""
    base, tuned = plan.inputs
    found, _ = plan_sidecars(tuned, tuned.folder, None)
    differ = []
    for sidecar in found:
        content = sidecar.content or sidecar.source.read_bytes()
        there = base.folder / sidecar.name
        if not there.is_file() or there.read_bytes() != content:
            differ.append(sidecar)
    return differ


def _write_folder(
    target: Path, packer: _Packer, files: Sequence[Sidecar], *, overwrite: bool
) -> None:
    """All or nothing, in a hidden sibling that is not that of a merge."""
    folder = OutputFolder(target)
    folder.work = folder.path.parent / f".{folder.path.name}.cl_fast-delta"
    folder.model, folder.replaced = folder.work / "model", folder.work / "replaced"
    lock = WorkLock(folder.work, folder.path)
    folder.create()
    lock.acquire()
    try:
        folder.recover()
        folder.clear()
        folder.model.mkdir()
        _write_file(folder.model / NAME, packer)
        for file in files:
            copy = folder.model / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.content or file.source.read_bytes())
        folder.publish(overwrite=overwrite, fsync=True)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise write_failure(target, error) from error
    finally:
        folder.discard()
        lock.release()


def _write_file(target: Path, packer: _Packer) -> None:
    """All or nothing: the file grows under a hidden name and is renamed when it is whole."""
    part = target.with_name(f".{target.name}.cl_fast-partial")
    try:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise write_failure(target, error) from error
    try:
        _lock(fd, target)
        try:
            os.ftruncate(fd, 0)
            packer.write(fd)
            os.fsync(fd)
            read_delta(part)
            part.replace(target)
            sync_folder(target.parent)
        except OSError as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OutputError):
                raise
            raise write_failure(target, error) from error
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    finally:
        os.close(fd)


def _lock(fd: int, target: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no flock, so no protection from a second run
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(f"{target}: another run is writing it; wait for that one") from error


class _Packer:
    """Writes the file of one delta."""

    def __init__(
        self,
        plan: Plan,
        *,
        stream: str,
        threshold: int,
        rescale: Rescale,
        core: ModuleType | None,
        threads: int | None,
        progress: Progress | None,
    ) -> None:
        from cl_fast.backends import native

        self._plan = plan
        self._stream = stream
        self._threshold = threshold
        self._rescale = rescale
        self._core = core
        self._threads = threads or native.threads()
        self._progress = progress
        self._done = 0
        self._total = sum(
            t.base.nbytes + t.terms[0].source.nbytes for t in plan.tensors if t.base is not None
        )
        self.metadata: dict[str, Any] = {
            "cl_fast": __version__,
            "stream": STREAM,
            "block": str(BLOCK),
            "seed": str(plan.seed),
            "model": stream,
            "threshold": str(threshold),
            "rescale": rescale,
        }

    def _tick(self, nbytes: int) -> None:
        self._done = min(self._total, self._done + nbytes)
        if self._progress is not None:
            self._progress("pack", self._done, self._total)

    def write(self, fd: int) -> None:
        """The whole file. The header comes last, into room that was left for it."""
        from cl_fast.merging.engine import check_inputs

        entries: dict[str, dict[str, Any]] = {}
        stored: list[tuple[int, str, str, TensorPlan]] = []
        for tensor in self._plan.tensors:
            entry, kind = self._entry(tensor)
            entries[tensor.name] = entry
            if kind == "kept":
                stored.append((64, "offsets", "I64", tensor))
                stored.append((DTYPE_BITS[entry["dtype"]], kind, entry["dtype"], tensor))
            elif kind == "whole":
                stored.append((DTYPE_BITS[entry["dtype"]], kind, entry["dtype"], tensor))
        stored.sort(key=lambda item: -item[0])  # the wider types first; stable
        shapes = {
            f"{what}/{tensor.name}": (blocks_of(tensor.numel),)
            if what == "offsets"
            else tensor.shape
            if what == "whole"
            else (tensor.numel,)
            for _, what, _, tensor in stored
        }

        def header(size: int = 0) -> bytes:
            listed = [
                (f"{what}/{tensor.name}", dtype, shapes[f"{what}/{tensor.name}"])
                for _, what, dtype, tensor in stored
            ]
            return header_of(
                [*listed, ("seal", "U8", (16,))],
                {**self.metadata, "tensors": entries},
                size=size,
            )

        # Nothing in the real header is longer than in this one.
        room = len(header())
        position = room
        places: dict[str, int] = {}
        for _, what, dtype, tensor in stored:
            name, entry = f"{what}/{tensor.name}", entries[tensor.name]
            if what == "offsets":
                places[tensor.name] = position
                position += tensor_nbytes(dtype, shapes[name])
            elif what == "whole":
                entry["crc64"] = _hex(self._copy(fd, position, tensor))
                entry["base_crc64"] = _hex(self._hash(tensor.base))
                position += tensor.nbytes
            else:
                kept = self._pack(fd, position, places[tensor.name], tensor, entry)
                shapes[name] = (kept,)
                position += tensor_nbytes(dtype, (kept,))
        check_inputs(self._plan)
        start = header(room)
        write_all(fd, start, 0)
        write_all(fd, _digest(start), position)
        os.ftruncate(fd, position + 16)

    def _entry(self, tensor: TensorPlan) -> tuple[dict[str, Any], str]:
        """What the header says of a tensor, with numbers of full length where none is known."""
        base, tuned = tensor.base, tensor.terms[0].source
        assert base is not None
        entry: dict[str, Any] = {
            "kind": "same",
            "dtype": tuned.dtype,
            "shape": list(tensor.shape),
            "base_dtype": base.dtype,
            "base_crc64": _hex(0),
        }
        equal, crc = self._compare(base, tuned)
        if equal:
            entry["base_crc64"] = _hex(crc)
            return entry, "same"
        if tensor.kind == "copy":
            entry |= {"kind": "whole", "crc64": _hex(0)}
            return entry, "whole"
        key = stream_key(int(self.metadata["seed"]), self._stream, tensor.name)
        entry |= {
            "kind": "kept",
            "key": f"{key:016x}",
            "factor": _LONGEST,
            "crc64": _hex(0),
            "offsets_crc64": _hex(0),
        }
        return entry, "kept"

    def _compare(self, base: Source, tuned: Source) -> tuple[bool, int]:
        """Whether both hold the same bytes, and the CRC of the base's as far as it was read."""
        if (base.dtype, base.nbytes) != (tuned.dtype, tuned.nbytes):
            return False, 0
        crc = 0
        with _Reader(base) as one, _Reader(tuned) as two:
            for start in range(0, base.nbytes, 1 << 20):
                size = min(1 << 20, base.nbytes - start)
                ours, theirs = one.read(start, size), two.read(start, size)
                if ours != theirs:
                    return False, 0
                crc = crc64(ours, crc)
        self._tick(2 * base.nbytes)
        return True, crc

    def _hash(self, source: Source | None) -> int:
        assert source is not None
        self._tick(source.nbytes)
        return crc64_of_file(source.path, source.offset, source.nbytes)

    def _copy(self, fd: int, position: int, tensor: TensorPlan) -> int:
        from cl_fast.merging.executors import read_stored

        data = read_stored(tensor.terms[0].source)
        write_all(fd, data, position)
        self._tick(len(data))
        return crc64(data)

    def _pack(
        self, fd: int, position: int, offsets_at: int, tensor: TensorPlan, entry: dict[str, Any]
    ) -> int:
        """Writes the values and offsets of a tensor; fills in its entry. How many were kept."""
        key = int(entry["key"], 16)
        item = DTYPE_BITS[entry["dtype"]] // 8
        base_crc = crc = kept = 0
        every = some = 0.0
        counts = array.array("q", [0])
        runs = self._native_runs if self._core is not None else self._eager_runs
        for ours, values, in_blocks, sums in runs(tensor, key):
            base_crc, crc = crc64(ours, base_crc), crc64(values, crc)
            write_all(fd, values, position + kept * item)
            for count in in_blocks:
                kept += count
                counts.append(kept)
            every, some = sums
        if every - every != 0.0:
            raise NonFiniteError(
                f"tensor {tensor.name}: the difference of {tensor.terms[0].source.path} and its "
                "base holds NaN or infinite values, or its sum overflows; repair the models"
            )
        entry["factor"] = _factor(self._rescale, self._threshold, every, some)
        if sys.byteorder != "little":
            counts.byteswap()
        table = counts.tobytes()
        write_all(fd, table, offsets_at)
        entry |= {
            "base_crc64": _hex(base_crc),
            "crc64": _hex(crc),
            "offsets_crc64": _hex(crc64(table)),
        }
        return kept

    def _native_runs(self, tensor: TensorPlan, key: int) -> Iterator[_Run]:
        import ctypes

        core, tuned, base = self._core, tensor.terms[0].source, tensor.base
        assert core is not None
        assert base is not None
        item, base_item = DTYPES[tuned.dtype], DTYPES[base.dtype]
        values = bytearray(min(_RUN, tensor.numel) * item)
        counts = array.array("q", bytes(8 * (_RUN // BLOCK)))

        def address(buffer: Any) -> int:
            return ctypes.addressof(ctypes.c_char.from_buffer(buffer))

        starts = range(0, tensor.numel, _RUN)
        every = some = 0.0
        with (
            _Reader(tuned) as theirs,
            _Reader(base) as ours,
            ThreadPoolExecutor(1, "cl_fast pack") as ahead,
        ):

            def read(start: int) -> tuple[bytearray, bytearray]:
                n = min(_RUN, tensor.numel - start)
                return theirs.read(start * item, n * item), ours.read(
                    start * base_item, n * base_item
                )

            waiting = ahead.submit(read, 0)
            for start in starts:
                x, b = waiting.result()
                if start + _RUN < tensor.numel:
                    waiting = ahead.submit(read, start + _RUN)
                n = min(_RUN, tensor.numel - start)
                kept, every, some = core.pack_run(
                    x=(tuned.dtype, address(x)),
                    base=(base.dtype, address(b)),
                    key=key,
                    threshold=self._threshold,
                    first=start,
                    n=n,
                    values_ptr=address(values),
                    counts_ptr=address(counts),
                    all=every,
                    kept=some,
                    threads=self._threads,
                )
                yield b, memoryview(values)[: kept * item], counts[: -(-n // BLOCK)], (every, some)
                self._tick(len(x) + len(b))

    def _eager_runs(self, tensor: TensorPlan, key: int) -> Iterator[_Run]:
        import torch

        from cl_fast.merging.executors import read_stored, torch_dtype
        from cl_fast.ops.dropping import absolute_sum, keep_mask, signed_key

        tuned, base = tensor.terms[0].source, tensor.base
        assert base is not None
        x, b = read_stored(tuned), read_stored(base)
        mine = torch.frombuffer(x, dtype=torch_dtype(tuned.dtype))
        delta = mine.float() - torch.frombuffer(b, dtype=torch_dtype(base.dtype)).float()
        keep = keep_mask(signed_key(key), tensor.numel, self._threshold)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[mine.element_size()]
        kept = mine.view(bits)[keep]
        values = bytearray(kept.numel() * kept.element_size())
        if values:
            torch.frombuffer(values, dtype=bits).copy_(kept)
        padded = torch.nn.functional.pad(keep, (0, -tensor.numel % BLOCK)).view(-1, BLOCK)
        sums = absolute_sum(delta), absolute_sum(torch.where(keep, delta, 0.0))
        yield b, memoryview(values), padded.sum(1).tolist(), sums
        self._tick(len(x) + len(b))


class _Reader:
    """Pieces of one stored tensor."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __enter__(self) -> _Reader:
        self._fd = -1
        if not isinstance(self._source, Fetched):
            self._fd = os.open(self._source.path, os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, start: int, nbytes: int) -> bytearray:
        if isinstance(self._source, Fetched):
            return replace(self._source, offset=self._source.offset + start, nbytes=nbytes).make()
        data = bytearray(nbytes)
        view, done = memoryview(data), 0
        while done < nbytes:
            got = os.preadv(self._fd, [view[done:]], self._source.offset + start + done)
            if got == 0:
                raise CheckpointError(
                    f"{self._source.path}: ended before a tensor does; it is truncated or was "
                    "changed while it was read"
                )
            done += got
        return data


def _factor(rescale: str, threshold: int, every: float, some: float) -> float:
    """r, as a drop in a merge has it."""
    if rescale == "keep_rate":
        return 2.0**32 / threshold
    if rescale == "l1":
        return 1.0 if every < 1e-7 or some < 1e-7 else every / some
    return 1.0


def _hex(crc: int) -> str:
    return f"{crc:016x}"


def _digest(data: bytes) -> bytes:
    from hashlib import blake2b

    return blake2b(data, digest_size=16).digest()


# ----------------------------------------------------------------------- apply and unpack


def plan_delta(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    out_shard_size: int = 5_000_000_000,
    out_dtype: str | None = None,
    threads: int | None = None,
    memory: int | None = None,
) -> Plan:
    """What `apply_delta` will do; nothing is written. Arguments and errors are its own."""
    from cl_fast.merging.plan import plan_change

    read_delta(absolute(os.fspath(delta)))
    return plan_change(
        base,
        delta,
        output,
        out_shard_size=out_shard_size,
        out_dtype=out_dtype,
        threads=threads,
        memory=memory,
    )


def apply_delta(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    out_shard_size: int = 5_000_000_000,
    out_dtype: str | None = None,
    **options: Any,
) -> Result:
    """Write base + delta as a checkpoint, without loading a model.

    The result has the bits of `dare_linear` with the one finetuned model, weight 1, and the seed,
    drop rate and rescaling of the packing. Tensors that did not change are copied byte for byte.
    It is the merge

        merge_method: task_arithmetic
        base_model: BASE
        models:
          - model: math.delta.safetensors
            parameters: {weight: 1.0}

    with all that the engine promises: nothing is at `output` before it is whole, an interrupted
    run goes on with resume=True, and `cl-fast verify` checks the result.

    Args:
        base: folder or .safetensors file of what the delta was packed on.
        delta: what `pack_delta` wrote.
        output: the folder to make.
        out_shard_size: bytes of tensors per output file.
        out_dtype: "bfloat16", "float16" or "float32"; by default each tensor keeps the base's.
        options: of `execute`: resume, restart, overwrite, threads, memory, progress, ...

    Raises:
        CheckpointError: the delta is for another base, or one of the files is damaged; nothing is
            at the output.
        OutputError, NonFiniteError, Interrupted, ValueError: see `execute`.
    """
    from cl_fast.merging.engine import execute

    plan = plan_delta(
        base,
        delta,
        output,
        out_shard_size=out_shard_size,
        out_dtype=out_dtype,
        threads=options.get("threads"),
        memory=options.get("memory"),
    )
    return execute(plan, **options)


def unpack_delta(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    out_dtype: str = "float32",
    threads: int | None = None,
    backend: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the dense delta itself, as one .safetensors file.

        y_i = keep_i ? (float32(x_p) - float32(base_i)) * float32(r) : 0

    one tensor for each that changed, rounded once to `out_dtype`. It is no model: base + y is what
    `apply_delta` writes. Tensors that equal the base's are left out (their delta is 0), and those
    that are not of a floating type (they have none).

    Args:
        base: folder or .safetensors file of what the delta was packed on.
        delta: what `pack_delta` wrote.
        output: a .safetensors file.
        out_dtype: "float32", "bfloat16" or "float16".
        threads, backend, overwrite, progress: as in `pack_delta`.

    Returns:
        The file.

    Raises:
        CheckpointError: the delta is for another base, or one of the files is damaged.
        NonFiniteError, RecipeError, OutputError: as `pack_delta`.
    """
    from cl_fast.checkpoints.safetensors import build_header
    from cl_fast.checkpoints.sidecar import TORCH_NAMES
    from cl_fast.merging.executors import make_executor
    from cl_fast.merging.output import allocate
    from cl_fast.merging.plan import ShardPlan, TensorPlan, Term
    from cl_fast.ops.policy import Policy

    dtypes = {word: name for name, word in TORCH_NAMES.items()}
    if out_dtype not in dtypes:
        raise RecipeError(f"out_dtype: must be one of {', '.join(dtypes)}; got {out_dtype!r}")
    target = absolute(os.fspath(output))
    if target.suffix != ".safetensors":
        raise OutputError(f"{target}: a dense delta is one file; give a name in .safetensors")
    below = Checkpoint.open(base, key="base")
    opened = open_delta(below, os.fspath(delta), key="delta")
    opened = opened.dense()
    listed = [tensor for tensor in opened.delta.tensors.values() if tensor.kind == "kept"]
    dtype = dtypes[out_dtype]
    header, offsets, size = build_header(
        ((tensor.name, dtype, tensor.shape) for tensor in listed),
        {"format": "pt", "cl_fast": __version__, "delta_of": str(opened.path)},
    )
    tensors = tuple(
        TensorPlan(
            name=tensor.name,
            shape=tensor.shape,
            dtype=dtype,
            shard=0,
            offset=offset,
            nbytes=tensor_nbytes(dtype, tensor.shape),
            kind="combine",
            base=None,
            terms=(Term(opened.delta.model, _dense_delta(opened, tensor), 1.0, 1.0, 0),),
            policy=Policy(difference=False),
            lam=1.0,
        )
        for tensor, offset in zip(listed, offsets, strict=True)
    )
    plan = replace(
        plan_delta(base, delta, target.with_suffix(".cl_fast-unpacked"), out_dtype=out_dtype),
        tensors=tensors,
        shards=(ShardPlan(target.name, header, size, tuple(range(len(tensors)))),),
        inputs=(below, opened),
        bases=0,
    )
    _check_target(plan, target, overwrite=overwrite)
    opened.check()
    executor = make_executor(
        plan, backend=backend, threads=threads, memory=None, io="auto", nan="refuse"
    )
    done, total = 0, sum(t.nbytes + t.terms[0].source.stored for t in tensors)

    def tick(nbytes: int) -> None:
        nonlocal done
        done = min(total, done + nbytes)
        if progress is not None:
            progress("unpack", done, total)

    part = target.with_name(f".{target.name}.cl_fast-partial")
    part.unlink(missing_ok=True)
    try:
        allocate(part, size)
        with part.open("r+b") as file:
            file.write(header)
        executor.write(tensors, part, None, tick)
        sync_file(part)
        part.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OutputError):
            raise
        raise write_failure(target, error, size) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return target


def _dense_delta(opened: DeltaCheckpoint, tensor: DeltaTensor) -> Packed:
    source = opened.source(tensor.name)
    assert isinstance(source, Packed)
    return replace(source.as_model(), as_="delta")
