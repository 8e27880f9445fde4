"""The examples of the losses run, and show what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def table(example: str) -> list[list[str]]:
    """The cells of the last table that the example prints, by two spaces apart."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]),
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    printed = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=True,
    ).stdout
    lines = [line for line in printed.splitlines() if not line.startswith("{")]
    return [[cell for cell in line.split("  ") if cell.strip()] for line in lines[1:]]


def test_distill_hf_trainer() -> None:
    rows = {name.strip(): (float(first), float(second)) for name, first, second in table(
        "distill_hf_trainer.py"
    )}  # fmt: skip
    assert rows["before"][0] > 0.9 > 0.5 > rows["before"][1]
    assert rows["plainly trained"][0] < 0.5 < 0.9 < rows["plainly trained"][1]
    assert min(rows["with its earlier self"]) > 0.9


def test_distill_trl_gkd() -> None:
    losses = [float(row[-1]) for row in table("distill_trl_gkd.py")]
    assert losses[-1] < losses[0] / 2


def test_dpo_trl() -> None:
    rows = [[float(cell) for cell in row] for row in table("dpo_trl.py")]
    assert rows[-1][1] < rows[0][1] / 2  # loss
    assert rows[-1][3] == 1.0  # chosen preferred


def test_distill_peft() -> None:
    (_, free, away), (_, held, near) = [[float(x) for x in row] for row in table("distill_peft.py")]
    assert free < held
    assert near < away / 4


def test_distill_torchtitan_loop() -> None:
    losses = [float(row[-1]) for row in table("distill_torchtitan_loop.py")]
    assert losses[-1] < losses[0] / 2
