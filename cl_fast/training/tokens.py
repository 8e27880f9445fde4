"""Which tokens of a batch count, and their log-probs under a model, without the logits.

    counted(batch)                what the model is given, and labels: the tokens that count
    batch_logprobs(model, batch)  log p(token | what precedes it) of those, [B, T]
    at_base(model, reference)     the model that others are compared with, in eval mode, no grad
    frozen_copy(model)            such a reference: the model as it is now (models.bases)

The trainers of transformers and TRL say in three ways which tokens count; all are read.

    labels                                    Trainer, SFTTrainer
    input_ids, completion_mask                DPOTrainer: chosen answers, then rejected ones
    prompt_ids, completion_ids, their masks   GRPOTrainer and other on-policy trainers
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_fast.losses import token_logprobs
from cl_fast.models.bases import adapters_off, frozen_copy
from cl_fast.models.heads import (
    IGNORED,
    Evaluating,
    head_of,
    last_hidden,
    next_labels,
    run_inside,
    unwrap,
)

__all__ = ["at_base", "batch_logprobs", "check_base", "counted", "frozen_copy", "on_device_of"]

# What collators add for losses; a model's forward does not know it.
_OF_LOSSES = frozenset(
    ("labels", "shift_labels", "num_items_in_batch", "completion_mask", "ref_chosen_logps",
     "ref_rejected_logps", "assistant_masks", "seq_lengths")
)  # fmt: skip
_ROLLOUT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def counted(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """What a model's forward is given of `batch`, and the labels: [B, T], IGNORED where a token
    does not count, not shifted.

    Raises:
        ValueError: the batch does not say which tokens count.
    """
    if all(name in batch for name in _ROLLOUT):
        prompt, mask, answer, counts = (batch[name] for name in _ROLLOUT)
        ids, seen = torch.cat([prompt, answer], 1), torch.cat([mask, counts], 1)
        labels = torch.cat(
            [torch.full_like(prompt, IGNORED), answer.masked_fill(counts == 0, IGNORED)], 1
        )
        return {"input_ids": ids, "attention_mask": seen}, labels
    given = {k: v for k, v in batch.items() if k not in _OF_LOSSES and v is not None}
    if batch.get("labels") is not None:
        return given, batch["labels"]
    if "input_ids" in batch and "completion_mask" in batch:
        return given, batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    raise ValueError(
        f"the batch has {sorted(batch)}, which does not say which tokens count: give labels, or "
        "input_ids and completion_mask, or prompt_ids, completion_ids and their masks"
    )


def batch_logprobs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens that count, differentiable; no logits are made.

    Args:
        model: a causal language model of transformers; within DDP, FSDP or PEFT too.
        batch: as a trainer has it, see `counted`.

    Returns:
        Log-probs [B, T] in float32 (float64 for such a model), at the position that predicts; 0
        where nothing is predicted that counts. And where something is: bool [B, T].
    """
    given, labels = counted(batch)
    targets = next_labels(labels)

    def logprobs_of(inner: Any, **inputs: Any) -> Tensor:
        # Prompt tuning puts its own positions in front.
        hidden = last_hidden(inner, **inputs)[:, -targets.size(1) :]
        return token_logprobs(**head_of(inner).keywords(hidden), ids=targets)

    logprobs: Tensor = run_inside(model, logprobs_of, **given)
    return logprobs, targets != IGNORED


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` with its tensors where the first parameter of the model is."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def check_base(model: nn.Module, reference: nn.Module | None) -> None:
    """That `at_base` has something to compare with.

    Raises:
        ValueError: there is neither a reference nor an adapter to switch off; or the reference is
            the model itself.
    """
    inner = unwrap(model)
    if reference is not None and unwrap(reference) is inner:
        raise ValueError(
            "reference is the model that is trained: give frozen_copy(model), or nothing if the "
            "model has an adapter of PEFT"
        )
    if reference is None and not hasattr(inner, "disable_adapter"):
        raise ValueError(
            f"{type(inner).__name__} has no adapter of PEFT that could be switched off: give "
            "reference, frozen_copy(model) of the model as it was"
        )


@contextlib.contextmanager
def at_base(model: nn.Module, reference: nn.Module | None = None) -> Iterator[nn.Module]:
    """The base: `reference`, or `model` with its adapters switched off; in eval mode, no grad.

    Raises:
        ValueError: see `check_base`.
    """
    check_base(model, reference)
    off = contextlib.nullcontext() if reference is not None else adapters_off(unwrap(model))
    base = model if reference is None else reference
    with Evaluating(base), torch.no_grad(), off:
        yield base
