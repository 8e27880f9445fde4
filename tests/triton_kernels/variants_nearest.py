"""What the launcher of nearest.py asks for: a decode step, a long prompt, and the reduction."""

from __future__ import annotations

from typing import Any

import torch
from cl_fast.triton_kernels import nearest
from variant import Variant

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def search(count: int, dtype: torch.dtype, biased: bool) -> Variant:
    sizes, options = nearest.tile(count, dtype)
    short = NAMES[dtype]
    steps = {"count": "i32", "n": "i32", "d": "i32", "q_step": "i32", "k_step": "i32"}
    return Variant(
        name=f"nearest {short} queries {sizes[0]} {'biased' if biased else 'plain'}",
        kernel=nearest._nearest_kernel,
        signature={
            "q_ptr": f"*{short}", "k_ptr": f"*{short}", "b_ptr": "*fp32", "score_ptr": "*fp32",
            "index_ptr": "*i64", **steps, "share": "i32",
        },
        constexprs=nearest.constants(biased, sizes),
        aligned=(
            "q_ptr", "k_ptr", "b_ptr", "score_ptr", "index_ptr", "d", "q_step", "k_step",
        ),
        options=options,
        matrix=True,
    )  # fmt: skip


def reduction() -> Variant:
    pointers: dict[str, Any] = {
        "scores_ptr": "*fp32", "indices_ptr": "*i64", "score_ptr": "*fp32", "index_ptr": "*i64",
    }  # fmt: skip
    return Variant(
        name="reduce 1024",
        kernel=nearest._reduce_kernel,
        signature={**pointers, "count": "i32", "splits": "i32"},
        constexprs={"SPLITS": nearest.MOST_SPLITS},
        aligned=tuple(pointers),
        options=nearest.REDUCE_OPTIONS,
        vectors=False,
    )


VARIANTS = [
    search(1, torch.bfloat16, biased=False),
    search(4096, torch.bfloat16, biased=True),
    search(4096, torch.float32, biased=True),
    reduction(),
]
