"""Examples as tests run them: in the test's process, which has imported their hosts already."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed_by(example: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that the example prints, without those of trainers' logs."""
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    return [x for x in capsys.readouterr().out.splitlines() if x and not x.startswith("{")]
