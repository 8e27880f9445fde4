"""The losses as nn.Modules: the options are set once, the tensors of a batch are given to forward.

They have no parameters and no buffers; a head is passed in, so that whoever owns it keeps it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cl_fast.losses.divergence import (
    check_reduction,
    divergence_from_logits,
    kind_and_mix,
    linear_divergence,
)
from cl_fast.losses.logprobs import token_logprobs
from cl_fast.losses.teachers import Teacher

__all__ = ["Divergence", "LinearDivergence", "TokenLogprobs"]


class _Options(nn.Module):  # type: ignore[misc, unused-ignore]
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearDivergence(_Options):
    """`linear_divergence` with its options set.

    Args:
        kind, beta, skew: the divergence.
        options: the other options of `linear_divergence`.

    Raises:
        ValueError: there is no such kind or reduction, or a number is out of range.
    """

    def __init__(
        self, kind: str = "forward_kl", *, beta: float = 0.5, skew: float = 0.1, **options: Any
    ) -> None:
        kind_and_mix(kind, beta, skew)
        check_reduction(options.get("reduction", "mean"), None)
        super().__init__(kind=kind, beta=beta, skew=skew, **options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        teacher: Teacher,
        *,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        bias: Tensor | None = None,
        denom: float | Tensor | None = None,
    ) -> Any:
        """The loss of `hidden` [..., H] and the head `weight` [V, H]; see `linear_divergence`."""
        return linear_divergence(
            hidden, weight, teacher, labels=labels, token_weight=token_weight, bias=bias,
            denom=denom, **self.options,
        )  # fmt: skip


class Divergence(_Options):
    """`divergence_from_logits` with its options set; arguments as for `LinearDivergence`."""

    def __init__(
        self, kind: str = "forward_kl", *, beta: float = 0.5, skew: float = 0.1, **options: Any
    ) -> None:
        kind_and_mix(kind, beta, skew)
        check_reduction(options.get("reduction", "mean"), None)
        super().__init__(kind=kind, beta=beta, skew=skew, **options)

    def forward(
        self,
        logits: Tensor,
        teacher: Teacher,
        *,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        denom: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of `logits` [..., V]; see `divergence_from_logits`."""
        return divergence_from_logits(
            logits, teacher, labels=labels, token_weight=token_weight, denom=denom, **self.options
        )


class TokenLogprobs(_Options):
    """`token_logprobs` with its options set."""

    def forward(
        self, hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None
    ) -> Any:
        """Log-probs [...] of `ids` [...]; see `token_logprobs`."""
        return token_logprobs(hidden, weight, ids, bias=bias, **self.options)
