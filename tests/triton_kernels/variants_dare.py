from __future__ import annotations

from cl_fast.triton_kernels import philox
from variant import Variant
from variants_combine import variant

VARIANTS = [
    *(
        variant(1, "drop", "none", base=None, terms=(dtype,), out=dtype)
        for dtype in ("bf16", "fp16", "fp32")
    ),
    Variant(
        name="keep mask",
        kernel=philox._keep_mask_kernel,
        signature={
            "o_ptr": "*u8",
            **dict.fromkeys(("n", "first_group"), "i64"),
            **dict.fromkeys(("k0", "k1", "lead", "rest"), "i32"),
        },
        constexprs={"GROUPS": 128},
        aligned=("o_ptr",),
        vectors=False,  # it reads nothing
    ),
]
