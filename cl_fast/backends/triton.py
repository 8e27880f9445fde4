"""The ops on CUDA tensors by the Triton kernels of `cl_fast.triton_kernels`.

Triton is imported when a CUDA tensor first arrives, never before. Where it is missing the eager
reference runs on the device instead, and says so once.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor

from cl_fast.backends import say_once

__all__ = ["dare", "load"]


def load(kernel: str) -> ModuleType | None:
    """A module of the kernels, or None and one warning."""
    try:
        return importlib.import_module(f"cl_fast.triton_kernels.{kernel}")
    except ImportError as error:
        say_once(
            f"cl_fast uses its slower eager reference on CUDA tensors: {error}; "
            "pip install 'cl_fast[triton]'"
        )
        return None


def dare(delta: Tensor, key: int, threshold: int, factor: float) -> Tensor | None:
    """Keep where the draw is below `threshold` < 2^32, times the float32 `factor`; None: cannot."""
    kernel = load("dare")
    if kernel is None:
        return None
    out: Tensor = kernel.dare(delta, key, threshold, factor)
    return out
