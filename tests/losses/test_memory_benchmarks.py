"""The memory that the benchmarks of losses report is that of the call, whoever started them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# As a benchmark after its largest row: the mark of a parent would hide what its child needs.
LARGE_PARENT = """
import subprocess, sys
held = bytearray(b"x") * (1 << 30)
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the mark of a process is that of Linux"
)
@pytest.mark.parametrize("name", ["linear_divergence", "logprobs"])
def test_a_large_parent_does_not_hide_what_a_call_needs(name: str) -> None:
    script = str(ROOT / "benchmarks" / f"{name}.py")
    command = [sys.executable, "-c", LARGE_PARENT, sys.executable, script]
    done = subprocess.run(
        [*command, "--peak", "eager", "256", "64", "8192"], check=True, capture_output=True
    )
    logits = 256 * 8192 * 4
    assert 2 * logits <= json.loads(done.stdout) <= 40 * logits
