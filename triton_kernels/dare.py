"""Drop and rescale in one pass: reads each element once, writes it once, stores no mask.

    y_i = keep_i ? float32(x_i) * factor : 0        rounded once to the dtype of y

`keep` is the stream of philox.py. The product is one float32 multiplication, so float32 results
have the bits of every other implementation of the stream. This is combine.py with one model and
no base.
"""

from __future__ import annotations

import torch

from .combine import combine_rows

__all__ = ["dare"]


def dare(x: torch.Tensor, key: int, threshold: int, factor: float) -> torch.Tensor:
    """Keep the elements whose draw is below `threshold`, times `factor`; the others become 0.

    Args:
        x: bfloat16, float16 or float32, any shape; counted in row-major order.
        key: 64 bits, of the stream.
        threshold: T in [0, 2^32]; 2^32 keeps everything.
        factor: a float32 value.

    Returns:
        A new contiguous tensor of the shape and dtype of `x`.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    combine_rows(
        [],
        [x],
        [out],
        1,
        weights=[1.0],
        scales=[factor],
        sparsify="drop",
        keys=[key],
        keeps=[threshold],
    )
    return out
