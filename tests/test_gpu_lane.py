"""The GPU lane, proven without a card: its records, its harness on a pretended card, dry runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
ABOUT: dict[str, Any] = {
    "device": "NVIDIA H100 80GB HBM3, 80 GiB, 132 multiprocessors",
    "card": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "commit": "abc",
    "source": "123",
    "versions": {"torch": "2.11", "triton": "3.6"},
    "date": "2026-11-24",
}


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    """The folder benchmarks/ holds the package `gpu`."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def rows() -> ModuleType:
    return importlib.import_module("gpu.rows")


@pytest.fixture
def harness() -> ModuleType:
    return importlib.import_module("gpu.harness")


@pytest.fixture
def lane() -> ModuleType:
    return importlib.import_module("gpu_lane")


def row(case: str = "combine/linear/K3", provider: str = "cl_fast", **more: Any) -> dict[str, Any]:
    return {
        **ABOUT,
        "op": case.split("/")[0],
        "case": case,
        "provider": provider,
        "role": "ours",
        "status": "ok",
        "reason": "",
        "shape": "8",
        "dtype": "bfloat16",
        "ms_p20": 0.9,
        "ms_p50": 1.0,
        "ms_p80": 1.1,
        "graph_ms_p50": 0.8,
        "graph_error": "",
        "gb_per_s": 2000.0,
        "tflop_per_s": None,
        "share_of_floor": 0.93,
        "input_bytes": 1000,
        "output_bytes": 100,
        "peak_extra_bytes": 110,
        "note": "",
        **more,
    }


def target(**more: Any) -> dict[str, Any]:
    return {
        "case": "combine/linear/K3",
        "text": "share of the copy",
        "provider": "cl_fast",
        "value": 0.93,
        "limit": 0.9,
        "at_least": True,
        "met": True,
        **more,
    }


# ------------------------------------------------------------------------------------ records


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("NVIDIA H200", "nvidia-h200"),
        ("Radeon (TM) / X", "radeon-tm-x"),
        ("", "unknown-card"),
    ],
)
def test_file_names(rows: ModuleType, card: str, name: str) -> None:
    assert rows.slug(card) == name


def test_rows_of_the_same_machine_and_source_stay(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    first = rows.Results(path, ABOUT)
    first.put_step("build", {"status": "ok", "seconds": 1.0})
    first.put_case("combine/linear/K3", [row()], [target()])
    later = rows.Results(path, {**ABOUT, "date": "2026-11-25"}, resume=True)
    assert later.rows == first.rows
    assert later.targets == first.targets
    assert later.cases == {"combine/linear/K3"}
    assert later.steps["build"]["status"] == "ok"
    assert "1 rows" in later.note
    assert not rows.Results(path, ABOUT).rows  # a call that does not resume


@pytest.mark.parametrize("key", ["device", "card", "driver", "commit", "source", "versions"])
def test_rows_of_another_identity_do_not_stay(rows: ModuleType, tmp_path: Path, key: str) -> None:
    path = tmp_path / "card.json"
    rows.Results(path, ABOUT).put_case("combine/linear/K3", [row()])
    other = rows.Results(path, {**ABOUT, key: "other"}, resume=True)
    assert not other.rows
    assert key in other.note


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"about": 3}'])
def test_an_unreadable_file_is_said(rows: ModuleType, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "card.json"
    if content is not None:
        path.write_text(content)
    assert "nothing to resume" in rows.Results(path, ABOUT, resume=True).note


def test_retry_drops_what_failed_and_nothing_else(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    first = rows.Results(path, ABOUT)
    first.put_case("a/1", [row("a/1"), row("a/1", "peer", status="failed", reason="no")])
    first.put_case("a/2", [row("a/2"), row("a/2", "peer", status="not run", reason="no")])
    first.put_case("a/3", [row("a/3", graph_error="no graph")])
    parts = {
        "test_a.py": {"status": "ok", "passed": 3},
        "test_b.py": {"status": "failed", "reason": "1 tests failed"},
    }
    first.put_step("test", {"status": "failed", "parts": parts})
    first.put_step("build", {"status": "failed", "reason": "no nvcc"})
    assert len(first.failures()) == 4
    kept = rows.Results(path, ABOUT, resume=True)
    assert len(kept.failures()) == 4
    again = rows.Results(path, ABOUT, resume=True, retry=True)
    assert again.cases == {"a/2"}
    assert list(again.steps) == ["test"]
    assert list(again.steps["test"]["parts"]) == ["test_a.py"]


def test_a_failing_write_leaves_the_old_file(
    rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "card.json"
    results = rows.Results(path, ABOUT)
    results.put_case("a/1", [row("a/1")])
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.put_case("a/2", [row("a/2")])
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.json", "card.md"]


def test_a_case_replaces_its_rows(rows: ModuleType, tmp_path: Path) -> None:
    results = rows.Results(tmp_path / "card.json", ABOUT)
    results.put_case("a/1", [row("a/1"), row("a/1", "peer")], [target(case="a/1")])
    results.put_case("a/1", [row("a/1", ms_p50=7.0)])
    data = json.loads((tmp_path / "card.json").read_text())
    assert [r["ms_p50"] for r in data["rows"]] == [7.0]
    assert data["targets"] == []


def test_the_table(rows: ModuleType) -> None:
    data = {
        "about": ABOUT,
        "steps": {
            "build": {"status": "ok", "seconds": 61.0},
            "test": {
                "status": "ok",
                "parts": {
                    "test_a.py": {
                        "status": "ok", "passed": 9, "failed": 0, "skipped": 2, "seconds": 3.0,
                        "skips": {"needs 90 GiB | more": 2},
                    }
                },
            },
        },
        "targets": [target(), target(text="twice", value=None, met=False, at_least=False)],
        "rows": [
            row(),
            row(provider="copy", role="floor", share_of_floor=None, graph_ms_p50=None),
            row(provider="peer", status="not run", reason="a | b\nc"),
            row("gram/d 4096", tflop_per_s=400.0, peak_extra_bytes=None),
        ],
        "left": ["bench gram/d 14336"],
    }  # fmt: skip
    text = rows.table(data)
    lines = text.splitlines()
    assert lines[0] == "# GPU lane: NVIDIA H100 80GB HBM3"
    assert rows.DRY_RUN not in text
    assert "torch 2.11, triton 3.6" in text
    assert "| build |  | ok | 61.0 |" in lines
    assert "| test | test_a.py | ok: 9 passed, 2 skipped | 3.0 |" in lines
    assert r"| | | skipped 2: needs 90 GiB \| more | |" in lines
    assert "| share of the copy | cl_fast | at least 0.9 | 0.93 | met |" in lines
    assert "| twice | cl_fast | at most 0.9 | no number | not met |" in lines
    assert any("1 (0.9, 1.1) | 0.8 | 2000 GB/s | 93 % |" in line for line in lines)
    assert any(r"**not run**: a \| b c |" in line for line in lines)
    assert any("2000 GB/s, 400 TFLOP/s" in line for line in lines)
    assert "1 %" in text  # 10 bytes beyond the output, of 1,000 bytes of input
    assert "- bench gram/d 14336" in lines
    for line in lines:
        if line.startswith("|"):
            assert line.replace(r"\|", "").count("|") in (5, 6, 9), line


# ------------------------------------------------------------------------------------ reading


def test_reading_pytests_report(lane: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><failure message="assert 1 == 2">x</failure></testcase>'
        '<testcase classname="t" name="c"><error message="no fixture"/></testcase>'
        '<testcase classname="t" name="d"><skipped message="needs 9 GiB"/></testcase>'
        '<testcase classname="t" name="e"><skipped message="needs 9 GiB"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = lane.read_junit(path)
    assert (found["passed"], found["failed"], found["errors"], found["skipped"]) == (1, 1, 1, 2)
    assert found["failures"] == {"t::b": "assert 1 == 2", "t::c": "no fixture"}
    assert found["skips"] == {"needs 9 GiB": 2}
    path.write_text("<testsuites><testsuite>")
    assert lane.read_junit(path) == {}
    assert lane.read_junit(tmp_path / "none.xml") == {}


@pytest.mark.parametrize(
    ("name", "code", "output", "status", "words"),
    [
        ("memcheck", 0, "launches: 9, wrong: 0\n========= ERROR SUMMARY: 0 errors", "ok", ""),
        ("memcheck", 86, "launches: 9, wrong: 0\n========= ERROR SUMMARY: 2 errors",
         "failed", "memcheck found 2"),
        ("racecheck", 0, "launches: 9, wrong: 0\n========= RACECHECK SUMMARY: 0 hazards displayed",
         "ok", ""),
        ("racecheck", 86, "launches: 9, wrong: 0\n========= RACECHECK SUMMARY: 1 hazard displayed",
         "failed", "racecheck found 1"),
        ("memcheck", 0, "launches: 9, wrong: 0", "failed", "no summary"),
        ("memcheck", -11, "Traceback", "failed", "killed by SIGSEGV"),
        ("memcheck", None, "", "failed", "its time was over"),
        ("memcheck", 1, "launches: 9, wrong: 3\n========= ERROR SUMMARY: 0 errors",
         "failed", "3 wrong results"),
        ("memcheck", 1, "ValueError\n========= ERROR SUMMARY: 0 errors", "failed", "ended with 1"),
        ("memcheck", 1, "========= Error: Device not supported. Please refer", "not run",
         "Device not supported"),
        ("memcheck", 77, "refused 9 of 9 calls: not built\n========= ERROR SUMMARY: 0 errors",
         "not run", "not built"),
        ("no tool", 0, "launches: 9, wrong: 0", "ok", ""),
        ("no tool", 0, "", "failed", ""),
    ],
)  # fmt: skip
def test_reading_the_sanitizer(
    lane: ModuleType, name: str, code: int | None, output: str, status: str, words: str
) -> None:
    found = lane.read_sanitizer(name, lane.Ended(code, output, 1.0))
    assert found["status"] == status
    assert words in found.get("reason", "")


def test_refused_calls_are_counted(lane: ModuleType) -> None:
    text = "refused 3 of 9 calls: too many\nrefused 2 of 9 calls: not l1\nlaunches: 4, wrong: 0"
    found = lane.read_sanitizer("no tool", lane.Ended(0, text, 1.0))
    assert found == {
        "status": "ok", "launches": 4, "refused": 5, "refusals": ["too many", "not l1"],
    }  # fmt: skip


def test_programs_are_looked_for_in_the_toolkit(
    lane: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "toolkit" / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert lane.tool("compute-sanitizer", *lane.cuda_folders()) is None  # cannot be executed
    program.chmod(0o755)
    assert lane.tool("compute-sanitizer", *lane.cuda_folders()) == str(program)
    monkeypatch.delenv("CUDA_HOME")
    nvcc = program.with_name("nvcc")
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    (tmp_path / "nvcc").symlink_to(nvcc)
    assert lane.tool("compute-sanitizer", *lane.cuda_folders()) == str(program)


# ------------------------------------------------------------------------------------ harness


class PretendedCard:
    """What the harness uses of torch.cuda, on the CPU: a clock that ticks 1 ms per call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = 0
        self.highest = 0
        self.clock = 0.0
        self.tick = 0.0
        self.broken = False
        self.capturing = False
        self.captures = True
        self.replays = 0
        card = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at = math.nan

            def record(self) -> None:
                card.clock += card.tick
                self.at = card.clock

            def synchronize(self) -> None:
                card.synchronize()

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                card.replays += 1
                card.clock += 0.5

        class Recording:
            def __init__(self, graph: Graph) -> None:
                assert isinstance(graph, Graph)

            def __enter__(self) -> None:
                if not card.captures:
                    raise RuntimeError("operation not permitted when stream is capturing")
                card.capturing = True

            def __exit__(self, *_: object) -> None:
                card.capturing = False

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                assert isinstance(other, Stream)

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None: ...

        # raising=True, the default: every one of these names is there in torch.cuda.
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": Recording,
            "Stream": Stream,
            "stream": lambda stream: stream,
            "current_stream": Stream,
            "synchronize": lambda device=None: self.synchronize(),
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (80 << 30, 100 << 30),
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.highest,
            "reset_peak_memory_stats": self.reset,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50 << 20),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def reset(self, device: Any) -> None:
        self.highest = self.allocated

    def call(self, out: Any, *, ms: float = 1.0, extra: int = 0) -> Any:
        """A call that takes `ms` and `extra` bytes while it runs."""
        self.clock += ms
        self.highest = max(self.highest, self.allocated + extra)
        return out


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> PretendedCard:
    return PretendedCard(monkeypatch)


@pytest.fixture
def machine(harness: ModuleType, card: PretendedCard) -> Any:
    """A machine that takes itself for one with a card."""

    class Pretended(harness.Machine):  # type: ignore[name-defined, misc]
        dry = False

    return Pretended(torch.device("cpu"), 1 << 10)


WANT = torch.arange(4.0)


def work(harness: ModuleType, *providers: Any, **more: Any) -> Callable[[Any], Any]:
    given: dict[str, Any] = {
        "shape": "4", "dtype": "float32", "bytes": 4_000_000, "input_bytes": 16,
        "expected": lambda: WANT, **more,
    }  # fmt: skip
    return lambda machine: harness.Work(providers=providers, **given)


def run(harness: ModuleType, machine: Any, *providers: Any, **more: Any) -> Any:
    case = harness.Case("trial", "trial/one", work(harness, *providers, **more))
    rows, targets = harness.run_case(case, machine, ABOUT)
    return {r["provider"]: r for r in rows}, targets


def test_a_row(harness: ModuleType, machine: Any, card: PretendedCard) -> None:
    seen: list[int] = []

    def ours(i: int) -> torch.Tensor:
        seen.append(i)
        return card.call(WANT.clone(), ms=2.0, extra=640)

    rows, targets = run(
        harness,
        machine,
        harness.Provider("cl_fast", "ours", ours, harness.equal, graph=True, note="a note"),
        harness.Provider("copy", "floor", lambda i: card.call(WANT), harness.equal, flops=0),
        sets=3,
        flops=10_000_000,
        targets=[
            harness.Target("at least", "cl_fast", lambda r: r["cl_fast"]["share_of_floor"], 0.9),
            harness.Target("at most", "cl_fast", lambda r: r["cl_fast"]["ms_p50"], 1.9, False),
            harness.Target("nothing", "cl_fast", lambda r: r["cl_fast"]["note"] / 1, 0.0),
            harness.Target("nobody", "peer", lambda r: r["peer"]["ms_p50"], 0.0),
        ],
    )
    ours_row, copy = rows["cl_fast"], rows["copy"]
    for key in ("card", "driver", "versions", "commit", "source", "date"):
        assert ours_row[key] == ABOUT[key]
    assert ours_row["status"] == copy["status"] == "ok"
    assert ours_row["verified"] == "bit for bit"
    assert ours_row["ms_p20"] == ours_row["ms_p50"] == ours_row["ms_p80"] == 2.0
    assert copy["ms_p50"] == 1.0
    # A replay makes one call per input set: half a millisecond for three of them.
    assert ours_row["graph_ms_p50"] == pytest.approx(0.5 / 3)
    assert card.replays > 3
    assert copy["graph_ms_p50"] is None
    assert ours_row["gb_per_s"] == pytest.approx(4e6 / (0.5e-3 / 3) / 1e9)
    assert ours_row["tflop_per_s"] == pytest.approx(1e7 / (0.5e-3 / 3) / 1e12)
    assert copy["tflop_per_s"] is None
    assert ours_row["share_of_floor"] == pytest.approx(6.0)
    assert (ours_row["peak_extra_bytes"], ours_row["output_bytes"]) == (640, 0)
    assert set(range(3)) <= {i % 3 for i in seen}
    assert ours_row["note"] == "a note"
    assert ours_row["repeats"] >= 3
    assert [(t["value"], t["met"]) for t in targets] == [
        (pytest.approx(6.0), True), (2.0, False), (None, False), (None, False),
    ]  # fmt: skip
    json.dumps(list(rows.values()))


def test_short_calls_are_timed_many_at_once(
    harness: ModuleType, machine: Any, card: PretendedCard
) -> None:
    calls = 0

    def short(i: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return card.call(WANT, ms=0.1)

    rows, _ = run(harness, machine, harness.Provider("cl_fast", "ours", short, harness.equal))
    assert rows["cl_fast"]["ms_p50"] == pytest.approx(0.1)
    # Verified, measured for memory, warmed up twice; then ten calls to each measurement.
    assert calls == 1 + 1 + 2 + 10 * rows["cl_fast"]["repeats"]


def test_slow_providers_take_part_in_few_rounds(
    harness: ModuleType, machine: Any, card: PretendedCard
) -> None:
    rows, _ = run(
        harness,
        machine,
        harness.Provider("slow", "peer", lambda i: card.call(WANT, ms=5000.0), harness.equal),
        harness.Provider("fast", "peer", lambda i: card.call(WANT, ms=1.0), harness.equal),
    )
    assert rows["slow"]["repeats"] == harness.FEWEST
    assert rows["fast"]["repeats"] == harness.ROUNDS


def test_a_call_that_takes_long_is_made_once(
    harness: ModuleType, machine: Any, card: PretendedCard
) -> None:
    calls = []

    def long(i: int) -> torch.Tensor:
        calls.append(i)
        return card.call(WANT.clone(), ms=7000.0, extra=640)

    rows, _ = run(
        harness,
        machine,
        harness.Provider("cl_fast", "ours", long, harness.equal, once=True),
        harness.Provider("cl_fast undo", "ours", lambda i: None, harness.equal, once=True),
        harness.Provider("copy", "floor", lambda i: card.call(WANT), harness.equal, flops=0),
    )
    one = rows["cl_fast"]
    assert calls == [0]
    assert one["ms_p20"] == one["ms_p50"] == one["ms_p80"] == 7000.0
    assert (one["repeats"], one["peak_extra_bytes"], one["verified"]) == (1, 640, "bit for bit")
    assert rows["cl_fast undo"]["status"] == "failed"
    assert rows["cl_fast undo"]["ms_p50"] is None
    assert rows["copy"]["repeats"] == harness.ROUNDS


def test_providers_take_turns(harness: ModuleType, machine: Any, card: PretendedCard) -> None:
    order: list[str] = []

    def who(name: str) -> Any:
        def call(i: int) -> torch.Tensor:
            order.append(name)
            return card.call(WANT)

        return harness.Provider(name, "peer", call, harness.equal)

    run(harness, machine, who("a"), who("b"))
    assert order[-2 * harness.ROUNDS :] == ["a", "b"] * harness.ROUNDS


def test_what_does_not_verify_is_not_timed(
    harness: ModuleType, machine: Any, card: PretendedCard
) -> None:
    calls = 0

    def wrong(i: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.tensor([0.0, 1.0, 2.5, 3.0])

    rows, _ = run(
        harness,
        machine,
        harness.Provider("cl_fast", "ours", wrong, harness.equal),
        harness.Provider("peer", "peer", lambda i: card.call(WANT), harness.equal),
    )
    bad = rows["cl_fast"]
    assert bad["status"] == "failed"
    assert "1 of 4 elements differ, the first at 2: 2.5 instead of 2.0" in bad["reason"]
    assert bad["ms_p50"] is None
    assert calls == 1
    assert rows["peer"]["status"] == "ok"


def _raise(error: Exception) -> Callable[[int], Any]:
    def call(i: int) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("name", "role", "error", "status", "words"),
    [
        ("cl_fast", "ours", torch.OutOfMemoryError("CUDA out of memory. Tried"), "failed",
         "out of memory"),
        ("PEFT", "peer", torch.OutOfMemoryError("CUDA out of memory. Tried"), "not run",
         "out of memory"),
        ("PEFT", "peer", RuntimeError("no\nmore"), "failed", "RuntimeError: no (test_gpu_lane.py:"),
        ("cl_fast cuda", "ours", ValueError("backend must be one of 'eager'; got 'cuda'"),
         "not run", "backend must be one of"),
        ("cl_fast cuda", "ours", RuntimeError("backend='cuda' cannot be used: not built"),
         "not run", "not built"),
        ("cl_fast", "ours", RuntimeError("backend='cuda' cannot be used: not built"), "failed",
         "not built"),
        ("cl_fast cuda", "ours", RuntimeError("invalid argument"), "failed", "invalid argument"),
    ],
)  # fmt: skip
def test_exceptions_become_rows(
    harness: ModuleType, machine: Any, card: PretendedCard,
    name: str, role: str, error: Exception, status: str, words: str,
) -> None:  # fmt: skip
    rows, _ = run(
        harness,
        machine,
        harness.Provider(name, role, _raise(error), harness.equal),
        harness.Provider("copy", "floor", lambda i: card.call(WANT), harness.equal),
    )
    assert rows[name]["status"] == status
    assert words in rows[name]["reason"]
    assert rows["copy"]["status"] == "ok"


def test_a_failure_after_verification_is_a_failure(
    harness: ModuleType, machine: Any, card: PretendedCard
) -> None:
    calls = 0

    def later(i: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise RuntimeError("suddenly")
        return card.call(WANT)

    rows, _ = run(harness, machine, harness.Provider("cl_fast", "ours", later, harness.equal))
    assert rows["cl_fast"]["status"] == "failed"
    assert rows["cl_fast"]["ms_p50"] is None


def test_a_device_that_fails_for_good_ends_the_case(
    harness: ModuleType, machine: Any, card: PretendedCard
) -> None:
    def breaks(i: int) -> torch.Tensor:
        card.broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(harness.Poisoned) as caught:
        run(harness, machine, harness.Provider("cl_fast cuda", "ours", breaks, harness.equal))
    provider, words = caught.value.args
    assert provider == "cl_fast cuda"
    assert "illegal memory access" in words


def test_a_graph_that_cannot_be_captured(
    harness: ModuleType, rows: ModuleType, machine: Any, card: PretendedCard
) -> None:
    card.captures = False
    found, _ = run(
        harness,
        machine,
        harness.Provider("cl_fast", "ours", lambda i: card.call(WANT), harness.equal, graph=True),
        harness.Provider("peer", "peer", lambda i: card.call(WANT), harness.equal, graph=True),
    )
    assert found["cl_fast"]["status"] == "ok"
    assert "not permitted" in found["cl_fast"]["graph_error"]
    assert rows.failed(found["cl_fast"])  # ours must be capturable
    assert not rows.failed(found["peer"])


def test_inputs_and_references_that_fail(
    harness: ModuleType, machine: Any, card: PretendedCard
) -> None:
    def nothing(machine: Any) -> Any:
        raise ImportError("no such op")

    (only,), _ = harness.run_case(harness.Case("trial", "trial/x", nothing), machine, ABOUT)
    assert only["status"] == "failed"
    assert "no inputs: ImportError: no such op" in only["reason"]

    def no_reference() -> Any:
        raise ValueError("no reference")

    found, _ = run(
        harness,
        machine,
        harness.Provider("cl_fast", "ours", lambda i: WANT, harness.equal),
        expected=no_reference,
    )
    assert "nothing to verify with" in found["cl_fast"]["reason"]


def test_missing_and_skipped_providers_are_rows(
    harness: ModuleType, machine: Any, card: PretendedCard
) -> None:
    case = harness.Case(
        "trial",
        "trial/one",
        work(
            harness,
            harness.absent("mergekit", "mergekit cannot be imported"),
            harness.Provider("cl_fast cuda", "ours", _raise(ValueError("called")), harness.equal),
            harness.Provider("cl_fast", "ours", lambda i: card.call(WANT), harness.equal),
        ),
    )
    found, _ = harness.run_case(case, machine, ABOUT, skip={"cl_fast cuda": "killed by SIGSEGV"})
    by_name = {r["provider"]: (r["status"], r["reason"]) for r in found}
    assert by_name == {
        "mergekit": ("not run", "mergekit cannot be imported"),
        "cl_fast cuda": ("failed", "killed by SIGSEGV"),
        "cl_fast": ("ok", ""),
    }


def test_input_sets_leave_the_cache_behind(harness: ModuleType, card: PretendedCard) -> None:
    found = harness.Machine.find("cuda")
    assert found.l2_bytes == 50 << 20
    assert found.sets(1 << 30) == 1
    assert found.sets(63 << 20) == 4
    assert found.sets(1 << 10) == 8
    assert found.backends == ("triton", "cuda")
    assert found.free_bytes() == int(0.9 * (80 << 30))


@pytest.mark.parametrize(
    "family", ["editing", "low_rank", "nearest", "orthogonality", "packing", "selection"]
)
def test_families_on_a_pretended_card(
    harness: ModuleType, card: PretendedCard, family: str
) -> None:
    """Tiny shapes, but with events, peaks and graphs: the way that a card takes."""

    class Pretended(harness.Machine):  # type: ignore[name-defined, misc]
        dry = False
        backends = ("eager",)

        def pick(self, full: Any, tiny: Any) -> Any:
            return tiny

    torch.set_num_threads(1)
    card.tick = 0.25  # nothing here moves the clock but the events themselves
    for case in importlib.import_module(f"gpu.{family}").CASES:
        found, targets = harness.run_case(case, Pretended(torch.device("cpu"), 1 << 10), ABOUT)
        for r in found:
            assert r["status"] == "ok", (r["case"], r["provider"], r["reason"])
            assert r["graph_error"] == ""
            assert r["peak_extra_bytes"] == 0
        own = {r["provider"]: r for r in found}
        if case.op in ("orthogonal_penalty", "orthogonal_project"):
            assert own["cl_fast"]["graph_ms_p50"] is not None
        for t in targets:
            assert t["provider"] in own
            assert t["value"] is not None, t


def test_what_a_card_is_called(card: PretendedCard, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = importlib.import_module("gpu.worker")
    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=141 << 30, multi_processor_count=132, major=9, minor=0
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = worker.about("cuda", worker.all_cases())
    assert found["card"] == "NVIDIA H200"
    assert found["device"] == "NVIDIA H200, 141 GiB, 132 multiprocessors"
    assert found["arch"] == "90"
    assert found["driver"]
    assert found["cases"][0]["name"] == "combine/linear/K3"
    json.dumps(found)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (torch.zeros(4), "3 of 4 elements differ"),
        (torch.arange(4), "torch.float32 was expected, got"),
        (torch.arange(5.0), r"\(4,\) torch.float32 was expected, got \(5,\)"),
        (torch.tensor([-0.0, 1.0, 2.0, 3.0]), "1 of 4 elements differ, the first at 0: -0.0"),
        (torch.tensor([0.0, 1.0, math.nan, 3.0]), "nan instead of 2.0"),
        (None, "a tensor was expected, got NoneType"),
    ],
)
def test_equal_is_bit_for_bit(harness: ModuleType, out: Any, words: str) -> None:
    with pytest.raises(harness.Mismatch, match=words):
        harness.equal(out, WANT)


def test_equal_accepts_nan_and_lists(harness: ModuleType) -> None:
    nan = torch.tensor([math.nan, 1.0])
    assert harness.equal(nan.clone(), nan) == "bit for bit"
    assert harness.equal([nan, WANT], [nan.clone(), WANT.clone()]) == "bit for bit"
    with pytest.raises(harness.Mismatch, match="in tensor 1"):
        harness.equal([nan, WANT + 1], [nan, WANT])
    with pytest.raises(harness.Mismatch, match="2 tensors were expected, got 1"):
        harness.equal([nan], [nan, WANT])


# ------------------------------------------------------------------------------------ families


def test_the_shapes_of_the_7b_model() -> None:
    shapes = importlib.import_module("gpu.merge").llama_shapes(32)
    assert len(shapes) == 291
    assert sum(math.prod(shape) for shape in shapes.values()) == 6_738_415_616


def test_case_names_are_unique_and_cover_what_must_be_reached() -> None:
    cases = importlib.import_module("gpu.worker").all_cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for method in ("linear", "task_arithmetic", "dare_linear", "ties"):
        assert {f"combine/{method}/K{k}" for k in (1, 3, 8)} <= set(names)
        assert f"combine_many/{method}/7B" in names
    assert {f"rank_update/rank {r}" for r in (1, 16, 64, 256)} <= set(names)
    assert {"gram/d 4096", "gram/d 14336", "rank_update/1000 of one weight"} <= set(names)
    assert {f"editing/{n}" for n in ("stats", "priors", "fit 100", "fit 1000", "patch")} <= set(
        names
    )
    assert {case.op for case in cases} >= {
        "magnitude_threshold", "orthogonal_penalty", "orthogonal_project", "pack", "unpack", "dare",
        "token_logprobs",
    }  # fmt: skip
    assert {f"divergence_from_logits/{k}" for k in ("forward_kl", "reverse_kl", "jsd")} <= set(
        names
    )
    assert {
        f"linear_divergence/{n} {head}"
        for n in (1024, 4096, 8192)
        for head in ("frozen", "trained")
    } <= set(names)
    # Two calls of ten minutes, the second with --resume, and what build, tests and sanitizer take.
    assert sum(case.seconds for case in cases) < 900


def test_a_peer_that_is_off_is_noticed() -> None:
    merge = importlib.import_module("gpu.merge")
    harness = importlib.import_module("gpu.harness")
    machine = harness.Machine.find("cpu")
    base, tensors = merge.inputs(machine, (20_000,), 3)
    for name, method in merge.METHODS.items():
        if name not in merge.FORMULAS:
            continue
        good = merge.FORMULAS[name](base, tensors)
        check = merge.close_to(method, base, tensors, wide=True)
        check(good, good)
        # Half of the merged delta: what a forgotten weight would give.
        off = (base.float() + 0.5 * (good.float() - base.float())).to(good.dtype)
        with pytest.raises(harness.Mismatch):
            check(off if method.base else good * 0.5, good)


def test_the_sanitized_calls_cover_every_variant() -> None:
    from dataclasses import fields
    from typing import get_args, get_type_hints

    from cl_fast.ops import Policy

    policies = list(importlib.import_module("gpu.sanitized").policies())
    assert len(set(policies)) == len(policies)
    for field in fields(Policy):
        hint = get_type_hints(Policy)[field.name]
        wanted = {True, False} if hint is bool else set(get_args(hint))
        if field.name == "trim_count":
            wanted = {"at_least_one"}  # decided before a kernel is called
        if field.name == "sparsify":
            wanted -= {"band", "magprune"}  # no kernel has them
        assert {getattr(policy, field.name) for policy in policies} == wanted


# ------------------------------------------------------------------------------------ dry runs

TRIALS = """
import os, signal, time
import torch
from gpu.harness import Case, Poisoned, Provider, Work, copy_floor, equal

def good(i):
    return torch.arange(4.0)

def boom(error):
    def run(i):
        raise error
    return run

def case(name, *providers, seconds=1.0, limit_s=60.0):
    def make(machine):
        own = [Provider(who, role, run, equal) for who, role, run in providers]
        return Work(shape="4", dtype="float32", bytes=32, input_bytes=16,
                    providers=[*own, copy_floor(machine, 32)],
                    expected=lambda: torch.arange(4.0))
    return Case("trial", f"trial/{name}", make, seconds, limit_s)

def no_inputs(machine):
    os._exit(3)

GOOD = ("cl_fast", "ours", good)
SICK = [
    case("wrong", GOOD, ("cl_fast eager", "ours", lambda i: torch.zeros(4))),
    case("crash", ("cl_fast cuda", "ours", lambda i: os.kill(os.getpid(), signal.SIGSEGV)), GOOD),
    case("memory", ("cl_fast", "ours", boom(torch.OutOfMemoryError("CUDA out of memory."))),
         ("PEFT", "peer", boom(torch.OutOfMemoryError("CUDA out of memory.")))),
    case("hang", ("cl_fast cuda", "ours", lambda i: time.sleep(600)), GOOD, limit_s=3.0),
    case("poisoned", ("cl_fast cuda", "ours", boom(Poisoned("cl_fast cuda", "illegal access"))),
         GOOD),
    Case("trial", "trial/no inputs", no_inputs, 1.0, 60.0),
]
WELL = [case("first", GOOD), case("second", GOOD, seconds=1e6), case("third", GOOD)]
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without history: what is edited meanwhile does not change between two calls."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copyfile(ROOT / "CMakeLists.txt", copy / "CMakeLists.txt")
    shutil.copyfile(ROOT / "pyproject.toml", copy / "pyproject.toml")
    for folder in ("cl_fast", "triton_kernels", "csrc", "benchmarks", "tests/gpu"):
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("results", "__pycache__")
        )
    shutil.copyfile(ROOT / "tests" / "conftest.py", copy / "tests" / "conftest.py")
    return copy


def call(checkout: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(checkout / "benchmarks" / "gpu_lane.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=checkout,
        timeout=900,
        check=False,
    )


def trial(
    checkout: Path, tmp_path: Path, which: str, *arguments: str
) -> tuple[int, dict[str, Any], str]:
    """A dry run of the bench step with cases of the text above."""
    cases = tmp_path / f"{which}.py"
    cases.write_text(f"{TRIALS}\nCASES = {which}\n")
    done = call(checkout, "--dry-run", tmp_path / "out", "--steps", "bench", "--cases", "trial/",
                "--cases-from", cases, *arguments)  # fmt: skip
    path = tmp_path / "out" / "cpu-dry-run.json"
    assert path.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(path.read_text()), done.stdout


@pytest.mark.slow
def test_whatever_a_case_does_the_others_go_on(checkout: Path, tmp_path: Path) -> None:
    code, data, said = trial(checkout, tmp_path, "SICK")
    assert code == 1
    found = {(r["case"].removeprefix("trial/"), r["provider"]): r for r in data["rows"]}
    status = {name: (r["status"], r["reason"]) for name, r in found.items()}

    def failed(case: str, provider: str, words: str) -> None:
        got, reason = status.pop((case, provider))
        assert got == "failed"
        assert words in reason, reason

    failed("wrong", "cl_fast eager", "does not verify: Mismatch: 3 of 4 elements differ")
    failed("crash", "cl_fast cuda", "the process killed by SIGSEGV at: verify")
    failed("memory", "cl_fast", "out of memory")
    failed("hang", "cl_fast cuda", "stopped: verify took too long")
    failed("poisoned", "cl_fast cuda", "illegal access")
    failed("no inputs", "", "the process ended with 3 at: make the inputs")
    assert status.pop(("memory", "PEFT"))[0] == "not run"
    assert set(status.values()) == {("ok", "")}
    assert {case for case, who in status if who == "cl_fast"} == {
        "wrong", "crash", "hang", "poisoned",
    }  # fmt: skip
    assert data["steps"]["bench"]["status"] == "failed"
    assert "FAILED trial/crash, cl_fast cuda" in said
    table = (tmp_path / "out" / "cpu-dry-run.md").read_text()
    assert "**failed**: does not verify" in table

    # What has failed stays, and stays a failure, until it is to be tried again.
    code, again, said = trial(checkout, tmp_path, "SICK", "--resume")
    assert (code, again["rows"]) == (1, data["rows"])
    assert f"{len(data['rows'])} rows" in said


@pytest.mark.slow
def test_the_time_is_kept_and_a_second_call_goes_on(checkout: Path, tmp_path: Path) -> None:
    code, data, said = trial(checkout, tmp_path, "WELL")
    assert code == 3
    assert [r["case"] for r in data["rows"] if r["provider"] == "cl_fast"] == [
        "trial/first", "trial/third",
    ]  # fmt: skip
    assert data["left"] == ["bench trial/second"]
    assert "left: bench trial/second" in said
    assert "--resume" in said
    for r in data["rows"]:
        assert r["device"] == r["card"] == "cpu, dry run"
        assert r["graph_ms_p50"] is None
        assert r["peak_extra_bytes"] is None
    assert "no number here says anything" in (tmp_path / "out" / "cpu-dry-run.md").read_text()

    code, later, _ = trial(checkout, tmp_path, "WELL", "--resume", "--budget", "2e6")
    assert code == 0
    assert later["left"] == []
    assert {r["case"] for r in later["rows"]} == {"trial/first", "trial/second", "trial/third"}
    for r in data["rows"]:
        assert r in later["rows"]  # not measured again
    assert not list((tmp_path / "out").glob(".*"))  # nothing half written

    code, none, _ = trial(checkout, tmp_path, "WELL", "--budget", "0")
    assert code == 3
    assert none["rows"] == []
    assert len(none["left"]) == 3


@pytest.mark.slow
def test_build_test_and_sanitize_without_a_card(checkout: Path, tmp_path: Path) -> None:
    """The calls are the real ones; only the tool is a stand-in that runs what it is given."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --tool ] && [ "$3" = --error-exitcode ] || exit 9\nname=$2\n'
        'shift 4\n"$@"\ncode=$?\n[ $name = memcheck ] && echo "========= ERROR SUMMARY: 0 errors"\n'
        '[ $name = racecheck ] && echo "========= RACECHECK SUMMARY: 1 hazard displayed"\n'
        "exit $code\n"
    )
    tool.chmod(0o755)
    out = tmp_path / "out"
    done = call(checkout, "--dry-run", out, "--steps", "build,test,sanitize", "--sanitizer", tool)
    data = json.loads((out / "cpu-dry-run.json").read_text())
    assert data["steps"]["build"]["status"] == "not run"
    tests = data["steps"]["test"].get("parts", {})
    assert sorted(tests) == sorted(p.name for p in (checkout / "tests/gpu").glob("test_*.py"))
    if not torch.cuda.is_available():
        for part in tests.values():
            assert part["status"] == "ok", part
            assert part["passed"] == 0
            assert part["skips"]["needs a CUDA device"] > 0
    sanitized = data["steps"]["sanitize"]["parts"]
    assert sanitized["memcheck"]["status"] == "ok"
    assert sanitized["memcheck"]["launches"] > 20
    assert sanitized["racecheck"]["reason"] == "racecheck found 1"
    assert "FAILED sanitize racecheck" in done.stdout
    assert done.returncode == 1

    # With the time over nothing is started, and what was done stays.
    done = call(
        checkout, "--dry-run", out, "--steps", "build,test,sanitize", "--resume", "--budget", "0"
    )
    again = json.loads((out / "cpu-dry-run.json").read_text())
    assert again["steps"] == data["steps"]


@pytest.fixture(scope="module")
def everything(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dry run of every case."""
    out = tmp_path_factory.mktemp("everything")
    done = call(checkout, "--dry-run", out, "--steps", "bench", "--budget", "800")
    data: dict[str, Any] = json.loads((out / "cpu-dry-run.json").read_text())
    return {**data, "code": done.returncode, "said": done.stdout + done.stderr}


@pytest.mark.slow
def test_every_case_verifies_on_a_processor(everything: dict[str, Any]) -> None:
    assert everything["code"] == 0, everything["said"]
    cases = {case.name for case in importlib.import_module("gpu.worker").all_cases()}
    assert {r["case"] for r in everything["rows"]} == cases
    for r in everything["rows"]:
        assert r["device"] == "cpu, dry run"
        if r["status"] != "ok":
            # Peers that are not installed, and backends that an op does not have, or not for the
            # dtype of the case.
            assert r["status"] == "not run"
            words = ("cannot be imported", "backend must be one of", "cannot be used for matrices")
            assert any(w in r["reason"] for w in words), r["reason"]
            continue
        assert r["ms_p20"] <= r["ms_p50"] <= r["ms_p80"]
        assert r["bytes"] > 0
        assert r["verified"]
    for case in cases:
        own = {r["provider"]: r for r in everything["rows"] if r["case"] == case}
        assert own["cl_fast"]["status"] == "ok"
        assert any(r["role"] == "floor" for r in own.values())


@pytest.mark.slow
def test_every_peer_has_its_row(everything: dict[str, Any]) -> None:
    """Where a peer is not installed there is a row that says so."""
    found: dict[str, set[str]] = {}
    for r in everything["rows"]:
        found.setdefault(r["case"], set()).add(r["provider"])
    for method in ("linear", "task_arithmetic", "dare_linear", "dare_ties", "ties"):
        peers = found[f"combine/{method}/K3"]
        assert {"torch eager", "torch.compile", "mergekit", "copy"} <= peers
        assert ("PEFT" in peers) == (method in ("task_arithmetic", "dare_linear", "ties"))
    for name in ("peft", "mergekit"):
        if importlib.util.find_spec(name) is None:
            continue
        for r in everything["rows"]:
            if r["provider"].lower() == name:
                assert r["status"] == "ok", r["reason"]


# ------------------------------------------------------------------------------------ command


def test_the_checkout_is_imported_without_an_installation(lane: ModuleType, tmp_path: Path) -> None:
    """From a folder of links, also by a process started in the root of the checkout."""
    subject = lane.Lane(dry=True, out=tmp_path, deadline=0.0, resume=False, retry=False)
    text = (
        "import cl_fast.triton_kernels as k, cl_fast.ops as o; "
        "print(k.__path__[0]); print(o.__path__[0])"
    )
    for cwd in (ROOT, tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", text],
            capture_output=True, text=True, cwd=cwd, env=subject.environment(), check=True,
        )  # fmt: skip
        kernels, ops = done.stdout.split()
        assert Path(kernels).resolve() == ROOT / "triton_kernels"
        assert Path(ops).resolve() == ROOT / "cl_fast" / "ops"
        assert str(tmp_path) in kernels
    stale = tmp_path / "work" / "site" / "cl_fast" / "gone.py"
    stale.symlink_to(tmp_path / "gone.py")
    subject.site()
    assert not stale.is_symlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "bench,fly"], "--steps must name some of"),
        (["--steps", ""], "--steps must name some of"),
        (["--retry"], "no effect without --resume"),
        (["--dry-run", str(BENCHMARKS / "results")], "must not write to"),
        (["--dry-run", str(BENCHMARKS / "results" / "x")], "must not write to"),
    ],
)
def test_bad_commands(
    lane: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        lane.parse(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_defaults(lane: ModuleType) -> None:
    a: argparse.Namespace = lane.parse([])
    assert a.steps == ["build", "test", "sanitize", "bench"]
    assert a.budget == 570.0
    assert a.out == BENCHMARKS / "results"


def test_printing_a_table(
    lane: ModuleType, rows: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nvidia-h100-80gb-hbm3.json"
    rows.Results(path, ABOUT).put_case("combine/linear/K3", [row()])
    assert lane.main(["--table", str(path)]) == 0
    assert capsys.readouterr().out.strip() == path.with_suffix(".md").read_text().strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(checkout: Path, tmp_path: Path) -> None:
    done = call(checkout, "--steps", "bench", "--out", tmp_path)
    assert done.returncode == 2
    assert "no card" in done.stdout
    assert "--dry-run" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("required", ["0", "1"])
def test_gpu_tests_are_skipped_or_failed_without_a_card(tmp_path: Path, required: str) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests/gpu/conftest.py").read_text())
    (tmp_path / "test_card.py").write_text(
        "def test_a(device): ...\ndef test_b(need_memory): need_memory(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "CL_FAST_REQUIRE_GPU": required},
        check=False,
    )
    if required == "1":
        assert done.returncode == 1
        assert "CL_FAST_REQUIRE_GPU=1, but: needs a CUDA device" in done.stdout
    else:
        assert done.returncode == 0
        assert "needs a CUDA device" in done.stdout
        assert "2 skipped" in done.stdout
