"""The losses as nn.Modules: the options are set once, the tensors of a batch are given to forward.

They have no parameters and no buffers; a head is passed in, so that whoever owns it keeps it. An
option that the function does not have, or a value that it would refuse whatever the batch, is
refused when the module is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_fast.losses.divergence import (
    _cap,
    check_pad_vocab,
    check_reduction,
    divergence_from_logits,
    kind_and_mix,
    linear_divergence,
)
from cl_fast.losses.logprobs import token_logprobs
from cl_fast.losses.policy_gradient import clipped_policy_loss
from cl_fast.losses.preference import dpo_loss, kto_loss, orpo_loss
from cl_fast.losses.teachers import Logits, Teacher
from cl_fast.ops.divergences import check_how
from cl_fast.ops.heads import chunks
from cl_fast.ops.vocabulary_rows import How

__all__ = [
    "ClippedPolicyLoss",
    "DPOLoss",
    "Divergence",
    "KTOLoss",
    "LinearDivergence",
    "ORPOLoss",
    "TokenLogprobs",
]


class _Options(nn.Module):  # type: ignore[misc, unused-ignore]
    """Options of `function`: its keyword arguments, without those that forward takes."""

    function: ClassVar[Callable[..., Any]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        given = inspect.signature(type(self).forward).parameters
        known = [
            name
            for name, x in inspect.signature(self.function).parameters.items()
            if x.kind is x.KEYWORD_ONLY and name not in given
        ]
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} has no option {name!r}; it has "
                    f"{', '.join(map(repr, known))}"
                    + (f", and forward takes {name}" if name in given else "")
                )
        self.check(**options)
        self.options = options

    def check(self, **options: Any) -> None:
        """Raise if no batch could be computed with these values."""

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check_logits(
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    **_: Any,
) -> None:
    check_how("", How(logit_scale, _cap(softcap), temperature))
    chunks(0, 1, chunk_tokens)


class _Divergence(_Options):
    def check(
        self,
        *,
        kind: str = "forward_kl",
        beta: float = 0.5,
        skew: float = 0.1,
        reduction: str = "mean",
        pad_vocab: str | None = None,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        **options: Any,
    ) -> None:
        kind_and_mix(kind, beta, skew)
        check_reduction(reduction, None)
        check_pad_vocab(pad_vocab, Logits(torch.empty(0, 0, device="cpu")))
        _check_logits(temperature=temperature, **options)
        if teacher_temperature is not None:
            check_how("teacher_", How(temperature=teacher_temperature))


class LinearDivergence(_Divergence):
    """`linear_divergence` with its options set.

    Args:
        kind, beta, skew: the divergence.
        options: the other options of `linear_divergence`.

    Raises:
        TypeError: there is no such option.
        ValueError: there is no such kind or reduction, or a number is out of range.
    """

    function = staticmethod(linear_divergence)

    def __init__(
        self, kind: str = "forward_kl", *, beta: float = 0.5, skew: float = 0.1, **options: Any
    ) -> None:
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


class Divergence(_Divergence):
    """`divergence_from_logits` with its options set; arguments as for `LinearDivergence`."""

    function = staticmethod(divergence_from_logits)

    def __init__(
        self, kind: str = "forward_kl", *, beta: float = 0.5, skew: float = 0.1, **options: Any
    ) -> None:
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

    function = staticmethod(token_logprobs)

    def check(self, **options: Any) -> None:
        _check_logits(**options)

    def forward(
        self, hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None
    ) -> Any:
        """Log-probs [...] of `ids` [...]; see `token_logprobs`."""
        return token_logprobs(hidden, weight, ids, bias=bias, **self.options)


# --- preferences and policies: what they refuse is asked of them, with a batch of nothing --------


def _nothing(*shape: int) -> Tensor:
    return torch.zeros(shape, device="cpu")


class DPOLoss(_Options):
    """`dpo_loss` with its options set: beta, loss_type, label_smoothing, reduction,
    return_rewards.

    Raises:
        TypeError, ValueError: an option does not exist, or its value is wrong.
    """

    function = staticmethod(dpo_loss)

    def check(self, **options: Any) -> None:
        dpo_loss(_nothing(0), _nothing(0), _nothing(0), _nothing(0), **options)

    def forward(
        self,
        policy_chosen: Tensor,
        policy_rejected: Tensor,
        ref_chosen: Tensor,
        ref_rejected: Tensor,
    ) -> Any:
        """The loss of pairs of answers [B]; see `dpo_loss`."""
        return dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, **self.options)


class KTOLoss(_Options):
    """`kto_loss` with its options set: beta, desirable_weight, undesirable_weight, reduction.

    Raises:
        TypeError, ValueError: an option does not exist, or its value is wrong.
    """

    function = staticmethod(kto_loss)

    def check(self, **options: Any) -> None:
        kto_loss(_nothing(0), _nothing(0), _nothing(0) > 0, **options)

    def forward(
        self, policy: Tensor, ref: Tensor, desirable: Tensor, *, kl: float | Tensor = 0.0
    ) -> Tensor:
        """The loss of answers [B]; see `kto_loss`."""
        return kto_loss(policy, ref, desirable, kl=kl, **self.options)


class ORPOLoss(_Options):
    """`orpo_loss` with its options set: beta, reduction, return_rewards.

    Raises:
        TypeError, ValueError: an option does not exist, or its value is wrong.
    """

    function = staticmethod(orpo_loss)

    def check(self, **options: Any) -> None:
        orpo_loss(_nothing(0), _nothing(0), **options)

    def forward(
        self, policy_chosen: Tensor, policy_rejected: Tensor, *, nll: Tensor | None = None
    ) -> Any:
        """The loss of pairs of answers [B]; see `orpo_loss`."""
        return orpo_loss(policy_chosen, policy_rejected, nll=nll, **self.options)


class ClippedPolicyLoss(_Options):
    """`clipped_policy_loss` with its options set: clip_low, clip_high, dual_clip, kl_coef,
    importance_level, reduction, return_clipped.

    Raises:
        TypeError, ValueError: an option does not exist, or its value is wrong.
    """

    function = staticmethod(clipped_policy_loss)

    def check(self, *, kl_coef: float = 0.0, **options: Any) -> None:
        tokens = _nothing(0, 0)
        kl = None if kl_coef == 0 else tokens
        clipped_policy_loss(tokens, tokens, _nothing(0), kl=kl, kl_coef=kl_coef, **options)

    def forward(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        kl: Tensor | None = None,
        denom: float | Tensor | None = None,
    ) -> Any:
        """The loss of tokens, padded or packed; see `clipped_policy_loss`."""
        return clipped_policy_loss(
            logprobs, old_logprobs, advantages, mask=mask, cu_seqlens=cu_seqlens, kl=kl,
            denom=denom, **self.options,
        )  # fmt: skip
