"""Prompts that a model writes itself, and batches of prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import llama
from torch import nn

from cl_fast.training.prompts import end_tokens, generate_prompts, pad_prompts


def test_samples_begin_with_the_begin_token_and_end_with_an_end() -> None:
    model = llama(1).train()
    state = torch.random.get_rng_state()
    made = generate_prompts(model, 21, max_new_tokens=6, batch_size=8, seed=5, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert len(made) == 21
    for row in made:
        ids = row["input_ids"]
        assert ids[0] == 1
        assert row["labels"] == [-100, *ids[1:]]
        assert 2 <= len(ids) <= 7
        assert 2 not in ids[:-1]
        assert len(ids) == 7 or ids[-1] == 2
    again = generate_prompts(model, 13, max_new_tokens=6, batch_size=8, seed=5, progress=False)
    assert again[:8] == made[:8]  # the seed and the batch, not the count
    other = generate_prompts(model, 21, max_new_tokens=6, batch_size=8, seed=6, progress=False)
    assert other != made


def test_prefixes_are_taken_in_turn() -> None:
    prefixes = [[5, 6, 7], {"input_ids": torch.tensor([8])}]
    made = generate_prompts(
        llama(), 5, prefixes=prefixes, max_new_tokens=3, batch_size=2, progress=False
    )
    for i, row in enumerate(made):
        size = (3, 1)[i % 2]
        assert row["input_ids"][:size] == ([5, 6, 7], [8])[i % 2]
        assert row["labels"][:size] == [-100] * size
        assert row["labels"][size:] == row["input_ids"][size:]


def test_samples_have_the_models_own_distribution() -> None:
    """Frequencies of the first token against the model's probabilities: chi-squared."""
    model = llama(2)
    with torch.no_grad():
        p = model(torch.tensor([[1]])).logits[0, 0].double().softmax(-1)
    count = 4000
    made = generate_prompts(model, count, max_new_tokens=1, batch_size=count, progress=False)
    seen = torch.bincount(torch.tensor([row["input_ids"][1] for row in made]), minlength=67)
    often = p * count >= 5
    observed = torch.cat([seen[often], seen[~often].sum()[None]]).double()
    expected = torch.cat([p[often], p[~often].sum()[None]]) * count
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    freedom = expected.numel() - 1
    assert freedom > 20
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5
    # With a sharper temperature the likeliest comes more often than the model says.
    cold = generate_prompts(
        model, 500, max_new_tokens=1, batch_size=500, temperature=0.05, progress=False
    )
    top = int(p.argmax())
    assert np.mean([row["input_ids"][1] == top for row in cold]) > float(p.max()) + 0.1


def test_batches_are_padded_at_the_end() -> None:
    rows = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, {"input_ids": [6], "labels": [6]}]
    found = pad_prompts(rows, [1, 0])
    assert found["input_ids"].tolist() == [[6, 0, 0], [3, 4, 5]]
    assert found["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert found["labels"].tolist() == [[6, -100, -100], [-100, 4, 5]]
    assert "labels" not in pad_prompts([*rows, [7, 8]], [0, 2])
    masked = [{"input_ids": [3, 4], "attention_mask": [0, 1]}]
    assert pad_prompts(masked, [0])["attention_mask"].tolist() == [[0, 1]]


def test_end_tokens_are_those_of_generation() -> None:
    model = llama()
    assert end_tokens(model) == [2]
    model.generation_config.eos_token_id = [2, 9]
    assert end_tokens(model) == [2, 9]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"count": 0}, ValueError, "count must be at least 1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"top_p": 1.5}, ValueError, r"top_p in \(0, 1\]"),
        ({"top_k": -1}, ValueError, "top_k not negative"),
        ({"prefixes": []}, ValueError, "prefixes is empty"),
        ({"prefixes": [[]]}, ValueError, r"prefixes\[0\]: input_ids must be one sequence"),
        ({"prefixes": [{"text": "a"}]}, ValueError, r"prefixes\[0\] must have input_ids"),
        (
            {"prefixes": [{"input_ids": [3], "labels": [3, 4]}]},
            ValueError,
            "labels must be as long as input_ids, 1; got 2",
        ),
        ({"model": nn.Linear(2, 2)}, TypeError, r"model must have generate\(\)"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"model": llama(), "count": 2, "progress": False, **changes}
    with pytest.raises(error, match=words):
        generate_prompts(**given)


def test_a_model_without_a_begin_token_needs_one() -> None:
    model = llama()
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="give bos_token_id, or prefixes"):
        generate_prompts(model, 2, progress=False)
    made = generate_prompts(model, 2, bos_token_id=4, max_new_tokens=2, progress=False)
    assert all(row["input_ids"][0] == 4 for row in made)
