"""Losses for continual learning that never hold the logits: distillation, log-probs, preferences.

    linear_divergence        KL, JSD, skewed KL, TVD of a student's hidden states and head from a
                             teacher: `Hidden`, `Logits`, `Probs` or `TopK`
    divergence_from_logits   the same where the logits exist already
    TeacherCache             a teacher's top-k log-probs on disk
    token_logprobs           log-probs (and entropies) of given tokens; from logits: ..._from_logits
    sequence_sums            their sums over padded or packed sequences
    dpo_loss, kto_loss, orpo_loss, simpo_loss, cpo_loss   preferences, from sums of log-probs
    kl_estimate, clipped_policy_loss, importance_weights  the pieces of PPO and GRPO
    LinearDivergence, Divergence, TokenLogprobs, DPOLoss, KTOLoss, ORPOLoss, ClippedPolicyLoss
                             the same as nn.Modules

Torch is imported when a loss is first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_fast.losses.cache import TeacherCache
    from cl_fast.losses.divergence import Measured, divergence_from_logits, linear_divergence
    from cl_fast.losses.logprobs import sequence_sums, token_logprobs, token_logprobs_from_logits
    from cl_fast.losses.modules import (
        ClippedPolicyLoss,
        Divergence,
        DPOLoss,
        KTOLoss,
        LinearDivergence,
        ORPOLoss,
        TokenLogprobs,
    )
    from cl_fast.losses.policy_gradient import (
        Clipped,
        clipped_policy_loss,
        importance_weights,
        kl_estimate,
    )
    from cl_fast.losses.preference import (
        Rewards,
        cpo_loss,
        dpo_loss,
        kto_loss,
        orpo_loss,
        simpo_loss,
    )
    from cl_fast.losses.teachers import Hidden, Logits, Probs, TopK

__all__ = [
    "Clipped",
    "ClippedPolicyLoss",
    "DPOLoss",
    "Divergence",
    "Hidden",
    "KTOLoss",
    "LinearDivergence",
    "Logits",
    "Measured",
    "ORPOLoss",
    "Probs",
    "Rewards",
    "TeacherCache",
    "TokenLogprobs",
    "TopK",
    "clipped_policy_loss",
    "cpo_loss",
    "divergence_from_logits",
    "dpo_loss",
    "importance_weights",
    "kl_estimate",
    "kto_loss",
    "linear_divergence",
    "orpo_loss",
    "sequence_sums",
    "simpo_loss",
    "token_logprobs",
    "token_logprobs_from_logits",
]

_HOMES = {
    "Clipped": "policy_gradient",
    "ClippedPolicyLoss": "modules",
    "DPOLoss": "modules",
    "Divergence": "modules",
    "Hidden": "teachers",
    "KTOLoss": "modules",
    "LinearDivergence": "modules",
    "Logits": "teachers",
    "Measured": "divergence",
    "ORPOLoss": "modules",
    "Probs": "teachers",
    "Rewards": "preference",
    "TeacherCache": "cache",
    "TokenLogprobs": "modules",
    "TopK": "teachers",
    "clipped_policy_loss": "policy_gradient",
    "cpo_loss": "preference",
    "divergence_from_logits": "divergence",
    "dpo_loss": "preference",
    "importance_weights": "policy_gradient",
    "kl_estimate": "policy_gradient",
    "kto_loss": "preference",
    "linear_divergence": "divergence",
    "orpo_loss": "preference",
    "sequence_sums": "logprobs",
    "simpo_loss": "preference",
    "token_logprobs": "logprobs",
    "token_logprobs_from_logits": "logprobs",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"cl_fast.losses.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cl_fast.losses' has no attribute {name!r}")
