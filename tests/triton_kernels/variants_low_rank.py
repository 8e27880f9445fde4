"""What the launchers of low_rank.py ask for, by the launchers' own rules."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from cl_fast.triton_kernels import low_rank
from variant import Variant

BF16, FP16, FP32, FP64 = tl.bfloat16, tl.float16, tl.float32, tl.float64
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}
TABLE = {"table_ptr": "*i64", "layers": "i32", "steps": "i32"}


def update(
    kind: str,
    w: Any,
    f: Any,
    b: Any = None,
    *,
    rank: int = 0,
    vector: int = 8,
    factors: int = 8,
    rounding: int = 0,
) -> Variant:
    b = b or w
    factors = 1 if kind == "outer" else factors
    launch = low_rank._Launch(kind, (w, b, f), vector, factors, rounding, rank)
    name = f"{kind}{rank or ''} {SHORT[w]} base {SHORT[b]} factors {SHORT[f]}"
    return Variant(
        name=f"{name} vectors {vector} {factors} rounding {rounding}",
        kernel=launch.kernel,
        signature=TABLE,
        constexprs=launch.constants,
        aligned=("table_ptr",),
        options=launch.options,
        vectors=vector > 1,
        matrix=kind != "outer",
        exact=True,
    )


def moments(k: Any, c: Any, masked: bool, vector: int = 8, c_vector: int = 2) -> Variant:
    dtype = torch.float32 if k == FP32 else torch.bfloat16
    block_d, block_t, options = low_rank.gram_tile(dtype, vector)
    return Variant(
        name=f"gram {SHORT[k]} into {SHORT[c]} {'masked' if masked else 'all'} vectors {vector}",
        kernel=low_rank._gram_kernel,
        signature=TABLE | {"first": "i32", "block": "i32", "last": "i32"},
        constexprs={
            "C": c, "K": k, "MASKED": masked, "VECTOR": vector, "C_VECTOR": c_vector,
            "BLOCK_D": block_d, "BLOCK_T": block_t, "DOT_F32": False,
        },
        aligned=("table_ptr",),
        options=options,
        vectors=vector > 1,
        matrix=True,
    )  # fmt: skip


VARIANTS = [
    *(update("outer", w, w) for w in (BF16, FP16, FP32)),
    update("outer", BF16, FP32, FP32),
    update("outer", BF16, BF16, rounding=1),
    *(update("outer", w, w, vector=1) for w in (BF16, FP32)),
    update("outer", BF16, BF16, vector=1, rounding=2),
    update("outer", FP16, FP16, rounding=2),
    *(update("strip", BF16, BF16, rank=rank) for rank in (16, 256)),
    update("strip", FP16, FP16, rank=256),
    update("strip", FP32, BF16, rank=256),
    update("strip", BF16, BF16, rank=256, rounding=1),
    *(update("strip", BF16, BF16, rank=128, factors=factors) for factors in (1,)),
    *(update("loop", w, f) for w in (BF16, FP32) for f in (BF16, FP32)),
    update("loop", FP16, FP16),
    update("loop", BF16, BF16, rounding=1),
    update("loop", BF16, BF16, factors=1),
    update("loop", BF16, BF16, vector=1),
    update("loop", FP32, FP32, vector=1, factors=1),
    update("loop", FP16, FP32, rounding=2),
    moments(BF16, FP64, masked=False),
    moments(BF16, FP64, masked=True),
    moments(BF16, FP32, masked=True),
    moments(FP32, FP64, masked=True),
    moments(BF16, FP64, masked=True, vector=1, c_vector=1),
]
