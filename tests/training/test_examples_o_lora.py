"""The example of O-LoRA runs, and shows what it says."""

from __future__ import annotations

import pytest
from run_examples import printed_by


def test_o_lora_peft(capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_by("o_lora_peft.py", capsys)
    lines = [line for line in printed if line.startswith("steps of")]
    rows = [[float(cell) for cell in line.split()[3:]] for line in lines]
    assert [row[3:] for row in rows] == [[0, 4], [4, 4], [8, 4], [12, 4]]
    assert all(last < first for first, last, *_ in rows)
    assert all(overlap < 1e-6 for _, _, overlap, *_ in rows)
