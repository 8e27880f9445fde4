"""Edit patches in merges: a patch is the model "base + U V^T"; most of its tensors are the base's.

In a plan a patch looks like a checkpoint that shares its base's stored tensors. Those that it edits
are `Patched` sources, which no file holds: the executor makes each when its turn comes, on the CPU,
in float32, by the very function that `Patch.apply` uses, and frees it again. So a patch takes part
in a merge as any finetuned model does, and nothing but the output is written.

A patch alone, added to its base with weight 1, is not merged but applied: the edited weights are
rounded once, from the sum, and all other tensors are copied byte for byte.

The layers' hashes are compared with the base, and the patch's data with their own hash, before
anything is written.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from cl_fast.checkpoints.checkpoint import Checkpoint, absolute
from cl_fast.checkpoints.patches import (
    PatchFile,
    StoredLayer,
    check_content,
    hash_stored,
    is_patch,
    read_patch,
    stored_name,
)
from cl_fast.checkpoints.safetensors import Header, TensorInfo, tensor_nbytes
from cl_fast.errors import CheckpointError, OutputError
from cl_fast.merging.inputs import Derived, source_of
from cl_fast.merging.sources import Made, Source

if TYPE_CHECKING:
    from cl_fast.merging.engine import Result
    from cl_fast.merging.plan import Plan

__all__ = [
    "Patched",
    "PatchedCheckpoint",
    "apply_patch",
    "is_patch",
    "make",
    "open_patch",
    "own",
    "plan_patch",
]

_EDITABLE = ("F32", "BF16", "F16")

#: The blocks in which a patch is put on its base.
_BLOCK_BYTES = 40_000_000


@dataclass(frozen=True, slots=True)
class Patched(Made):
    """A tensor that no file holds: a stored weight with the factors of a patch on it.

    ``base + u v^T`` of ``shape``, rounded to ``dtype``; ``u`` and ``v`` are such that it is, also
    where the patch has them the other way round. ``path`` is the patch's file. The executor makes
    it when it is needed, whole.
    """

    shape: tuple[int, int]
    rank: int
    base: Source
    u: Source
    v: Source

    @property
    def stored(self) -> int:
        return self.base.nbytes + self.u.nbytes + self.v.nbytes

    @property
    def memory(self) -> int:
        """Bytes that making it takes: itself, its base, float32 sums, the factors in parts."""
        m, n = self.shape
        factors = 8 * (m + n) * self.rank
        return self.nbytes + self.base.nbytes + 4 * m * n + 5 * factors + _BLOCK_BYTES

    def rounded(self, dtype: str) -> Patched:
        return replace(self, dtype=dtype, nbytes=tensor_nbytes(dtype, self.shape))

    def make(self, threads: int | None = None) -> bytearray:
        """Its bytes; see the function `make`."""
        return make(self, threads)


@dataclass(frozen=True, slots=True)
class PatchedCheckpoint(Derived):
    """A base with a patch on it, as far as headers tell.

    Attributes:
        base: the checkpoint below.
        patch: the file of the patch.
        edited: stored tensor -> layer of the patch. `tensors` says of these what they will be.
    """

    patch: PatchFile
    edited: dict[str, StoredLayer]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, keys and targets in the patch's file."""
        return sum(info.nbytes for info in self.patch.header.tensors.values())

    @property
    def role(self) -> str:
        return "patch"

    @property
    def content(self) -> str:
        return self.patch.content

    @property
    def words(self) -> str:
        """What it is, for people."""
        count, layers = len(self.patch.facts), len(self.edited)
        method = f"{self.patch.method}, " if self.patch.method else ""
        return (
            f"patch ({method}{count} fact{'' if count == 1 else 's'} in {layers} "
            f"layer{'' if layers == 1 else 's'})"
        )

    @classmethod
    def over(cls, base: Checkpoint, reference: str, *, key: str) -> PatchedCheckpoint:
        """A patch file on its base. `key` is the recipe key that named it, for messages.

        Raises:
            CheckpointError: the file is damaged, or the base lacks a layer of it, holds it in
                another shape, or quantised.
        """
        path = absolute(reference)
        patch = read_patch(path)
        tensors = dict(base.tensors)
        edited: dict[str, StoredLayer] = {}
        for layer in patch.layers:
            name = stored_name(layer.weight_name, base.tensors)
            if name is None:
                close = difflib.get_close_matches(layer.weight_name, list(base.tensors), 1, 0.0)
                raise CheckpointError(
                    f"{key}: {path} edits {layer.weight_name!r}, which {base.path} does not have"
                    + (f" (it has {close[0]!r})" if close else "")
                    + "; a patch goes on the checkpoint that it was fitted on"
                )
            stored = base.tensors[name]
            if stored.dtype not in _EDITABLE:
                raise CheckpointError(
                    f"{key}: {path} edits {name!r}, which {stored.path} stores as {stored.dtype}; "
                    f"a patch goes on weights of {', '.join(_EDITABLE)}: convert the checkpoint "
                    "first"
                )
            if stored.shape != layer.shape:
                raise CheckpointError(
                    f"{key}: {path} edits {name!r} of shape {list(layer.shape)}, in {base.path} "
                    f"it has {list(stored.shape)}; a patch goes on the checkpoint that it was "
                    "fitted on"
                )
            edited[name] = layer
            tensors[name] = TensorInfo(
                name, "F32", stored.shape, str(path), 0, 4 * prod(stored.shape)
            )
        return cls(reference, path, (patch.header,), tensors, None, base, patch, edited)

    def source(self, name: str) -> Source:
        """The stored tensor of the base, or what the patch makes of it."""
        if name not in self.edited:
            return source_of(self.base, name)
        layer, info = self.edited[name], self.tensors[name]
        u, v = Source.of(layer.u), Source.of(layer.v)
        if layer.transposed:
            u, v = v, u
        return Patched(
            path=info.path,
            offset=0,
            dtype=info.dtype,
            nbytes=info.nbytes,
            shape=layer.shape,
            rank=layer.rank,
            base=source_of(self.base, name),
            u=u,
            v=v,
        )

    def check(self) -> None:
        """Compare the patch's data, and the weights that it edits, with the hashes.

        Raises:
            CheckpointError: its data are not those that were saved, or it was fitted on another
                base.
        """
        check_content(self.patch)
        for name, layer in self.edited.items():
            info = self.base.tensors[name]
            found = hash_stored(info)
            if found != layer.base_hash:
                raise CheckpointError(
                    f"{self.path} is for another base: tensor {name!r} of {info.path} is "
                    f"not the weight that it was fitted on (hash {found}, the patch says "
                    f"{layer.base_hash}); give the checkpoint that was edited, or fit the facts "
                    "on this one"
                )


def open_patch(base: Checkpoint, reference: str, *, key: str) -> PatchedCheckpoint:
    """A patch file on its base; see `PatchedCheckpoint.over`."""
    return PatchedCheckpoint.over(base, reference, key=key)


def own(path: os.PathLike[str]) -> tuple[tuple[Header, ...], str]:
    """The header of a patch's file, and the hash of its data, which are read and compared with it.

    Raises:
        CheckpointError: the file is damaged.
    """
    patch = read_patch(path)
    check_content(patch)
    return (patch.header,), patch.content


def make(source: Patched, threads: int | None = None) -> bytearray:
    """The bytes of a tensor that no file holds.

    Raises:
        OutputError: torch is not installed.
        CheckpointError: a file ended early, or its factors hold NaN.
    """
    try:
        import torch
    except ImportError as error:
        raise OutputError(
            f"{source.path}: torch, which puts a patch on its base, is not installed"
        ) from error
    from cl_fast.merging.executors import torch_dtype
    from cl_fast.merging.factors import torch_load
    from cl_fast.ops.reproducible import reproducible_update_

    if threads is not None:
        torch.set_num_threads(threads)
    rows, columns = source.shape
    data = bytearray(source.nbytes)
    weight = torch.frombuffer(data, dtype=torch_dtype(source.dtype)).reshape(rows, columns)
    base = torch_load(source.base, rows, columns)
    # As `Patch.apply` does: the factors count as float32.
    u = torch_load(source.u, rows, source.rank).float()
    v = torch_load(source.v, columns, source.rank).float()
    try:
        reproducible_update_(weight, u, v, base=base)
    except ValueError as error:
        raise CheckpointError(f"{source.path}: {error}; save the patch again") from error
    return data


def plan_patch(
    base: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    out_shard_size: int = 5_000_000_000,
    out_dtype: str | None = None,
    threads: int | None = None,
    memory: int | None = None,
) -> Plan:
    """What `apply_patch` will do; nothing is written. Arguments and errors are its own."""
    from cl_fast.merging.plan import plan_change

    if not is_patch(absolute(os.fspath(patch))):
        read_patch(absolute(os.fspath(patch)))  # raises, and says why it is none
        raise CheckpointError(f"{patch}: a patch is one .safetensors file")
    return plan_change(
        base,
        patch,
        output,
        out_shard_size=out_shard_size,
        out_dtype=out_dtype,
        threads=threads,
        memory=memory,
    )


def apply_patch(
    base: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    out_shard_size: int = 5_000_000_000,
    out_dtype: str | None = None,
    **options: Any,
) -> Result:
    """Writes a checkpoint with a patch on it, without loading the model.

    The edited weights have the bits that `patch.apply()` gives on the CPU, all other tensors are
    copied byte for byte, and config and tokenizer come along. It is the merge

        merge_method: task_arithmetic
        base_model: BASE
        models:
          - model: edits.safetensors
            parameters: {weight: 1.0}

    with all that the engine promises: nothing is at `output` before it is whole, an interrupted
    run goes on with resume=True, and `cl-fast verify` checks the result.

    Args:
        base: folder or .safetensors file of the checkpoint that was edited.
        patch: what `Patch.save` wrote.
        output: the folder to make.
        out_shard_size: bytes of tensors per output file.
        out_dtype: "bfloat16", "float16" or "float32"; by default each tensor keeps its own.
        options: of `execute`: resume, restart, overwrite, threads, memory, progress, ...

    Raises:
        CheckpointError: the patch is for another base, or one of the files is damaged; nothing
            was written.
        OutputError, NonFiniteError, Interrupted, ValueError: see `execute`.
    """
    from cl_fast.merging.engine import execute

    plan = plan_patch(
        base,
        patch,
        output,
        out_shard_size=out_shard_size,
        out_dtype=out_dtype,
        threads=options.get("threads"),
        memory=options.get("memory"),
    )
    return execute(plan, **options)
