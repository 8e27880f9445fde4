from __future__ import annotations

from cl_fast.triton_kernels import magnitude as m
from cl_fast.triton_kernels import rows
from variant import Variant

KINDS = {"bf16": 0, "fp16": 1, "fp32": 2, "mixed": rows.MIXED, "none": rows.NO_BASE}
WHERE = dict.fromkeys(("first", "rows", "models", "places"), "i32")
TILES = {"TILE": m.TILE, "STEPS": m.STEPS}
COUNTED = {"table_ptr": "*i64", "state_ptr": "*i64", "hist_ptr": "*i64", **WHERE, "shift": "i32"}
TIED = {"table_ptr": "*i64", "state_ptr": "*i64", "codes_ptr": "*i32", "ties_ptr": "*i32", **WHERE}


def inputs(base: str, kind: str, aligned: bool = True) -> dict[str, int | bool]:
    return {"BASE_KIND": KINDS[base], "KIND": KINDS[kind], "ALIGNED": aligned}


PAIRS = (
    ("none", "bf16"), ("none", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"),
    ("bf16", "mixed"),
)  # fmt: skip


VARIANTS = [
    *(
        Variant(
            name=f"count {base} {kind} {bits} {'sparse' if sparse else 'dense'}",
            kernel=m._count_kernel,
            signature=COUNTED,
            constexprs={
                "BITS": bits, "SPARSE": sparse, **inputs(base, kind), "WHOLE": False, **TILES,
                "STRIDE": m.BINS, "FEW": m.FEW,
            },
            aligned=("table_ptr", "state_ptr", "hist_ptr"),
            options={"num_warps": m.WARPS},
            exact=True,
        )
        for base, kind in PAIRS
        for bits, sparse in ((7, False), (9, True))
    ),
    Variant(
        name="count unaligned, whole model",
        kernel=m._count_kernel,
        signature=COUNTED,
        constexprs={
            "BITS": 7, "SPARSE": False, **inputs("bf16", "bf16", False), "WHOLE": True, **TILES,
            "STRIDE": m.BINS, "FEW": m.FEW,
        },
        aligned=("table_ptr", "state_ptr", "hist_ptr"),
        options={"num_warps": m.WARPS},
        vectors=False,
        exact=True,
    ),
    *(
        Variant(
            name=f"descend {bits}",
            kernel=m._descend_kernel,
            signature={"state_ptr": "*i64", "hist_ptr": "*i64", "places": "i32"},
            constexprs={"BITS": bits, "STRIDE": m.BINS},
            aligned=("state_ptr", "hist_ptr"),
            options={"num_warps": 1},
            vectors=False,
        )
        for bits in sorted(set(m.DIGITS))
    ),
    *(
        Variant(
            name=f"ties {base} {kind}",
            kernel=m._ties_kernel,
            signature=TIED,
            constexprs={**inputs(base, kind), **TILES},
            aligned=("table_ptr", "state_ptr", "codes_ptr", "ties_ptr"),
            options={"num_warps": m.WARPS},
            exact=True,
        )
        for base, kind in PAIRS
    ),
    *(
        Variant(
            name=f"cut {base} {kind}",
            kernel=m._cut_kernel,
            signature={**TIED, "cuts_ptr": "*i64"},
            constexprs={**inputs(base, kind), **TILES, "BLOCK": m._TIE_BLOCK},
            aligned=("table_ptr", "state_ptr", "codes_ptr", "ties_ptr", "cuts_ptr"),
            options={"num_warps": m.WARPS},
            vectors=False,  # it looks into one tile, up to its end
            exact=True,
        )
        for base, kind in (("none", "bf16"), ("fp32", "fp32"), ("bf16", "mixed"))
    ),
]  # fmt: skip
