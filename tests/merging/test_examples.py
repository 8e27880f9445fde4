"""The examples run, and show what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def output(example: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]),
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=True,
    ).stdout


def test_merge_state_dicts() -> None:
    losses = {
        line.rsplit(maxsplit=1)[0]: float(line.rsplit(maxsplit=1)[1])
        for line in output("merge_state_dicts.py").splitlines()[1:]
    }
    specialists = [value for name, value in losses.items() if name.startswith("finetuned")]
    assert losses["ties"] < min(*specialists, losses["base"])
    assert losses["greedy soup"] <= min(*specialists, losses["base"])


def test_merge_on_gpu() -> None:
    printed = output("merge_on_gpu.py")
    assert "12 tensors merged" in printed
    assert "same bits as the reference: True" in printed
