"""How a model writes on from prompts: greedily, or drawn from its k likeliest tokens.

    greedy     x_t = argmax p(. | x_<t)
    drawn      x_t = the first of the k likeliest whose cumulated share exceeds u_t

Prompts of one length go through the model together, so that nothing is padded and a continuation is
the same whatever else is asked. Each prompt has random numbers u of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from cl_fast.models.heads import Evaluating, capture, head_of, run_inside, unwrap

__all__ = ["continuations", "end_tokens", "uniforms"]


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """The ids that end a text, as tokenizer and generation config tell them."""
    config = getattr(unwrap(model), "generation_config", None)
    ids: set[int] = set()
    for given in (getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)):
        ids.update(given if isinstance(given, list | tuple) else [] if given is None else [given])
    return ids


def uniforms(count: int, seed: int, *names: str) -> Tensor:
    """`count` numbers in [0, 1), float64, that depend on seed and names alone."""
    digest = blake2b("\0".join([str(seed), *names]).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def continuations(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    batch: int,
    ends: Collection[int] = (),
    top_k: int = 1,
    draws: Sequence[Tensor] | None = None,
    bar: Any = None,
) -> list[list[int]]:
    """What `model` writes on from each prompt.

    Args:
        model: a causal language model of transformers. With a cache of keys and values where its
            forward gives one, else the whole text is read for each token.
        prompts: token ids, none empty.
        limits: the most tokens to write, of each prompt.
        batch: prompts per forward pass.
        ends: ids that end a text; they are not part of it.
        top_k: of how many tokens one is drawn.
        draws: float64 [>= limit] of each prompt, in [0, 1); None: greedily.
        bar: its `update` is told how many prompts are done.

    Returns:
        The new tokens of each prompt.
    """
    written: list[list[int]] = [[] for _ in prompts]
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        if limits[i] > 0:
            groups[len(prompt)].append(i)
    device = unwrap(model).get_input_embeddings().weight.device
    with torch.no_grad(), Evaluating(model):
        for indices in groups.values():
            for first in range(0, len(indices), batch):
                some = indices[first : first + batch]
                _write_on(model, prompts, limits, some, written, ends, top_k, draws, device)
                if bar is not None:
                    bar.update(len(some))
    return written


def _write_on(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    indices: list[int],
    written: list[list[int]],
    ends: Collection[int],
    top_k: int,
    draws: Sequence[Tensor] | None,
    device: torch.device,
) -> None:
    """Fills `written` at `indices`, whose prompts are of one length."""
    text = torch.tensor([list(prompts[i]) for i in indices], device=device)
    given, cache = text, None
    busy = dict(enumerate(indices))
    for step in range(max(limits[i] for i in indices)):
        inputs: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        inputs["attention_mask"] = torch.ones_like(text)
        logits, cache = run_inside(model, _next, input_ids=given, use_cache=True, **inputs)
        if draws is None:
            tokens = logits.argmax(-1)
        else:
            # What is over in a row is drawn for and thrown away.
            u = torch.stack([draws[i][min(step, len(draws[i]) - 1)] for i in indices])
            tokens = _drawn(logits, top_k, u.to(logits.device))
        for row, token in zip(list(busy), tokens[list(busy)].tolist(), strict=True):
            index = busy[row]
            if token in ends:
                del busy[row]
                continue
            written[index].append(token)
            if len(written[index]) == limits[index]:
                del busy[row]
        if not busy:
            return
        tokens = tokens.to(device)[:, None]
        text = torch.cat([text, tokens], 1)
        given = text if cache is None else tokens


def _next(inner: Any, **inputs: Any) -> tuple[Tensor, Any]:
    """The logits after the last token [B, V], and the cache, if there is one."""
    hidden, output = capture(inner, inner.forward, **inputs)
    logits = [z for _, z in head_of(inner).logits(hidden[:, -1])]
    return torch.cat(logits), getattr(output, "past_key_values", None)


def _drawn(logits: Tensor, top_k: int, u: Tensor) -> Tensor:
    """One of the `top_k` likeliest tokens of each row, by its share of them: int64 [B]."""
    best, ids = logits.double().topk(min(top_k, logits.size(-1)))
    below = best.softmax(-1).cumsum(-1)
    at = (below <= u[:, None]).sum(-1).clamp(max=ids.size(-1) - 1)
    return ids.gather(-1, at[:, None])[:, 0]
