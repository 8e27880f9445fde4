#!/usr/bin/env python3
"""Merge checkpoints that do not fit in memory, and plan those that do not fit on this disk.

    python benchmarks/large_merge.py --work DIR [--shape 6.7b] [--methods task_arithmetic,ties]

Makes a base and three finetunes (benchmarks/make_checkpoints.py), merges the four, and tells for
each method wall and CPU seconds, peak anonymous memory, bytes moved, and beside it the floor: the
same inputs read by two threads and an output of the same size written, without arithmetic. The
inputs are larger than memory, so both come from the disk; floor and merge run in turn, and both
are forced to the disk before the clock stops. The output is compared with the formula in float64
on sampled tensors before its time counts.

Then the plans of merges of 70B and 671B shapes, whose inputs are headers with holes for weights:
what `cl-fast merge --dry-run` says of them, and the time it takes to say so. Nothing of these is
measured but the planning; the predicted time uses the rate of the merge that was measured.

Writes benchmarks/results/large-merge-<shape>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from make_checkpoints import SHAPES, make
from merge_vs_peers import check, floor, machine, process, recipe, weight_files

from cl_fast.checkpoints.safetensors import build_header
from cl_fast.merging import make_plan, parse_recipe

HERE = Path(__file__).resolve().parent
SHARD = 5_000_000_000


def llama_70b() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a decoder of 80 layers and 8,192 dimensions."""
    yield "model.embed_tokens.weight", (128_256, 8192)
    for i in range(80):
        p = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", 8192, 8192), ("self_attn.k_proj", 1024, 8192),
            ("self_attn.v_proj", 1024, 8192), ("self_attn.o_proj", 8192, 8192),
            ("mlp.gate_proj", 28_672, 8192), ("mlp.up_proj", 28_672, 8192),
            ("mlp.down_proj", 8192, 28_672),
        ):  # fmt: skip
            yield f"{p}{name}.weight", (rows, columns)
        yield p + "input_layernorm.weight", (8192,)
        yield p + "post_attention_layernorm.weight", (8192,)
    yield "model.norm.weight", (8192,)
    yield "lm_head.weight", (128_256, 8192)


def experts_671b() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a mixture of 256 experts in 58 of 61 layers, latent attention."""
    yield "model.embed_tokens.weight", (129_280, 7168)
    for i in range(61):
        p = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_a_proj", 1536, 7168), ("self_attn.q_b_proj", 24_576, 1536),
            ("self_attn.kv_a_proj_with_mqa", 576, 7168), ("self_attn.kv_b_proj", 32_768, 512),
            ("self_attn.o_proj", 7168, 16_384),
        ):  # fmt: skip
            yield f"{p}{name}.weight", (rows, columns)
        inner = [("mlp.", 18_432)]
        if i >= 3:
            inner = [(f"mlp.experts.{e}.", 2048) for e in range(256)]
            inner.append(("mlp.shared_experts.", 2048))
            yield p + "mlp.gate.weight", (256, 7168)
        for name, width in inner:
            yield f"{p}{name}gate_proj.weight", (width, 7168)
            yield f"{p}{name}up_proj.weight", (width, 7168)
            yield f"{p}{name}down_proj.weight", (7168, width)
        yield p + "input_layernorm.weight", (7168,)
        yield p + "post_attention_layernorm.weight", (7168,)
    yield "model.norm.weight", (7168,)
    yield "lm_head.weight", (129_280, 7168)


PLANNED = {"70B": llama_70b, "671B": experts_671b}


def hollow(folder: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    """A bfloat16 checkpoint whose weights are holes: headers are real, the disk is not used."""
    folder.mkdir(parents=True)
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        size = 2
        for extent in shape:
            size *= extent
        if groups[-1] and filled + size > SHARD:
            groups.append([])
            filled = 0
        groups[-1].append((name, "BF16", shape))
        filled += size
    weight_map = {}
    for number, group in enumerate(groups, 1):
        header, _, size = build_header(group, {"format": "pt"})
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(size)
        weight_map |= {tensor: name for tensor, _, _ in group}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "planned"}))


def planned(work: Path, method: str) -> list[dict[str, Any]]:
    rows = []
    for size, shapes in PLANNED.items():
        tensors = list(shapes())
        folder = work / f"planned-{size}"
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("base", "ft0", "ft1", "ft2"):
            hollow(folder / name, tensors)
        wanted = recipe(method, [folder / f"ft{k}" for k in range(3)], folder / "base")
        started = time.perf_counter()
        plan = make_plan(parse_recipe(wanted), folder / "out")
        rows.append({
            "shape": size, "method": method, "tensors": len(plan.tensors),
            "elements": sum(t.numel for t in plan.tensors), "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written, "passes": plan.passes,
            "memory_predicted": plan.memory, "planning_s": time.perf_counter() - started,
        })  # fmt: skip
        shutil.rmtree(folder)
    return rows


def text(rows: list[dict[str, Any]], plans: list[dict[str, Any]], about: dict[str, Any]) -> str:
    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.0f} [{min(values):.0f}, {max(values):.0f}]"

    lines = [
        f"Base and three finetunes of the {about['shape']} shape, bfloat16, "
        f"{about['input_gb']:.1f} GB of inputs, {about['memory_gb']:.0f} GB of memory. "
        f"{about['cpu']}, {about['cores']} cores, {about['date']}, commit {about['commit']}; "
        f"median [least, most] of {about['reps']} runs.",
        "",
        "| method | cl_fast s | floor s | ratio | CPU s | GB moved | GB/s | anonymous MB | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rates = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        ours = [r for r in rows if r["method"] == method and r["provider"] == "cl_fast"]
        base = [r for r in rows if r["method"] == method and r["provider"] == "floor"]
        wall = statistics.median(r["wall_s"] for r in ours)
        rates[method] = ours[0]["bytes"] / wall
        lines.append(
            f"| {method} | {spread([r['wall_s'] for r in ours])} | "
            f"{spread([r['wall_s'] for r in base])} | "
            f"{wall / statistics.median(r['wall_s'] for r in base):.2f} | "
            f"{statistics.median(r['cpu_s'] for r in ours):.0f} | {ours[0]['bytes'] / 1e9:.1f} | "
            f"{rates[method] / 1e9:.2f} | {max(r['peak_anonymous_mb'] for r in ours):.0f} | "
            f"{ours[0]['max_error_spacings']:.3f} spacings |"
        )
    lines += [
        "",
        "Planned, not run (base and three finetunes, bfloat16); hours at the measured rate of the "
        "same method:",
        "",
        "| shape | method | tensors | read GB | written GB | predicted memory MB | planned in s | "
        "hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for plan in plans:
        once = (plan["bytes_read"] / plan["passes"] + plan["bytes_written"]) / rates[plan["method"]]
        lines.append(
            f"| {plan['shape']} | {plan['method']} | {plan['tensors']} | "
            f"{plan['bytes_read'] / 1e9:.0f} | {plan['bytes_written'] / 1e9:.0f} | "
            f"{plan['memory_predicted'] / 1e6:.0f} | {plan['planning_s']:.2f} | {once / 3600:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="6.7b")
    parser.add_argument("--work", type=Path, required=True, help="room for five checkpoints")
    parser.add_argument("--methods", default="task_arithmetic,ties")
    parser.add_argument("--reps", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    a = parser.parse_args()
    work = a.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    checkpoints = work / f"checkpoints-{a.shape}"
    make(checkpoints, a.shape, 3, 2_000_000_000, 20240601)
    base, models = checkpoints / "base", [checkpoints / f"ft{k}" for k in range(3)]
    inputs = [weight_files(folder) for folder in (base, *models)]
    moved = sum(f.stat().st_size for group in inputs for f in group)
    about = machine() | {
        "shape": a.shape, "reps": a.reps, "input_gb": moved / 1e9,
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
    }  # fmt: skip
    moved += sum(f.stat().st_size for f in inputs[0])
    out, rows, plans = work / "out", list[dict[str, Any]](), list[dict[str, Any]]()
    for method in a.methods.split(","):
        written = work / f"{method}.yml"
        written.write_text(yaml.safe_dump(recipe(method, models, base), sort_keys=False))
        merge = [sys.executable, "-m", "cl_fast", "merge", str(written), str(out), "--quiet"]
        for rep in range(a.reps):
            for provider in ("floor", "cl_fast"):
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                if provider == "floor":
                    row: dict[str, Any] = dict(floor(inputs, out, True))
                else:
                    row = process(merge, work / "log.txt")
                    row |= check(method, out, base, models, "cl_fast")
                row |= {"method": method, "provider": provider, "rep": rep, "bytes": moved}
                rows.append(row)
                print(json.dumps(row), flush=True)
        plans += planned(work, method)
    shutil.rmtree(out, ignore_errors=True)
    result = {"about": about, "rows": rows, "plans": plans}
    a.out.mkdir(exist_ok=True)
    name = f"large-merge-{a.shape}"
    (a.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (a.out / f"{name}.md").write_text(text(rows, plans, about))
    print(text(rows, plans, about))


if __name__ == "__main__":
    main()
