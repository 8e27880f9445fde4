"""What runs where on this machine, and why not faster: the text of `cl-fast env`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

from cl_fast._version import __version__
from cl_fast.backends import cuda, native

__all__ = ["available_memory", "describe"]

OPS = {
    "combine, combine_many, combine_many_": "merge",
    "dare": "merge",
    "magnitude_threshold": "merge",
    "pack, unpack, combine of packed deltas": "packed",
    "rank_update, gram": "dense",
    "orthogonal_penalty": "penalty",
    "orthogonal_project": "dense",
    "divergences, log-probs of tokens": "rows",
}
"""Families of ops, and which kernels they have: of a merge (C++, CUDA, Triton), of packed deltas
(C++, Triton), of a penalty (C++ for float32, Triton), dense products (plain torch on the CPU,
Triton), or rows of logits (C++, Triton; float64 in plain torch)."""
_PACKAGES = ("torch", "triton", "numpy", "transformers", "safetensors", "peft", "trl", "mergekit")


def describe() -> list[str]:
    """Lines of plain text. Imports torch where it is installed, to ask it about devices."""
    core = native.load()
    lines = [
        f"cl_fast       {__version__}  ({Path(__file__).parent})",
        f"python        {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"threads       {native.threads()} of {os.cpu_count()} cores"
        + (" (CL_FAST_THREADS)" if "CL_FAST_THREADS" in os.environ else ""),
    ]
    memory = available_memory()
    if memory is not None:
        lines.append(f"memory        {memory / 1e9:.1f} GB available")
    if core is None:
        lines.append(f"C++ core      not used: {native.reason()}")
    else:
        info = core.build_info()
        lines.append(
            f"C++ core      {core.isa()} (this machine can: {', '.join(core.supported_isas())}), "
            f"compiler {info['compiler']}"
        )
    lines += [f"{name:<13} {_version(name)}" for name in _PACKAGES]
    device = _device()
    lines += [f"cuda          {device}", f"CUDA kernels  {_cuda_kernels()}", "", "what serves:"]
    width = max(map(len, OPS))
    lines.append(f"  {'merge of files':<{width}}  {_on_cpu('merge')}")
    for op, kind in OPS.items():
        lines.append(f"  {op:<{width}}  cpu: {_on_cpu(kind)}")
        if not device.startswith(("none", "unknown")):
            lines.append(f"  {'':<{width}}  cuda: {_on_cuda(kind)}")
    return lines


def available_memory() -> int | None:
    """Bytes that a new process could use without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "importable, version unknown"


def _device() -> str:
    """The devices that torch sees, or why there are none."""
    if importlib.util.find_spec("torch") is None:
        return "unknown: torch is not installed"
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken install must not break this report
        return f"unknown: torch does not load: {error}"
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"none: torch is built for CUDA {torch.version.cuda} but sees no device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _cuda_kernels() -> str:
    module = cuda.load()
    if module is None:
        return f"not used: {cuda.reason()}"
    info = module.build_info()
    return f"CUDA {info['cuda'] // 1000}.{info['cuda'] % 1000 // 10}, for {info['architectures']}"


def _on_cpu(kind: str) -> str:
    if kind == "dense":
        return "plain torch"
    core = native.load()
    if core is None:
        return f"eager (plain torch), because {native.reason()}"
    return f"native ({core.isa()})" + (", float32; else plain torch" if kind == "penalty" else "")


def _on_cuda(kind: str) -> str:
    import torch

    if kind == "merge" and cuda.serves(torch.device("cuda")):
        return "cuda"
    if importlib.util.find_spec("triton") is None:
        return "eager (plain torch on the device), because triton is not installed"
    if kind == "merge":
        why = cuda.reason() or "the CUDA kernels are not built for this device"
        return f"triton; not the CUDA kernels, because {why}"
    return "triton"
