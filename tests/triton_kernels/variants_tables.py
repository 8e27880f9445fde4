from __future__ import annotations

from variant import Variant

from cl_fast.triton_kernels import tables

VARIANTS = [
    Variant(
        name="store words",
        kernel=tables._store_kernel,
        signature={"o_ptr": "*i32", **{f"w{i}": "i32" for i in range(32)}},
        aligned=("o_ptr",),
        vectors=False,
    )
]
