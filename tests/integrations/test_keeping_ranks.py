"""DDP and FSDP2: with keeps, two gloo ranks end with the weights of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from keeping_ranks import in_one_process


@pytest.mark.slow
def test_two_ranks_end_with_the_weights_of_one_process(tmp_path: Path) -> None:
    in_one_process(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(Path(__file__).with_name("keeping_ranks.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all equal" in done.stdout
