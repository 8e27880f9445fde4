"""The ops of a merge on GPU tensors: what to compute where, in which order, without a host sync.

    trim    select -> codes and cuts on the device -> combine
    l1      absolute sums -> factors on the device -> combine
    rest    combine

The three steps come in two builds with equal signatures and equal bits: CUDA C++ (`cuda_ops`),
where it is built and runs on the device, and Triton (`cl_fast.triton_kernels`). The caller has
checked the arguments. Eight-bit floats are widened to bfloat16 first, which holds all their values.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_fast.backends import cuda, triton
from cl_fast.ops.policy import Policy, trim_keep_count
from cl_fast.ops.streams import keep_threshold

if TYPE_CHECKING:
    from cl_fast.ops.combining import Call

__all__ = [
    "KERNEL_DTYPES",
    "MOST_MODELS",
    "Engine",
    "combine",
    "denominator",
    "dense",
    "engine",
    "float32",
    "magnitude_threshold",
    "require",
    "takes",
    "upload",
]

MOST_MODELS = 32
"""What the kernels combine in one pass."""
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SMALLEST_L1 = 1e-7
_SMALLEST_WEIGHT_SUM = 1e-8
_NOTHING = 0x7FFFFFFF
_filled: set[tuple[torch.device, torch.dtype]] = set()


@dataclass(frozen=True)
class Engine:
    """The three steps, by one backend."""

    name: str
    select: Callable[..., tuple[Tensor, Tensor, Tensor]]
    absolute_sums: Callable[..., tuple[Tensor, Tensor]]
    combine_rows: Callable[..., None]


def engine(device: torch.device) -> Engine | None:
    """The fastest engine for `device`, or None (said once): then the eager reference serves."""
    if cuda.serves(device):
        return _cuda_engine()
    return _triton_engine()


def require(backend: str, device: torch.device) -> Engine:
    """The engine for an explicit backend="cuda" or "triton".

    Raises:
        RuntimeError: it is not there.
    """
    if backend == "cuda":
        if not cuda.serves(device):
            why = cuda.reason() or f"it does not run on {device}"
            raise RuntimeError(f"backend='cuda' cannot be used: {why}")
        return _cuda_engine()
    found = _triton_engine()
    if found is None:
        raise RuntimeError("backend='triton' cannot be used: triton is not installed")
    return found


def _cuda_engine() -> Engine:
    from cl_fast.backends import cuda_ops

    return Engine("cuda", cuda_ops.select, cuda_ops.absolute_sums, cuda_ops.combine_rows)


def _triton_engine() -> Engine | None:
    modules = [triton.load(name) for name in ("magnitude", "sums", "combine")]
    if any(module is None for module in modules):
        return None
    magnitude, sums, combine_module = modules
    return Engine(
        "triton",
        magnitude.select,  # type: ignore[union-attr]
        sums.absolute_sums,  # type: ignore[union-attr]
        combine_module.combine_rows,  # type: ignore[union-attr]
    )


def takes(call: Call) -> bool:
    """Whether the kernels can carry out `call`; if not, the eager reference does."""
    policy = call.policy
    scaled_whole = policy.trim_scope == "model" and policy.rescale == "l1"
    return (
        call.models <= MOST_MODELS
        and policy.sparsify not in ("band", "magprune")
        and not (policy.sparsify == "trim" and scaled_whole)
    )


def combine(call: Call, by: Engine, outs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """All rows of `call`, into `outs` (contiguous; may be its bases) or into new tensors."""
    bases = [dense(base) for base in call.bases]
    tensors = [dense(tensor) for tensor in call.tensors]
    sizes = [tensor.numel() for tensor in tensors[:: call.models]]
    if outs is None:
        outs = [
            torch.empty(first.shape, dtype=call.out_dtype or first.dtype, device=first.device)
            for first in map(call.first, range(call.rows))
        ]
    if not any(sizes):
        return list(outs)

    policy = call.policy
    codes = cuts = keys = keeps = None
    sparsify = policy.sparsify if min(call.densities) < 1.0 else "none"
    factors: Tensor | list[float] = [1.0] * len(tensors)
    if sparsify == "trim":
        codes, cuts, at = _thresholds(call, by, bases, tensors, sizes)
    elif sparsify == "drop":
        keys, keeps = call.keys, [keep_threshold(density) for density in call.densities]
    if sparsify != "none" and policy.rescale == "keep_rate":
        factors = [_keep_rate(policy, density) for density in call.densities]
    elif sparsify != "none" and policy.rescale == "l1":
        total, kept = by.absolute_sums(
            bases, tensors, call.models, keys=keys, keeps=keeps, codes=codes
        )
        if codes is not None:
            # Above the threshold first, then the ties at once: no order among them matters.
            kept = kept + codes.clamp(min=0).view(torch.float32).double() * at
        small = (total < _SMALLEST_L1) | (kept < _SMALLEST_L1)
        factors = torch.where(small, 1.0, total / kept)

    if isinstance(factors, Tensor):
        weights = upload(call.weights, torch.float64, factors.device)
        scales: Any = (weights * factors).float()
        rescales: Any = factors.float()
    else:
        scales = [float32(w * r) for w, r in zip(call.weights, factors, strict=True)]
        rescales = [float32(r) for r in factors]
    by.combine_rows(
        bases,
        tensors,
        outs,
        call.models,
        weights=[float32(weight) for weight in call.weights],
        scales=scales,
        rescales=rescales,
        sparsify=sparsify,
        codes=codes,
        cuts=cuts,
        keys=keys,
        keeps=keeps,
        packed=None,
        kinds=None,
        elect=policy.elect,
        elect_on=policy.elect_on,
        reduce=policy.reduce,
        divisor=policy.divisor,
        denominators=[denominator(policy, call.weights[call.row(r)]) for r in range(call.rows)],
        lam=float32(call.lam),
    )
    return list(outs)


def denominator(policy: Policy, weights: Sequence[float]) -> float:
    """What a mean without election divides by, as a float32 value."""
    by = sum(weights) if policy.divisor == "weights" else float(len(weights))
    return 1.0 if abs(by) < _SMALLEST_WEIGHT_SUM else float32(by)


def _thresholds(
    call: Call, by: Engine, bases: list[Tensor], tensors: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    policy = call.policy
    if call.selects_over_rows:
        counts = [_count(policy, density, sum(sizes)) for density in call.densities[: call.models]]
        return by.select(
            bases, tensors, call.models, counts, whole_model=True, ties=policy.trim_ties
        )
    given = list(call.thresholds) if policy.trim_scope == "model" else [-1] * len(tensors)
    counts = [
        -1 if code >= 0 else _count(policy, density, sizes[entry // call.models])
        for entry, (code, density) in enumerate(zip(given, call.densities, strict=True))
    ]
    codes, cuts, at = by.select(
        bases, tensors, call.models, counts, whole_model=False, ties=policy.trim_ties
    )
    if max(given) >= 0:
        known = upload(given, torch.int32, codes.device)
        end = (1 << 62) if policy.trim_ties == "all" else 0
        # The code that means that nothing is kept is one that NaN may have: it has no ties.
        cuts = torch.where(known >= 0, torch.where(known == _NOTHING, 0, end), cuts)
        codes = torch.where(known >= 0, known, codes)
    return codes, cuts, at


def _count(policy: Policy, density: float, n: int) -> int:
    return -1 if density >= 1.0 else trim_keep_count(density, n, policy.trim_count)


def _keep_rate(policy: Policy, density: float) -> float:
    if density >= 1.0:
        return 1.0
    if policy.sparsify == "trim":
        return 1.0 / density
    threshold = keep_threshold(density)
    return 2.0**32 / threshold if threshold > 0 else 1.0


def magnitude_threshold(
    by: Engine, x: Tensor, base: Tensor | None, k: int, ties: str
) -> tuple[Tensor, Tensor]:
    """`cl_fast::magnitude_threshold`: the k-th largest magnitude and how many of its ties stay."""
    if k == 0:
        infinite = torch.full((), float("inf"), dtype=torch.float32, device=x.device)
        return infinite, torch.zeros((), dtype=torch.int64, device=x.device)
    bases = [] if base is None else [dense(base)]
    codes, _, at = by.select(bases, [dense(x)], 1, [k], whole_model=False, ties=ties)
    return codes.view(torch.float32).reshape(()), at.reshape(())


def upload(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small list as a tensor on `device`, without a host sync; a CUDA graph keeps the numbers."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=dtype)
    # A copy would be read from host memory at every replay of a graph; a fill carries its number
    # itself. The first call fills too, because kernels may not be loaded during a capture.
    capturing = torch.cuda.is_current_stream_capturing()
    filled = None
    if capturing or (device, dtype) not in _filled:
        filled = torch.stack([torch.full((), n, dtype=dtype, device=device) for n in numbers])
        _filled.add((device, dtype))
    if capturing:
        assert filled is not None
        return filled
    return torch.tensor(numbers, dtype=dtype).pin_memory().to(device, non_blocking=True)


def dense(tensor: Tensor) -> Tensor:
    """Contiguous, and of a dtype that the kernels read."""
    tensor = tensor.detach()
    if tensor.dtype not in KERNEL_DTYPES:
        tensor = tensor.to(torch.bfloat16)
    return tensor.resolve_conj().resolve_neg().contiguous()


def float32(value: float) -> float:
    """`value` rounded to float32; beyond its range infinite, as a cast of a tensor gives it."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
