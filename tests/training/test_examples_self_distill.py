"""The examples of self-distillation run, and show what they say."""

from __future__ import annotations

import pytest
from run_examples import printed_by


def table(example: str, rows: int, capsys: pytest.CaptureFixture[str]) -> dict[str, list[float]]:
    """The last rows that the example prints: a name, and numbers two spaces apart."""
    lines = printed_by(example, capsys)
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[-rows:]]
    return {name: [float(x) for x in numbers] for name, *numbers in cells}


def test_self_distill_sft(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table("self_distill_sft.py", 5, capsys)
    assert rows["before"][0] > 0.9 > 0.5 > rows["before"][1]
    assert rows["plainly trained"][0] < 0.4 < 0.9 < rows["plainly trained"][1]
    assert min(rows["kept on made-up prompts"]) > 0.85
    assert min(rows["kept on stored prompts"]) > 0.85
    # On the new data alone there is nothing to be seen of the first task, and it goes.
    assert rows["kept on the new data"][0] < 0.5


@pytest.mark.filterwarnings("ignore:.*experimental")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sdft_on_policy(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table("sdft_on_policy.py", 2, capsys)
    assert rows["before"] == pytest.approx([1, 0, 1], abs=0.13)
    assert rows["after"][1] > 0.7 > 0.3 > rows["after"][0]
