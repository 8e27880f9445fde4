from __future__ import annotations

from cl_fast.triton_kernels import rows
from cl_fast.triton_kernels import sums as s
from variant import Variant

KINDS = {"bf16": 0, "fp16": 1, "fp32": 2, "mixed": rows.MIXED, "none": rows.NO_BASE}
MODES = {"all": s.ALL, "trim": s.TRIM, "drop": s.DROP}


def chunks(mode: str, base: str, kind: str, aligned: bool = True) -> Variant:
    count, steps, warps = s._shape(MODES[mode], KINDS[kind], aligned)
    return Variant(
        name=f"{mode} {base} {kind}{'' if aligned else ' unaligned'}",
        kernel=s._chunks_kernel,
        signature={
            "table_ptr": "*i64", "drops_ptr": "*i64", "o_ptr": "*fp64",
            "codes_ptr": "*i32" if mode == "trim" else "*i64",
            **dict.fromkeys(("first", "rows", "models"), "i32"),
        },
        constexprs={
            "MODE": MODES[mode], "BASE_KIND": KINDS[base], "KIND": KINDS[kind],
            "ALIGNED": aligned, "CHUNKS": count, "CHUNK": s.CHUNK, "STEPS": steps,
        },
        aligned=("table_ptr", "drops_ptr", "codes_ptr", "o_ptr"),
        options={"num_warps": warps, "enable_fp_fusion": False},
        vectors=aligned and mode != "drop",  # a drop computes more than it reads
        exact=True,
    )  # fmt: skip


VARIANTS = [
    *(chunks("trim", kind, kind) for kind in ("bf16", "fp16", "fp32")),
    *(chunks("drop", kind, kind) for kind in ("bf16", "fp32")),
    chunks("all", "none", "bf16"),
    chunks("drop", "none", "fp16"),
    chunks("drop", "bf16", "mixed"),
    chunks("trim", "bf16", "bf16", aligned=False),
    Variant(
        name="entries",
        kernel=s._entries_kernel,
        signature={
            "table_ptr": "*i64", "x_ptr": "*fp64", "totals_ptr": "*fp64", "kept_ptr": "*fp64",
            **dict.fromkeys(("first", "rows", "models"), "i32"),
        },
        constexprs={"CHUNKS": 32, "CHUNK": s.CHUNK, "AT_ONCE": s._AT_ONCE},
        aligned=("table_ptr", "x_ptr", "totals_ptr", "kept_ptr"),
        options={"num_warps": 1},
        vectors=False,
        exact=True,
    ),
]  # fmt: skip
