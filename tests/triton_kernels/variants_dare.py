from __future__ import annotations

from cl_fast.triton_kernels import dare, philox
from variant import Variant

PLAIN = dict.fromkeys(("k0", "k1", "lead", "rest"), "i32")

VARIANTS = [
    *(
        Variant(
            name=f"dare {dtype}",
            kernel=dare._dare_kernel,
            signature={
                "x_ptr": f"*{dtype}",
                "o_ptr": f"*{dtype}",
                "n": "i64",
                **PLAIN,
                "factor": "fp32",
                "steps": "i32",
            },
            constexprs={"TILE": 512},
            aligned=("x_ptr", "o_ptr"),
            options={"num_warps": 1, "enable_fp_fusion": False},
            exact=True,
            most_registers=96,
        )
        for dtype in ("bf16", "fp16", "fp32")
    ),
    Variant(
        name="keep mask",
        kernel=philox._keep_mask_kernel,
        signature={"o_ptr": "*u8", "n": "i64", "first_group": "i64", **PLAIN},
        constexprs={"GROUPS": 128},
        aligned=("o_ptr",),
        vectors=False,  # it reads nothing
    ),
]
