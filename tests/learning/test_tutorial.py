"""The tutorial: its script shows what the page says, and the page's code is that of the script."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cl_fast.learning import Report

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "continual_tutorial.py"
PAGE = (ROOT / "docs" / "tutorial.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_code_of_the_page_is_that_of_the_script() -> None:
    found = blocks("python")
    script = SCRIPT.read_text("utf-8")
    assert len(found) >= 8
    assert [block for block in found if block not in script] == []
    places = [script.index(block) for block in found]
    assert places == sorted(places)


@pytest.mark.slow
def test_the_script_shows_what_the_page_says(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed (pip install 'cl_fast[hosts]')")
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]),
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = {path.parent.name: Report.load(path.parent) for path in out.glob("*/report.json")}
    for name, report in found.items():
        assert report.matrix.tasks == ["later", "mirror"], name
        assert report.learning_accuracy > 0.8, name
        assert max(report.matrix.before) < 0.3, name
        assert report.probes["larger"]["before"] > 0.95, name
    # What is lost plainly is kept by each of the others.
    assert found["plain"].backward < -0.5
    assert found["plain"].kept("larger") < 0.4
    for name in ("replay", "distilled", "sft"):
        assert found[name].backward > -0.25, name
        assert found[name].kept("larger") > 0.6, name
    assert found["lora"].backward == 0
    assert found["lora"].kept("larger") == 1
    # The run that was cut off.
    assert "the same bits as the run that was not cut off: True" in done.stdout
    assert found["cut"].matrix == found["replay"].matrix
    for path in (out / "replay.png", *(out / name / "report.png" for name in found)):
        assert path.read_bytes().startswith(b"\x89PNG"), path
    # The tables of the page have the shape of those that are printed, and near their numbers.
    printed = tables(done.stdout)
    for table in tables("\n".join(blocks("text"))):
        assert any(near(table, other) for other in printed), table


Table = list[tuple[str, list[float]]]


def tables(text: str) -> list[Table]:
    rows = re.findall(r"^(before|later|mirror)((?: +\d\.\d{3}){3})$", text, re.MULTILINE)
    plain = [(name, [float(x) for x in numbers.split()]) for name, numbers in rows]
    assert plain
    assert [name for name, _ in plain] == ["before", "later", "mirror"] * (len(plain) // 3)
    return [plain[i : i + 3] for i in range(0, len(plain), 3)]


def near(one: Table, other: Table) -> bool:
    pairs = zip(one, other, strict=True)
    return all(math.dist(mine, theirs) < 0.3 for (_, mine), (_, theirs) in pairs)
