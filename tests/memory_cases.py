"""Models with facts beside their weights: logits, hooks, and what holds for any such memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_fast.editing.facts import Fact


@torch.no_grad()
def logits(made: Any, prompts: list[str], side: str = "left") -> list[Tensor]:
    """Of the tokens of each prompt, run as one padded batch."""
    rows = [made.tokenizer(text)["input_ids"] for text in prompts]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = made.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return [out[i][mask[i].bool()] for i in range(len(rows))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def asked(facts: list[Fact]) -> list[str]:
    return [fact.text for fact in facts]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def check_padding(made: Any, memory: Any, facts: list[Fact]) -> None:
    """Padding on either side leaves each prompt as it is alone."""
    prompts = [facts[0].text, "The cat sat near the door .", "yesterday " + facts[1].text]
    with memory:
        alone = [logits(made, [prompt])[0] for prompt in prompts]
        for side in ("left", "right"):
            for a, b in zip(logits(made, prompts, side), alone, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def check_decoding(made: Any, memory: Any, text: str, prompt: int) -> None:
    """A text token by token with a cache is the whole text; so is what follows its beginning."""
    ids = torch.tensor([made.tokenizer(text)["input_ids"]] * 2)
    with memory, torch.no_grad():
        whole = made.model(input_ids=ids).logits
        cache, steps = None, []
        for start, stop in [(0, 3), *((i, i + 1) for i in range(3, ids.size(1)))]:
            out = made.model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
        written = [
            made.model.generate(
                ids[:, :prompt], max_new_tokens=6, do_sample=False, use_cache=cached
            )
            for cached in (True, False)
        ]
    assert torch.equal(*written)
