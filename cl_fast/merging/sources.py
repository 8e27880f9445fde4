"""Where a tensor of an input comes from: bytes of a file, or something that is made from them.

A :class:`Source` is a stored tensor. A :class:`Made` source is one that no file holds (a weight
with a patch on it, say): the executor makes it whole when its turn comes, hands it to the merge as
if it had been stored, and frees it. A :class:`Packed` source is made from kept values, which the
core does tile by tile. All are values: hashable, comparable, cheap to send elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cl_fast.checkpoints.safetensors import TensorInfo
    from cl_fast.merging.plan import TensorPlan

__all__ = ["READ_AHEAD", "Fetched", "Made", "Packed", "PackedAs", "Source", "made", "made_whole"]

PackedAs = Literal["parts", "model", "delta"]

READ_AHEAD = 256_000_000
"""Most bytes of tensors at URLs that are fetched before their turn, if memory is not bounded."""


@dataclass(frozen=True, slots=True)
class Source:
    """One stored tensor of an input: ``nbytes`` bytes at absolute ``offset`` of file ``path``.

    ``dtype`` is the safetensors name (``BF16``, ``F32``, ...). ``crc64`` is what a packed delta
    says that the CRC-64 of the bytes is: the merge compares while it reads. ``None``: nobody says.
    """

    path: str
    offset: int
    dtype: str
    nbytes: int
    crc64: int | None = field(default=None, compare=False, kw_only=True)

    @property
    def stored(self) -> int:
        """Bytes that are read for it."""
        return self.nbytes

    @classmethod
    def of(cls, info: TensorInfo) -> Source:
        if "://" in info.path:
            return Fetched(info.path, info.offset, info.dtype, info.nbytes)
        return Source(info.path, info.offset, info.dtype, info.nbytes)


@dataclass(frozen=True, slots=True)
class Made(Source):
    """A tensor that no file holds: ``nbytes`` bytes of type ``dtype``, from :meth:`make`.

    ``path`` is the file that errors about it should name; ``offset`` has no meaning.
    """

    @property
    def stored(self) -> int:
        raise TypeError("a Made source says itself what is read for it")

    @property
    def memory(self) -> int:
        """Peak bytes that making it takes, itself included."""
        raise TypeError("a Made source says itself what making it takes")

    @property
    def streamed(self) -> bool:
        """Whether the core makes it tile by tile, and never needs it whole."""
        return False

    def rounded(self, dtype: str) -> Made | None:
        """The same in another type, rounded once; ``None`` where that is not possible."""
        return None

    def make(self, threads: int | None = None) -> bytearray:
        """Its bytes; the same for any number of ``threads``.

        Raises:
            OutputError: what makes it is not installed.
            CheckpointError: a file that it is made from ended early, or holds what it must not.
        """
        raise TypeError("a Made source says itself how it is made")


@dataclass(frozen=True, slots=True)
class Fetched(Made):
    """A stored tensor of a file at a URL, ``path``: fetched by its range, ahead of its turn."""

    @property
    def stored(self) -> int:
        return self.nbytes

    @property
    def memory(self) -> int:
        return self.nbytes

    def make(self, threads: int | None = None) -> bytearray:
        """See `Made`. Raises CheckpointError where the store cannot be read."""
        from cl_fast.checkpoints.remote import fetch

        return fetch(self.path, self.offset, self.nbytes)


@dataclass(frozen=True, slots=True)
class Packed(Made):
    """A tensor of a packed delta: kept ``values`` on a ``base``, where the random stream says.

    ``crc64`` is that of the values. ``as_`` says what the dense tensor is:

    ``parts``   the kept values, elsewhere the base's; its delta is multiplied by ``factor`` where
                it is used. Of their common type, or F32 where values and base differ
    ``model``   base + factor * (value - base), in F32
    ``delta``   factor * (value - base), 0 where dropped, in F32

    ``blocks`` are the offsets (docs/delta-format.md), with their own checksum.
    """

    values: Source
    blocks: Source
    base: Source
    numel: int
    key: int
    threshold: int
    factor: float
    as_: PackedAs

    @property
    def stored(self) -> int:
        return self.values.nbytes + self.blocks.nbytes + (self.base.nbytes if self.apart else 0)

    @property
    def apart(self) -> bool:
        """Whether its base is read for it alone, and not for the merge in any case."""
        return self.as_ != "parts"

    @property
    def memory(self) -> int:
        """What making it whole takes; the core does not need to."""
        return self.nbytes + self.values.nbytes + self.base.nbytes + 9 * self.numel

    @property
    def streamed(self) -> bool:
        return True

    def as_model(self) -> Packed:
        """The same for a method that combines models and not their deltas."""
        return replace(self, dtype="F32", nbytes=4 * self.numel, as_="model")

    def make(self, threads: int | None = None) -> bytearray:
        """Its bytes, dense."""
        from cl_fast.merging.deltas import expand

        return expand(self)


def made_whole(tensor: TensorPlan) -> list[Made]:
    """Those of `made` that the core cannot make tile by tile, and pieces that it cannot read."""
    listed: list[Made] = []
    for source in made(tensor):
        if isinstance(source, Packed):
            listed += [s for s in (source.values, source.base) if isinstance(s, Fetched)]
        elif not source.streamed:
            listed.append(source)
    return listed


def made(tensor: TensorPlan) -> list[Made]:
    """The sources of a tensor, its base's too, that must be made first."""
    listed = [tensor.base, *(term.source for term in tensor.terms)]
    return [source for source in listed if isinstance(source, Made)]
