"""Anchor and its Fisher: against autograd in float64, task by task."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from cl_fast.errors import CheckpointError, NonFiniteError
from cl_fast.integrations.keeping import KeepCallback
from cl_fast.training.anchors import Anchor, fisher_diagonal
from cl_fast.training.keeping import Task

SMALL = {"vocab_size": 5, "num_hidden_layers": 1, "pad_token_id": None}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_models.llama().double()


def task(index: int = 0, size: int = 3) -> Task:
    batches = [tiny_models.batch(10 * index + k, size=size) for k in range(2)]
    return Task(f"t{index}", index, None, lambda: iter(batches))


def log_likelihood(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """From the logits, as one writes it by hand."""
    given = {k: v for k, v in batch.items() if k != "labels"}
    logp = model(**given).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    picked = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (picked * (labels != -100)).sum(), int((labels != -100).sum())


def fisher_by_hand(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    named, tokens = dict(model.named_parameters()), 0
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for batch in batches:
        value, count = log_likelihood(model, batch)
        tokens += count
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        for name, g in zip(named, grads, strict=True):
            sums[name] += g**2
    return {name: x / tokens for name, x in sums.items()}


def rows(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {k: v[i : i + 1] for k, v in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]


@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_fisher(model: nn.Module, group: Any) -> None:
    batches = [tiny_models.batch(k) for k in range(2)]
    groups = rows(batches) if group == "sequence" else batches
    first = next(model.parameters())
    first.grad = torch.full_like(first, 3.0)
    model.train()
    got = fisher_diagonal(model, batches, group=group)
    torch.testing.assert_close(got, fisher_by_hand(model, groups), rtol=1e-9, atol=1e-12)
    assert model.training
    assert (first.grad == 3.0).all()  # what was there stays
    assert all(p.grad is None for p in list(model.parameters())[1:])
    first.grad = None


def test_fisher_of_some_sequences_and_parameters(model: nn.Module) -> None:
    batches = [tiny_models.batch(k) for k in range(3)]
    few = copy.deepcopy(model)
    for name, p in few.named_parameters():
        p.requires_grad_("mlp" in name)
    got = fisher_diagonal(few, batches, sequences=4)
    want = fisher_by_hand(model, rows(batches)[:4])
    assert got.keys() == {name for name in want if "mlp" in name}
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=1e-9, atol=1e-12)


def test_fisher_of_drawn_labels_is_that_of_the_model() -> None:
    """The mean over many draws is sum_y p(y) (grad log p(y))^2, over all y."""
    model = tiny_models.llama(**SMALL).double()
    one = {"input_ids": torch.tensor([[1, 4]]), "labels": torch.tensor([[-100, 0]])}
    want: dict[str, Tensor] = {}
    p = model(one["input_ids"]).logits[0, 0].softmax(-1).detach()
    for y in range(5):
        batch = {**one, "labels": torch.tensor([[-100, y]])}
        for name, x in fisher_by_hand(model, [batch]).items():
            want[name] = want.get(name, 0) + p[y] * x
    draws = 400
    many = {k: v.expand(draws, -1) for k, v in one.items()}
    options: Any = {"labels": "model", "seed": 3}
    got = fisher_diagonal(model, [many], **options)
    trace, expected = (float(sum(x.sum() for x in f.values())) for f in (got, want))
    empirical = fisher_diagonal(model, [one])
    assert abs(trace - expected) < 0.1 * expected
    assert abs(float(sum(x.sum() for x in empirical.values())) - expected) > 0.3 * expected
    # What the data say does not matter, which tokens count does; a seed is a seed.
    few = {k: v[:20] for k, v in many.items()}
    other = {**few, "labels": few["labels"].clone().masked_fill_(few["labels"] == 0, 2)}
    got = fisher_diagonal(model, [few], **options)
    torch.testing.assert_close(got, fisher_diagonal(model, [other], **options), rtol=0, atol=0)
    drawn_anew = fisher_diagonal(model, [few], labels="model", seed=4)
    assert any(not torch.equal(got[name], drawn_anew[name]) for name in got)


def moved(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def gradients_of(anchor: Anchor, model: nn.Module) -> dict[str, Tensor]:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    anchor.on_gradients(model)
    return tiny_models.gradients(model)


@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_one_anchor_stands_for_all_tasks(decay: float) -> None:
    """Gradient and, up to a constant, penalty of the sum over tasks, term by term."""
    model = tiny_models.llama().double()
    anchor = Anchor(0.3, fisher="sequence", decay=decay)
    terms: list[tuple[float, dict[str, Tensor], dict[str, Tensor]]] = []
    for t in range(3):
        anchor.before_task(model, task(t))
        moved(model, t)
        anchor.after_task(model, task(t))
        fisher = fisher_by_hand(model, rows([tiny_models.batch(10 * t + k) for k in range(2)]))
        theta = {n: p.detach().clone() for n, p in model.named_parameters()}
        terms = [(decay * w, f, x) for w, f, x in terms] + [(1.0, fisher, theta)]
    values = []
    for seed in (7, 8):
        moved(model, seed)
        named = dict(model.named_parameters())
        value = sum(
            w * 0.15 * (f[n] * (named[n] - x[n]) ** 2).sum() for w, f, x in terms for n in named
        )
        want = torch.autograd.grad(value, list(named.values()))
        got = gradients_of(anchor, model)
        for name, g in zip(named, want, strict=True):
            torch.testing.assert_close(got[name], g, rtol=1e-9, atol=1e-12)
        values.append((anchor.measures()["anchor/penalty"], float(value.detach())))
    (a, x), (b, y) = values
    assert b - a == pytest.approx(y - x, rel=1e-9)
    assert abs(x - a) > 1e-9 * x  # the constant is there: the tasks disagree


def test_latest_center_and_no_memory() -> None:
    model = tiny_models.llama().double()
    online = Anchor(1.0, fisher="batch", center="latest", decay=0.5)
    last = Anchor(1.0, fisher="batch", decay=0.0)
    fishers = []
    for t in range(2):
        moved(model, t)
        for keep in (online, last):
            keep.after_task(model, task(t))
        fishers.append(fisher_by_hand(model, list(task(t).batches())))  # type: ignore[misc]
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved(model, 9)
    named = dict(model.named_parameters())
    for keep, f in (
        (online, {n: 0.5 * fishers[0][n] + fishers[1][n] for n in named}),
        (last, fishers[1]),
    ):
        got = gradients_of(keep, model)
        for name, p in named.items():
            want = f[name] * (p.detach() - theta[name])
            torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-12)


def test_l2_sp_is_anchored_where_tasks_begin() -> None:
    model = nn.Linear(3, 2, dtype=torch.float64)
    model.bias.requires_grad_(False)
    anchor = Anchor(0.5)
    anchor.before_task(model, Task("a"))
    first = model.weight.detach().clone()
    moved(model, 0)
    got = gradients_of(anchor, model)["weight"]
    torch.testing.assert_close(got, 0.5 * (model.weight.detach() - first))
    penalty = 0.25 * float((model.weight.detach() - first).square().sum())
    assert anchor.measures()["anchor/penalty"] == pytest.approx(penalty)
    anchor.after_task(model, Task("a"))
    anchor.before_task(model, Task("b", 1))
    second = model.weight.detach().clone()
    moved(model, 1)
    got = gradients_of(anchor, model)
    want = 0.5 * (2 * model.weight.detach() - first - second)
    torch.testing.assert_close(got["weight"], want)
    assert not got["bias"].any()  # frozen: not anchored


def test_decoupled_pull() -> None:
    model = nn.Linear(3, 2, dtype=torch.float64)
    rate = [0.1]
    anchor = Anchor(0.5, pull="decoupled", learning_rate=lambda: rate[0])
    anchor.before_task(model, Task("a"))
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved(model, 0)
    for rate[0], part in ((0.1, 0.05), (0.4, 0.2), (5.0, 1.0)):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        anchor.on_gradients(model)
        assert all(p.grad is None for p in model.parameters())
        anchor.on_update(model)
        for name, p in model.named_parameters():
            want = before[name] - part * (before[name] - first[name])
            torch.testing.assert_close(p.detach(), want)


def test_bfloat16_with_float32_anchors() -> None:
    """The mean of two anchors lies between the numbers of bfloat16."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    for dtype, want in ((torch.float32, 1.00390625), (None, 1.0)):
        anchor = Anchor(1.0, dtype=dtype)
        for value in (1.0, 1.0078125):
            model.weight.data.fill_(value)
            anchor.before_task(model, Task("a"))
        assert float(anchor.state_dict()["anchors"]["weight"]) == want


def test_resume() -> None:
    model = tiny_models.llama()
    options: Any = {"fisher": "batch", "decay": 0.9}
    anchor, again = Anchor(2.0, **options), Anchor(2.0, **options)
    moved(model, 0)
    anchor.after_task(model, task(0))
    file = io.BytesIO()
    torch.save(anchor.state_dict(), file)
    file.seek(0)
    again.before_task(model, task(1))
    again.load_state_dict(torch.load(file, weights_only=True))
    for keep in (anchor, again):
        keep.after_task(model, task(1))
    moved(model, 1)
    one, two = gradients_of(anchor, model), gradients_of(again, model)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(g.any() for g in one.values())


def test_in_the_trainer_accumulation_changes_nothing(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    data = [{k: v[0] for k, v in tiny_models.batch(k, size=1, length=6).items()} for k in range(8)]
    for row in data:  # every micro-batch counts alike
        row["labels"] = row["input_ids"].clone()
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    ends = []
    for accumulation in (1, 4):
        model = tiny_models.llama().double()
        anchor = Anchor(5.0, fisher="sequence", sequences=4)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation, learning_rate=0.05, optim="sgd",
            lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_steps=1, train_sampling_strategy="sequential",
        )  # fmt: skip
        for index in range(2):
            callback = KeepCallback(anchor, name=f"t{index}", index=index)
            trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
            trainer.train()
        logs = trainer.state.log_history
        assert logs[1]["anchor/penalty"] > 0
        ends.append({n: p.detach().clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weight": -1.0}, "weight must be 0 or more, and finite; got -1.0"),
        ({"weight": float("nan")}, "weight must be 0 or more"),
        ({"decay": 1.5}, "decay must be in [0, 1]; got 1.5"),
        ({"fisher": "token"}, "fisher must be one of 'none', 'sequence', 'batch'; got 'token'"),
        ({"labels": "model"}, "labels='model' has no effect with fisher='none'"),
        ({"fisher": "batch", "labels": "true"}, "labels must be one of 'data', 'model'"),
        ({"center": "first"}, "center must be one of 'mean', 'latest'; got 'first'"),
        ({"pull": "hard"}, "pull must be one of 'gradient', 'decoupled'; got 'hard'"),
        ({"learning_rate": lambda: 1.0}, "learning_rate has no effect with pull='gradient'"),
        ({"sequences": 0}, "sequences must be at least 1; got 0"),
        ({"dtype": torch.float16}, "(float16 cannot hold a small F)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Anchor(**{"weight": 1.0, **arguments})


def test_bad_use() -> None:
    model = tiny_models.llama()
    with pytest.raises(ValueError, match="Anchor with a fisher needs batches of the task"):
        Anchor(1.0, fisher="batch").after_task(model, Task("a"))
    masked = {**tiny_models.batch(), "labels": torch.full((3, 9), -100)}
    with pytest.raises(ValueError, match="no token of batches counts"):
        fisher_diagonal(model, [masked])
    with pytest.raises(ValueError, match="group must be one of 'sequence', 'batch'; got 'row'"):
        fisher_diagonal(model, [], group="row")  # type: ignore[arg-type]
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        fisher_diagonal(frozen, [tiny_models.batch()])
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the gradient of \S+ is NaN or infinite"):
        fisher_diagonal(broken, [tiny_models.batch()])

    anchor = Anchor(1.0)
    anchor.before_task(model, Task("a"))
    with pytest.raises(ValueError, match=re.escape("no parameter 'model.embed_tokens.weight'")):
        anchor.before_task(nn.Linear(2, 2), Task("b"))
    with pytest.raises(ValueError, match=r"anchor of model.embed_tokens.weight is of the shape"):
        anchor.before_task(tiny_models.llama(vocab_size=70), Task("b"))
    with pytest.raises(CheckpointError, match=r"of anchors without a Fisher; .* fisher='batch'"):
        Anchor(1.0, fisher="batch").load_state_dict(anchor.state_dict())
    with pytest.raises(CheckpointError, match="no state of an Anchor"):
        anchor.load_state_dict({"anchors": {}})
    assert anchor.options()["weight"] == 1.0
