"""The example of editing runs, and shows what it says."""

from __future__ import annotations

import pytest
from run_examples import printed_by

pytestmark = pytest.mark.slow


def test_edit_facts(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed_by("edit_facts.py", capsys)
    assert float(lines[0].split()[3].rstrip("%")) >= 99
    head = lines[1].split()
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:4]}
    unedited, edited = (
        {name: float(cell) for name, cell in zip(head, rows[row], strict=True)}
        for row in ("unedited", "edited")
    )
    assert unedited["es"] == unedited["greedy"] == 0
    assert edited["es"] >= 0.9
    assert edited["ps"] >= 0.8
    assert edited["ns"] >= unedited["ns"] - 0.05
    assert edited["greedy"] >= 0.9

    answers = {
        line[:26].strip(): [said.split()[-1] for said in line[26:].split(";")]
        for line in (*lines[4:7], lines[8])
    }
    assert list(answers) == ["before", "edited", "without this fact", "undone"]
    new, new_in_other_words = answers["edited"]
    assert new == new_in_other_words != answers["before"][0]
    assert answers["without this fact"] == answers["undone"] == answers["before"]
    assert lines[7].startswith("the other 29 facts: es ")
    assert float(lines[7].split()[-1]) >= 0.9
    assert lines[9:] == ["the weights are those of before, bit for bit: True"]
