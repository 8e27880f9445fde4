"""The kernels of rows of logits as their launchers ask for them."""

from __future__ import annotations

from cl_fast.triton_kernels import vocabulary as kernels
from variant import Variant

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
FORMS = {"plain": kernels._PLAIN, "softcap": kernels._SOFTCAP, "probs": kernels._PROBS}
WARPS = {"num_warps": kernels.WARPS}


def words(form: str, scaled: bool, aligned: bool) -> str:
    return f" {form}" + ", scaled" * scaled + ", unaligned" * (not aligned)


def in_vectors(aligned: bool, block: int, *dtypes: str) -> bool:
    """Waves of 64 share half a block of 16-bit numbers in vectors of 8 bytes."""
    return aligned and (block == kernels.BLOCK or "fp32" in dtypes)


def pair(
    x: str, y: str, x_form: str = "plain", y_form: str = "plain", scaled: bool = False,
    aligned: bool = True,
) -> Variant:  # fmt: skip
    return Variant(
        name=f"pair {x} {y} {x_form}{words(y_form, scaled, aligned)}",
        kernel=kernels._pair_kernel,
        signature={
            "x_ptr": f"*{x}", "y_ptr": f"*{y}", "o_ptr": "*fp32", "x_stride": "i32",
            "y_stride": "i32", "nx": "i32", "ny": "i32", "x_inner": "fp32", "x_factor": "fp32",
            "y_inner": "fp32", "y_factor": "fp32",
        },
        constexprs={
            "X_FORM": FORMS[x_form], "X_SCALED": scaled, "Y_FORM": FORMS[y_form],
            "Y_SCALED": scaled, "ALIGNED": aligned, "SPAN": kernels.SPAN,
            **kernels.block_shape(
                aligned, (FORMS[x_form], FORMS[y_form]), BYTES[x], BYTES[y]
            ),
        },
        aligned=("x_ptr", "y_ptr", "o_ptr") if aligned else ("o_ptr",),
        options=WARPS,
        vectors=aligned,
    )  # fmt: skip


def single(
    x: str, entropy: bool, form: str = "plain", scaled: bool = False, aligned: bool = True
) -> Variant:
    return Variant(
        name=f"single {x}{' entropy' * entropy}{words(form, scaled, aligned)}",
        kernel=kernels._single_kernel,
        signature={
            "x_ptr": f"*{x}", "o_ptr": "*fp32", "x_stride": "i32", "n": "i32", "inner": "fp32",
            "factor": "fp32",
        },
        constexprs={
            "FORM": FORMS[form], "SCALED": scaled, "ENTROPY": entropy, "ALIGNED": aligned,
            "SPAN": kernels.SPAN, **kernels.block_shape(aligned, (FORMS[form],), BYTES[x]),
        },
        aligned=("x_ptr", "o_ptr") if aligned else ("o_ptr",),
        options=WARPS,
        vectors=aligned,
    )  # fmt: skip


def sums(
    s: str, t: str, kind: str, s_form: str = "plain", t_form: str = "plain", scaled: bool = False,
    aligned: bool = True,
) -> Variant:  # fmt: skip
    block = kernels.flat_block(FORMS[s_form], FORMS[t_form])
    return Variant(
        name=f"sums {kind} {s} {t} {s_form}{words(t_form, scaled, aligned)}",
        kernel=kernels._sums_kernel,
        signature={
            "s_ptr": f"*{s}", "t_ptr": f"*{t}", "normal_s_ptr": "*fp32", "normal_t_ptr": "*fp32",
            "o_ptr": "*fp32", "s_stride": "i32", "t_stride": "i32", "ns_stride": "i32",
            "nt_stride": "i32", "ns": "i32", "nt": "i32", "s_inner": "fp32", "s_factor": "fp32",
            "t_inner": "fp32", "t_factor": "fp32", "mix": "fp32",
        },
        constexprs={
            "KIND": kernels.KINDS[kind], "S_FORM": FORMS[s_form], "S_SCALED": scaled,
            "T_FORM": FORMS[t_form], "T_SCALED": scaled, "ALIGNED": aligned,
            "BLOCK": block, "SPAN": kernels.SPAN,
        },
        aligned=("s_ptr", "t_ptr", "o_ptr") if aligned else ("o_ptr",),
        options=WARPS,
        vectors=in_vectors(aligned, block, s, t),
    )  # fmt: skip


def gradient(
    out: str, s: str, t: str, kind: str, s_form: str = "plain", t_form: str = "plain",
    scaled: bool = False, extra: bool = False, aligned: bool = True,
) -> Variant:  # fmt: skip
    block = kernels.flat_block(FORMS[s_form], FORMS[t_form], crowded=extra and not aligned)
    end = ", cross-entropy" * extra + words(t_form, scaled, aligned)
    return Variant(
        name=f"gradient {kind} {out} {s} {t} {s_form}{end}",
        kernel=kernels._gradient_kernel,
        signature={
            "o_ptr": f"*{out}", "g_ptr": "*fp32", "s_ptr": f"*{s}", "t_ptr": f"*{t}",
            "stats_ptr": "*fp32", "c_g_ptr": "*fp32", "c_normal_ptr": "*fp32", "ids_ptr": "*i64",
            "o_stride": "i32", "s_stride": "i32", "t_stride": "i32", "g_stride": "i32",
            "c_g_stride": "i32", "c_normal_stride": "i32", "id_stride": "i32", "ns": "i32",
            "nt": "i32", "s_inner": "fp32", "s_factor": "fp32", "t_inner": "fp32",
            "t_factor": "fp32", "c_factor": "fp32", "chain": "fp32", "c_chain": "fp32",
            "mix": "fp32",
        },
        constexprs={
            "KIND": kernels.KINDS[kind], "S_FORM": FORMS[s_form], "S_SCALED": scaled,
            "T_FORM": FORMS[t_form], "T_SCALED": scaled, "EXTRA": extra, "C_SCALED": scaled,
            "ALIGNED": aligned, "BLOCK": block, "SPAN": kernels.SPAN,
        },
        aligned=("o_ptr", "s_ptr", "t_ptr") if aligned else (),
        options=WARPS,
        vectors=in_vectors(aligned, block, s, t),
    )  # fmt: skip


def logprob_gradient(
    out: str, x: str, entropy: bool, form: str = "plain", scaled: bool = False,
    aligned: bool = True,
) -> Variant:  # fmt: skip
    block = kernels.flat_block(FORMS[form])
    return Variant(
        name=f"log-prob gradient {out} {x}{' entropy' * entropy}{words(form, scaled, aligned)}",
        kernel=kernels._logprob_gradient_kernel,
        signature={
            "o_ptr": f"*{out}", "g_ptr": "*fp32", "e_ptr": "*fp32", "x_ptr": f"*{x}",
            "ids_ptr": "*i64", "stats_ptr": "*fp32", "o_stride": "i32", "x_stride": "i32",
            "g_stride": "i32", "e_stride": "i32", "id_stride": "i32", "n": "i32",
            "inner": "fp32", "factor": "fp32", "chain": "fp32",
        },
        constexprs={
            "FORM": FORMS[form], "SCALED": scaled, "ENTROPY": entropy, "ALIGNED": aligned,
            "BLOCK": block, "SPAN": kernels.SPAN,
        },
        aligned=("o_ptr", "x_ptr") if aligned else (),
        options=WARPS,
        vectors=in_vectors(aligned, block, x),
    )  # fmt: skip


VARIANTS = [
    *(pair(d, d) for d in ("bf16", "fp32")),
    *(pair(d, d, scaled=True) for d in ("bf16", "fp32")),
    pair("fp16", "fp32"),
    pair("fp32", "bf16", "probs"),
    pair("fp32", "fp32", "probs", scaled=True),
    pair("bf16", "bf16", "softcap", "softcap", scaled=True),
    *(pair(d, d, aligned=False) for d in ("bf16", "fp32")),
    *(single(d, e) for d in ("bf16", "fp32") for e in (False, True)),
    single("bf16", True, "softcap", scaled=True),
    single("fp32", False, "probs"),
    single("bf16", True, aligned=False),
    *(sums(d, d, kind) for d in ("bf16", "fp32") for kind in ("forward_kl", "jsd")),
    *(sums("bf16", "bf16", kind) for kind in ("reverse_kl", "skew_forward_kl", "tvd")),
    sums("fp32", "fp32", "skew_reverse_kl", "softcap", "softcap", scaled=True),
    sums("bf16", "fp32", "jsd", "plain", "probs", scaled=True),
    sums("fp32", "fp32", "forward_kl", "softcap", "softcap", scaled=True),
    sums("bf16", "bf16", "jsd", aligned=False),
    *(gradient(d, d, d, kind) for d in ("bf16", "fp32") for kind in ("forward_kl", "jsd")),
    *(
        gradient("bf16", "bf16", "bf16", kind, scaled=True)
        for kind in ("reverse_kl", "skew_forward_kl", "skew_reverse_kl", "tvd")
    ),
    *(
        gradient(d, d, d, kind, "softcap", "softcap", scaled=True, extra=True)
        for d in ("bf16", "fp32")
        for kind in ("jsd", "skew_reverse_kl")
    ),
    gradient("fp32", "fp32", "fp32", "skew_forward_kl", "softcap", "softcap", scaled=True),
    gradient("fp32", "fp32", "fp32", "jsd", scaled=True, extra=True),
    gradient("fp32", "fp32", "fp32", "forward_kl", extra=True),
    gradient("fp32", "bf16", "fp32", "forward_kl", "plain", "probs"),
    gradient("bf16", "bf16", "bf16", "skew_forward_kl", scaled=True, aligned=False),
    gradient("bf16", "bf16", "bf16", "jsd", extra=True, aligned=False),
    gradient("bf16", "bf16", "bf16", "skew_reverse_kl", "softcap", "softcap", True, True, False),
    *(logprob_gradient(d, d, e) for d in ("bf16", "fp32") for e in (False, True)),
    logprob_gradient("bf16", "bf16", True, "softcap", scaled=True),
    logprob_gradient("fp32", "bf16", False, aligned=False),
    *(
        Variant(
            name=f"finish pair {kind}",
            kernel=kernels._finish_pair_kernel,
            signature={
                "partial_ptr": "*fp32", "loss_ptr": "*fp32", "stats_ptr": "*fp32", "spans": "i32"
            },
            constexprs={"KIND": kernels.KINDS[kind], "SPANS": 4},
            options={"num_warps": 1},
            vectors=False,
        )
        for kind in ("forward_kl", "reverse_kl")
    ),
    *(
        Variant(
            name=f"finish single{' entropy' * entropy}",
            kernel=kernels._finish_single_kernel,
            signature={
                "partial_ptr": "*fp32", "o_ptr": "*fp32", "x_ptr": "*bf16", "ids_ptr": "*i64",
                "x_stride": "i32", "id_stride": "i32", "o_stride": "i32", "spans": "i32",
                "inner": "fp32", "factor": "fp32",
            },
            constexprs={
                "FORM": FORMS["softcap"], "SCALED": True, "ENTROPY": entropy, "SPANS": 4
            },
            options={"num_warps": 1},
            vectors=False,
        )
        for entropy in (False, True)
    ),
]  # fmt: skip
