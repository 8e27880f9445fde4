"""The one random stream: which elements of a delta a drop keeps.

Format "cl_fast philox v1" (docs/random-stream.md has the text and test vectors):

    key   = blake2b-64("cl_fast philox v1\\0" seed "\\0" model "\\0" tensor), little endian
    B_L   = Philox4x32-10(counter = (g mod 2^32, g >> 32, L, 0), key = (key mod 2^32, key >> 32))
    byte_L(i) = byte (i mod 16) of B_L for the group g = i >> 4, little endian words
    u(i)  = byte_0 2^24 + byte_1 2^16 + byte_2 2^8 + byte_3
    keep element i  <=>  u(i) < T,    T = min(2^32, floor(density 2^32 + 1/2))

A draw depends on the seed, the model's name, the tensor's name and the element's index, and on
nothing else: the same mask on every backend, for any thread count, tile, shard layout or order of
models. Philox is the generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC11, with the constants of Random123.

One byte decides an element unless it equals the leading byte of T (1 in 256), so a backend may
draw one block per 16 elements and look deeper only where it must: levels 1 to 3 exist so that the
keep probability is exact to 2^-32 all the same.

This module is the scalar reference. It needs the standard library only.
"""

from __future__ import annotations

import hashlib
import math

__all__ = [
    "FORMAT",
    "GROUP",
    "keep_mask",
    "keep_threshold",
    "philox4x32_10",
    "stream_key",
    "uniform32",
]

FORMAT = "cl_fast philox v1"
GROUP = 16
"""Elements that share one Philox block per level."""

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


def philox4x32_10(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Philox4x32 with ten rounds: four 32-bit words from a 128-bit counter and a 64-bit key."""
    c0, c1, c2, c3 = (word & _MASK32 for word in counter)
    k0, k1 = (word & _MASK32 for word in key)
    for _ in range(10):
        product0, product1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def stream_key(seed: int, model: str, tensor: str) -> int:
    """The 64-bit key of the stream that `seed` gives to one tensor of one model.

    Any integer is a seed, negative ones too (it enters as decimal text).

    Raises:
        TypeError: `seed` is not an int, or a name is not a str.
        ValueError: a name holds a NUL character, which separates the fields.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    for argument, name in (("model", model), ("tensor", tensor)):
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a str, got {type(name).__name__}")
        if "\0" in name:
            raise ValueError(f"{argument} must not hold a NUL character, got {name!r}")
    text = f"{FORMAT}\0{seed}\0{model}\0{tensor}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keep_threshold(density: float) -> int:
    """T in [0, 2^32]: a draw below T keeps its element; the keep rate is exactly T / 2^32.

    Raises:
        ValueError: `density` is not a number in [0, 1].
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density must be in [0, 1], got {density}")
    return min(1 << 32, math.floor(density * 2.0**32 + 0.5))


def uniform32(key: int, index: int) -> int:
    """The 32-bit draw of element `index` in the stream of `key`."""
    group, j = index >> 4, index & 15
    draw = 0
    for level in range(4):
        words = philox4x32_10(
            (group & _MASK32, group >> 32, level, 0), (key & _MASK32, (key >> 32) & _MASK32)
        )
        draw = draw << 8 | (words[j >> 2] >> (8 * (j & 3))) & 0xFF
    return draw


def keep_mask(key: int, start: int, count: int, threshold: int) -> list[bool]:
    """Which of the elements start .. start + count - 1 are kept. For tests: one at a time."""
    return [uniform32(key, index) < threshold for index in range(start, start + count)]
