"""Drop and rescale in one pass: reads each element once, writes it once, stores no mask.

    y_i = keep_i ? float32(x_i) * factor : 0        rounded once to the dtype of y

`keep` is the stream of philox.py. The product is one float32 multiplication, so float32 results
have the bits of every other implementation of the stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import GROUP, GROUPS_PER_PROGRAM, keep_tile, split_key, split_threshold

__all__ = ["dare"]


@triton.jit(do_not_specialize=["n", "k0", "k1", "lead", "rest"])  # type: ignore[untyped-decorator, unused-ignore]
def _dare_kernel(  # type: ignore[no-untyped-def]
    x_ptr, o_ptr, n, k0, k1, lead, rest, factor, GROUPS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = first + tl.arange(0, GROUPS)[:, None]
    offset = group * 16 + tl.arange(0, 16)[None, :]
    keep = keep_tile(group, k0, k1, lead, rest)
    # A mask would break the vectors up; only the last tile needs one.
    if (first + GROUPS) * 16 <= n:
        x = tl.load(x_ptr + offset).to(tl.float32)
        y = tl.where(keep, x, 0.0) * factor
        tl.store(o_ptr + offset, y.to(o_ptr.dtype.element_ty))
    else:
        inside = offset < n
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(keep, x, 0.0) * factor
        tl.store(o_ptr + offset, y.to(o_ptr.dtype.element_ty), mask=inside)


def dare(x: torch.Tensor, key: int, threshold: int, factor: float) -> torch.Tensor:
    """Keep the elements whose draw is below `threshold`, times `factor`; the others become 0.

    Args:
        x: bfloat16, float16 or float32, any shape; counted in row-major order.
        key: 64 bits, of the stream.
        threshold: T in [0, 2^32); 2^32, which keeps everything, needs no kernel.
        factor: a float32 value.

    Returns:
        A new contiguous tensor of the shape and dtype of `x`.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    n = x.numel()
    if n:
        grid = (triton.cdiv(n, GROUPS_PER_PROGRAM * GROUP),)
        _dare_kernel[grid](
            x,
            out,
            n,
            *split_key(key),
            *split_threshold(threshold),
            factor,
            GROUPS=GROUPS_PER_PROGRAM,
        )
    return out
