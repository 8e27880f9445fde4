"""pack, unpack, and combine straight from packed deltas.

A packed delta holds the kept values and an offset per 2,048 elements; which elements they belong
to follows from the random stream. Bytes that the work must move: the dense side, the kept values
and the offsets, each once.
"""

from __future__ import annotations

from .harness import Case

__all__ = ["CASES"]

CASES: list[Case] = []
