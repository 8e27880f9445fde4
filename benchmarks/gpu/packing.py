"""pack, unpack, combine straight from packed deltas, and dare, all at density 0.1.

A packed delta holds the kept values and an offset per 2,048 elements; which elements they belong
to follows from the random stream. Bytes that the work must move: the dense side, the kept values
and the offsets, each once. Of a packed tensor that is a tenth of what the dense one takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .harness import (
    GIB,
    Case,
    Machine,
    Mismatch,
    Provider,
    Target,
    Work,
    copy_floor,
    equal,
    ours,
)
from .merge import inputs

__all__ = ["CASES"]

DENSITY, SEED, MODELS = 0.1, 7, 3
BF16 = torch.bfloat16


def _elements(machine: Machine, bytes_each: int) -> tuple[int, str]:
    """Elements of 1 GiB of bfloat16, or of what fits at `bytes_each` bytes for each element."""
    n, note = int(machine.pick(GIB // 2, 5003)), ""
    while n * bytes_each + 2 * GIB > machine.free_bytes() and n > 4096:
        n //= 2
        note = f"memory is short: {2 * n / GIB:.3g} GiB per tensor instead of 1 GiB"
    return n, note


def _stream(k: int) -> dict[str, Any]:
    return {"density": DENSITY, "seed": SEED, "model": f"model{k}", "tensor": "weight"}


def _packed_bytes(packed: Any) -> int:
    return int(packed.values.nbytes + packed.offsets.nbytes)


def _pack_work(machine: Machine) -> Work:
    from cl_fast.ops import keep_mask, keep_threshold, pack, stream_key

    n, note = _elements(machine, 16)
    base, (x,) = inputs(machine, (n,), 1)
    kept = pack(x, base=base, **_stream(0))

    def run(**more: Any) -> Callable[[int], Any]:
        return lambda i: pack(x, base=base, **_stream(0), **more)

    def expected() -> Tensor:
        key = stream_key(SEED, "model0", "weight")
        return x[keep_mask(key, n, keep_threshold(DENSITY), device=x.device)]

    return Work(
        shape=f"{n}, density {DENSITY}",
        dtype="bfloat16",
        bytes=2 * n + _packed_bytes(kept),
        input_bytes=2 * n,
        providers=[
            *ours(machine, pack, run, lambda out, e: equal(out.values, e)),
            copy_floor(machine, 2 * n + _packed_bytes(kept)),
        ],
        note=note,
        expected=expected,
        output_elements=kept.values.numel(),
    )


def _unpack_work(machine: Machine) -> Work:
    from cl_fast.ops import dare, pack, unpack

    n, note = _elements(machine, 24)
    base, (x,) = inputs(machine, (n,), 1)
    delta = (x.float() - base.float()).to(BF16)
    packed = pack(delta, **_stream(0))

    def run(**more: Any) -> Callable[[int], Tensor]:
        return lambda i: unpack(packed, **more)

    moved = 2 * n + _packed_bytes(packed)
    return Work(
        shape=f"{n}, density {DENSITY}",
        dtype="bfloat16",
        bytes=moved,
        input_bytes=_packed_bytes(packed),
        providers=[*ours(machine, unpack, run, equal), copy_floor(machine, moved)],
        note=note,
        expected=lambda: dare(delta, **_stream(0), backend="eager"),
        output_elements=n,
    )


def _combine_work(machine: Machine) -> Work:
    from cl_fast.ops import Policy, combine, combine_reference, pack, stream_key

    n, note = _elements(machine, 2 * (MODELS + 2) + 4 * (MODELS + 10))
    base, tensors = inputs(machine, (n,), MODELS)
    packed = [pack(x, base=base, **_stream(k)) for k, x in enumerate(tensors)]
    policy = Policy(sparsify="drop", rescale="keep_rate")

    def run(**more: Any) -> Callable[[int], Tensor]:
        return lambda i: combine(base, packed, weights=0.4, policy=policy, **more)

    given: dict[str, Any] = {
        "weights": 0.4,
        "policy": policy,
        "density": DENSITY,
        "keys": [stream_key(SEED, f"model{k}", "weight") for k in range(MODELS)],
    }
    held = sum(map(_packed_bytes, packed))
    return Work(
        shape=f"{n}, K = {MODELS}, density {DENSITY}",
        dtype="bfloat16",
        bytes=4 * n + held,
        input_bytes=2 * n + held,
        providers=[
            *ours(machine, combine, run, equal),
            copy_floor(machine, 4 * n + held),
            Provider(
                "cl_fast dense",
                "ours",
                lambda i: combine(base, tensors, **given),
                equal,
                bytes=2 * n * (MODELS + 2),
                note="the same merge of the dense tensors",
            ),
        ],
        note=note,
        expected=lambda: combine_reference(base, tensors, **given),
        output_elements=n,
        targets=[
            Target(
                "combine of packed deltas: times that of dense tensors",
                "cl_fast",
                lambda r: r["cl_fast"]["ms_p50"] / r["cl_fast dense"]["ms_p50"],
                1.0,
                at_least=False,
            )
        ],
    )


def _dare_work(machine: Machine) -> Work:
    from cl_fast.ops import dare

    n, note = _elements(machine, 24)
    base, (x,) = inputs(machine, (n,), 1)
    delta = (x.float() - base.float()).to(BF16)

    def run(**more: Any) -> Callable[[int], Tensor]:
        return lambda i: dare(delta, **_stream(0), **more)

    def masked(out: Tensor, _: Tensor) -> str:
        """Kept elements are the delta over the density, and as many as there should be."""
        share = float((out != 0).sum() / (delta != 0).sum())
        spread = 5.0 * (DENSITY * (1.0 - DENSITY) / n) ** 0.5 + 5e-4
        worst = 0.0
        for first in range(0, n, 1 << 24):
            part = slice(first, first + (1 << 24))
            kept = out[part] != 0
            off = (out[part].double() * DENSITY - delta[part].double()).abs()
            worst = max(worst, float((off / delta[part].double().abs())[kept].max()))
        if not (abs(share - DENSITY) < spread and worst < 2.0**-6):
            raise Mismatch(f"{share:.4g} of the elements kept, values off by {worst:.3g}")
        return "own random masks; share kept, and values"

    drop = functools.partial(torch.nn.functional.dropout, delta, p=1.0 - DENSITY, training=True)
    return Work(
        shape=f"{n}, density {DENSITY}",
        dtype="bfloat16",
        bytes=4 * n,
        input_bytes=2 * n,
        providers=[
            *ours(machine, dare, run, equal),
            copy_floor(machine, 4 * n),
            *_dare_peers(machine, delta, drop, masked),
        ],
        note=note,
        expected=lambda: dare(delta, **_stream(0), backend="eager"),
        output_elements=n,
    )


def _dare_peers(
    machine: Machine,
    delta: Tensor,
    drop: Callable[[], Tensor],
    check: Callable[[Tensor, Tensor], str],
) -> Sequence[Provider]:
    def bernoulli(i: int) -> Tensor:
        return delta * torch.bernoulli(torch.full_like(delta, DENSITY)) / DENSITY

    return [
        Provider("torch bernoulli", "peer", bernoulli, check, note="as in PEFT and mergekit"),
        Provider("torch dropout", "peer", lambda i: drop(), check),
    ]


CASES = [
    Case("combine", "combine/dare_linear packed/K3", _combine_work, 12.0),
    Case("dare", "dare/0.1", _dare_work, 10.0),
    Case("pack", "pack/0.1", _pack_work, 8.0),
    Case("unpack", "unpack/0.1", _unpack_work, 8.0),
]
