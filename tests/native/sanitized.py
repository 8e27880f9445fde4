"""A pytest plugin: the module at $CL_FAST_SANITIZED_MODULE takes the place of cl_fast._native."""

from __future__ import annotations

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location(
    "cl_fast._native", os.environ["CL_FAST_SANITIZED_MODULE"]
)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["cl_fast._native"] = _module
_spec.loader.exec_module(_module)
