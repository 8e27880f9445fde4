from __future__ import annotations

from cl_fast.triton_kernels import tables
from variant import Variant

VARIANTS = [
    Variant(
        name="store words",
        kernel=tables._store_kernel,
        signature={"o_ptr": "*i32", **{f"w{i}": "i32" for i in range(32)}},
        aligned=("o_ptr",),
        vectors=False,
    )
]
