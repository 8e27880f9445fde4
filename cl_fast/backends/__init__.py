"""Faster implementations of the ops: native (C++), triton. Loading one never fails the package.

An op asks here which implementation may serve it. Where none is at hand the eager reference does
the work, and says so once per process.
"""

from __future__ import annotations

import warnings
from types import ModuleType

from cl_fast.backends import native

__all__ = ["BACKENDS", "native", "native_or_say", "require_native", "say_once"]

BACKENDS = ("eager", "native")
"""What `backend=` accepts."""

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn with `message`, the first time that it comes."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def native_or_say() -> ModuleType | None:
    """The C++ core, or None and one warning; no warning where it was switched off on purpose."""
    core = native.load()
    if core is None and not native.switched_off():
        say_once(f"cl_fast uses its slower eager reference: {native.reason()}")
    return core


def require_native(backend: str, device: str) -> ModuleType:
    """The C++ core for an explicit backend="native".

    Raises:
        ValueError: `backend` is no backend, or not one for `device`.
        RuntimeError: the core is not there.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))} or None; got {backend!r}"
        )
    if device != "cpu":
        raise ValueError(f"backend='native' needs tensors on the cpu; got {device}")
    core = native.load()
    if core is None:
        raise RuntimeError(f"backend='native' cannot be used: {native.reason()}")
    return core
