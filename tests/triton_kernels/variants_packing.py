"""Counting, packing and unpacking, as packing.py launches them."""

from __future__ import annotations

from cl_fast.triton_kernels import packing
from variant import Variant

STREAM = dict.fromkeys(("k0", "k1", "lead", "rest"), "i32")
DTYPES = ("bf16", "fp16", "fp32")
OPTIONS = packing._OPTIONS

VARIANTS = [
    Variant(
        name="packed offsets",
        kernel=packing._count_kernel,
        signature={"o_ptr": "*i64", "n": "i64", **STREAM},
        constexprs={"TILE": packing.PACK_TILE},
        options=OPTIONS,
        vectors=False,  # reads nothing
    ),
]
for held in DTYPES:
    other = "bf16" if held == "fp32" else "fp32"
    for has_base, base in ((False, held), (True, held), (True, other)):
        name = f"{held} less {base}" if has_base else held
        sizes = {"n": "i64", "kept_n": "i64"}
        constexprs = {"HAS_BASE": has_base, "TILE": packing.PACK_TILE}
        VARIANTS += [
            Variant(
                name=f"pack {name}",
                kernel=packing._pack_kernel,
                signature={
                    "x_ptr": f"*{held}", "b_ptr": f"*{base}", "at_ptr": "*i64",
                    "o_ptr": f"*{held}", **sizes, **STREAM,
                },
                constexprs=constexprs,
                aligned=("x_ptr", "b_ptr", "at_ptr", "o_ptr"),
                options=OPTIONS,
                # sm_80 takes the difference of two bfloat16 as fma.rn.bf16 with a factor of one:
                # the exact difference rounded once, which a float32 in between does not change.
                exact=not (has_base and held == base == "bf16"),
            ),
            Variant(
                name=f"unpack {name}",
                kernel=packing._unpack_kernel,
                signature={
                    "v_ptr": f"*{held}", "b_ptr": f"*{base}", "at_ptr": "*i64",
                    "o_ptr": f"*{held}", **sizes, **STREAM, "factor": "fp32",
                },
                constexprs=constexprs,
                aligned=("v_ptr", "b_ptr", "at_ptr", "o_ptr"),
                options=OPTIONS,
                vectors=has_base,  # values are gathered, a base is read whole
                exact=True,
            ),
        ]  # fmt: skip
