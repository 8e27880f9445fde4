"""Divergences of rows by plain autograd, from the formulas of the papers: float64 as the truth,
float32 as what a careful eager implementation gives. Shares no code with `cl_fast`."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
FLOOR = -1e30
"""In place of -inf inside a mixture: its exponential is 0 as well, and its gradient no NaN."""


def log_probs(
    x: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    probs: bool = False,
) -> Tensor:
    if probs:
        return torch.log_softmax(x.log() / temperature, -1)
    z = x * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature, -1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of log-probs, 0 log 0 = 0."""
    p = a.exp()
    return torch.where(p > 0, p * torch.where(p > 0, a - b, 0.0), 0.0).sum(-1)


def mixture(a: Tensor, b: Tensor, w: float) -> Tensor:
    """log(w e^a + (1 - w) e^b)."""
    one = torch.tensor(w, dtype=torch.float64)
    return torch.logaddexp(
        a.clamp(min=FLOOR) + float(one.log()), b.clamp(min=FLOOR) + float((1 - one).log())
    )


def divergence(lp: Tensor, lq: Tensor, kind: str, mix: float) -> Tensor:
    """Of rows of log-probs: lp the student's, lq the teacher's."""
    if kind == "forward_kl":
        return kl(lq, lp)
    if kind == "reverse_kl":
        return kl(lp, lq)
    if kind == "jsd":
        m = mixture(lq, lp, mix)
        return mix * kl(lq, m) + (1 - mix) * kl(lp, m)
    if kind == "skew_forward_kl":
        return kl(lq, mixture(lq, lp, mix))
    if kind == "skew_reverse_kl":
        return kl(lp, mixture(lq, lp, 1 - mix))
    assert kind == "tvd"
    return 0.5 * (lp.exp() - lq.exp()).abs().sum(-1)


def peaked(m: int, v: int, seed: int = 0, tails: str = "normal") -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher that is near it, std 30, in float64."""
    g = torch.Generator().manual_seed(seed + 31 * m + v)
    x = 30 * torch.randn(m, v, generator=g, dtype=torch.float64)
    if tails == "heavy":
        x = (0.1 * x / (1e-3 + torch.rand(m, v, generator=g, dtype=torch.float64))).clamp(-4e3, 4e3)
    return x, x + 3 * torch.randn(m, v, generator=g, dtype=torch.float64)


def with_gradient(
    student: Tensor, teacher: Tensor, kind: str, mix: float, dtype: torch.dtype, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses [M] and the gradient of sum(up * losses), all in `dtype`."""
    x = student.detach().to(dtype).requires_grad_()
    loss = divergence(log_probs(x), log_probs(teacher.detach().to(dtype)), kind, mix)
    loss.backward(up.to(dtype))
    assert x.grad is not None
    return loss.detach(), x.grad


class Errors:
    """Largest errors of ours and of plain eager, summed over draws of the inputs.

    One draw says little: where few numbers are large, the better of two good results is a matter of
    luck, several times over.
    """

    def __init__(self) -> None:
        self.ours = self.plain = self.largest = 0.0

    def add(self, got: Tensor, plain: Tensor, truth: Tensor) -> None:
        assert got.isfinite().all()
        self.ours += float((got.double() - truth).abs().max())
        self.plain += float((plain.double() - truth).abs().max())
        self.largest += float(truth.abs().max())

    def check(self, factor: float = 2.0) -> None:
        """At most `factor` times plain eager's.

        Where eager happens to be exact, half a float32 spacing of the largest number is granted,
        since the result is rounded; and 2^-100, which is nothing to probabilities.
        """
        bound = factor * self.plain + 2.0**-24 * self.largest + 2.0**-100
        assert self.ours <= bound, (self.ours, self.plain, self.largest)
