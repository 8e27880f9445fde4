#!/usr/bin/env python3
"""Time work on LoRA adapters: put on a base, composed, extracted; cl_fast, PEFT and mergekit.

    python benchmarks/adapters.py --work DIR [--shape 0.5b] [--rank 16] [--reps 3]
        [--jobs apply,compose,extract]

apply    an adapter on its base, written as a checkpoint: cl-fast merge, PEFT's merge_and_unload
compose  two adapters, weights 1 and 0.5, to one of the same rank by SVD: cl-fast adapter merge,
         PEFT's add_weighted_adapter (which loads the base)
extract  an adapter of a finetune: cl-fast adapter extract, mergekit-extract-lora

Every provider is a fresh process (imports are part of what a user waits for), in turn within each
repetition, on files that are in the page cache; nobody waits for the disk. Peak anonymous memory is
sampled every 20 ms. Before its time counts, a result is compared with float64: `error` is the
relative Frobenius norm of what is written against the exact change, over sampled layers.

Writes benchmarks/results/adapters-<shape>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from make_checkpoints import SHAPES, make
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS = (1.0, 0.5)

PEFT_APPLY = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
PEFT_COMPOSE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, first, second, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, first, adapter_name="a")
model.load_adapter(second, "b")
model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "both", combination_type="svd",
                           svd_full_matrices=False)
model.save_pretrained(out, selected_adapters=["both"])
"""


def tensors_of(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def read(where: dict[str, Path], name: str) -> torch.Tensor:
    with safe_open(where[name], "pt") as file:
        return file.get_tensor(name)


def make_adapter(base: Path, folder: Path, rank: int, seed: int) -> None:
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    where, tensors = tensors_of(base), {}
    for name in where:
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in TARGETS and name.endswith(".weight"):
            out, inner = read(where, name).shape
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inner, generator=draw) / 30
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank, generator=draw) / 300
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": list(TARGETS), "base_model_name_or_path": str(base),
        "init_lora_weights": True, "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def product(where: dict[str, Path], module: str, config: dict[str, Any]) -> torch.Tensor:
    a = read(where, f"base_model.model.{module}.lora_A.weight").double()
    b = read(where, f"base_model.model.{module}.lora_B.weight").double()
    scale = config["lora_alpha"] / config["r"]
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if module.endswith(pattern.removeprefix("^")):
            scale = alpha / a.shape[0]
    return scale * (b @ a)


def adapter_product(folder: Path, module: str) -> torch.Tensor:
    [config_file] = folder.rglob("adapter_config.json")
    config = json.loads(config_file.read_text())
    return product(tensors_of(config_file.parent), module, config)


def error(job: str, out: Path, work: Path, modules: list[str]) -> float:
    """|written - exact| / |exact| over the sampled layers."""
    wrong = size = 0.0
    base = tensors_of(work / "base")
    for module in modules:
        weight = read(base, f"{module}.weight").double()
        if job == "apply":
            exact = weight + adapter_product(work / "lora0", module)
            found = read(tensors_of(out), f"{module}.weight").double()
        elif job == "compose":
            exact = sum(
                w * adapter_product(work / f"lora{k}", module) for k, w in enumerate(WEIGHTS)
            )
            found = adapter_product(out, module)
        else:
            exact = read(tensors_of(work / "ft0"), f"{module}.weight").double() - weight
            found = adapter_product(out, module)
        wrong += float((found - exact).square().sum())
        size += float(exact.square().sum())
    return math.sqrt(wrong / size)


def commands(job: str, work: Path, rank: int, out: Path) -> dict[str, list[str]]:
    python, base = sys.executable, str(work / "base")
    first, second = str(work / "lora0"), str(work / "lora1")
    ours = [python, "-m", "cl_fast"]
    if job == "apply":
        recipe = work / "apply.yml"
        recipe.write_text(
            json.dumps(
                {
                    "merge_method": "task_arithmetic",
                    "base_model": base,
                    "models": [{"model": first, "parameters": {"weight": 1.0}}],
                }
            )
        )
        return {
            "cl_fast": [*ours, "merge", str(recipe), str(out), "--no-fsync", "--quiet"],
            "peft": [python, "-c", PEFT_APPLY, base, first, str(out)],
        }
    if job == "compose":
        return {
            "cl_fast": [
                *ours, "adapter", "merge", first, second, "--out", str(out), "--weights",
                *map(str, WEIGHTS), "--rank", str(rank), "--quiet",
            ],
            "peft": [python, "-c", PEFT_COMPOSE, base, first, second, str(out)],
        }  # fmt: skip
    peer = shutil.which("mergekit-extract-lora") or str(
        Path(sys.executable).parent / "mergekit-extract-lora"
    )
    given = [
        *ours, "adapter", "extract", base, str(work / "ft0"), "--out", str(out), "--rank",
        str(rank), "--targets", *TARGETS, "--others", "lose", "--quiet",
    ]  # fmt: skip
    found = {"cl_fast": given, "cl_fast exact": [*given, "--svd", "exact"]}
    if Path(peer).exists():
        found["mergekit"] = [
            peer, "--model", str(work / "ft0"), "--base-model", base, "--out-path", str(out),
            "--max-rank", str(rank),
        ]  # fmt: skip
        for target in ("embed_tokens", "lm_head"):
            found["mergekit"] += ["--exclude-regex", target]
    return found


def run(command: list[str]) -> tuple[float, float, int]:
    """Seconds, CPU seconds, peak anonymous bytes."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=HERE.parent
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]) << 10)
            time.sleep(0.02)

    before = os.times()
    watcher = threading.Thread(target=watch)
    watcher.start()
    _, said = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    after = os.times()
    if process.returncode:
        raise SystemExit(f"{command[:4]}: {said.decode()[-2000:]}")
    cpu = after.children_user + after.children_system
    return seconds, cpu - before.children_user - before.children_system, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--jobs", default="apply,compose,extract")
    a = parser.parse_args()
    work = a.work / a.shape
    if not (work / "base").exists():
        make(work, a.shape, 1, 1 << 30, 0)
    for k in range(2):
        if not (work / f"lora{k}").exists():
            make_adapter(work / "base", work / f"lora{k}", a.rank, seed=k)
    names = [
        name.removesuffix(".weight")
        for name in tensors_of(work / "base")
        if name.removesuffix(".weight").rsplit(".", 1)[-1] in TARGETS and name.endswith(".weight")
    ]
    sampled = sorted(names)[:: max(1, len(names) // 6)]
    rows = []
    for job in a.jobs.split(","):
        times: dict[str, list[tuple[float, float, int]]] = {}
        errors: dict[str, float] = {}
        for rep in range(a.reps):
            for provider in commands(job, work, a.rank, work / "out"):
                shutil.rmtree(work / "out", ignore_errors=True)
                command = commands(job, work, a.rank, work / "out")[provider]
                taken = run(command)
                if rep == 0:
                    errors[provider] = error(job, work / "out", work, sampled)
                times.setdefault(provider, []).append(taken)
                os.sync()
                print(job, provider, f"{taken[0]:.1f} s, {taken[2] / 1e6:.0f} MB", flush=True)
        shutil.rmtree(work / "out", ignore_errors=True)
        for provider, runs in times.items():
            seconds = sorted(run[0] for run in runs)
            rows.append(
                {
                    "job": job,
                    "provider": provider,
                    "seconds": statistics.median(seconds),
                    "fastest": seconds[0],
                    "slowest": seconds[-1],
                    "cpu_seconds": statistics.median(run[1] for run in runs),
                    "peak_anonymous_bytes": max(run[2] for run in runs),
                    "error": errors[provider],
                }
            )
    report(rows, a.shape, a.rank, a.reps, len(names))


def report(rows: list[dict[str, Any]], shape: str, rank: int, reps: int, modules: int) -> None:
    import peft

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    machine = {
        "cpu": model, "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version(),
    }  # fmt: skip
    results = HERE / "results"
    content = {"shape": shape, "rank": rank, "reps": reps, "modules": modules, "machine": machine}
    (results / f"adapters-{shape}.json").write_text(
        json.dumps(content | {"rows": rows}, indent=1) + "\n"
    )
    lines = [
        f"{shape} shape, rank {rank} on {modules} modules; median of {reps} (fastest to slowest), "
        f"{machine['cpu']}, {machine['cores']} cores",
        "",
        "| job | provider | seconds | CPU seconds | peak anonymous MB | error |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['job']} | {row['provider']} | {row['seconds']:.1f} ({row['fastest']:.1f} to "
        f"{row['slowest']:.1f}) | {row['cpu_seconds']:.1f} | "
        f"{row['peak_anonymous_bytes'] / 1e6:.0f} | {row['error']:.6g} |"
        for row in rows
    ]
    (results / f"adapters-{shape}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
