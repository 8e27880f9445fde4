"""A-GEM: a step that the memory of earlier tasks would not agree with is bent until it does.

    g  <-  g - (g.r / r.r) r     where g.r < 0          r: the gradient on remembered examples

over all parameters at once (Chaudhry et al. 2019, arXiv 1812.00420, equation 11). After it g.r = 0:
to first order the loss on the memory does not rise. Adaptive optimizers change the direction
again, so this holds exactly for SGD alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["agem_"]


def _dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """In float32 within a tensor (float64 where one is), float64 between them."""
    total = 0.0
    for x, y in zip(xs, ys, strict=True):
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        total += float(torch.dot(x.reshape(-1).to(wide), y.reshape(-1).to(wide)))
    return total


def agem_(grads: Sequence[Tensor], reference: Sequence[Tensor]) -> bool:
    """Projects `grads` in place if they point against `reference`. Waits for the device.

    Args:
        grads: the gradients of all parameters, complete and unscaled; on every rank the same.
        reference: those of a batch from memory, of the same shapes.

    Returns:
        Whether they were changed.

    Raises:
        ValueError: numbers of tensors or shapes differ; or a product is NaN or infinite.
    """
    if len(grads) != len(reference):
        raise ValueError(
            f"reference must hold one tensor for each of the {len(grads)} of grads; got "
            f"{len(reference)}"
        )
    for i, (g, r) in enumerate(zip(grads, reference, strict=True)):
        if g.shape != r.shape:
            raise ValueError(
                f"reference[{i}] must have the shape of grads[{i}], {tuple(g.shape)}; got "
                f"{tuple(r.shape)}"
            )
    with torch.no_grad():
        against = _dot(grads, reference)
        if not math.isfinite(against):
            raise ValueError(f"grads or reference hold NaN or infinity: their product is {against}")
        if against >= 0:
            return False
        factor = against / _dot(reference, reference)
        for g, r in zip(grads, reference, strict=True):
            g.add_(r.to(g.dtype), alpha=-factor)
        return True
