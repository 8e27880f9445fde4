"""Where the Triton kernels of `cl_fast.triton_kernels` are, and what to say if they are not.

Triton is imported when a CUDA tensor first arrives, never before. Where it is missing the eager
reference runs on the device instead, and says so once.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from cl_fast.backends import say_once

__all__ = ["load"]


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
