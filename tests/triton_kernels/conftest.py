"""Tests here, and what they start in processes of their own, use the kernels of this checkout."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)


def _use_the_checkout() -> None:
    """Load triton_kernels/ under the name that an installation gives it."""
    path = Path(__file__).parents[2] / "triton_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "cl_fast.triton_kernels", path, submodule_search_locations=[str(path.parent)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


_use_the_checkout()
