#!/usr/bin/env python3
"""Time packed deltas: packing, applying, and merges of three of them beside the dense merge.

    python benchmarks/packed_deltas.py --shape 0.5b [--work DIR] [--reps 5]

Every run is a fresh process of the command `cl-fast`, in turn within each repetition:

    pack 0.9, 0.99    one finetuned model
    apply 0.9         one packed delta
    dense             dare_linear of three finetuned models, density 0.1, dropped in the merge
    packed 0.9, 0.99  dare_linear of the same three, packed before

The same streams and seed: the output of "packed 0.9" is compared with that of "dense" byte for byte
(the digests of all tensors) before anything is timed, and so is "apply 0.9" with the dense merge of
one model. Warm: the inputs are in the page cache. Cold: the cache is told to forget them before
each run (posix_fadvise), so what is read comes from the disk; the bytes are those that the kernel
counted. Outputs are not forced to the disk. The file system's own copy of the dense merge's bytes
is timed as a floor, warm.

Writes benchmarks/results/packed_deltas-<shape>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from make_checkpoints import SHAPES, make
from merge_vs_peers import floor, machine, process, warm, weight_files

HERE = Path(__file__).resolve().parent
MODELS = ("ft0", "ft1", "ft2")
SEED, WEIGHT = 7, 0.4


def forget(files: list[Path]) -> None:
    """Takes clean pages of these files out of the page cache."""
    os.sync()
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def cached(files: list[Path]) -> float:
    """The share of these files that is in the page cache, as far as `fincore` tells."""
    total = sum(path.stat().st_size for path in files)
    said = subprocess.run(
        ["fincore", "-b", "-n", "-o", "RES", *map(str, files)],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    return sum(map(int, said.split())) / total if said else float("nan")


def disk_reads() -> int:
    """Bytes that children of this process, waited for, have read from the disk."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock * 512


def recipe(work: Path, models: list[Path], own: dict[str, float]) -> dict[str, Any]:
    return {
        "merge_method": "dare_linear",
        "base_model": str(work / "base"),
        "models": [{"model": str(m), "parameters": {"weight": WEIGHT, **own}} for m in models],
        "seed": SEED,
    }


def digest(folder: Path) -> str:
    return str(json.loads((folder / "cl_fast_merge.json").read_text())["digest"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--work", type=Path, default=Path("/tmp/cl_fast_packed"))
    parser.add_argument("--reps", type=int, default=5)
    a = parser.parse_args()
    work = a.work / f"checkpoints-{a.shape}"
    make(work, a.shape, len(MODELS), int(1e9), 20240601)
    scratch = a.work / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    command = [sys.executable, "-m", "cl_fast"]

    def packed(model: str, drop: str) -> Path:
        return scratch / f"{model}-{drop}.delta.safetensors"

    def pack(model: str, drop: str, out: Path) -> list[str]:
        words = ["delta", "pack", work / "base", work / model, out, "--drop", drop, "--seed", SEED]
        return [*command, *map(str, words), "--overwrite", "--quiet"]

    for model in MODELS:
        for drop in ("0.9", "0.99"):
            subprocess.run(pack(model, drop, packed(model, drop)), check=True)
    density = 1 - 0.9
    recipes = {
        "dense": recipe(work, [work / m for m in MODELS], {"density": density}),
        "packed 0.9": recipe(work, [packed(m, "0.9") for m in MODELS], {}),
        "packed 0.99": recipe(work, [packed(m, "0.99") for m in MODELS], {}),
        "dense one": recipe(work, [work / "ft0"], {"density": density, "weight": 1.0}),
    }
    for name, content in recipes.items():
        (scratch / f"{name}.yml").write_text(yaml.safe_dump(content))

    def merge(name: str, out: Path) -> list[str]:
        return [*command, "merge", str(scratch / f"{name}.yml"), str(out), "--no-fsync", "--quiet"]

    def apply(out: Path) -> list[str]:
        words = ["delta", "apply", work / "base", packed("ft0", "0.9"), out]
        return [*command, *map(str, words), "--no-fsync", "--quiet"]

    dense_files = [f for m in ("base", *MODELS) for f in weight_files(work / m)]
    base_files = weight_files(work / "base")
    runs: dict[str, tuple[list[str], list[Path]]] = {
        "pack 0.9": (
            pack("ft0", "0.9", scratch / "o.safetensors"),
            base_files + weight_files(work / "ft0"),
        ),
        "pack 0.99": (
            pack("ft0", "0.99", scratch / "o.safetensors"),
            base_files + weight_files(work / "ft0"),
        ),
        "apply 0.9": (apply(scratch / "out"), [*base_files, packed("ft0", "0.9")]),
        "dense": (merge("dense", scratch / "out"), dense_files),
        "packed 0.9": (
            merge("packed 0.9", scratch / "out"),
            base_files + [packed(m, "0.9") for m in MODELS],
        ),
        "packed 0.99": (
            merge("packed 0.99", scratch / "out"),
            base_files + [packed(m, "0.99") for m in MODELS],
        ),
    }

    # Equal before fast.
    for name in ("dense", "packed 0.9", "dense one"):
        subprocess.run(merge(name, scratch / f"verified {name}"), check=True)
    subprocess.run(apply(scratch / "verified apply"), check=True)
    digests = {f.name: digest(f) for f in scratch.glob("verified *")}
    if digests["verified dense"] != digests["verified packed 0.9"]:
        raise SystemExit("the packed merge is not the dense one")
    if digests["verified dense one"] != digests["verified apply"]:
        raise SystemExit("apply is not dare_linear")
    for folder in scratch.glob("verified *"):
        shutil.rmtree(folder)

    rows: list[dict[str, Any]] = []
    for repetition in range(a.reps):
        for state in ("warm", "cold"):
            for name, (words, files) in runs.items():
                os.sync()
                if state == "warm":
                    warm(files)
                else:
                    forget(files)
                share = cached(files)
                before = disk_reads()
                row = process(words, scratch / "log")
                row["read_from_disk"] = disk_reads() - before
                shutil.rmtree(scratch / "out", ignore_errors=True)
                rows.append(
                    {"what": name, "cache": state, "repetition": repetition, **row,
                     "cached_before": share, "input_bytes": sum(f.stat().st_size for f in files),
                     "load": os.getloadavg()[0]}
                )  # fmt: skip
                print(
                    f"{state} {name}: {row['wall_s']:.2f} s, {row['cpu_s']:.2f} s CPU", flush=True
                )
        warm(dense_files)
        row = floor([weight_files(work / m) for m in ("base", *MODELS)], scratch / "floor", False)
        shutil.rmtree(scratch / "floor")
        rows.append({"what": "floor of dense", "cache": "warm", "repetition": repetition, **row})

    sizes = {
        "finetuned": sum(f.stat().st_size for f in weight_files(work / "ft0")),
        **{drop: packed("ft0", drop).stat().st_size for drop in ("0.9", "0.99")},
    }
    about = machine() | {"shape": a.shape, "reps": a.reps, "sizes": sizes}
    results = HERE / "results" / f"packed_deltas-{a.shape}"
    Path(f"{results}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    table = report(about, rows, runs)
    Path(f"{results}.md").write_text(table)
    print(table)
    shutil.rmtree(scratch)


def report(about: dict[str, Any], rows: list[dict[str, Any]], runs: dict[str, Any]) -> str:
    lines = [
        f"Shape {about['shape']}, bfloat16, {about['reps']} repetitions in turns; "
        + ", ".join(f"{k} {v}" for k, v in about.items() if isinstance(v, str) and k != "shape")
        + ". Medians (least - most). Read: files opened; from disk: as the kernel counted.",
        "",
        "| size | bytes | of the finetuned model |",
        "|---|---|---|",
    ]
    for name, size in about["sizes"].items():
        lines.append(f"| {name} | {size} | 1/{about['sizes']['finetuned'] / size:.2f} |")
    lines += [
        "",
        "| what | cache | wall s | CPU s | GB of inputs | GB from disk | anonymous MB |",
        "|---|---|---|---|---|---|---|",
    ]

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"

    for state in ("warm", "cold"):
        for what in [*runs, "floor of dense"]:
            some = [row for row in rows if row["what"] == what and row["cache"] == state]
            if not some:
                continue
            disk = [row["read_from_disk"] for row in some if "read_from_disk" in row]
            lines.append(
                f"| {what} | {state} | {spread([r['wall_s'] for r in some])} "
                f"| {spread([r['cpu_s'] for r in some])} "
                f"| {some[0].get('input_bytes', 0) / 1e9:.3f} "
                f"| {statistics.median(disk) / 1e9 if disk else 0:.3f} "
                f"| {max(r['peak_anonymous_mb'] for r in some):.0f} |"
            )
    loads = [row["load"] for row in rows if "load" in row]
    lines += ["", f"Load average after the runs: {min(loads):.1f} - {max(loads):.1f}."]
    lines += ["", "Of each repetition, the packed merge over the dense one:", ""]
    lines += ["| what | cache | wall | CPU |", "|---|---|---|---|"]
    for state in ("warm", "cold"):
        for what in ("packed 0.9", "packed 0.99"):
            ratios = {
                clock: [
                    next(r for r in rows if (r["what"], r["cache"], r["repetition"]) == key)[clock]
                    / dense[clock]
                    for dense in rows
                    if (dense["what"], dense["cache"]) == ("dense", state)
                    for key in ((what, state, dense["repetition"]),)
                ]
                for clock in ("wall_s", "cpu_s")
            }
            lines.append(
                f"| {what} | {state} | {spread(ratios['wall_s'])} | {spread(ratios['cpu_s'])} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
