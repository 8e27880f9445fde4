"""What a model is compared with, its base: a copy that stays, or itself without its adapters.

    frozen_copy(model)         the model as it is now
    adapters_off(model)        PEFT's model without its adapters, while the context lasts

Teachers of a distillation are made so, and references of a KL divergence or of DPO.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cl_fast.models.heads import unwrap

__all__ = ["adapters_off", "frozen_copy"]


def frozen_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The model as it is now, in eval mode, without gradients.

    Not `copy.deepcopy` alone: TRL's trainers put a forward on a model that holds the model itself,
    so that a plain copy of it answers with the weights of the original, whatever becomes of them.

    Args:
        model: whole on its device; also within DDP or PEFT.
        dtype: of the copy; by default the model's.
    """
    made: Any = copy.deepcopy(unwrap(model))
    for module in (made, made.get_base_model() if hasattr(made, "get_base_model") else made):
        if not hasattr(module, "_hf_hook"):  # accelerate's forward is copied with the model
            module.__dict__.pop("forward", None)
    for parameter in made.parameters():
        parameter.grad = None
    frozen: nn.Module = made.requires_grad_(False).eval()
    return frozen if dtype is None else frozen.to(dtype)


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """PEFT's `disable_adapter`, which marks parameters of adapters that it switches on again as
    trainable, frozen ones too: here each gets its mark back."""
    marks = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, mark in marks:
            if parameter.requires_grad != mark:
                parameter.requires_grad_(mark)
