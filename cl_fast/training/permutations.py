"""An order of n samples that is computed where it is asked for, and never stored.

A permutation of range(n) is a generalised Feistel network (Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002) over pairs (L, R) with L, R < m = ceil(sqrt n):

    x = L m + R
    (L, R) <- (R, (L + F_k(R)) mod m)      for the round keys k = k_0 ... k_5
    F_k(R) = (h m) >> 32,  h = the upper 32 bits of z C2,  z = y ^ (y >> 32),  y = (R ^ k) C1

over integers of 64 bits that wrap. Each round can be undone, so all of it is a bijection of
range(m^2); a value of n or more is sent through again until it is smaller (cycle walking), which
leaves a bijection of range(n). m^2 < n + 2 sqrt(n) + 1, so for large n that is rare.

The round keys of a sample order follow from a seed, the name of a source, and its epoch:

    k_0 ... k_5 = blake2b(seed "\\0" source "\\0" epoch, 48 bytes, person="cl_fast order v1")

in decimal and UTF-8, read as six little-endian words. This is a shuffle, not a cipher.
"""

from __future__ import annotations

import hashlib
import math
import operator
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "Permutation", "order_key"]

LARGEST = 1 << 62
"""The largest n: m then has 31 bits, and (h m) fits into 64."""

_ROUNDS = 6
_C1, _C2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_MASK = (1 << 64) - 1
_32 = np.uint64(32)


def order_key(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    """The round keys of an order: see the head of this module."""
    text = f"{seed}\0{source}\0{epoch}".encode()
    digest = hashlib.blake2b(text, digest_size=8 * _ROUNDS, person=b"cl_fast order v1").digest()
    return struct.unpack(f"<{_ROUNDS}Q", digest)


class Permutation:
    """A bijection of range(n), in constant memory.

    Args:
        n: how many; 0 to 2**62.
        key: six words of 64 bits (`order_key`), or an int, which stands for
            `order_key(key, "", 0)`.

    Raises:
        ValueError: n is negative or too large, or a key of another length.
    """

    __slots__ = ("_keys", "_m", "n")

    def __init__(self, n: int, key: int | Sequence[int]) -> None:
        n = operator.index(n)
        if not 0 <= n <= LARGEST:
            raise ValueError(f"n must lie in [0, 2**62]; got {n}")
        keys = order_key(key, "", 0) if isinstance(key, int) else tuple(key)
        if len(keys) != _ROUNDS or not all(0 <= k <= _MASK for k in keys):
            raise ValueError(f"key must be {_ROUNDS} words of 64 bits, or an int; got {key!r}")
        self.n, self._keys = n, keys
        self._m = _root(n)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        """Where `index` goes.

        Raises:
            IndexError: it is not in range(n).
        """
        x = self._checked(index)
        m = self._m
        while True:
            left, right = divmod(x, m)
            for key in self._keys:
                left, right = right, (left + _f(right, key, m)) % m
            x = left * m + right
            if x < self.n:
                return x

    def inverse(self, index: int) -> int:
        """What goes to `index`.

        Raises:
            IndexError: it is not in range(n).
        """
        x = self._checked(index)
        m = self._m
        while True:
            left, right = divmod(x, m)
            for key in reversed(self._keys):
                left, right = (right - _f(left, key, m)) % m, left
            x = left * m + right
            if x < self.n:
                return x

    def many(self, indices: Any) -> NDArray[np.int64]:
        """Where each of an array of indices goes: int64, of the shape of `indices`.

        Raises:
            IndexError: one is not in range(n).
        """
        given = np.asarray(indices, dtype=np.int64)
        if given.size and (int(given.min()) < 0 or int(given.max()) >= self.n):
            raise IndexError(f"indices must lie in range({self.n})")
        x = self._send(given.astype(np.uint64).ravel())
        walking = np.flatnonzero(x >= self.n)
        while walking.size:
            part = self._send(x[walking])
            x[walking] = part
            walking = walking[part >= self.n]
        return x.view(np.int64).reshape(given.shape)

    def _checked(self, index: int) -> int:
        x = operator.index(index)
        if not 0 <= x < self.n:
            raise IndexError(f"index must lie in range({self.n}); got {index}")
        return x

    def _send(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """All rounds."""
        m = np.uint64(self._m)
        left = x // m
        right = x - left * m
        for key in self._keys:
            y = right ^ np.uint64(key)
            y *= np.uint64(_C1)
            y ^= y >> _32
            y *= np.uint64(_C2)
            y >>= _32
            y *= m
            y >>= _32
            y += left
            # y mod m, as y < 2 m: what wraps is larger.
            left, right = right, np.minimum(y, y - m, out=y)
        left = left * m
        left += right
        return left


def _f(right: int, key: int, m: int) -> int:
    y = ((right ^ key) * _C1) & _MASK
    y ^= y >> 32
    return (((y * _C2) & _MASK) >> 32) * m >> 32


def _root(n: int) -> int:
    """ceil(sqrt n), at least 1."""
    return math.isqrt(n - 1) + 1 if n else 1
