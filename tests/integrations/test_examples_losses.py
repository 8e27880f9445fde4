"""The examples of the losses run, and show what they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from run_examples import printed_by

pytestmark = pytest.mark.slow


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[list[str]]]:
    """The cells of the last table that an example prints, by two spaces apart."""

    def read(example: str) -> list[list[str]]:
        lines = printed_by(example, capsys)
        return [[cell for cell in line.split("  ") if cell.strip()] for line in lines[1:]]

    return read


Table = Callable[[str], list[list[str]]]


def test_distill_hf_trainer(table: Table) -> None:
    rows = {name.strip(): (float(first), float(second)) for name, first, second in table(
        "distill_hf_trainer.py"
    )}  # fmt: skip
    assert rows["before"][0] > 0.9 > 0.5 > rows["before"][1]
    assert rows["plainly trained"][0] < 0.5 < 0.9 < rows["plainly trained"][1]
    assert min(rows["with its earlier self"]) > 0.9


def test_distill_trl_gkd(table: Table) -> None:
    losses = [float(row[-1]) for row in table("distill_trl_gkd.py")]
    assert losses[-1] < losses[0] / 2


def test_dpo_trl(table: Table) -> None:
    rows = [[float(cell) for cell in row] for row in table("dpo_trl.py")]
    assert rows[-1][1] < rows[0][1] / 2  # loss
    assert rows[-1][3] == 1.0  # chosen preferred


def test_distill_peft(table: Table) -> None:
    (_, free, away), (_, held, near) = [[float(x) for x in row] for row in table("distill_peft.py")]
    assert free < held
    assert near < away / 4


def test_distill_torchtitan_loop(table: Table) -> None:
    losses = [float(row[-1]) for row in table("distill_torchtitan_loop.py")]
    assert losses[-1] < losses[0] / 2
