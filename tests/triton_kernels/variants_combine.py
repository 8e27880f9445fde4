from __future__ import annotations

from itertools import product
from typing import Any

from cl_fast.triton_kernels import combine
from variant import Variant

CODES = {None: -1, "bf16": 0, "fp16": 1, "fp32": 2}
SPARSIFY = {"none": 0, "trim": 1, "drop": 2, "packed": 3}


def variant(
    models: int,
    sparsify: str,
    elect: str,
    *,
    base: str | None = "bf16",
    terms: tuple[str, ...] = ("bf16",),
    out: str = "bf16",
    reduce: str = "sum",
    unweighted: bool = False,
    aligned: bool = True,
) -> Variant:
    """What combine_rows asks for; `terms` are repeated for all models."""
    packed = sparsify == "packed"
    codes = [CODES[terms[k % len(terms)]] for k in range(models)]
    unrolled = models <= combine._most_unrolled(SPARSIFY[sparsify], elect, codes)
    one = codes[0] if len(set(codes)) == 1 else -1
    digits = sum(code << 2 * k for k, code in enumerate(codes if unrolled else codes[:4]))
    absent: dict[str, Any] = {} if unweighted else {"rescales_ptr": None}
    if sparsify != "trim":
        absent |= {"codes_ptr": None, "cuts_ptr": None}
    signature = {
        "table": "*i64",
        **dict.fromkeys(("rows", "width", "models", "steps"), "i32"),
        **dict.fromkeys(("scales_ptr", "rescales_ptr"), "*fp32"),
        "codes_ptr": "*i32",
        "cuts_ptr": "*i64",
        "lam": "fp32",
    }
    types = "+".join((base or "no base", *terms, out))
    words = [f"combine {models}", sparsify, elect, reduce, types]
    words += ["unweighted"] * unweighted + ["unaligned"] * (not aligned)
    return Variant(
        name=" ".join(words),
        kernel=combine._combine_kernel,
        signature=signature,
        constexprs={
            **absent,
            "UNROLLED": models if unrolled else 0,
            "FIELDS": {"none": 2, "trim": 2, "drop": 5, "packed": 7}[sparsify]
            + (reduce == "mean" and elect != "none" and sparsify in ("none", "trim")),
            "BASE": CODES[base],
            "TERMS": digits if unrolled or one >= 0 else -1,
            "EACH": one,
            "OUT": CODES[out],
            "ALIGNED": aligned,
            "SPARSIFY": SPARSIFY[sparsify],
            "ELECT": {"none": 0, "mass": 1, "frequency": 2}[elect],
            "REDUCE": {"sum": 0, "mean": 1, "max": 2}[reduce],
            "COUNTED": False,
            "TILE": 2048 if packed else 512,
        },
        options={"enable_fp_fusion": False, **combine._options(packed)},
        # Packed values are gathered, and 512 threads have four elements of the base each.
        vectors=aligned and not packed,
        # On AMD hardware a division rounded to nearest is made of fused steps.
        exact=reduce != "mean",
    )


VARIANTS = [
    *(
        variant(models, sparsify, elect)
        for models, sparsify, elect in product((1, 3, 8, 32), SPARSIFY, ("none", "mass"))
        # Without election 8 and 32 models share a loop.
        if not (models == 8 and elect == "none" and sparsify != "none")
    ),
    variant(3, "none", "none", base=None, terms=("fp16",), out="fp16", reduce="mean"),
    variant(3, "trim", "mass", base="fp32", terms=("fp32",), out="fp32", reduce="max"),
    variant(3, "trim", "frequency", base="fp16", terms=("fp16",), out="fp16", unweighted=True),
    variant(3, "drop", "mass", terms=("bf16", "fp32", "fp16"), out="fp32", reduce="mean"),
    variant(32, "trim", "mass", terms=("bf16", "fp32", "fp16")),
    variant(4, "drop", "mass", base="fp32", terms=("fp32",), out="bf16", reduce="mean"),
    variant(8, "trim", "mass", base="fp32", terms=("fp32",), out="fp32"),
    variant(3, "none", "none", aligned=False),
    variant(3, "packed", "none", base=None),
]
