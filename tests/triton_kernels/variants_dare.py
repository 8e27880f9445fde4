from __future__ import annotations

from cl_fast.triton_kernels import dare
from variant import Variant

VARIANTS = [
    Variant(
        name=f"dare {dtype}",
        kernel=dare._dare_kernel,
        signature={
            "x_ptr": f"*{dtype}",
            "o_ptr": f"*{dtype}",
            "n": "i64",
            **dict.fromkeys(("k0", "k1", "lead", "rest"), "i32"),
            "factor": "fp32",
        },
        constexprs={"GROUPS": 128},
        aligned=("x_ptr", "o_ptr"),
        exact=True,
    )
    for dtype in ("bf16", "fp16", "fp32")
]
