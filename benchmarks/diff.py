#!/usr/bin/env python3
"""Time `cl-fast diff` against reading the same files, at the shape of a 0.5B model.

    python benchmarks/diff.py [--shape 0.5b] [--work DIR] [--reps 5] [--models 3]

Three providers in turn within each repetition, each a fresh process, on files that are in the page
cache:

    read      two threads (--threads) read all files into buffers that they use again: the floor
    memory    the same into memory that stays: what a program does that loads the models
    diff      cl-fast diff with the page and the JSON

For each: wall and CPU seconds, peak anonymous memory sampled every 20 ms. Before anything is timed
the numbers of sampled tensors are compared with float64. Writes results/diff-<shape>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from make_checkpoints import SHAPES, make
from merge_vs_peers import machine, process, warm, weight_files
from safetensors import safe_open

HERE = Path(__file__).resolve().parent

READ = """
import os, sys, threading
keep, threads, *files = sys.argv[1:]
keep, threads, size = keep == "memory", int(threads), 1 << 20
parts = [(f, o) for f in files for o in range(0, os.path.getsize(f), size)]
fds = {f: os.open(f, os.O_RDONLY) for f in files}
def work(mine):
    buffer, kept = memoryview(bytearray(size)), []
    for f, o in mine:
        if keep:
            kept.append(bytearray(size))
            buffer = memoryview(kept[-1])
        os.preadv(fds[f], [buffer], o)
crew = [threading.Thread(target=work, args=(parts[i::threads],)) for i in range(threads)]
for t in crew: t.start()
for t in crew: t.join()
"""


def verify(base: Path, models: list[Path], numbers: dict[str, Any]) -> float:
    """The largest relative error of norms and products of some tensors, against float64."""

    def load(folder: Path, name: str) -> torch.Tensor:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        with safe_open(folder / index["weight_map"][name], "pt") as file:
            return file.get_tensor(name).double().reshape(-1)

    worst = 0.0
    for tensor in numbers["tensors"][1::29]:
        b = load(base, tensor["name"])
        deltas = [load(folder, tensor["name"]) - b for folder in models]
        for d, found in zip(deltas, tensor["models"], strict=True):
            for exact, got in (
                (d.norm(), found["l2"]),
                (d.abs().sum(), found["l1"]),
                (d.norm() / b.norm(), found["relative_l2"]),
            ):
                worst = max(worst, abs(got - float(exact)) / (float(exact) or 1.0))
            if int((d != 0).sum()) != found["changed"]:
                raise SystemExit(f"{tensor['name']}: another count of changed elements")
        signs = torch.stack(deltas).sign()
        conflicts = int(((signs > 0).any(0) & (signs < 0).any(0)).sum())
        if conflicts != tensor["conflicts"]:
            raise SystemExit(f"{tensor['name']}: another count of sign conflicts")
    if worst > 4e-6:
        raise SystemExit(f"norms differ from float64 by {worst:.1e}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cl_fast_bench")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--label", default="")
    a = parser.parse_args()

    root = a.work / a.shape
    make(root, a.shape, a.models, int(1e9), 20240601)
    base, models = root / "base", [root / f"ft{k}" for k in range(a.models)]
    files = [file for folder in (base, *models) for file in weight_files(folder)]
    size = sum(file.stat().st_size for file in files)
    with tempfile.TemporaryDirectory(dir=a.work) as scratch:
        page, numbers = Path(scratch) / "diff.html", Path(scratch) / "diff.json"
        threads = str(a.threads)
        read = [sys.executable, "-c", READ]
        providers = {
            "read": [*read, "again", threads, *map(str, files)],
            "memory": [*read, "memory", threads, *map(str, files)],
            "diff": [sys.executable, "-m", "cl_fast", "diff", str(base), *map(str, models),
                     "--out", str(page), "--json", str(numbers), "--overwrite", "--quiet",
                     "--threads", threads],
        }  # fmt: skip
        warm(files)
        log = Path(scratch) / "log"
        process(providers["diff"], log)
        worst = verify(base, models, json.loads(numbers.read_text()))
        print(f"verified: norms within {worst:.1e} of float64, counts equal", flush=True)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in providers}
        for _ in range(a.reps):
            for name, command in providers.items():
                warm(files)
                load = os.getloadavg()[0]
                runs[name].append(process(command, log) | {"load": load})
    result: dict[str, Any] = {
        "shape": a.shape,
        "models": a.models,
        "bytes": size,
        "threads": a.threads,
        **machine(),
        "relative_error": worst,
        "runs": runs,
    }
    floor = statistics.median(run["wall_s"] for run in runs["read"])
    busy = max(run["load"] for run in runs["read"])
    print(f"load before a run: up to {busy:.1f} (others' work makes walls meaningless)")
    print(f"{'':8}{'s':>8}{'min':>8}{'max':>8}{'CPU s':>8}{'GB/s':>8}{'/ read':>8}{'MB anon':>9}")
    for name, listed in runs.items():
        walls = [run["wall_s"] for run in listed]
        wall = statistics.median(walls)
        cpu = statistics.median(run["cpu_s"] for run in listed)
        memory = max(run["peak_anonymous_mb"] for run in listed)
        print(
            f"{name:8}{wall:8.2f}{min(walls):8.2f}{max(walls):8.2f}{cpu:8.2f}"
            f"{size / wall / 1e9:8.2f}{wall / floor:8.2f}{memory:9.0f}"
        )
        result[name] = {"wall_s": wall, "cpu_s": cpu, "peak_anonymous_mb": memory}
    label = f"-{a.label}" if a.label else ""
    out = HERE / "results" / f"diff-{a.shape}{label}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
