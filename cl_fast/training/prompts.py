"""Prompts without answers: drawn from a dataset step by step, or written by the model itself.

    PromptDraw(len(prompts)).next(16)     the next 16: each once per epoch, other ones on each rank
    generate_prompts(model, 1000)         what the model says when it is given nothing

Distillation on earlier prompts (`cl_fast.training.SelfDistill`) needs inputs on which the earlier
model is to be imitated, and no labels. Where none were stored, samples of the model serve:
pseudo-rehearsal (Robins 1995), LAMOL (Sun et al. 2020, arXiv 1909.03329), SSR (Huang et al. 2024,
arXiv 2403.01244).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from cl_fast.models.heads import IGNORED, Evaluating, unwrap
from cl_fast.options import at_least
from cl_fast.training.drawing import Draw
from cl_fast.training.keeping import Dataset

__all__ = ["PromptDraw", "check_prompts", "generate_prompts", "generated", "pad_prompts"]


# --- examples ----------------------------------------------------------------------------------


def _ids(value: Any, name: str, where: str) -> Tensor:
    try:
        ids = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError):
        ids = torch.zeros(())
    if ids.dim() != 1 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(
            f"{where}: {name} must be one sequence of token ids, not empty; got {value!r:.80}"
        )
    return ids.long()


def _example(prompts: Any, index: int, name: str) -> dict[str, Tensor]:
    item, where = prompts[index], f"{name}[{index}]"
    if not isinstance(item, Mapping) and not hasattr(item, "keys"):
        item = {"input_ids": item}
    if "input_ids" not in item:
        raise ValueError(
            f"{where} must have input_ids: tokenise the prompts first; it has "
            f"{', '.join(map(str, item.keys()))}"
        )
    out = {"input_ids": _ids(item["input_ids"], "input_ids", where)}
    for column in ("attention_mask", "labels"):
        if column in item and item[column] is not None:
            out[column] = _ids(item[column], column, where)
            if out[column].numel() != out["input_ids"].numel():
                raise ValueError(
                    f"{where}: {column} must be as long as input_ids, "
                    f"{out['input_ids'].numel()}; got {out[column].numel()}"
                )
    return out


def check_prompts(prompts: Any, name: str = "prompts", labels: bool = False) -> None:
    """Raise unless `prompts` is a map-style dataset of token ids that is not empty.

    Args:
        labels: whether its examples must have labels.

    Raises:
        TypeError: it is not map-style.
        ValueError: it is empty, or its first example is not one.
    """
    if isinstance(prompts, (str, bytes)) or not (
        hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")
    ):
        raise TypeError(
            f"{name} must be a map-style dataset, with a length and examples by index; got "
            f"{type(prompts).__name__}"
        )
    if len(prompts) == 0:
        raise ValueError(f"{name} is empty: give at least one prompt")
    if labels and "labels" not in _example(prompts, 0, name):
        raise ValueError(f"{name}[0] has no labels, which tokens='labels' needs")
    _example(prompts, 0, name)


def pad_prompts(prompts: Any, indices: Sequence[int], name: str = "prompts") -> dict[str, Tensor]:
    """Some examples, padded at the end: input_ids and attention_mask [B, L], labels if all have
    them.

    Padding is token 0 and is not attended to.
    """
    rows = [_example(prompts, i, name) for i in indices]
    ids = [row["input_ids"] for row in rows]
    seen = [row.get("attention_mask", torch.ones_like(row["input_ids"])) for row in rows]
    out = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence(seen, batch_first=True),
    }
    if all("labels" in row for row in rows):
        labels = [row["labels"] for row in rows]
        out["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return out


# --- drawing -----------------------------------------------------------------------------------


class PromptDraw(Draw):
    """`Draw` of prompts.

    Args:
        count: of prompts.
        seed: of the orders.
        stream: gives orders of its own, for example to each task.
    """

    def __init__(self, count: int, seed: int = 0, stream: int = 0) -> None:
        super().__init__(count, seed, f"prompts {stream}")


# --- generating --------------------------------------------------------------------------------


def end_tokens(model: Any) -> list[int]:
    """The ids at which a model ends what it generates."""
    config = getattr(model, "generation_config", None) or model.config
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = getattr(model.config, "eos_token_id", None)
    return [] if ends is None else [int(x) for x in (ends if isinstance(ends, list) else [ends])]


def generated(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    pad_token_id: int,
    seed: Sequence[int],
    **sampling: Any,
) -> list[list[int]]:
    """What `model.generate` adds to each row of token ids, up to and including its end token.

    Rows are padded at the left. Random numbers come from `seed`; the global state of torch is left
    as it was.
    """
    device = next(model.parameters()).device
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.as_tensor(row)
        mask[i, width - len(row) :] = 1
    cards = [device] if device.type == "cuda" else []
    with torch.no_grad(), Evaluating(model), torch.random.fork_rng(cards):
        torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint32)[0]))
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id,
            **sampling,
        )
    ends, found = set(end_tokens(model)), []
    for row in out[:, width:].tolist():
        last = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        found.append(row[: last + 1])
    return found


def _prefixes(prefixes: Any, model: Any, bos_token_id: int | None) -> Iterator[list[int]]:
    """Forever: the given ones in turn, or the begin token."""
    if prefixes is not None:
        check_prompts(prefixes, "prefixes")
        while True:
            for i in range(len(prefixes)):
                yield _example(prefixes, i, "prefixes")["input_ids"].tolist()
    if bos_token_id is None:
        bos_token_id = getattr(model.config, "bos_token_id", None)
    if bos_token_id is None:
        raise ValueError(
            "the model's config has no bos_token_id to begin with: give bos_token_id, or prefixes"
        )
    while True:
        yield [int(bos_token_id)]


def generate_prompts(
    model: nn.Module,
    count: int,
    *,
    prefixes: Dataset | None = None,
    bos_token_id: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, list[int]]]:
    """Prompts that the model writes itself: samples from its own distribution.

    Args:
        model: a model of transformers with `generate`, whole on its device; run in eval mode.
        count: of prompts.
        prefixes: a dataset of token ids to go on from, taken in turn; by default the begin token.
        bos_token_id: the begin token, by default that of the model's config.
        max_new_tokens: of each prompt, at most.
        batch_size: prompts that are sampled at a time.
        temperature, top_p, top_k: of the sampling; by default from the model's own distribution.
        seed: the same seed gives the same prompts on the same machine; the global random state is
            neither read nor changed.
        progress: show a bar.

    Returns:
        examples with `input_ids` (prefix and sample), and `labels`, which are -100 on the prefix.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    count = operator.index(count)
    numbers = {"count": count, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, value in numbers.items():
        at_least(name, value, 1)
    if not temperature > 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "temperature must be positive, top_p in (0, 1] and top_k not negative; got "
            f"{temperature}, {top_p}, {top_k}"
        )
    inner = unwrap(model)
    if not hasattr(inner, "generate"):
        raise TypeError(f"model must have generate(); got {type(inner).__name__}")
    source = _prefixes(prefixes, inner, bos_token_id)
    made: list[dict[str, list[int]]] = []
    pad = getattr(inner.config, "pad_token_id", None)
    with tqdm(total=count, desc="writing prompts", disable=not progress) as bar:
        while len(made) < count:
            given = [next(source) for _ in range(min(batch_size, count - len(made)))]
            new = generated(
                inner, given, max_new_tokens=max_new_tokens, pad_token_id=pad or 0,
                seed=[seed, len(made)], do_sample=True, temperature=temperature, top_p=top_p,
                top_k=top_k,
            )  # fmt: skip
            for prefix, sample in zip(given, new, strict=True):
                labels = [IGNORED] * len(prefix) + sample
                made.append({"input_ids": prefix + sample, "labels": labels})
            bar.update(len(given))
    return made
