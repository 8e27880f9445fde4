from __future__ import annotations

import torch
import triton.language as tl
from cl_fast.triton_kernels import orthogonality as kernels
from variant import Variant

DTYPES = {
    "bf16": (tl.bfloat16, torch.bfloat16),
    "fp16": (tl.float16, torch.float16),
    "fp32": (tl.float32, torch.float32),
}
MODES = {"l1": kernels.L1, "squared": kernels.SQUARED, "project": kernels.PROJECT}


def products(
    new: str, past: str, rows: int, past_rows: int, columns: bool = False, aligned: bool = True
) -> Variant:
    narrow = new == past != "fp32"
    blocks = kernels.product_blocks(rows, past_rows, narrow, aligned)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    layout = ", columns" * columns + ", unaligned" * (not aligned)
    return Variant(
        name=f"products {new} {past}, {rows} of {past_rows}{layout}",
        kernel=kernels._products_kernel,
        signature={"table_ptr": "*i64", "o_ptr": "*fp32", "total": "i64", "chunk": "i32"},
        constexprs={
            "NEW": DTYPES[new][0], "PAST": DTYPES[past][0], "COLUMNS": columns,
            "ALIGNED": aligned, "WIDEN": not narrow, **blocks,
        },
        aligned=("o_ptr", "chunk"),
        options=options,
        vectors=aligned,
        matrix=narrow,
    )  # fmt: skip


def apply(
    mode: str, new: str, past: str, rows: int, past_rows: int, columns: bool = False,
    aligned: bool = True,
) -> Variant:  # fmt: skip
    narrow = past == "bf16" or (mode == "l1" and past == "fp16")
    split = past == "bf16" and mode != "l1"
    blocks = kernels.apply_blocks(rows, past_rows, narrow, split, aligned)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    layout = ", columns" * columns + ", unaligned" * (not aligned)
    return Variant(
        name=f"apply {mode} {new} {past}, {rows} of {past_rows}{layout}",
        kernel=kernels._apply_kernel,
        signature={
            "tiles_ptr": "*i64", "pairs_ptr": "*i64", "s_ptr": "*fp32", "g_ptr": "*fp32",
            "g_stride": "i32",
        },
        constexprs={
            "MODE": int(MODES[mode]), "NEW": DTYPES[new][0], "OUT": DTYPES[new][0],
            "PAST": DTYPES[past][0], "COLUMNS": columns, "ALIGNED": aligned,
            "SPLIT": split, "INTERPRETED": False, **blocks,
        },
        aligned=("tiles_ptr", "s_ptr"),
        options=options,
        vectors=aligned,
        matrix=narrow,
    )  # fmt: skip


SAME = [(dtype, dtype) for dtype in DTYPES]
MIXED = [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")]

VARIANTS = [
    *(products(new, past, 8, 120) for new, past in SAME + MIXED),
    *(products(new, past, 8, 8) for new, past in SAME),
    *(products(new, past, 64, 120) for new, past in SAME),
    *(products(new, past, 64, 120, columns=True) for new, past in SAME),
    *(products(new, past, 8, 120, aligned=False) for new, past in SAME),
    *(apply("l1", new, past, 8, 120) for new, past in SAME + MIXED),
    *(apply(mode, new, past, 8, 120) for mode in MODES if mode != "l1" for new, past in SAME),
    *(apply("l1", new, past, 8, 8) for new, past in SAME),
    *(apply("project", new, past, 64, 120) for new, past in SAME),
    *(apply("project", new, past, 64, 120, columns=True) for new, past in SAME),
    *(apply("l1", new, past, 8, 120, aligned=False) for new, past in SAME),
    *(
        Variant(
            name=f"finish {mode}",
            kernel=kernels._finish_kernel,
            signature={
                "table_ptr": "*i64", "partial_ptr": "*fp32", "s_ptr": "*fp32", "v_ptr": "*fp32",
                "total": "i64",
            },
            constexprs={"FORM": int(MODES[mode]), "BLOCK": kernels.SUM_BLOCK},
            aligned=("partial_ptr", "s_ptr", "v_ptr"),
            options={"num_warps": 4},
            # Sums begin where the blocks of a module do, which may be anywhere.
            vectors=False,
        )
        for mode in MODES
    ),
]  # fmt: skip
