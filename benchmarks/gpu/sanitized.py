"""Every CUDA C++ kernel once, on small inputs of awkward lengths: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m gpu.sanitized
    python -m gpu.sanitized --backend native      the same calls on a processor

combine for every policy, and magnitude_threshold for every rule of ties; lengths around the tiles
of the kernels, addresses that are not aligned, mixed dtypes. Each result is compared bit for bit
with that of the C++ core (or of the reference) on the CPU. Memory is allocated anew for each
tensor, so that an access beyond its end is seen.

Prints how many calls were made, and which ones the backend refused. Ends with 1 after a wrong
result, with 77 if every call was refused.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from cl_fast.backends import cuda
from cl_fast.ops import Policy, combine, magnitude_threshold
from cl_fast.ops.policy import (
    Divisor,
    Elect,
    ElectOn,
    Reduce,
    Rescale,
    Sparsify,
    TrimScope,
    TrimTies,
)

__all__ = ["main", "policies"]

NOT_THERE = 77
LENGTHS = (1, 7, 2047, 4099, 33_001)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Bands and drops by rank have no kernel: the eager reference serves them on every device.
SPARSIFIES = tuple(word for word in get_args(Sparsify) if word not in ("band", "magprune"))


def policies() -> Iterator[Policy]:
    """Every policy that means something different from the ones before it."""
    seen = set()
    for difference, sparsify, scope, ties, rescale, elect, on, reduce, divisor in itertools.product(
        (True, False), SPARSIFIES, get_args(TrimScope), get_args(TrimTies),
        get_args(Rescale), get_args(Elect), get_args(ElectOn), get_args(Reduce), get_args(Divisor),
    ):  # fmt: skip
        trims = sparsify == "trim"
        given: dict[str, Any] = {
            "difference": difference,
            "sparsify": sparsify,
            "trim_scope": scope if trims else "tensor",
            "trim_ties": ties if trims else "first",
            "rescale": rescale,
            "elect": elect,
            "elect_on": on if elect != "none" else "weighted",
            "reduce": reduce,
            "divisor": divisor if reduce == "mean" else "weights",
        }
        try:
            policy = Policy(**given)
        except ValueError:  # a combination without a meaning
            continue
        if policy not in seen:
            seen.add(policy)
            yield policy


def _tensor(generator: torch.Generator, n: int, dtype: torch.dtype, shift: int) -> Tensor:
    """n numbers with many ties and zeros, `shift` elements behind the start of its memory."""
    values = torch.randn(n + shift, generator=generator).mul_(8).round_().div_(64)
    return values.to(dtype)[shift:]


def _on(device: str, x: Tensor) -> Tensor:
    """A copy on `device` that starts as many elements behind its memory as `x` does."""
    memory = torch.empty(x.numel() + x.storage_offset(), dtype=x.dtype, device=device)
    return memory[x.storage_offset() :].copy_(x)


def _equal(one: Tensor, other: Tensor) -> bool:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return bool(torch.equal(one.cpu().reshape(-1).view(kind), other.reshape(-1).view(kind)))


def _runs(backend: str, every: int) -> Iterator[tuple[str, bool | str]]:
    """What was called, and whether it gave the right bits, or in words why it was refused."""
    # CUDA kernels may be built for a processor, to be tested there.
    device = "cpu" if backend in ("native", "eager") or cuda.on_cpu() else "cuda"
    generator = torch.Generator().manual_seed(0)
    for number, policy in enumerate(itertools.islice(policies(), 0, None, every)):
        # Where the CPU has the reference only, long sums in a fixed order would take long.
        slow = policy.rescale == "l1" and policy.trim_scope == "model"
        n = LENGTHS[number % (2 if slow else len(LENGTHS))]
        models = 1 + number % 4
        shift = number % 3
        kinds = [DTYPES[(number + k) % 3] for k in range(models + 1)]
        base, *tensors = (_tensor(generator, n, dtype, shift) for dtype in kinds)
        sparse = policy.sparsify != "none"
        given: dict[str, Any] = {
            "weights": [0.5 + 0.25 * k for k in range(models)],
            "policy": policy,
            "density": 0.3 if sparse else 1.0,
            "keys": [number * 37 + k for k in range(models)] if policy.sparsify == "drop" else None,
            "lam": 1.0 if number % 2 else 0.7,
            "out_dtype": DTYPES[number % 3],
        }
        want = combine(base if policy.difference else None, tensors, **given)
        there = [_on(device, x) for x in (base, *tensors)]
        try:
            out = combine(there[0] if policy.difference else None, there[1:], **given,
                          backend=backend)  # fmt: skip
        except (ValueError, RuntimeError) as error:
            if not _refuses(error):
                raise
            yield f"combine, {policy}", str(error)
            continue
        yield f"combine, {n} elements, {policy}", _equal(out, want)
    selections = itertools.product(LENGTHS, get_args(TrimTies), DTYPES, (False, True))
    for n, ties, dtype, against in itertools.islice(selections, 0, None, every):
        x, base = (_tensor(generator, n, dtype, n % 2) for _ in range(2))
        for k in sorted({1, (n + 1) // 2, n}):
            want_pair = magnitude_threshold(x, base=base if against else None, k=k, ties=ties)
            what = f"magnitude_threshold, {n} elements, k={k}, {ties}, {dtype}, base {against}"
            there = [_on(device, x), _on(device, base)]
            try:
                pair = magnitude_threshold(there[0], base=there[1] if against else None, k=k,
                                           ties=ties, backend=backend)  # fmt: skip
            except (ValueError, RuntimeError) as error:
                if not _refuses(error):
                    raise
                yield what, str(error)
                continue
            yield what, all(_equal(a, b) for a, b in zip(pair, want_pair, strict=True))


def _refuses(error: Exception) -> bool:
    """Whether a backend says that it does not do this, or is not there."""
    words = ("backend must be one of", "cannot be used", "backend='")
    return any(word in str(error) for word in words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--every", type=int, default=1, help="take each N-th policy and length")
    a = parser.parse_args()
    torch.set_num_threads(1)
    calls = 0
    wrong: list[str] = []
    refused: dict[str, list[str]] = {}
    for what, outcome in _runs(a.backend, a.every):
        calls += 1
        if isinstance(outcome, str):
            refused.setdefault(outcome, []).append(what)
        elif not outcome:
            wrong.append(what)
    for reason, those in refused.items():
        print(f"refused {len(those)} of {calls} calls: {reason}")
    for what in wrong[:20]:
        print(f"wrong: {what}")
    print(f"launches: {calls - sum(map(len, refused.values()))}, wrong: {len(wrong)}")
    if sum(map(len, refused.values())) == calls:
        return NOT_THERE
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
