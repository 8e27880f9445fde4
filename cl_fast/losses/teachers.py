"""What a student is compared with: four forms in which a teacher gives its next-token distribution.

    Hidden   hidden states and a head; its logits exist a chunk at a time
    Logits   logits
    Probs    probabilities; they need not sum to 1 exactly
    TopK     the k likeliest token ids with their log-probs, as a cache or a server gives them

Leading shapes are those of the student's tokens. No gradient reaches a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["Hidden", "Logits", "Probs", "Tail", "Teacher", "TopK"]

Tail = Literal["bucket", "renorm", "none"]


@dataclass(frozen=True, eq=False)
class Hidden:
    """A teacher's last hidden states and its head.

    Attributes:
        hidden: [..., Ht].
        weight: [Vt, Ht].
        bias: [Vt], or None.
        logit_scale: a factor on the logits (Cohere, Granite's 1 / logits_scaling).
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2); None: they do not.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class Logits:
    """A teacher's final logits: [..., Vt]; -inf is a token id that it excludes."""

    logits: Tensor


@dataclass(frozen=True, eq=False)
class Probs:
    """A teacher's probabilities: [..., Vt], not negative. A row is divided by its sum."""

    probs: Tensor


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's likeliest tokens.

    Attributes:
        ids: integer [..., k], without duplicates in a row.
        logprobs: [..., k], of the whole vocabulary; -inf counts as probability 0.
        tail: what becomes of the vocabulary outside of the k ids.
            "bucket": one more category on both sides, with the probability that is left;
            "renorm": both sides are renormalised on the k ids, and the vocabulary is not touched;
            "none": the sum of the divergence stops at the k ids.
        temperature: at which the log-probs were made. Only renormalised ones can be brought to
            another: of the others the tail is not known there.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tail = "bucket"
    temperature: float = 1.0


Teacher = Hidden | Logits | Probs | TopK
