#!/usr/bin/env python3
"""What driving a merge through Ray costs on one node, beside the same merge without it.

    python benchmarks/make_checkpoints.py IN --shape 0.5b
    python benchmarks/ray_overhead.py IN --rounds 7 --json benchmarks/results/ray_overhead_cpu.json

Both write the same checkpoint in turns, in one process, with the same number of threads in all
(Ray's default: two tasks at a time with half of them each); the first
round is compared byte for byte and not counted. A time is that of `execute`: checks, working
folder, merge, journal, side files, rename. In the Ray figure are also the look at the shared
storage from the node, cutting the plan into units, sending and scheduling tasks, and their answers.
Not in it: starting Ray and connecting to it (told on a line of its own), the first start of the
worker process (it does the uncounted round), making the plan, and fsync, which would measure the
disk. The inputs are in the page cache. Times are medians with the 20th and 80th percentile; the
overhead is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from cl_fast._version import __version__
from cl_fast.backends import native
from cl_fast.integrations.ray import RayEngine
from cl_fast.merging import Plan, execute, make_plan, parse_recipe

METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", {}, {}),
    "ties": ("ties", {"density": 0.2}, {}),
    "ties over the whole model": ("ties", {"density": 0.2}, {"variant": "paper"}),
    "dare_ties": ("dare_ties", {"density": 0.3}, {}),
}


def plan_of(method: str, folder: Path, output: Path, shard: int) -> Plan:
    name, own, everywhere = METHODS[method]
    content: dict[str, Any] = {
        "merge_method": name,
        "models": [
            {"model": str(folder / f"ft{i}"), "parameters": {"weight": 1.0, **own}}
            for i in range(3)
        ],
        "parameters": everywhere,
    }
    if name != "linear":
        content["base_model"] = str(folder / "base")
    return make_plan(parse_recipe(content), output, out_shard_size=shard, seed=None)


def spread(values: list[float]) -> str:
    low, high = np.quantile(values, [0.2, 0.8])
    return f"{statistics.median(values):.3f} ({low:.3f} - {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=Path, help="of make_checkpoints.py")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["linear", "ties"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=native.threads())
    parser.add_argument("--out-shard-size", type=int, default=500_000_000)
    parser.add_argument("--scratch", type=Path, default=Path("ray_overhead_out"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    started = time.perf_counter()
    ray.init(
        address="local",
        num_cpus=arguments.threads,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    rows = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {"cl_fast": __version__, "ray": ray.__version__},
        "threads": arguments.threads,
        "seconds_to_start_ray": time.perf_counter() - started,
        "rows": [],
    }
    print(json.dumps({key: value for key, value in rows.items() if key != "rows"}))
    ways = {"local": None, "ray": RayEngine()}
    for method in arguments.methods:
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        moved = 0
        for round_ in range(arguments.rounds + 1):
            digests = {}
            for way in ways if round_ % 2 else reversed(ways):
                output = arguments.scratch / way / "out"
                shutil.rmtree(output, ignore_errors=True)
                plan = plan_of(method, arguments.inputs, output, arguments.out_shard_size)
                began = time.perf_counter()
                threads = arguments.threads if way == "local" else None
                result = execute(plan, engine=ways[way], threads=threads, fsync=False)
                seconds[way].append(time.perf_counter() - began)
                digests[way], moved = result.digest, result.bytes_moved
            if round_ == 0:
                assert digests["local"] == digests["ray"]
                for path in (arguments.scratch / "local" / "out").iterdir():
                    other = arguments.scratch / "ray" / "out" / path.name
                    assert path.read_bytes() == other.read_bytes(), path.name
                seconds = {way: [] for way in ways}
        ratios = [r / x for r, x in zip(seconds["ray"], seconds["local"], strict=True)]
        row = {
            "method": method,
            "bytes_moved": moved,
            "seconds": seconds,
            "overhead_percent": 100 * (statistics.median(ratios) - 1),
        }
        rows["rows"].append(row)
        print(
            f"{method:<26} local {spread(seconds['local'])} s   ray {spread(seconds['ray'])} s   "
            f"overhead {row['overhead_percent']:+.1f} % (within rounds {spread(ratios)})"
        )
    shutil.rmtree(arguments.scratch, ignore_errors=True)
    ray.shutdown()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
