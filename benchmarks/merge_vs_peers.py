#!/usr/bin/env python3
"""Time whole merges: cl_fast, mergekit, PEFT's functions, and the floor of moving the bytes.

    python benchmarks/merge_vs_peers.py --shape 0.5b [--work DIR] [--mergekit PATH/mergekit-yaml]
        [--peft PATH/python] [--reps 3] [--methods linear,ties] [--readme]

Every provider is a fresh process (start-up is part of what a user waits for), run in turn within
each repetition on the same checkpoints, whose files are read into the page cache before. For each
run: wall and CPU seconds, peak resident memory, peak anonymous memory (what the machine must
have; mapped files are page cache) sampled every 20 ms. Between runs dirty pages are synced.

The floor reads the same inputs with two threads and writes one output of the same size from a
reused buffer, without any arithmetic, start-up or checks; `fsync` says whether the output was
forced to the disk before the clock stopped. Peers do not fsync, so the ratios are taken between
runs that do not.

Before timing counts, each provider's output is compared with the formula in float64 on sampled
tensors, in units of the spacing of bfloat16. Random masks of DARE are those of cl_fast's
documented stream; another program's masks cannot be reproduced, and its column says so.

Writes benchmarks/results/merge-<shape>[-<label>].json; --readme puts the table into README.md.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from make_checkpoints import SHAPES, make
from safetensors import safe_open

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Merge:
    """A recipe: the numbers of each model, whether there is a base, its models, and the rest."""

    own: dict[str, float]
    base: bool = True
    more: dict[str, Any] = field(default_factory=dict)
    models: int = 3
    peers: tuple[str, ...] = ("mergekit",)

    @property
    def weight(self) -> float:
        return self.own.get("weight", 1.0)

    @property
    def density(self) -> float | None:
        return self.own.get("density")


BOTH = ("mergekit", "peft")
METHODS: dict[str, Merge] = {
    "linear": Merge({"weight": 1.0}, base=False),
    "task_arithmetic": Merge({"weight": 0.4}, peers=BOTH),
    "dare_linear": Merge({"weight": 0.4, "density": 0.1}, peers=BOTH),
    "ties": Merge({"weight": 1.0, "density": 0.2}, peers=BOTH),
    "dare_ties": Merge({"weight": 0.4, "density": 0.1}, peers=BOTH),
    "ties_global": Merge({"weight": 1.0, "density": 0.2}, more={"variant": "paper"}, peers=()),
    "breadcrumbs": Merge({"weight": 0.5, "density": 0.9, "gamma": 0.01}),
    "breadcrumbs_ties": Merge({"weight": 0.5, "density": 0.9, "gamma": 0.01}),
    "della_linear": Merge({"weight": 0.5, "density": 0.3, "epsilon": 0.15}),
    "della": Merge({"weight": 1.0, "density": 0.3, "epsilon": 0.15}),
    "slerp": Merge({}, more={"t": 0.3}, models=1),
    "model_stock": Merge({}),
}
DEFAULT = ("linear", "task_arithmetic", "dare_linear", "ties", "dare_ties", "ties_global")
CHUNK = 1 << 20


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def recipe(method: str, folders: list[Path], base: Path) -> dict[str, Any]:
    merge = METHODS[method]
    r: dict[str, Any] = {
        "merge_method": method.removesuffix("_global"),
        "models": [{"model": str(f), "parameters": dict(merge.own)} for f in folders],
    }
    if method == "slerp":  # between the base and one model, which are both listed
        r["models"] = [{"model": str(f)} for f in (base, *folders)]
    elif not merge.own:
        r["models"] = [{"model": str(f)} for f in folders]
    if merge.base:
        r["base_model"] = str(base)
    if merge.more:
        r["parameters"] = merge.more
    return r


# ------------------------------------------------------------------------------------ running


def sample_anonymous(pid: int, stop: threading.Event, peak: list[int]) -> None:
    while not stop.wait(0.02):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("RssAnon"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)


def process(command: list[str], log: Path) -> dict[str, float]:
    env = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="0")
    with log.open("w") as sink:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=sink, stderr=sink, env=env)
        stop, peak = threading.Event(), [0]
        thread = threading.Thread(target=sample_anonymous, args=(child.pid, stop, peak))
        thread.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        stop.set()
        thread.join()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "max_rss_mb": usage.ru_maxrss / 1024,
        "peak_anonymous_mb": peak[0] / 2**20,
    }


def floor(inputs: list[list[Path]], out: Path, fsync: bool) -> dict[str, float]:
    """Read every input and write as many bytes as the first one holds, with two threads."""
    out.mkdir()
    segments = []
    for shard, first in enumerate(inputs[0]):
        size = first.stat().st_size
        segments += [(shard, o, min(CHUNK, size - o)) for o in range(0, size, CHUNK)]
    sources = [[os.open(m[s], os.O_RDONLY) for m in inputs] for s in range(len(inputs[0]))]
    sinks = [os.open(out / f.name, os.O_CREAT | os.O_WRONLY) for f in inputs[0]]
    start, cpu = time.perf_counter(), time.process_time()

    def work(part: list[tuple[int, int, int]]) -> None:
        buffer = memoryview(bytearray(CHUNK))
        for shard, offset, n in part:
            for fd in sources[shard]:
                os.preadv(fd, [buffer[:n]], offset)
            os.pwrite(sinks[shard], buffer[:n], offset)

    half = len(segments) // 2
    threads = [threading.Thread(target=work, args=(p,)) for p in (segments[:half], segments[half:])]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if fsync:
        for fd in sinks:
            os.fsync(fd)
    result = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    for fd in [*sinks, *(fd for group in sources for fd in group)]:
        os.close(fd)
    return result | {"max_rss_mb": 0.0, "peak_anonymous_mb": 0.0}


def warm(files: list[Path]) -> None:
    buffer = bytearray(1 << 22)
    for path in files:
        with path.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


# ------------------------------------------------------------------------------------ checking


def expected(method: str, name: str, base: torch.Tensor | None, models: list[torch.Tensor],
             seed: int, thresholds: list[float] | None) -> torch.Tensor:  # fmt: skip
    """The merged tensor in float64, from the formulas of the papers and of mergekit."""
    from cl_fast.ops import keep_mask, keep_threshold, stream_key

    merge = METHODS[method]
    weight, density = merge.weight, merge.density
    if not merge.base:
        return torch.stack([m.double() for m in models]).mean(0)
    assert base is not None
    if method == "slerp":
        return slerp(base.double(), models[0].double(), merge.more["t"])
    deltas = [m.double() - base.double() for m in models]
    if method == "model_stock":
        return base.double() + model_stock_share(deltas) * torch.stack(deltas).mean(0)
    if "breadcrumbs" in method:
        deltas = [without_outliers(d, density or 1.0, merge.own["gamma"]) for d in deltas]
    if "della" in method:
        for k, d in enumerate(deltas):
            key = stream_key(seed, f"ft{k}", name)
            keep = magprune_keep(d, density or 1.0, merge.own["epsilon"], key)
            deltas[k] = d * keep * (d.abs().sum() / (d * keep).abs().sum())
    if method.startswith("dare") and density is not None:
        for k, d in enumerate(deltas):
            key = stream_key(seed, f"ft{k}", name)
            keep = keep_mask(key, d.numel(), keep_threshold(density)).reshape(d.shape).double()
            deltas[k] = d * keep * (d.abs().sum() / (d * keep).abs().sum())
    elif thresholds is not None:
        pairs = zip(deltas, thresholds, strict=True)
        deltas = [torch.where(d.abs() >= t, d, 0.0) for d, t in pairs]
    elif method == "ties" and density is not None:
        n = deltas[0].numel()
        for k, d in enumerate(deltas):
            order = d.abs().flatten().sort(descending=True, stable=True).indices
            kept = torch.zeros(n, dtype=torch.bool)
            kept[order[: max(1, int(density * n))]] = True
            deltas[k] = torch.where(kept.reshape(d.shape), d, 0.0)
    total = weight * torch.stack(deltas)
    if "ties" in method or method == "della":
        majority = torch.where(total.sum(0) >= 0, 1.0, -1.0)
        agrees = total.sign() == majority
        total = torch.where(agrees, total, 0.0)
        divisor = (agrees * weight).sum(0)
        merged = total.sum(0)
        if method in ("ties", "ties_global", "della"):
            merged = merged / torch.where(divisor == 0, 1.0, divisor)
    else:
        merged = total.sum(0)
    return base.double() + merged


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def model_stock_share(deltas: list[torch.Tensor]) -> float:
    n = len(deltas)
    cosines = [
        float((deltas[i] * deltas[j]).sum() / (deltas[i].norm() * deltas[j].norm()))
        for i in range(n)
        for j in range(i)
    ]
    mean = sum(cosines) / len(cosines)
    return n * mean / (1 + (n - 1) * mean)


def without_outliers(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    n = delta.numel()
    order = delta.abs().flatten().sort(descending=True, stable=True).indices
    keep = int(density * n)
    top = min(int(gamma * n), n - keep)
    kept = torch.zeros(n, dtype=torch.bool)
    kept[order[top : top + keep]] = True
    return torch.where(kept.reshape(delta.shape), delta, 0.0)


def magprune_keep(delta: torch.Tensor, density: float, epsilon: float, key: int) -> torch.Tensor:
    """Which elements of the documented stream are kept; ranks by an ordinary sort of each row."""
    from cl_fast.ops.dropping import below_thresholds

    rows = delta.abs().reshape(-1, delta.shape[-1])
    length = rows.shape[1]
    order = rows.sort(dim=1, descending=True, stable=True).indices
    chance = (density - epsilon) + 2 * epsilon * torch.arange(
        length - 1, -1, -1, dtype=torch.float64
    ) / (length - 1)
    thresholds = torch.empty_like(order).scatter_(
        1, order, (chance * 2**32 + 0.5).floor().long().expand_as(order)
    )
    return below_thresholds(key, thresholds.flatten()).reshape(delta.shape).double()


def spacing(x: torch.Tensor) -> torch.Tensor:
    """The distance between neighbouring bfloat16 values at |x|."""
    exponent = torch.frexp(x.abs().clamp_min(2.0**-126)).exponent
    return torch.ldexp(torch.ones_like(x), exponent - 8)


def locate(folder: Path, name: str) -> torch.Tensor:
    for shard in weight_files(folder):
        with safe_open(shard, "pt") as f:
            if name in f.keys():  # noqa: SIM118 - not a mapping
                return f.get_tensor(name)
    raise SystemExit(f"{folder} has no tensor {name}")


def check(method: str, out: Path, base: Path, models: list[Path], provider: str) -> dict[str, Any]:
    """Largest error in bfloat16 spacings, and the share of elements off by more than 0.51."""
    if method.startswith(("dare", "della")) and provider != "cl_fast":
        return {"checked": "random masks of another stream"}
    thresholds = None
    if method == "ties_global":
        thresholds = model_thresholds(out)
    worst, off, count = 0.0, 0, 0
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight",
                 "model.norm.weight"):  # fmt: skip
        b = locate(base, name)
        inputs = [locate(m, name) for m in models]
        want = expected(method, name, b, inputs, 0, thresholds)
        # Where terms cancel, no float32 sum is better than the rounding of its terms.
        largest = torch.stack([x.abs() for x in (b, *inputs)]).amax(0)
        unit = torch.maximum(spacing(want), spacing(largest.double()) * 2.0**-16)
        error = (locate(out, name).double() - want).abs() / unit
        worst = max(worst, float(error.max()))
        off += int((error > 0.51).sum())
        count += error.numel()
    return {"max_error_spacings": worst, "share_off": off / count}


def model_thresholds(out: Path) -> list[float]:
    """The model-wide thresholds that cl_fast recorded; the tests check them by sorting."""
    codes = json.loads((out / "cl_fast_merge.json").read_text())["thresholds"]
    return torch.tensor(codes, dtype=torch.int32).view(torch.float32).tolist()


# ------------------------------------------------------------------------------------ the table


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    import cl_fast
    from cl_fast.backends import native

    core = native.load()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, check=False,
                            capture_output=True, text=True).stdout.strip()  # fmt: skip
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "isa": core.isa() if core else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cl_fast": cl_fast.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: list[dict[str, Any]], about: dict[str, Any], shape: str) -> str:
    def median(method: str, provider: str, key: str) -> float | None:
        values = [r[key] for r in rows if r["method"] == method and r["provider"] == provider]
        return statistics.median(values) if values else None

    def seconds(method: str, provider: str) -> str:
        v = [r["wall_s"] for r in rows if r["method"] == method and r["provider"] == provider]
        if len(v) < 2:
            return f"{v[0]:.2f}" if v else ""
        return f"{statistics.median(v):.2f} [{min(v):.2f}-{max(v):.2f}]"

    def ratio(a: float | None, b: float | None) -> str:
        return "" if a is None or b is None else f"{a / b:.1f}x"

    lines = [
        f"Qwen2.5-{shape.upper()} shapes, base and three finetuned models, bfloat16, page cache "
        f"warm; medians of {about['reps']} interleaved runs (other libraries: "
        f"{about['peer_reps']}), lowest and highest in brackets, on {about['cores']} cores "
        f"({about['cpu']}, {about['isa']}), {about['date']}, commit {about['commit']}. The floor "
        "moves the same bytes with two threads and does nothing else.",
        "",
        "| method | cl_fast s | with fsync s | floor s | of the floor | mergekit s | faster "
        "| PEFT functions s | faster | anonymous memory MB: cl_fast / mergekit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(r["method"] for r in rows):
        ours = median(method, "cl_fast", "wall_s")
        low = median(method, "floor", "wall_s")
        kit, peft = (median(method, p, "wall_s") for p in ("mergekit", "peft"))
        memory = [median(method, p, "peak_anonymous_mb") for p in ("cl_fast", "mergekit")]
        cells = [
            method,
            *(seconds(method, p) for p in ("cl_fast", "cl_fast fsync", "floor")),
            ratio(ours, low),
            seconds(method, "mergekit"),
            ratio(kit, ours),
            seconds(method, "peft"),
            ratio(peft, ours),
            " / ".join("-" if v is None else f"{v:.0f}" for v in memory),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def update_readme(shape: str, text: str) -> None:
    readme = HERE.parent / "README.md"
    begin, end = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
    content = readme.read_text()
    head, rest = content.split(begin)
    blocks, tail = rest.split(end)
    start = f"Qwen2.5-{shape.upper()} shapes"
    kept = [b for b in blocks.strip().split("\n\nQwen2.5-") if b]
    kept = [b if b.startswith("Qwen2.5-") else f"Qwen2.5-{b}" for b in kept]
    kept = [b for b in kept if not b.startswith(start)]
    body = "\n\n".join(sorted([*kept, text.strip()]))
    readme.write_text(f"{head}{begin}\n{body}\n{end}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="much free space")
    parser.add_argument("--checkpoints", type=Path, help="default: WORK/checkpoints-SHAPE")
    kit = Path(sys.executable).with_name("mergekit-yaml")
    parser.add_argument("--mergekit", default=str(kit) if kit.exists() else "",
                        help="mergekit-yaml; an empty string leaves it out")  # fmt: skip
    parser.add_argument("--peft", default=sys.executable if find_spec("peft") else "",
                        help="a python with peft; an empty string leaves it out")  # fmt: skip
    parser.add_argument("--methods", default=",".join(DEFAULT),
                        help="of " + ", ".join(METHODS))  # fmt: skip
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--peer-reps", type=int, default=None, help="default: as --reps")
    parser.add_argument("--label", default="", help="added to the name of the result file")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    a = parser.parse_args()
    work = a.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    checkpoints = a.checkpoints or work / f"checkpoints-{a.shape}"
    make(checkpoints, a.shape, 3, 1_000_000_000, 20240601)
    base, models = checkpoints / "base", [checkpoints / f"ft{k}" for k in range(3)]
    peer_reps = a.reps if a.peer_reps is None else a.peer_reps
    about = machine() | {"reps": a.reps, "peer_reps": peer_reps, "shape": a.shape}
    rows: list[dict[str, Any]] = []
    name = "-".join(filter(None, ("merge", a.shape, a.label)))
    target = HERE / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    checked: dict[tuple[str, str], dict[str, Any]] = {}
    out = work / "out"

    for method in a.methods.split(","):
        merge = METHODS[method]
        merged = models[: merge.models]
        inputs = ([base] if merge.base else []) + merged
        written = work / f"{method}.yml"
        written.write_text(yaml.safe_dump(recipe(method, merged, base), sort_keys=False))
        peer = ["--weight", str(merge.weight), "--density", str(merge.density or 1.0)]
        ours = [sys.executable, "-m", "cl_fast", "merge", str(written), str(out), "--quiet"]
        runs: dict[str, Callable[[Path], dict[str, float]]] = {
            "floor": lambda _, i=inputs: floor([weight_files(f) for f in i], out, False),
            "cl_fast": lambda log, m=ours: process([*m, "--no-fsync"], log),
            "floor fsync": lambda _, i=inputs: floor([weight_files(f) for f in i], out, True),
            "cl_fast fsync": lambda log, m=ours: process(m, log),
        }
        if a.mergekit and "mergekit" in merge.peers:
            command = [a.mergekit, str(written), str(out), "--quiet"]
            runs["mergekit"] = lambda log, c=command: process(c, log)
        if a.peft and "peft" in merge.peers:
            command = [a.peft, str(HERE / "peft_merge.py"), method, str(out), str(base)]
            command += [*map(str, merged), *peer]
            runs["peft"] = lambda log, c=command: process(c, log)
        for rep in range(a.reps):
            for provider, run in runs.items():
                if provider in BOTH and rep >= peer_reps:
                    continue
                shutil.rmtree(out, ignore_errors=True)
                warm([f for folder in inputs for f in weight_files(folder)])
                os.sync()
                row: dict[str, Any] = {"method": method, "provider": provider, "rep": rep}
                row |= run(work / "log.txt")
                moved = sum(f.stat().st_size for i in inputs for f in weight_files(i))
                moved += sum(f.stat().st_size for f in weight_files(base))
                row |= {"bytes": moved, "gb_per_s": moved / row["wall_s"] / 1e9}
                who = provider.split()[0]
                if who != "floor" and (method, who) not in checked:
                    checked[method, who] = check(method, out, base, merged, who)
                row |= checked.get((method, who), {})
                rows.append(row)
                print(json.dumps(row), flush=True)
                target.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    text = table(rows, about, a.shape)
    print(text)
    if a.readme:
        update_readme(a.shape, text)


if __name__ == "__main__":
    main()
