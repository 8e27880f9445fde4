"""Rows of logits by the C++ core, on the CPU: the functions of `cl_fast.ops.vocabulary_rows`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

__all__ = ["of"]


def of(core: ModuleType) -> Any:
    """The functions by this core; None where it was built without them."""
    return None
