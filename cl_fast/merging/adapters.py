"""LoRA adapters in merges: an adapter is the model "base + s B A"; all else is the base's.

In a plan an adapter looks like a checkpoint that shares its base's stored tensors. The weights that
it adapts are `Adapted` sources, which no file holds: each is made when its turn comes, whole, in
float32,

    W = round(W0 + s B A)        or  W0 + s (B A)^T  where the weight is stored as [in, out]

with bits that depend on nothing but the numbers (`cl_fast.ops.reproducible`), and freed again. What
modules_to_save or trained biases replace is read from the adapter's file. So nothing but the output
is written, and resume, verify and the manifest treat an adapter as any other input.

An adapter alone, added to its base with weight 1, is not merged but applied: the adapted weights
are rounded once, from the sum, and all other tensors are copied byte for byte.

`BASE+ADAPTER` is an adapter on a base of its own, which any method takes, also one without deltas.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from cl_fast.checkpoints.adapters import (
    CONFIG_NAME,
    AdapterFile,
    Place,
    places,
    read_adapter,
)
from cl_fast.checkpoints.checkpoint import Checkpoint, absolute
from cl_fast.checkpoints.patches import hash_stored
from cl_fast.checkpoints.safetensors import Header, TensorInfo, tensor_nbytes
from cl_fast.errors import CheckpointError, OutputError
from cl_fast.merging.inputs import Derived, source_of
from cl_fast.merging.sources import Made, Source

__all__ = ["Adapted", "AdaptedBias", "AdaptedCheckpoint", "open_adapter", "own"]

#: The blocks in which factors are put on their base.
_BLOCK_BYTES = 40_000_000
_PIECE = 4 << 20


@dataclass(frozen=True, slots=True)
class Adapted(Made):
    """A stored weight with the factors of an adapter on it, rounded to ``dtype``.

    ``base + scale b a`` of ``shape``, with ``a`` [rank, in] and ``b`` [out, rank] as the adapter
    stores them, or its transpose. ``path`` is the adapter's file.
    """

    shape: tuple[int, int]
    rank: int
    scale: float
    transposed: bool
    base: Source
    a: Source
    b: Source

    @property
    def stored(self) -> int:
        return self.base.nbytes + self.a.nbytes + self.b.nbytes

    @property
    def memory(self) -> int:
        """Bytes that making it takes: itself, its base, float32 sums, the factors in parts."""
        m, n = self.shape
        factors = 8 * (m + n) * self.rank
        return self.nbytes + self.base.nbytes + 4 * m * n + 5 * factors + _BLOCK_BYTES

    def rounded(self, dtype: str) -> Adapted:
        return replace(self, dtype=dtype, nbytes=tensor_nbytes(dtype, self.shape))

    def make(self, threads: int | None = None) -> bytearray:
        torch = _torch(self.path)
        from cl_fast.merging.executors import torch_dtype
        from cl_fast.merging.factors import torch_load
        from cl_fast.ops.reproducible import reproducible_update_

        if threads is not None:
            torch.set_num_threads(threads)
        m, n = self.shape
        data = bytearray(self.nbytes)
        weight = torch.frombuffer(data, dtype=torch_dtype(self.dtype)).reshape(m, n)
        out, inner = (n, m) if self.transposed else (m, n)
        a = torch_load(self.a, self.rank, inner).double().t()
        b = torch_load(self.b, out, self.rank).double() * self.scale
        u, v = (a, b) if self.transposed else (b, a)
        try:
            reproducible_update_(weight, u, v, base=torch_load(self.base, m, n))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: the factors hold NaN or infinity") from error
        return data


@dataclass(frozen=True, slots=True)
class AdaptedBias(Made):
    """A stored bias with that of an adapter's B on it: ``base + scale bias``."""

    shape: tuple[int]
    scale: float
    base: Source
    bias: Source

    @property
    def stored(self) -> int:
        return self.base.nbytes + self.bias.nbytes

    @property
    def memory(self) -> int:
        return self.nbytes + self.base.nbytes + 24 * self.shape[0]

    def rounded(self, dtype: str) -> AdaptedBias:
        return replace(self, dtype=dtype, nbytes=tensor_nbytes(dtype, self.shape))

    def make(self, threads: int | None = None) -> bytearray:
        torch = _torch(self.path)
        from cl_fast.merging.executors import torch_dtype
        from cl_fast.merging.factors import torch_load

        data = bytearray(self.nbytes)
        result = torch.frombuffer(data, dtype=torch_dtype(self.dtype))
        total = torch_load(self.base, *self.shape).double()
        total += torch_load(self.bias, *self.shape).double() * self.scale
        result.copy_(total.float())
        return data


def _torch(path: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise OutputError(
            f"{path}: torch, which puts an adapter on its base, is not installed"
        ) from error
    return torch


@dataclass(frozen=True, slots=True)
class AdaptedCheckpoint(Derived):
    """A base with an adapter on it, as far as headers tell.

    Attributes:
        base: the checkpoint below.
        adapter: the files of the adapter.
        adapted: stored weight -> where and how the adapter changes it.
        biases: stored bias -> the module whose B has one.
        replaced: stored tensor -> the adapter's own.
        whole: whether it is a model of its own, BASE+ADAPTER.
    """

    adapter: AdapterFile
    adapted: dict[str, Place]
    biases: dict[str, Place]
    replaced: dict[str, TensorInfo]
    whole: bool = False

    @property
    def pair(self) -> bool:
        return self.whole

    @property
    def content(self) -> str:
        return content_hash(self.adapter)

    @property
    def folder(self) -> Path:
        """Where config and tokenizer are looked for: with the base, which has them."""
        return self.base.folder if self.pair else self.path

    def alone(self, reference: str) -> AdaptedCheckpoint:
        """As a model of its own: what the adapter changes is rounded to the base's types."""
        changed = {
            name: info._replace(
                dtype=self.base.tensors[name].dtype, nbytes=self.base.tensors[name].nbytes
            )
            for name, info in self.tensors.items()
            if name in self.adapted or name in self.biases
        }
        return replace(
            self,
            reference=reference,
            files=(*self.files, *self.base.files),
            tensors={**self.tensors, **changed},
            config=self.base.config,
            whole=True,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's tensors."""
        return self.adapter.nbytes

    @property
    def role(self) -> str:
        return "adapter"

    @property
    def words(self) -> str:
        """What it is, for people."""
        return self.adapter.words

    @property
    def notes(self) -> tuple[str, ...]:
        said = self.adapter.base_name
        if said is None or self._named_base() is not None:  # `check` compares them
            return ()
        config = self.base.config or {}
        known = {self.base.path.name, Path(str(config.get("_name_or_path", ""))).name}
        name = Path(said.rstrip("/")).name
        if name in known:
            return ()
        return (
            f"{self.path} says that it was trained on {said!r}; whether {self.base.path} is that "
            "model cannot be told from here, its shapes fit",
        )

    @classmethod
    def over(cls, base: Checkpoint, reference: str, *, key: str) -> AdaptedCheckpoint:
        """An adapter's folder on its base. `key` is the recipe key that named it, for messages.

        Raises:
            CheckpointError: the adapter is damaged, of a kind that is not understood, or for
                another base.
        """
        adapter = read_adapter(reference, key=key)
        try:
            found, replaced = places(adapter, base)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from None
        tensors = dict(base.tensors)
        adapted = {place.name: place for place in found}
        biases = {place.bias: place for place in found if place.bias is not None}
        if len(adapted) < len(found):
            raise CheckpointError(
                f"{key}: two modules of {adapter.path} are for one weight of {base.path}"
            )
        for name in [*adapted, *biases]:
            shape = base.tensors[name].shape
            path = adapter.header.path
            tensors[name] = TensorInfo(name, "F32", shape, path, 0, 4 * prod(shape))
        for name, info in replaced.items():
            tensors[name] = info._replace(name=name)
        return cls(
            reference, adapter.path, (adapter.header, _config_header(adapter)), tensors, None,
            base, adapter, adapted, biases, replaced,
        )  # fmt: skip

    def source(self, name: str) -> Source:
        """The base's stored tensor, the adapter's own, or what the factors make of it."""
        if name in self.adapted:
            place = self.adapted[name]
            module = place.module
            base = source_of(self.base, name) if module.weight is None else Source.of(module.weight)
            info = self.tensors[name]
            return Adapted(
                path=info.path,
                offset=0,
                dtype=info.dtype,
                nbytes=info.nbytes,
                shape=(info.shape[0], info.shape[1]),
                rank=module.rank,
                scale=module.scale,
                transposed=place.transposed,
                base=base,
                a=Source.of(module.a),
                b=Source.of(module.b),
            )
        if name in self.biases:
            module, info = self.biases[name].module, self.tensors[name]
            assert module.bias is not None
            below = self.replaced.get(name)
            return AdaptedBias(
                path=info.path,
                offset=0,
                dtype=info.dtype,
                nbytes=info.nbytes,
                shape=(info.shape[0],),
                scale=module.scale,
                base=source_of(self.base, name) if below is None else Source.of(below),
                bias=Source.of(module.bias),
            )
        if name in self.replaced:
            return Source.of(self.replaced[name])
        return source_of(self.base, name)

    def _named_base(self) -> Checkpoint | None:
        """What base_model_name_or_path names, if that is a checkpoint on this machine."""
        said = self.adapter.base_name
        if said is None or not absolute(said).exists():
            return None
        try:
            return Checkpoint.open(str(absolute(said)))
        except CheckpointError:
            return None  # no checkpoint, or none any more

    def check(self) -> None:
        """Compare the adapted weights of the base with what the adapter tells of its own base.

        That is hashes, in an adapter that cl_fast extracted, or a base that
        base_model_name_or_path names and that is on this machine.

        Raises:
            CheckpointError: the adapter is for another base.
        """
        hashes = self.adapter.base_hashes
        for name, expected in hashes.items():
            info = self.base.tensors.get(name)
            if info is None or hash_stored(info) != expected:
                raise CheckpointError(
                    f"{self.path} is for another base: tensor {name!r} of {self.base.path} is not "
                    "the weight that it was extracted against"
                )
        said = self.adapter.base_name
        own_base = None if hashes else self._named_base()
        if own_base is None or own_base.path.resolve() == self.base.path.resolve():
            return
        for name in self.adapted:
            info, other = self.base.tensors[name], own_base.tensors.get(name)
            if other is not None and (
                other.shape != info.shape or hash_stored(other) != hash_stored(info)
            ):
                raise CheckpointError(
                    f"{self.path} is for another base: it was trained on {said} "
                    f"(base_model_name_or_path), whose {name!r} is not that of {self.base.path}; "
                    f"name that base, or set base_model_name_or_path in its {CONFIG_NAME} if it "
                    "is meant to go on this one"
                )


def open_adapter(base: Checkpoint, reference: str, *, key: str) -> AdaptedCheckpoint:
    """An adapter on its base; see `AdaptedCheckpoint.over`."""
    return AdaptedCheckpoint.over(base, reference, key=key)


def own(path: Path) -> tuple[tuple[Header, ...], str]:
    """The headers of an adapter's own files, and the hash of all that they hold.

    Raises:
        CheckpointError: it cannot be read.
    """
    adapter = read_adapter(path)
    return (adapter.header, _config_header(adapter)), content_hash(adapter)


def content_hash(adapter: AdapterFile) -> str:
    """blake2b (16 bytes, hex) of the bytes of config and weights."""
    hasher = hashlib.blake2b(digest_size=16)
    for file in (adapter.path / CONFIG_NAME, Path(adapter.header.path)):
        try:
            with file.open("rb") as stream:
                while piece := stream.read(_PIECE):
                    hasher.update(piece)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    return hasher.hexdigest()


def _config_header(adapter: AdapterFile) -> Header:
    """The config as a file without tensors: the scale of every factor follows from it."""
    path = adapter.path / CONFIG_NAME
    try:
        status, raw = path.stat(), path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
    return Header(str(path), {}, {}, 0, status.st_size, status.st_mtime_ns, digest)
