"""What the launcher of anchoring.py asks for."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from cl_fast.triton_kernels import anchoring
from variant import Variant

BF16, FP16, FP32 = tl.bfloat16, tl.float16, tl.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


def variant(
    g: Any,
    w: Any,
    a: Any,
    f: Any,
    *,
    pulls: bool = False,
    fisher: bool = True,
    aligned: bool = True,
) -> Variant:
    what = "pull" if pulls else "gradient"
    dtypes = " ".join(SHORT[x] for x in (g, w, a, f))
    return Variant(
        name=f"{what} {dtypes}{'' if fisher else ' no F'}{'' if aligned else ' unaligned'}",
        kernel=anchoring._anchor_kernel,
        signature={"table_ptr": "*i64", "tensors": "i32", "steps": "i32"},
        constexprs=anchoring.constants((g, w, a, f), pulls, fisher, aligned),
        aligned=("table_ptr",),
        options=anchoring.OPTIONS,
        vectors=aligned,
        exact=True,
        most_registers=128,
    )


VARIANTS = [
    *(variant(x, x, x, x) for x in (BF16, FP16, FP32)),
    variant(BF16, BF16, BF16, FP32),
    variant(BF16, BF16, FP32, FP32),
    variant(FP32, FP32, FP32, FP32, fisher=False),
    variant(BF16, BF16, BF16, BF16, aligned=False),
    *(variant(x, x, x, x, pulls=True) for x in (BF16, FP16, FP32)),
    variant(BF16, BF16, BF16, FP32, pulls=True),
    variant(FP32, FP32, FP32, FP32, pulls=True, fisher=False),
]
