"""The keys of facts, layer by layer, while the layers are being edited.

    k = 1/2 k("") + 1/2 mean_contexts k(context)        MEMIT: mean over kinds of prompts
    k = mean_all k                                      ROME

k is what the matrix W of a block is given at the lookup token. Edits of lower blocks change the
keys of higher ones, also through the tokens before the lookup, so that MEMIT collects the keys of a
block only once those below have been edited (Meng et al. 2023, sec. 4.3).

Here the prompts, cut after the lookup token, go through the model once: hidden states wait before
the block that is edited next, its keys are taken, its new W is set, and they go on. Without this,
every layer costs a forward pass of its own through all blocks below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cl_fast.editing.facts import Lookup, encode_many
from cl_fast.editing.rows import like_lengths, padded_left
from cl_fast.editing.values import Group, fused_activations
from cl_fast.models.blocks import Decoder, batched

__all__ = ["Averaging", "KeyStream", "key_rows", "keys_of"]

Averaging = Literal["kinds", "all"]

_CPU_TOKENS = 1024
"""Of a forward pass on the CPU: what is between its matrix products stays in caches."""


@dataclass
class _Chunk:
    """Prompts of like length: what waits before the next block is [rows, length, d]."""

    inputs: dict[str, Tensor]
    owner: Tensor
    plain: Tensor
    hidden: Tensor | None = None


def key_rows(
    tokenizer: Any, groups: Sequence[Group], contexts: Sequence[str], lookup: Lookup
) -> list[list[int]]:
    """Tokens up to the lookup, of each group: of the plain prompt, then of it behind each context.

    Facts of a group have these tokens in common.
    """
    texts: list[tuple[str, tuple[int, int] | None, str | None]] = []
    spaces = []
    for group in groups:
        fact = group.facts[0]
        for context in ("", *contexts):
            start, stop = (x + len(context) for x in fact.subject_span)
            texts.append((context + fact.text, (start, stop), fact.target))
            spaces.append(fact.separator)
    encoded = encode_many(tokenizer, texts, separator=spaces, lookup=lookup)
    return [e.ids[: e.lookup + 1] for e in encoded]


class KeyStream:
    """The prompts of groups of facts on their way through the blocks.

        stream = KeyStream(decoder, tokenizer, groups, contexts)
        for layer in layers:
            stream.advance(layer)
            keys, output, ahead = stream.look(layer, until)
            ... set the W of `layer` ...

    Args:
        decoder: from `decoder_of`; the model in eval mode.
        tokenizer: a fast one.
        groups: from `group_facts`.
        contexts: texts before the prompts; the plain prompt is always there.
        lookup: which token is looked up.
        averaging: "kinds" or "all", see the module.
        batch: rows per forward pass; on the CPU fewer, where they are more than its caches hold.
        waiting: the device on which hidden states wait between blocks; by default the model's.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        groups: Sequence[Group],
        contexts: Sequence[str] = (),
        *,
        lookup: Lookup = "subject_last",
        averaging: Averaging = "kinds",
        batch: int = 256,
        waiting: torch.device | str | None = None,
    ) -> None:
        self.decoder, self.groups = decoder, list(groups)
        self.at = 0
        self._waiting = None if waiting is None else torch.device(waiting)
        count = 1 + len(contexts)
        if averaging == "kinds" and contexts:
            self._weights = (0.5, 0.5 / len(contexts))
        else:
            self._weights = (1.0 / count, 1.0 / count)
        rows = key_rows(tokenizer, self.groups, contexts, lookup)
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        device = decoder.device
        self._chunks = []
        tokens = _CPU_TOKENS if device.type == "cpu" else None
        for some in like_lengths(rows, tokens=tokens, most=batch):
            given = padded_left([rows[i] for i in some], pad, device)
            at = torch.tensor(some)
            self._chunks.append(_Chunk(given, at // count, at % count == 0))

    def advance(self, layer: int) -> None:
        """Brings all prompts before block `layer`, with the weights as they are now."""
        if layer < self.at:
            raise ValueError(f"the prompts are before block {self.at} already; got {layer}")
        if layer == self.at:
            return
        for chunk in self._chunks:
            with torch.no_grad(), fused_activations(self.decoder):
                hidden = self.decoder.run(
                    chunk.inputs, self.at, layer, hidden=self._of(chunk, chunk.inputs)
                )
            chunk.hidden = hidden if self._waiting is None else hidden.to(self._waiting)
        self.at = layer

    def _of(self, chunk: _Chunk, inputs: dict[str, Tensor]) -> Tensor | None:
        device = inputs["input_ids"].device
        return None if chunk.hidden is None else chunk.hidden.to(device)

    def look(self, layer: int, until: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What block `layer` sees and says at the lookup token; nothing moves on.

        Args:
            layer: where the prompts are.
            until: the plain prompts also run on through block `until`.

        Returns:
            (keys [f, groups], float64, averaged over contexts; output of W for the plain prompts
            [groups, d] float32; the stream after block `until` there [groups, d] float32). On the
            device of the model.
        """
        self.advance(layer)
        with torch.no_grad(), fused_activations(self.decoder):
            return self._look(layer, layer if until is None else until)

    def _look(self, layer: int, until: int) -> tuple[Tensor, Tensor, Tensor]:
        site = self.decoder.site(layer)
        device = self.decoder.device
        keys = torch.zeros(len(self.groups), site.key_size, dtype=torch.float64, device=device)
        output = torch.empty(len(self.groups), site.value_size, device=device)
        ahead = torch.empty_like(output)
        for chunk in self._chunks:
            rows = chunk.owner.numel()
            seen: dict[str, Tensor] = {}

            def see(_: Any, args: Any, out: Tensor, seen: Any = seen, rows: int = rows) -> None:
                seen["key"] = batched(args[0], rows)[:, -1]
                seen["out"] = batched(out, rows)[:, -1]

            hook = site.module.register_forward_hook(see)
            try:
                hidden = self.decoder.run(
                    chunk.inputs, layer, layer + 1, hidden=self._of(chunk, chunk.inputs)
                )
            finally:
                hook.remove()
            plain_weight, weight = torch.tensor(self._weights, dtype=torch.float64).unbind()
            weight = torch.where(chunk.plain, plain_weight, weight).to(device)
            owner = chunk.owner.to(device)
            keys.index_add_(0, owner, seen["key"].double() * weight[:, None])
            plain = chunk.plain.to(device)
            if not bool(plain.any()):
                continue
            output[owner[plain]] = seen["out"][plain].float()
            hidden = hidden[plain]
            if until > layer:
                inputs = {name: tensor[plain] for name, tensor in chunk.inputs.items()}
                hidden = self.decoder.run(inputs, layer + 1, until + 1, hidden=hidden)
            ahead[owner[plain]] = hidden[:, -1].float()
        return keys.T.contiguous(), output, ahead


def keys_of(
    decoder: Decoder,
    tokenizer: Any,
    groups: Sequence[Group],
    layers: Sequence[int],
    contexts: Sequence[str] = (),
    **options: Any,
) -> dict[int, Tensor]:
    """The keys [f, groups] of all `layers` of the model as it is now."""
    stream = KeyStream(decoder, tokenizer, groups, contexts, **options)
    return {layer: stream.look(layer)[0] for layer in sorted(layers)}
