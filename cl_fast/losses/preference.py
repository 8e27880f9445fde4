"""Preference losses over log-probs of whole answers: DPO and its kin, KTO, ORPO, SimPO, CPO.

    c, r      log-probs of the chosen and the rejected answer under the policy: sums over tokens,
              or means where the table says so (`sequence_sums`, average=True)
    c0, r0    the same under the reference model, which gets no gradient
    delta     (c - c0) - (r - r0)
    s         label smoothing: the probability that a label is flipped

    loss                      of a pair
    dpo_loss "sigmoid"        -(1 - s) log sigma(beta delta) - s log sigma(-beta delta)
             "hinge"          max(0, 1 - beta delta)
             "ipo"            (delta - 1 / (2 beta))^2                               means
             "robust"         (-(1 - s) log sigma(x) + s log sigma(-x)) / (1 - 2 s), x = beta delta
             "exo_pair"       KL of (sigma(beta delta), sigma(-beta delta)) from (1 - s, s)
    cpo_loss                  the first three with delta = c - r, + alpha nll
    simpo_loss                -(1 - s) log sigma(beta (c - r) - gamma) - s log sigma(-...)  means
    orpo_loss                 -beta log sigma(log odds(c) - log odds(r)) + nll              means
                              log odds(x) = x - log(1 - e^x)
    kto_loss, of one answer   w_D sigma(-beta (x - x0 - z)) if it is desirable, else
                              w_U sigma( beta (x - x0 - z))

Everything is computed in float32 (float64 where an input is), with log sigma and log(1 - e^x) by
functions that neither overflow nor cancel.

Sources: DPO: Rafailov et al. 2023 (arXiv 2305.18290), its smoothing: Mitchell 2023; hinge: SLiC,
Zhao et al. 2023 (2305.10425); IPO: Azar et al. 2023 (2310.12036); robust: Ray Chowdhury et al. 2024
(2403.00409); EXO: Ji et al. 2024 (2402.00856); CPO: Xu et al. 2024 (2401.08417); SimPO: Meng et al.
2024 (2405.14734); ORPO: Hong et al. 2024 (2403.07691); KTO: Ethayarajh et al. 2024 (2402.01306).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Rewards", "cpo_loss", "dpo_loss", "kto_loss", "orpo_loss", "simpo_loss"]

Reduction = Literal["mean", "sum", "none"]
DpoType = Literal["sigmoid", "hinge", "ipo", "robust", "exo_pair"]
CpoType = Literal["sigmoid", "hinge", "ipo"]


class Rewards(NamedTuple):
    """Implicit rewards of a batch of pairs, without gradients: what trainers log.

    `(chosen > rejected).float().mean()` is the accuracy, `(chosen - rejected).mean()` the margin.
    """

    chosen: Tensor
    rejected: Tensor


# --- checks ------------------------------------------------------------------------------------


def _wide(**tensors: Tensor) -> list[Tensor]:
    """In the dtype of the loss.

    Raises:
        TypeError, ValueError: a tensor, named, does not fit the first one.
    """
    (first, like), *_ = tensors.items()
    wide = torch.float32
    for name, x in tensors.items():
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point; got {x.dtype}")
        if x.shape != like.shape:
            raise ValueError(
                f"{name} must have the shape of {first}, {tuple(like.shape)}; got {tuple(x.shape)}"
            )
        if x.dim() > 1:
            raise ValueError(
                f"{name} must have one number per sequence; got the shape {tuple(x.shape)}: add up "
                "the log-probs of its tokens by sequence_sums"
            )
        if x.device != like.device:
            raise ValueError(
                f"{name} must be on the device of {first}, {like.device}; got {x.device}"
            )
        if x.dtype == torch.float64:
            wide = torch.float64
    return [x.to(wide) for x in tensors.values()]


def _refuse_trainable(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.requires_grad:
            raise ValueError(
                f"{name} must not require grad: detach it, or compute it under torch.no_grad()"
            )


def _positive(**numbers: float) -> None:
    for name, x in numbers.items():
        if not (x > 0 and math.isfinite(x)):
            raise ValueError(f"{name} must be positive; got {x}")


def _smoothing(s: float, most: float = 1.0) -> None:
    if not 0 <= s < most:
        raise ValueError(f"label_smoothing must be in [0, {most:g}); got {s}")


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction != "mean":
        raise ValueError(f"reduction must be one of 'mean', 'sum', 'none'; got {reduction!r}")
    # An empty batch is a 0 that is connected to its inputs, not 0 / 0.
    return losses.sum() / max(1, losses.numel())


# --- formulas ----------------------------------------------------------------------------------


def _smoothed(x: Tensor, s: float) -> Tensor:
    loss = -F.logsigmoid(x)
    return loss if s == 0 else (1 - s) * loss - s * F.logsigmoid(-x)


def _pair(delta: Tensor, beta: float, loss_type: str, s: float) -> Tensor:
    if loss_type == "sigmoid":
        _smoothing(s)
        return _smoothed(beta * delta, s)
    if loss_type in ("hinge", "ipo"):
        if s:
            raise ValueError(f"label_smoothing is not offered for loss_type={loss_type!r}; got {s}")
        return torch.relu(1 - beta * delta) if loss_type == "hinge" else (delta - 0.5 / beta) ** 2
    x = beta * delta
    if loss_type == "robust":
        _smoothing(s, 0.5)
        return (s * F.logsigmoid(-x) - (1 - s) * F.logsigmoid(x)) / (1 - 2 * s)
    _smoothing(s)
    if s == 0:
        raise ValueError("label_smoothing must be above 0 for loss_type='exo_pair'; got 0")
    won, lost = F.logsigmoid(x), F.logsigmoid(-x)
    return won.exp() * (won - math.log1p(-s)) + lost.exp() * (lost - math.log(s))


def _log_odds(x: Tensor) -> Tensor:
    """x - log(1 - e^x) of log-probs x <= 0; 0 itself counts as the largest number below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    small = x < -math.log(2)
    # Each form gets an argument at which it is finite: where() multiplies its gradient by 0.
    far = torch.log1p(-torch.where(small, x, -1).exp())
    near = torch.log(-torch.expm1(torch.where(small, -1, x)))
    return x - torch.where(small, far, near)


# --- losses ------------------------------------------------------------------------------------


@overload
def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = ...,
    loss_type: DpoType = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    return_rewards: Literal[False] = ...,
) -> Tensor: ...


@overload
def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = ...,
    loss_type: DpoType = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    return_rewards: Literal[True],
) -> tuple[Tensor, Rewards]: ...


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    loss_type: DpoType = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_rewards: bool = False,
) -> Tensor | tuple[Tensor, Rewards]:
    """Direct preference optimisation: widen the policy's margin over that of the reference.

    Args:
        policy_chosen, policy_rejected: [B], log-probs of the answers under the policy: sums over
            tokens, means for loss_type="ipo".
        ref_chosen, ref_rejected: the same under the reference; they must not require grad.
        beta: how much the policy is held to the reference; tau of IPO.
        loss_type: see the table of the module.
        label_smoothing: s; of "sigmoid" (conservative DPO), "robust" (below 0.5) and "exo_pair"
            (above 0).
        reduction: "mean" over pairs, "sum", or "none": [B].
        return_rewards: return `Rewards` too: beta times the log-ratios.

    Raises:
        TypeError, ValueError: an argument, named, is wrong.
    """
    if loss_type not in ("sigmoid", "hinge", "ipo", "robust", "exo_pair"):
        raise ValueError(
            "loss_type must be one of 'sigmoid', 'hinge', 'ipo', 'robust', 'exo_pair'; "
            f"got {loss_type!r}"
        )
    _positive(beta=beta)
    _refuse_trainable(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    c, r, c0, r0 = _wide(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )  # fmt: skip
    chosen, rejected = c - c0, r - r0
    losses = _pair(chosen - rejected, beta, loss_type, label_smoothing)
    loss = _reduced(losses, reduction)
    if not return_rewards:
        return loss
    return loss, Rewards(beta * chosen.detach(), beta * rejected.detach())


def kto_loss(
    policy: Tensor,
    ref: Tensor,
    desirable: Tensor,
    *,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Kahneman-Tversky optimisation: answers that are good or bad one by one, without pairs.

    Args:
        policy: [B], sums of log-probs of the answers under the policy.
        ref: the same under the reference; it must not require grad.
        desirable: bool [B].
        kl: z of the table, the batch's estimate of KL(policy, reference): the mean of log-ratios
            of answers to other prompts, over all ranks. It is detached, and 0 where negative. A
            number must be finite; a tensor is not looked at, and its NaN is one in the loss.
        beta: how quickly the value saturates.
        desirable_weight, undesirable_weight: w_D and w_U.
        reduction: "mean" over answers, "sum", or "none": [B].

    Raises:
        TypeError, ValueError: an argument, named, is wrong.
    """
    _positive(beta=beta)
    _refuse_trainable(ref=ref)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool; got {desirable.dtype}")
    if desirable.shape != policy.shape:
        raise ValueError(
            f"desirable must have the shape of policy, {tuple(policy.shape)}; "
            f"got {tuple(desirable.shape)}"
        )
    x, x0 = _wide(policy=policy, ref=ref)
    if isinstance(kl, Tensor):
        if kl.numel() != 1:
            raise ValueError(f"kl must be one number; got the shape {tuple(kl.shape)}")
        away = x - x0 - kl.detach().reshape(()).to(x.dtype).clamp(min=0)
    else:
        if not -math.inf < kl < math.inf:  # math.isfinite breaks a graph that is compiled
            raise ValueError(f"kl must be a finite number; got {kl}")
        away = x - x0 - max(0.0, kl)
    losses = torch.sigmoid(beta * torch.where(desirable, -away, away))
    weighted = torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)
    return _reduced(weighted, reduction)


@overload
def orpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = ...,
    nll: Tensor | None = ...,
    reduction: Reduction = ...,
    return_rewards: Literal[False] = ...,
) -> Tensor: ...


@overload
def orpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = ...,
    nll: Tensor | None = ...,
    reduction: Reduction = ...,
    return_rewards: Literal[True],
) -> tuple[Tensor, Rewards]: ...


def orpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 0.1,
    nll: Tensor | None = None,
    reduction: Reduction = "mean",
    return_rewards: bool = False,
) -> Tensor | tuple[Tensor, Rewards]:
    """Odds-ratio preference optimisation, which needs no reference model.

    Args:
        policy_chosen, policy_rejected: [B], mean log-probs per token of the answers
            (`sequence_sums` with average=True). One that is exactly 0 gets no gradient.
        beta: lambda of the paper, the weight of the odds ratio.
        nll: the supervised loss of the chosen answers, [B] or one number, added to the loss.
        reduction: "mean" over pairs, "sum", or "none": [B].
        return_rewards: return `Rewards` too: beta times the log-probs.

    Raises:
        TypeError, ValueError: an argument, named, is wrong.
    """
    _positive(beta=beta)
    c, r = _wide(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    losses = -beta * F.logsigmoid(_log_odds(c) - _log_odds(r))
    loss = _with_nll(losses, nll, 1.0, reduction)
    return (loss, Rewards(beta * c.detach(), beta * r.detach())) if return_rewards else loss


def _with_nll(losses: Tensor, nll: Tensor | None, alpha: float, reduction: str) -> Tensor:
    """A number is added to the result once, losses of pairs each to its own."""
    if nll is None:
        return _reduced(losses, reduction)
    if nll.dim() == 0:
        return _reduced(losses, reduction) + alpha * nll
    if nll.shape != losses.shape:
        raise ValueError(
            f"nll must be one number or have the shape of the pairs, {tuple(losses.shape)}; "
            f"got {tuple(nll.shape)}"
        )
    return _reduced(losses + alpha * nll, reduction)


@overload
def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = ...,
    gamma: float = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    return_rewards: Literal[False] = ...,
) -> Tensor: ...


@overload
def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = ...,
    gamma: float = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    return_rewards: Literal[True],
) -> tuple[Tensor, Rewards]: ...


def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_rewards: bool = False,
) -> Tensor | tuple[Tensor, Rewards]:
    """Simple preference optimisation: a margin between mean log-probs, without a reference.

    Args:
        policy_chosen, policy_rejected: [B], mean log-probs per token of the answers.
        beta: scale of the rewards.
        gamma: the margin that the rewards shall differ by (not divided by beta).
        label_smoothing, reduction, return_rewards: as in `dpo_loss`.

    Raises:
        TypeError, ValueError: an argument, named, is wrong.
    """
    _positive(beta=beta)
    _smoothing(label_smoothing)
    c, r = _wide(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    losses = _smoothed(beta * (c - r) - gamma, label_smoothing)
    loss = _reduced(losses, reduction)
    return (loss, Rewards(beta * c.detach(), beta * r.detach())) if return_rewards else loss


@overload
def cpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = ...,
    loss_type: CpoType = ...,
    label_smoothing: float = ...,
    nll: Tensor | None = ...,
    alpha: float = ...,
    reduction: Reduction = ...,
    return_rewards: Literal[False] = ...,
) -> Tensor: ...


@overload
def cpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = ...,
    loss_type: CpoType = ...,
    label_smoothing: float = ...,
    nll: Tensor | None = ...,
    alpha: float = ...,
    reduction: Reduction = ...,
    return_rewards: Literal[True],
) -> tuple[Tensor, Rewards]: ...


def cpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 0.1,
    loss_type: CpoType = "sigmoid",
    label_smoothing: float = 0.0,
    nll: Tensor | None = None,
    alpha: float = 1.0,
    reduction: Reduction = "mean",
    return_rewards: bool = False,
) -> Tensor | tuple[Tensor, Rewards]:
    """Contrastive preference optimisation: DPO with a uniform reference, and a supervised loss.

    Args:
        policy_chosen, policy_rejected: [B], sums of log-probs (means for loss_type="ipo").
        beta, loss_type, label_smoothing, reduction, return_rewards: as in `dpo_loss`.
        nll: the supervised loss of the chosen answers, [B] or one number.
        alpha: its weight.

    Raises:
        TypeError, ValueError: an argument, named, is wrong.
    """
    if loss_type not in ("sigmoid", "hinge", "ipo"):
        raise ValueError(f"loss_type must be one of 'sigmoid', 'hinge', 'ipo'; got {loss_type!r}")
    _positive(beta=beta)
    c, r = _wide(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    losses = _pair(c - r, beta, loss_type, label_smoothing)
    loss = _with_nll(losses, nll, alpha, reduction)
    return (loss, Rewards(beta * c.detach(), beta * r.detach())) if return_rewards else loss
