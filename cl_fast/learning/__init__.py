"""The workflows strung together: a stream of tasks in, a model and its transfer matrix out.

    learn     trains on one task after the other, in the trainer that you have, with whatever keeps
              the earlier ones; goes on where it was cut off; merges at the end
    Report    the transfer matrix, its numbers, tables and picture

It stands above training and merging, which do not know one another.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_fast.learning.report import Report
    from cl_fast.learning.stream import learn

_HOMES = {"Report": "report", "learn": "stream"}

__all__ = ["Report", "learn"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"cl_fast.learning.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cl_fast.learning' has no attribute {name!r}")
