"""The pieces of PPO and GRPO over log-probs of tokens: KL estimates and the clipped surrogate.

    d = log p_ref - log p                            of the tokens that the policy drew
    k1 = -d,   k2 = d^2 / 2,   k3 = e^d - 1 - d      estimates of KL(p, p_ref); k1 and k3 unbiased

    rho = exp(log p - log p_old)                     of a token, or the geometric mean of a sequence
    loss = -min(rho A, clip(rho, 1 - low, 1 + high) A) + c kl

    gradient of the loss for log p: -rho A, and 0 where the clip is the smaller: A > 0 and
    rho > 1 + high, or A < 0 and rho < 1 - low

high > low is the clip-higher of DAPO. With `dual_clip` a negative advantage counts at most that
ratio: -max(min(rho A, clip(rho) A), dual_clip A) for A < 0. Tokens that are clipped or masked are
left out before anything is exponentiated, so that no infinity of theirs turns into NaN.

Sources: PPO: Schulman et al. 2017 (arXiv 1707.06347); k1, k2, k3: Schulman 2020, "Approximating KL
divergence"; GRPO: Shao et al. 2024 (2402.03300); DAPO: Yu et al. 2025 (2503.14476); dual clip: Ye
et al. 2020 (1912.09729); sequence ratios: GSPO, Zheng et al. 2025 (2507.18071).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from cl_fast.losses.logprobs import sequence_index, sequence_sums

__all__ = ["Clipped", "clipped_policy_loss", "importance_weights", "kl_estimate"]

Estimator = Literal["k1", "k2", "k3"]
PolicyReduction = Literal["mean", "sequence_mean", "sum", "none"]

_SERIES = 12
"""Terms up to d^12 / 12!: below 2^-53 of d^2 / 2 where |d| < 1/8."""


class Clipped(NamedTuple):
    """What was measured on the way, 0-dim, without gradients: parts of the tokens that count."""

    low: Tensor
    """Clipped from below."""
    high: Tensor
    """Clipped from above, by `dual_clip` too."""
    ratio: Tensor
    """The mean ratio."""


# --- checks ------------------------------------------------------------------------------------


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _check_like(name: str, x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of logprobs, {tuple(like.shape)}; got {tuple(x.shape)}"
        )
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of logprobs, {like.device}; got {x.device}")


def _check_given(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(
            f"{name} must not require grad: detach it, or compute it under torch.no_grad()"
        )


# --- KL to a reference -------------------------------------------------------------------------


def _exponential_rest(d: Tensor) -> Tensor:
    """e^d - 1 - d, to full precision and with a gradient e^d - 1 to full precision.

    expm1(d) - d cancels where d is small, and that is where a policy begins.
    """
    near = d.abs() < 0.125
    x = torch.where(near, d, 0)
    series = torch.full_like(x, 1 / math.factorial(_SERIES))
    for n in range(_SERIES - 1, 1, -1):
        series = series * x + 1 / math.factorial(n)
    away = torch.where(near, 0, d)
    return torch.where(near, series * x * x, torch.expm1(away) - away)


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: Estimator = "k3",
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Per token, an estimate of the KL divergence of the policy from a reference.

    The tokens must have been drawn from the policy. As a loss, the gradients of the three differ:
    that of k2 is the one whose mean is the gradient of the KL; that of k1 has mean 0.

    Args:
        logprobs: [...], of the policy.
        ref_logprobs: [...], of the reference.
        estimator: "k1", "k2" or "k3".
        mask: [...]; tokens where it is 0 or False are 0 and may hold anything. Masked only after
            this, NaN or an overflow of theirs is 0 in the loss but NaN in the gradient, so give the
            mask here wherever they are not ordinary numbers.

    Returns:
        [...], float32 (float64 where an input is).

    Raises:
        ValueError: shapes differ, or there is no such estimator.
    """
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"estimator must be one of 'k1', 'k2', 'k3'; got {estimator!r}")
    _check_like("ref_logprobs", ref_logprobs, logprobs)
    wide = _wide(logprobs, ref_logprobs)
    d = ref_logprobs.to(wide) - logprobs.to(wide)
    if mask is not None:
        _check_like("mask", mask, logprobs)
        d = torch.where(mask != 0, d, 0)
    if estimator == "k1":
        return -d
    return d * d / 2 if estimator == "k2" else _exponential_rest(d)


# --- policy ------------------------------------------------------------------------------------


def importance_weights(
    logprobs: Tensor, old_logprobs: Tensor, *, clip: float = math.inf, bound: float = 20.0
) -> Tensor:
    """min(exp(log p - log p_old), clip) per token, detached: what a loss of tokens that an older
    policy drew is multiplied by.

    Args:
        logprobs, old_logprobs: [...], of the policy and of the one that drew the tokens.
        clip: the largest weight.
        bound: log-ratios are clamped to [-bound, bound] first.

    Raises:
        ValueError: shapes differ, or a bound is not positive.
    """
    for name, x in (("clip", clip), ("bound", bound)):
        if not x > 0:
            raise ValueError(f"{name} must be positive; got {x}")
    _check_like("old_logprobs", old_logprobs, logprobs)
    wide = _wide(logprobs, old_logprobs)
    away = logprobs.detach().to(wide) - old_logprobs.detach().to(wide)
    return away.clamp(-bound, bound).exp().clamp(max=clip)


class _Batch:
    """The tokens that count and the sequences they belong to, padded or packed."""

    def __init__(self, logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        self.shape = logprobs.shape
        self.mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
        self.cu_seqlens = cu_seqlens
        self.index: Tensor | None = None
        if cu_seqlens is not None:
            self.index = sequence_index(cu_seqlens, logprobs.numel())
            # What follows the last sequence belongs to none.
            self.mask = self.mask & (self.index < cu_seqlens.numel() - 1).reshape(self.shape)

    def means(self, x: Tensor) -> Tensor:
        """Of sequences: [B], or [S] where packed."""
        return sequence_sums(x, mask=self.mask, cu_seqlens=self.cu_seqlens, average=True)

    def spread(self, x: Tensor) -> Tensor:
        """One number per sequence to all its tokens."""
        if self.index is None:
            return x.unsqueeze(-1).expand(self.shape)
        return torch.cat([x, x.new_zeros(1)])[self.index].reshape(self.shape)

    def advantages(self, x: Tensor) -> Tensor:
        """Per token, from per token or per sequence."""
        if x.shape == self.shape:
            return x
        per_sequence: tuple[int, ...] = tuple(self.shape[:-1])
        if self.cu_seqlens is not None:
            per_sequence = (self.cu_seqlens.numel() - 1,)
        if tuple(x.shape) == per_sequence:
            return self.spread(x)
        if tuple(x.shape) == (*per_sequence, 1):
            return self.spread(x.squeeze(-1))
        raise ValueError(
            f"advantages must have the shape of logprobs, {tuple(self.shape)}, or of the "
            f"sequences, {per_sequence}; got {tuple(x.shape)}"
        )


def _check_policy(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    kl: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    importance_level: str,
    reduction: str,
    denom: float | Tensor | None,
) -> None:
    if logprobs.dim() == 0:
        raise ValueError("logprobs must have a last dimension of tokens; got a scalar")
    _check_like("old_logprobs", old_logprobs, logprobs)
    _check_given("old_logprobs", old_logprobs)
    _check_given("advantages", advantages)
    if mask is not None:
        _check_like("mask", mask, logprobs)
    if kl is not None:
        _check_like("kl", kl, logprobs)
    if (kl is None) != (kl_coef == 0):
        raise ValueError("kl and kl_coef belong together; give both or none of them")
    if not 0 < clip_low <= 1:
        raise ValueError(f"clip_low must be in (0, 1]; got {clip_low}")
    if not clip_high > 0:
        raise ValueError(f"clip_high must be positive; got {clip_high}")
    if dual_clip is not None and not dual_clip > 1 + clip_high:
        raise ValueError(f"dual_clip must be above 1 + clip_high, {1 + clip_high}; got {dual_clip}")
    if importance_level not in ("token", "sequence"):
        raise ValueError(
            f"importance_level must be 'token' or 'sequence'; got {importance_level!r}"
        )
    if reduction not in ("mean", "sequence_mean", "sum", "none"):
        raise ValueError(
            f"reduction must be one of 'mean', 'sequence_mean', 'sum', 'none'; got {reduction!r}"
        )
    if denom is None:
        return
    if reduction not in ("mean", "sequence_mean"):
        raise ValueError(f"denom needs reduction='mean' or 'sequence_mean'; got {reduction!r}")
    if isinstance(denom, Tensor) and denom.numel() != 1:
        raise ValueError(f"denom must be one number; got the shape {tuple(denom.shape)}")
    if not isinstance(denom, Tensor) and not denom > 0:
        raise ValueError(f"denom must be positive; got {denom}")


def _surrogate(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token, and which of them are clipped from below and from above."""
    with torch.no_grad():
        least = math.log1p(-low) if low < 1 else -math.inf
        below = (advantages < 0) & (log_ratio < least)
        above = (advantages > 0) & (log_ratio > math.log1p(high))
        # The ratio that a clipped token counts with; it has no gradient.
        fixed = torch.full_like(log_ratio, 1 - low).masked_fill(above, 1 + high)
        if dual is not None:
            far = (advantages < 0) & (log_ratio > math.log(dual))
            fixed = fixed.masked_fill(far, dual)
            above = above | far
        idle = below | above | (advantages == 0)
    ratio = torch.where(idle, 0, log_ratio).exp()
    return -advantages * torch.where(below | above, fixed, ratio), below, above


@overload
def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = ...,
    clip_high: float | None = ...,
    dual_clip: float | None = ...,
    mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    kl: Tensor | None = ...,
    kl_coef: float = ...,
    importance_level: Literal["token", "sequence"] = ...,
    reduction: PolicyReduction = ...,
    denom: float | Tensor | None = ...,
    return_clipped: Literal[False] = ...,
) -> Tensor: ...


@overload
def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = ...,
    clip_high: float | None = ...,
    dual_clip: float | None = ...,
    mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    kl: Tensor | None = ...,
    kl_coef: float = ...,
    importance_level: Literal["token", "sequence"] = ...,
    reduction: PolicyReduction = ...,
    denom: float | Tensor | None = ...,
    return_clipped: Literal[True],
) -> tuple[Tensor, Clipped]: ...


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    importance_level: Literal["token", "sequence"] = "token",
    reduction: PolicyReduction = "mean",
    denom: float | Tensor | None = None,
    return_clipped: bool = False,
) -> Tensor | tuple[Tensor, Clipped]:
    """The clipped surrogate of PPO and GRPO.

    Args:
        logprobs: [..., T] padded, or packed in any shape with `cu_seqlens`: of the policy.
        old_logprobs: [..., T], of the policy that drew the tokens; must not require grad. On the
            first step `logprobs.detach()`.
        advantages: of the shape of logprobs, or one per sequence ([...] or [..., 1]; [S] packed).
        clip_low, clip_high: ratios are clipped to [1 - clip_low, 1 + clip_high]; clip_high is by
            default clip_low.
        dual_clip: the largest ratio that a negative advantage counts with; above 1 + clip_high.
        mask: [..., T], the tokens of the answers; what is masked may hold anything (and where `kl`
            is made from it, say so there: `kl_estimate` has a mask too).
        cu_seqlens: integer [S + 1], where packed sequences begin and the last one ends.
        kl: [..., T], per token, for example of `kl_estimate`; kl_coef times it is added.
        kl_coef: its weight.
        importance_level: "token", or "sequence": all tokens of a sequence have the exponential of
            its mean log-ratio (GSPO).
        reduction: "mean": over tokens, as in DAPO; "sequence_mean": over sequences of their means
            over tokens, as in GRPO; "sum"; "none": of the shape of logprobs, 0 where masked.
        denom: what a mean divides its sum by instead of the number of tokens or sequences of this
            call: of all micro-batches and ranks, or B x max length as in Dr. GRPO.
        return_clipped: return `Clipped` too.

    Returns:
        The loss, float32 (float64 where an input is). If nothing counts it is a 0 that is connected
        to its inputs.

    Raises:
        ValueError: an argument, named, is wrong.
    """
    high = clip_low if clip_high is None else clip_high
    _check_policy(
        logprobs, old_logprobs, advantages, mask, kl, clip_low, high, dual_clip, kl_coef,
        importance_level, reduction, denom,
    )  # fmt: skip
    if isinstance(denom, Tensor):
        denom = denom.reshape(())
    wide = _wide(logprobs, old_logprobs, advantages)
    batch = _Batch(logprobs, mask, cu_seqlens)
    counts = batch.mask
    a = torch.where(counts, batch.advantages(advantages).to(wide), 0)
    log_ratio = torch.where(counts, logprobs.to(wide) - old_logprobs.to(wide), 0)
    if importance_level == "sequence":
        log_ratio = batch.spread(batch.means(log_ratio))
    losses, below, above = _surrogate(log_ratio, a, clip_low, high, dual_clip)
    if kl is not None:
        losses = losses + kl_coef * torch.where(counts, kl.to(wide), 0)
    losses = torch.where(counts, losses, 0)
    if reduction == "none":
        loss = losses
    elif reduction == "sequence_mean":
        means = batch.means(losses)
        loss = means.sum() / (max(1, means.numel()) if denom is None else denom)
    else:
        loss = losses.sum()
        if reduction == "mean":
            loss = loss / (counts.sum().clamp(min=1) if denom is None else denom)
    if not return_clipped:
        return loss
    with torch.no_grad():
        number = counts.sum().clamp(min=1)
        ratio = torch.where(counts, log_ratio.exp(), 0).sum() / number
        return loss, Clipped(below.sum() / number, above.sum() / number, ratio)
