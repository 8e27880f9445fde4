"""The Triton kernels in the interpreter, in a process of its own: import reads the variable."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (pip install 'cl_fast[triton]')",
)


def test_kernels_equal_the_reference() -> None:
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(root)]),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted.py"))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "equal" in done.stdout
