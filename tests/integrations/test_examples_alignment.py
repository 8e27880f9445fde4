"""The example of preference replay runs, and shows what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_dpo_replay() -> None:
    printed = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "dpo_replay.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])},
        timeout=600,
        check=True,
    ).stdout
    lines = [line for line in printed.splitlines() if not line.startswith("{")]
    rows = {line[:30].strip(): [float(x) for x in line[30:].split()] for line in lines[1:]}
    safe, helps = {k: v[0] for k, v in rows.items()}, {k: v[1] for k, v in rows.items()}
    distance = {k: v[2] for k, v in rows.items()}
    assert safe["after safety"] > 0.9 > 0.5 > helps["after safety"]
    assert helps["after help, no replay"] > 0.9 > 0.3 > safe["after help, no replay"]
    assert min(helps["after help, 25 % replay"], safe["after help, 25 % replay"]) > 0.8
    assert 0 == distance["before"] < distance["after safety"]
    assert distance["after safety"] < distance["after help, no replay"]
