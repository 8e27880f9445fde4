"""The example of projected full fine-tuning runs, and shows what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_projected_full_finetuning() -> None:
    printed = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "projected_full_finetuning.py")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        },
        timeout=600,
        check=True,
    ).stdout
    lines = [line for line in printed.splitlines() if not line.startswith("{")]
    rows = {line[:24].strip(): [float(x) for x in line[24:].split()] for line in lines[1:]}
    before, plain, inputs = (
        rows[name] for name in ("before", "plainly trained", "off the first's inputs")
    )
    assert before[0] > 0.9 > 0.1 > before[1]
    assert plain[0] < 0.3 < 0.9 < plain[1]  # learned, and the first forgotten
    assert inputs[0] > 0.9
    assert inputs[1] > 0.8
    assert inputs[2] < 1e-6 < 0.1 < plain[2]
    assert rows["off leading directions"][1] > 0.8
