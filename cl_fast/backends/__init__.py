"""Faster implementations of the ops: native (C++), triton, cuda; none can fail the package.

An op asks here which implementation may serve it. Where none is at hand the eager reference does
the work, and says so once per process.

    eager     plain torch, on any device: the reference
    native    the C++ core, on CPU tensors
    triton    cl_fast.triton_kernels, on CUDA and ROCm tensors
    cuda      the CUDA kernels of the core, where it was built with them, on CUDA tensors
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from types import ModuleType

from cl_fast.backends import cuda, native

__all__ = [
    "BACKENDS",
    "check_backend",
    "interpreting",
    "native",
    "native_or_say",
    "require_native",
    "say_once",
]

BACKENDS = ("eager", "native", "triton", "cuda")
"""What `backend=` knows; an op may offer fewer."""

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn with `message`, the first time that it comes."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_backend(backend: str, device: str, offered: Sequence[str] = BACKENDS) -> None:
    """Raise ValueError unless `backend` is one of `offered` and may run on `device`."""
    if backend not in offered:
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, offered))} or None; got {backend!r}"
        )
    needed = {"native": "cpu", "triton": "cuda", "cuda": "cuda"}.get(backend, device)
    on_cpu = device == "cpu" and (
        (backend == "triton" and interpreting()) or (backend == "cuda" and cuda.on_cpu())
    )
    if device != needed and not on_cpu:
        raise ValueError(f"backend={backend!r} needs tensors on {needed}; got {device}")


def native_or_say() -> ModuleType | None:
    """The C++ core, or None and one warning; no warning where it was switched off on purpose."""
    core = native.load()
    if core is None and not native.switched_off():
        say_once(f"cl_fast uses its slower eager reference: {native.reason()}")
    return core


def require_native(
    backend: str, device: str, offered: Sequence[str] = ("eager", "native")
) -> ModuleType:
    """The C++ core for an explicit backend="native".

    Raises:
        ValueError: `backend` is no backend, or not one for `device`.
        RuntimeError: the core is not there.
    """
    check_backend(backend, device, offered)
    core = native.load()
    if core is None:
        raise RuntimeError(f"backend='native' cannot be used: {native.reason()}")
    return core
