"""The CUDA kernels of the C++ core: whether they are built, and for which devices they serve.

The module `cl_fast._cuda` is built with `CL_FAST_CUDA=ON` where nvcc is found. Without it the
Triton kernels do the same work with the same bits.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from cl_fast.backends import native

__all__ = ["load", "on_cpu", "reason", "serves"]

LEAST_CAPABILITY = (8, 0)
_module: ModuleType | None = None
_failure: str | None = None


def load() -> ModuleType | None:
    """The module `cl_fast._cuda`, or None; `reason()` then says why."""
    global _module, _failure
    if native.switched_off():
        return None
    if _module is None and _failure is None:
        try:
            _module = importlib.import_module("cl_fast._cuda")
        except ModuleNotFoundError:
            _failure = (
                "the CUDA kernels are not built; install cl_fast with CL_FAST_CUDA=ON where nvcc "
                "is found"
            )
        except ImportError as error:
            _failure = f"the CUDA kernels do not load: {error}; install cl_fast again"
    return _module


def reason() -> str:
    """Why `load()` gives None; an empty string if it gives the module."""
    if native.switched_off():
        return native.reason()
    load()
    return _failure or ""


def on_cpu() -> bool:
    """Whether the module that is there was built as plain C++, for tests."""
    module = load()
    return module is not None and bool(module.build_info()["on_cpu"])


def serves(device: Any) -> bool:
    """Whether the kernels are there and run on `device`, a torch.device."""
    module = load()
    if module is None:
        return False
    if on_cpu():
        return bool(device.type == "cpu")
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return bool(torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY)
