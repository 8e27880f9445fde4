"""The C++ core: where it is, why it is not there, and how many threads it may use.

Needs the standard library only. `CL_FAST_NATIVE=0` switches the core off; the eager reference then
does the same work with the same results, slower. `CL_FAST_THREADS` limits the threads.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

__all__ = ["load", "reason", "switched_off", "threads"]

_OFF = ("0", "false", "off", "no")
_module: ModuleType | None = None
_failure: str | None = None


def load() -> ModuleType | None:
    """The module `cl_fast._native`, or None; `reason()` then says why."""
    global _module, _failure
    if switched_off():
        return None
    if _module is None and _failure is None:
        try:
            _module = importlib.import_module("cl_fast._native")
        except ModuleNotFoundError:
            _failure = (
                "the C++ core is not built; install cl_fast where a C++17 compiler and CMake are "
                "found, or set CL_FAST_NATIVE=0 to use the eager reference without this message"
            )
        except ImportError as error:
            _failure = f"the C++ core does not load: {error}; install cl_fast again"
    return _module


def reason() -> str:
    """Why `load()` gives None; an empty string if it gives the module."""
    if switched_off():
        return f"CL_FAST_NATIVE={os.environ['CL_FAST_NATIVE']} switches the C++ core off"
    load()
    return _failure or ""


def threads() -> int:
    """Threads that the core uses unless told: `CL_FAST_THREADS`, or the cores of this process.

    Raises:
        ValueError: `CL_FAST_THREADS` is not a positive integer.
    """
    text = os.environ.get("CL_FAST_THREADS")
    if text is not None:
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise ValueError(f"CL_FAST_THREADS must be a positive integer, got {text!r}")
        return int(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def switched_off() -> bool:
    """Whether `CL_FAST_NATIVE` says not to use the core."""
    return os.environ.get("CL_FAST_NATIVE", "1").lower() in _OFF
