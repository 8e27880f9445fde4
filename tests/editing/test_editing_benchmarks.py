"""The benchmarks of editing run, verify what they time, and write their tables; at tiny sizes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = {"--width": 32, "--layers": 3, "--vocabulary": 400, "--facts": 5, "--steps": 2}
COUNTS = {"--stats-tokens": 256, "--verify": 2, "--loop-facts": 1, "--loop-keys": 2}
LOOP = [str(x) for pair in (SIZES | COUNTS).items() for x in pair]
LOOP += ["--rounds", "1", "--threads", "1"]
RIDGE = ["--f", "40", "--d", "12", "--n", "1", "3", "--factors", "1"]
RIDGE += ["--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def script(name: str) -> ModuleType:
    """A module of benchmarks/editing, which finds its neighbours by itself."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(f"editing.{name}")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_memit_beside_the_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("memit_vs_loop").main([*LOOP, "--out", str(tmp_path)])
    told = (tmp_path / "editing_memit_cpu.txt").read_text()
    assert told.splitlines()[0].startswith("# python benchmarks/editing/memit_vs_loop.py --width")
    assert capsys.readouterr().out == told.split("\n", 1)[1]
    for words in ("in float64", "values", "keys", "factor", "solves", "rest", "times", "per fact"):
        assert words in told


def test_what_differs_from_the_loop_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("memit_vs_loop")
    right = module.loop.update

    def wrong(*args: Any) -> Any:
        return 1.001 * right(*args)

    monkeypatch.setattr(module.loop, "update", wrong)
    monkeypatch.setattr(module.Bench, "ours", lambda self: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="do not agree"):
        module.main(LOOP)


def test_the_ridge_update_beside_lu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("ridge").main([*RIDGE, "--out", str(tmp_path)])
    told = (tmp_path / "editing_ridge_cpu.txt").read_text()
    assert told.splitlines()[0].startswith("# python benchmarks/editing/ridge.py --f 40")
    assert capsys.readouterr().out == told.split("\n", 1)[1]
    rows = [line.split()[:2] for line in told.splitlines()[5:]]
    assert rows == [["1", "factors"], ["1", "D,"], ["3", "factors"], ["3", "D,"]]


def test_what_differs_from_lu_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("ridge")
    right = module.by_lu
    monkeypatch.setattr(module, "by_lu", lambda C0, K: right(C0, 1.001 * K))
    with pytest.raises(SystemExit, match="do not agree"):
        module.main(RIDGE)
