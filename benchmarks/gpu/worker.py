"""The process that runs cases: `python -m gpu.worker`, started by gpu_lane.py.

    python -m gpu.worker about [--device cpu] [--cases-from FILE]
    python -m gpu.worker run --events FD [--device cpu] [--cases-from FILE] < todo.json

`about` prints what the rows belong to and which cases there are, as JSON. `run` carries out the
cases of its standard input, and reports to the file descriptor FD one JSON object per line:

    {"event": "start", "case": ..., "limit_s": ...}
    {"event": "at", "case": ..., "provider": ..., "what": ...}       before whatever may crash
    {"event": "rows", "case": ..., "rows": [...], "targets": [...]}
    {"event": "left", "case": ...}                                   the time does not suffice
    {"event": "poisoned", "case": ..., "provider": ..., "reason": ...}   then it ends itself

A process of its own, because a kernel that goes astray takes its process with it: the lane starts
another one for the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from . import (
    divergence,
    editing,
    harness,
    low_rank,
    merge,
    nearest,
    orthogonality,
    packing,
    selection,
)
from .rows import DRY_RUN

__all__ = ["all_cases", "main"]

POISONED = 75
_PEERS = ("peft", "mergekit", "transformers", "liger-kernel")


def all_cases(more: str | None = None) -> list[harness.Case]:
    """Every case in the order in which they run: those with targets and peers first."""
    families = (
        merge, selection, low_rank, nearest, orthogonality, divergence, packing,
        editing,  # long, and its model stays in memory: the last of all
    )  # fmt: skip
    cases = [case for family in families for case in family.CASES]
    if more:
        spec = importlib.util.spec_from_file_location("more_cases", more)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cases += module.CASES
    return cases


def about(device: str, cases: list[harness.Case]) -> dict[str, Any]:
    """The machine, the versions, and the cases."""
    found: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "triton": _version("triton"),
            **{name: _version(name) for name in _PEERS},
        },
        "cases": [
            {"op": c.op, "name": c.name, "seconds": c.seconds, "limit_s": c.limit_s} for c in cases
        ],
    }
    if device == "cpu":
        return found | {"device": DRY_RUN, "card": DRY_RUN, "driver": "none", "arch": ""}
    if not torch.cuda.is_available():
        return found | {"device": "", "why": _no_card()}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"{properties.multi_processor_count} multiprocessors",
        "card": properties.name,
        "driver": _driver(),
        "arch": f"{properties.major}{properties.minor}",
    }


def _no_card() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but sees no device"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return asked.stdout.split("\n")[0].strip()
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().split("\n")[0].strip()
    return "unknown"


def run(events: int, device: str, cases: list[harness.Case]) -> None:
    """Carry out the cases of the standard input."""
    order = json.load(sys.stdin)
    by_name = {case.name: case for case in cases}
    machine = harness.Machine.find(device)
    sink = os.fdopen(events, "w", encoding="utf-8")

    def tell(event: str, **what: Any) -> None:
        sink.write(json.dumps({"event": event, **what}) + "\n")
        sink.flush()

    for todo in order["todo"]:
        case = by_name[todo["case"]]
        if time.time() + case.seconds > order["until"]:
            tell("left", case=case.name)
            continue
        tell("start", case=case.name, limit_s=case.limit_s)

        def at(provider: str, what: str, name: str = case.name) -> None:
            tell("at", case=name, provider=provider, what=what)

        try:
            rows, targets = harness.run_case(
                case, machine, order["about"], at=at, skip=todo["skip"]
            )
        except harness.Poisoned as error:
            provider, reason = error.args
            tell("poisoned", case=case.name, provider=provider, reason=reason)
            # Nothing that belongs to the device can be taken down in order any more.
            os._exit(POISONED)
        tell("rows", case=case.name, rows=rows, targets=targets)
        gc.collect()
        if not machine.dry:
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("about", "run"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cases-from")
    parser.add_argument("--events", type=int)
    a = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"peft|mergekit|transformers")
    cases = all_cases(a.cases_from)
    if a.what == "about":
        print(json.dumps(about(a.device, cases)))
    else:
        run(a.events, a.device, cases)


if __name__ == "__main__":
    main()
