"""The examples run, and show what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_merge_state_dicts() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "merge_state_dicts.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=True,
    )
    losses = {
        line.rsplit(maxsplit=1)[0]: float(line.rsplit(maxsplit=1)[1])
        for line in done.stdout.splitlines()[1:]
    }
    specialists = [value for name, value in losses.items() if name.startswith("finetuned")]
    assert losses["ties"] < min(*specialists, losses["base"])
    assert losses["greedy soup"] <= min(*specialists, losses["base"])
