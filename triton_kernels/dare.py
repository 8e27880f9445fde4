"""Drop and rescale in one pass: reads each element once, writes it once, stores no mask.

    y_i = keep_i ? float32(x_i) * factor : 0        rounded once to the dtype of y

`keep` is the stream of philox.py. The product is one float32 multiplication, so float32 results
have the bits of every other implementation of the stream. One tensor per launch, without a table;
for many tensors see combine.py, of which this is the case of one model without a base.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import GROUP, keep_bits, kept, split_key, split_threshold, spread

__all__ = ["dare"]

# A program is one warp and a thread of it draws the mask of one group of 16.
_TILE = 32 * GROUP
_PROGRAMS = 16384
_MOST_STEPS = 16


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _dare_tile(  # type: ignore[no-untyped-def]
    x_ptr, o_ptr, start, n, k0, k1, threshold, factor, MASKED: tl.constexpr, TILE: tl.constexpr
):
    lane = tl.arange(0, TILE)
    # A mask would break the vectors up; only the last tile needs one.
    if MASKED:
        inside = lane < n - start
        x = tl.load(x_ptr + start + lane, mask=inside, other=0.0)
    else:
        x = tl.load(x_ptr + start + lane)
    bits = keep_bits(start // 16 + tl.arange(0, TILE // 16), k0, k1, threshold)
    y = tl.where(kept(spread(bits, TILE // 16), lane), x.to(tl.float32), 0.0) * factor
    if MASKED:
        tl.store(o_ptr + start + lane, y.to(o_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(o_ptr + start + lane, y.to(o_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n", "k0", "k1", "lead", "rest", "steps"])  # type: ignore[untyped-decorator, unused-ignore]
def _dare_kernel(  # type: ignore[no-untyped-def]
    x_ptr, o_ptr, n, k0, k1, lead, rest, factor, steps, TILE: tl.constexpr
):
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    threshold = lead.to(tl.int64) * 0x1000000 + rest
    first = tl.program_id(0).to(tl.int64) * steps
    full = tl.minimum(n // TILE - first, steps).to(tl.int32)
    for step in range(full):
        start = (first + step) * TILE
        _dare_tile(x_ptr, o_ptr, start, n, k0, k1, threshold, factor, False, TILE)
    edge = (first + full) * TILE
    if (full < steps) & (edge < n):
        _dare_tile(x_ptr, o_ptr, edge, n, k0, k1, threshold, factor, True, TILE)


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
    words = (*split_key(key), *split_threshold(threshold))
    x = x.contiguous()
    out = torch.empty_like(x)
    n = x.numel()
    if n:
        tiles = triton.cdiv(n, _TILE)
        steps = min(_MOST_STEPS, triton.cdiv(tiles, _PROGRAMS))
        with torch.cuda.device_of(x):
            _dare_kernel[(triton.cdiv(tiles, steps),)](
                x, out, n, *words, factor, steps, TILE=_TILE, num_warps=1, enable_fp_fusion=False
            )
    return out
