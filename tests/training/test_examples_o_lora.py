"""The example of O-LoRA runs, and shows what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_o_lora_peft() -> None:
    printed = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "o_lora_peft.py")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]),
        },
        timeout=300,
        check=True,
    ).stdout
    lines = [line for line in printed.splitlines() if line.startswith("steps of")]
    rows = [[float(cell) for cell in line.split()[3:]] for line in lines]
    assert [row[3:] for row in rows] == [[0, 4], [4, 4], [8, 4], [12, 4]]
    assert all(last < first for first, last, *_ in rows)
    assert all(overlap < 1e-6 for _, _, overlap, *_ in rows)
