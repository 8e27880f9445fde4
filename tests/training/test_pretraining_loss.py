"""The pre-training term: its value, its order, its draws under accumulation, ranks and resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, NoLogits, gemma2, gradients, llama
from torch import Tensor, nn

from cl_fast.training.pretraining_loss import PretrainingLoss, collate_text


def texts(count: int, length: int | None = 8, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        n = length or int(torch.randint(2, 9, (), generator=generator))
        rows.append({"input_ids": torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()})
    return rows


def nll_by_hand(model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """Of each text alone, from float64 logits."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        total = total - logprobs.gather(1, ids[0, 1:, None]).sum()
        tokens += ids.size(1) - 1
    return total / tokens


@pytest.mark.parametrize("make", [llama, gemma2])
def test_loss_is_the_mean_log_likelihood_of_ragged_texts(make: Any) -> None:
    model = make(0)
    rows = texts(12, None)
    keep = PretrainingLoss(rows, weight=2.5, batch_size=5, seed=3)
    picked = [rows[i] for i in keep.draws(0)]
    with NoLogits(20):
        loss = keep.loss(model, {})
    loss.backward()
    found = gradients(model)
    assert keep.measures() == {"pretraining_loss/nll": pytest.approx(loss.item() / 2.5)}
    model.zero_grad()
    expected = 2.5 * nll_by_hand(model, picked)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        tolerance = 1e-4 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=tolerance, msg=name)


def test_labels_of_examples_are_read() -> None:
    batch = collate_text([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4]}])
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_each_epoch_draws_every_text_once_over_ranks_and_batches(
    count: int, size: int, ranks: int, seed: int
) -> None:
    keep = PretrainingLoss(texts(count), batch_size=size, seed=seed)
    batches = -(-2 * count // (size * ranks))
    order = [i for n in range(batches) for rank in range(ranks) for i in keep.draws(n, rank, ranks)]
    assert sorted(order[:count]) == sorted(order[count : 2 * count]) == list(range(count))


def test_orders_differ_by_epoch_and_seed() -> None:
    first = PretrainingLoss(texts(64), batch_size=64)
    assert first.draws(0) != first.draws(1)
    assert first.draws(0) != PretrainingLoss(texts(64), batch_size=64, seed=1).draws(0)
    assert first.draws(0) == PretrainingLoss(texts(64), batch_size=64).draws(0)


def test_accumulation_draws_the_same_texts() -> None:
    rows = texts(30)
    model = llama(0)
    one, four = (PretrainingLoss(rows, batch_size=size) for size in (8, 2))
    for _ in range(3):
        model.zero_grad()
        one.loss(model, {}).backward()
        expected = gradients(model)
        model.zero_grad()
        for _ in range(4):
            (four.loss(model, {}) / 4).backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_resume_goes_on_where_it_was() -> None:
    model, rows = llama(0), texts(9)
    straight = PretrainingLoss(rows, batch_size=4, seed=5)
    losses = [straight.loss(model, {}).item() for _ in range(6)]
    first = PretrainingLoss(rows, batch_size=4, seed=5)
    begun = [first.loss(model, {}).item() for _ in range(3)]
    second = PretrainingLoss(rows, batch_size=4, seed=5)
    second.load_state_dict(first.state_dict())
    assert begun + [second.loss(model, {}).item() for _ in range(3)] == losses
    assert second.options() == first.options()


def test_ranks_draw_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = texts(12)
    seen: list[int] = []

    class Watched(list[Any]):
        def __getitem__(self, i: Any) -> Any:
            seen.append(i)
            return super().__getitem__(i)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        keep = PretrainingLoss(Watched(rows), batch_size=4)
        del seen[4 * rank :]  # it looks at the first to check it
        keep.loss(llama(0), {})
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PretrainingLoss([]), "dataset is empty"),
        (lambda: PretrainingLoss(texts(2), weight=0), "weight must be positive and finite; got 0"),
        (lambda: PretrainingLoss(texts(2), batch_size=0), "batch_size must be at least 1"),
        (lambda: PretrainingLoss([{"text": "a"}]), "no input_ids"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
