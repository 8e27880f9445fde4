"""MEMIT one fact at a time, written from the formulas: what `memit_vs_loop.py` compares with.

    z_i      compute_z: delta by torch.optim.Adam on 6 rewriting prompts and "{} is a", one batch of
             7 rows through the whole model, logits of all tokens; layer after layer then
    K        compute_ks: keys at the lookup, half plain prompt, half mean of the contexts, from a
             forward pass of the model for every layer
    R        (Z - h) / (layers left)
    D        R K^T (lambda C + K K^T)^-1 by an LU factorisation in float64;  W += D

(Meng et al. 2023, arXiv 2210.07229.) Weights are frozen, so that no gradient of theirs is computed;
the rows of the loss are picked from the logits before the softmax; prompts go through the model 128
at a time where no gradient is needed, and without the head there. Nothing is shared with the code
that it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BATCH = 128


@dataclass(frozen=True)
class Options:
    """Of compute_z, as in the published settings."""

    steps: int
    lr: float
    weight_decay: float
    clamp: float
    kl_factor: float
    stop_loss: float
    kl_prompt: str


@dataclass(frozen=True)
class Request:
    """A fact: `prompt` has {} in the place of the subject."""

    prompt: str
    subject: str
    target: str


def tokenise(tokenizer: Any, prompt: str, subject: str) -> tuple[list[int], int]:
    """The ids of the prompt about the subject, and the index of the subject's last token."""
    text = prompt.replace("{}", subject)
    last = prompt.index("{}") + len(subject) - 1
    found = tokenizer(text, return_offsets_mapping=True)
    at = [i for i, (start, stop) in enumerate(found["offset_mapping"]) if start <= last < stop]
    return list(found["input_ids"]), at[0]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """ids and mask, padded on the right, where a causal model does not see it."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


@contextmanager
def hooked(module: torch.nn.Module, hook: Callable[..., Any]) -> Any:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def compute_z(
    model: Any, tokenizer: Any, request: Request, layer: int, contexts: Sequence[str], o: Options
) -> tuple[Tensor, Tensor, int]:
    """(v0 + delta, delta, steps) for the output of block `layer` at the subject's last token."""
    target = list(tokenizer(request.target)["input_ids"])
    prompts = [context + request.prompt for context in ("", *contexts)]
    encoded = [tokenise(tokenizer, prompt, request.subject) for prompt in prompts]
    rows = [[*ids, *target[:-1]] for ids, _ in encoded]
    lookup = [at for _, at in encoded]
    lengths = [len(ids) for ids, _ in encoded]
    where = [(r, n - 1 + j) for r, n in enumerate(lengths) for j in range(len(target))]
    labels = torch.tensor(target * len(prompts))
    kl_ids, kl_at = tokenise(tokenizer, o.kl_prompt, request.subject)
    rows.append(kl_ids)
    lookup.append(kl_at)
    ids, mask = padded(rows)
    every, at = torch.arange(len(rows)), torch.tensor(lookup)
    row, column = (torch.tensor(x) for x in zip(*where, strict=True))
    weight = model.get_output_embeddings().weight
    delta = torch.zeros(weight.size(1), dtype=weight.dtype, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=o.lr)
    seen: dict[str, Tensor] = {}

    def add(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.setdefault("start", hidden[0, at[0]].detach().clone())
        hidden = hidden.clone()
        hidden[every, at] = hidden[every, at] + delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    before = None
    steps = 0
    with hooked(model.transformer.h[layer], add):
        for step in range(o.steps):
            adam.zero_grad()
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            steps += 1
            told = torch.nn.functional.cross_entropy(logits[row, column].float(), labels)
            now = logits[-1, kl_at].float().log_softmax(-1)
            if before is None:
                before = now.detach()
            kl = (now.exp() * (now - before)).sum()
            norm = seen["start"].norm()
            loss = told + o.kl_factor * kl + o.weight_decay * delta.norm() / norm**2
            if loss.item() < o.stop_loss or step == o.steps - 1:
                break
            loss.backward()
            adam.step()
            with torch.no_grad():
                if delta.norm() > o.clamp * norm:
                    delta.mul_(o.clamp * norm / delta.norm())
    return seen["start"] + delta.detach(), delta.detach(), steps


@torch.no_grad()
def at_lookup(
    model: Any, encoded: Sequence[tuple[list[int], int]], module: Any, of_input: bool
) -> Tensor:
    """What `module` is given, or gives, at the lookup of each prompt: [prompts, width]."""
    found = []
    for first in range(0, len(encoded), BATCH):
        some = encoded[first : first + BATCH]
        ids, mask = padded([ids for ids, _ in some])
        seen: list[Tensor] = []

        def see(_: Any, args: Any, output: Any, seen: list[Tensor] = seen) -> None:
            given = args[0] if of_input else output
            seen.append(given[0] if isinstance(given, tuple) else given)

        with hooked(module, see):
            model.transformer(input_ids=ids, attention_mask=mask, use_cache=False)
        found.append(seen[0][torch.arange(len(some)), torch.tensor([at for _, at in some])])
    return torch.cat(found)


def compute_ks(
    model: Any, tokenizer: Any, requests: Sequence[Request], layer: int, contexts: Sequence[str]
) -> Tensor:
    """[f, requests], with the weights as they are."""
    encoded = [
        tokenise(tokenizer, context + r.prompt, r.subject)
        for r in requests
        for context in ("", *contexts)
    ]
    keys = at_lookup(model, encoded, model.transformer.h[layer].mlp.c_proj, True)
    keys = keys.view(len(requests), 1 + len(contexts), -1).double()
    return (0.5 * keys[:, 0] + 0.5 * keys[:, 1:].mean(1)).T


def outputs(model: Any, tokenizer: Any, requests: Sequence[Request], layer: int) -> Tensor:
    """What block `layer` gives at the lookup of the plain prompts: [requests, d]."""
    encoded = [tokenise(tokenizer, r.prompt, r.subject) for r in requests]
    return at_lookup(model, encoded, model.transformer.h[layer], False)


def update(C: Tensor, weight: float, K: Tensor, R: Tensor) -> Tensor:
    """D [d, f] = R K^T (lambda C + K K^T)^-1, all float64."""
    solved = torch.linalg.solve(weight * C.double() + K @ K.T, K)
    return R.double() @ solved.T


def edit(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    layers: Sequence[int],
    moments: dict[int, Tensor],
    weight: float,
    contexts: Sequence[str],
    o: Options,
) -> tuple[Tensor, dict[int, Tensor]]:
    """(Z [requests, d], the change D of each layer); the model is as before afterwards."""
    Z = torch.stack(
        [compute_z(model, tokenizer, r, layers[-1], contexts, o)[0] for r in requests]
    )  # fmt: skip
    changes: dict[int, Tensor] = {}
    kept = {i: model.transformer.h[i].mlp.c_proj.weight.detach().clone() for i in layers}
    for number, layer in enumerate(layers):
        K = compute_ks(model, tokenizer, requests, layer, contexts)
        h = outputs(model, tokenizer, requests, layers[-1])
        R = ((Z - h) / (len(layers) - number)).T
        changes[layer] = update(moments[layer], weight, K, R)
        with torch.no_grad():
            W = model.transformer.h[layer].mlp.c_proj.weight  # GPT-2 stores it as [f, d]
            W.add_(changes[layer].T.to(W.dtype))
    for layer, W in kept.items():
        with torch.no_grad():
            model.transformer.h[layer].mlp.c_proj.weight.copy_(W)
    return Z, changes
