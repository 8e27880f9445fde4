"""The example of projected full fine-tuning runs, and shows what it says."""

from __future__ import annotations

import pytest
from run_examples import printed_by


def test_projected_full_finetuning(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed_by("projected_full_finetuning.py", capsys)
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
