"""Where a tensor of an input comes from: bytes of a file, or something that is made from them.

A :class:`Source` is a stored tensor. A :class:`Made` source is one that no file holds (a weight
with a patch on it, say): the executor makes it whole when its turn comes, hands it to the merge as
if it had been stored, and frees it. Both are values: hashable, comparable, cheap to send elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cl_fast.checkpoints.safetensors import TensorInfo
    from cl_fast.merging.plan import TensorPlan

__all__ = ["Made", "Source", "made"]


@dataclass(frozen=True, slots=True)
class Source:
    """One stored tensor of an input: ``nbytes`` bytes at absolute ``offset`` of file ``path``.

    ``dtype`` is the safetensors name (``BF16``, ``F32``, ...).
    """

    path: str
    offset: int
    dtype: str
    nbytes: int

    @property
    def stored(self) -> int:
        """Bytes that are read for it."""
        return self.nbytes

    @classmethod
    def of(cls, info: TensorInfo) -> Source:
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


def made(tensor: TensorPlan) -> list[Made]:
    """The sources of a tensor, its base's too, that must be made first."""
    listed = [tensor.base, *(term.source for term in tensor.terms)]
    return [source for source in listed if isinstance(source, Made)]
