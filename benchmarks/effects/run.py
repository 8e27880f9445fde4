"""What each method keeps and what it learns, on a toy that forgets: a table over seeds.

    python benchmarks/effects/run.py                     all methods, both streams, 3 seeds
    python benchmarks/effects/run.py --only replay --seeds 1
    python benchmarks/effects/run.py --out benchmarks/results

    average    accuracy over the four tasks of the stream at the end
    learned    of each task right after it
    BWT        backward transfer: what later tasks did to earlier ones
    base kept  accuracy of the four skills that the base had before

It is a toy: 85 thousand parameters, tasks of 256 prompts that contradict one another on purpose.
What works here may not work elsewhere, nor the other way round; a method that does nothing here is
shown doing nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from methods import METHODS, STEPS, Found, Method
from toy import BASE, KINDS, Toy

COLUMNS = {"average": "average", "learned": "learned", "backward": "BWT", "kept": "base kept"}


def trained_base(toy: Toy, folder: Path) -> dict[str, torch.Tensor]:
    """Trained once for each seed."""
    path = folder / f"base-{toy.kind}-{toy.seed}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(toy.trained_base(), path)
    weights: dict[str, torch.Tensor] = torch.load(path)
    return weights


def middle(values: list[float]) -> tuple[float, float, float]:
    """Median, lowest, highest; NaN where a number is not defined."""
    if any(map(math.isnan, values)):
        return math.nan, math.nan, math.nan
    return statistics.median(values), min(values), max(values)


def text(values: list[float]) -> str:
    mid, low, high = middle(values)
    if math.isnan(mid):
        return "-"
    return f"{mid:.2f}" if len(values) == 1 else f"{mid:.2f} [{low:.2f}, {high:.2f}]"


def table(kind: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {kind} symbols | {' | '.join(COLUMNS.values())} | s per seed |",
        f"|---|{'---|' * (len(COLUMNS) + 1)}",
    ]
    for row in rows:
        cells = [text([seed[key] for seed in row["seeds"]]) for key in COLUMNS]
        name = row["method"] + (f" ({row['note']})" if row["note"] else "")
        seconds = statistics.median(row["seconds"])
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines)


def measure(method: Method, kind: str, seeds: range, folder: Path) -> dict[str, Any]:
    results: list[Found] = []
    seconds = []
    for seed in seeds:
        toy = Toy(seed, kind)
        base = trained_base(toy, folder)
        began = time.perf_counter()
        results.append(method.run(toy, base))
        seconds.append(time.perf_counter() - began)
    return {
        "method": method.name,
        "note": method.note,
        "seeds": [asdict(result) for result in results],
        "seconds": seconds,
    }


def commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stream", choices=(*KINDS, "both"), default="both")
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--out", type=Path, help="folder for effects.json and effects.md")
    parser.add_argument("--work", type=Path, default=Path("effects_out"), help="trained bases")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is too small for more

    chosen = [method for method in METHODS if options.only in method.name]
    if not chosen:
        parser.error(f"--only {options.only!r}: there are {[m.name for m in METHODS]}")
    seeds = range(options.seeds)
    kinds = KINDS if options.stream == "both" else (options.stream,)
    content: dict[str, Any] = {
        "seeds": options.seeds,
        "steps": STEPS,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread used",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit(),
        "base": {},
        "streams": {},
    }
    parts = []
    for kind in kinds:
        rows = []
        for method in chosen:
            row = measure(method, kind, seeds, options.work)
            rows.append(row)
            found = {k: text([seed[k] for seed in row["seeds"]]) for k in COLUMNS}
            told = ", ".join(f"{COLUMNS[k]} {v}" for k, v in found.items())
            print(f"{kind:<9} {method.name:<46} {told}", flush=True)
        content["streams"][kind] = rows
        parts.append(table(kind, rows))
    written = "\n\n".join(parts)
    head = (
        f"Median [lowest, highest] of {options.seeds} seeds, commit {content['commit']}, "
        f"torch {torch.__version__}; skills of the base: {', '.join(BASE)}."
    )
    print(f"\n{head}\n\n{written}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "effects.json").write_text(json.dumps(content, indent=1) + "\n")
        (options.out / "effects.md").write_text(f"{head}\n\n{written}\n")


if __name__ == "__main__":
    main()
