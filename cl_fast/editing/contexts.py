"""Texts to put before a prompt, so that a fact is learnt as a fact and not as the start of a text.

ROME and MEMIT let the model write a few words of its own and put them before the prompt, followed
by ". ": what is optimised must hold behind any of them, and the key of a fact is a mean over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cl_fast.editing.continuations import continuations, end_tokens, uniforms
from cl_fast.editing.facts import encode
from cl_fast.models.heads import unwrap
from cl_fast.options import at_least

__all__ = ["STARTS", "own_contexts"]

STARTS = ("The", "Therefore", "Because", "I", "You")
"""The words that MEMIT lets the model go on from (Meng et al. 2023, their code)."""

TOP_K = 5


def own_contexts(
    model: nn.Module,
    tokenizer: Any,
    starts: Sequence[str] = STARTS,
    *,
    length: int = 10,
    seed: int = 0,
) -> list[str]:
    """What the model writes on from each start, with ". " at its end.

    `length` tokens are drawn from the 5 likeliest, as MEMIT and ROME do.

    Args:
        model: the one that will be edited.
        tokenizer: a fast one.
        starts: a text for each context. "" is the beginning of a text: it needs a tokenizer that
            puts a token there.
        length: tokens to write.
        seed: of the draws.

    Returns:
        The contexts, without repetition.
    """
    at_least("length", length, 1)
    known = set(tokenizer.get_vocab().values())
    ends = end_tokens(unwrap(model), tokenizer)
    prompts = []
    for start in starts:
        ids = encode(tokenizer, start).ids
        if not ids:
            begin = tokenizer.bos_token_id
            ids = [tokenizer.eos_token_id if begin is None else begin]
        prompts.append(ids)
    draws = [uniforms(length, seed, "context", str(i), s) for i, s in enumerate(starts)]
    written = continuations(
        model, prompts, [length] * len(prompts), batch=len(prompts) or 1, top_k=TOP_K, draws=draws,
        ends=ends,
    )  # fmt: skip
    texts = []
    for prompt, more in zip(prompts, written, strict=True):
        ids = [i for i in prompt + more if i in known]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        text = " ".join(text.replace("{", " ").replace("}", " ").split()).rstrip(".")
        if text:
            texts.append(text + ". ")
    return list(dict.fromkeys(texts))
