"""Token ids of texts as batches: rows of unlike lengths side by side, padded on one side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_fast.models.blocks import text_config

__all__ = ["check_length", "like_lengths", "padded", "padded_inputs", "padded_left"]


def padded(
    rows: Sequence[Sequence[int]], *, side: Literal["left", "right"], pad: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch: input_ids and attention_mask, int64 [n, longest]."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at] = torch.as_tensor(row, dtype=torch.long)
        mask[i, at] = 1
    return ids, mask


def padded_inputs(
    rows: Sequence[Sequence[int]], *, side: Literal["left", "right"], pad: int = 0, device: Any
) -> dict[str, Tensor]:
    """`padded` as a model is given it: input_ids and attention_mask, on its device."""
    ids, mask = padded(rows, side=side, pad=pad)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def padded_left(rows: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """input_ids, attention_mask and position_ids [rows, longest], padded on the left."""
    ids, mask = padded(rows, side="left", pad=pad)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in given.items()}


def like_lengths(
    rows: Sequence[Sequence[int]], *, tokens: int | None = None, most: int | None = None
) -> Iterator[list[int]]:
    """Indices of rows of like lengths, the shortest first: about `tokens` tokens, padding counted,
    and at most `most` rows at a time."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    some: list[int] = []
    for i in order:
        over = tokens is not None and (len(some) + 1) * len(rows[i]) > tokens
        if some and (over or len(some) == most):
            yield some
            some = []
        some.append(i)
    if some:
        yield some


def check_length(model: nn.Module, tokens: int, new: int, what: str) -> None:
    """Raise where `tokens` and `new` ones after them are more than the model has positions."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(most, int) and tokens + new > most:
        raise ValueError(
            f"{what} has {tokens} tokens{f', and {new} shall follow' if new else ''}: more than "
            f"the {most} positions of {type(model).__name__}"
        )
