"""Continual training: the pieces, each usable alone in the trainer that you have.

Torch is imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_fast.training.keeping import Keep, Task

_HOMES = {
    "Keep": "keeping",
    "Task": "keeping",
}

__all__ = ["Keep", "Task"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"cl_fast.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cl_fast.training' has no attribute {name!r}")
