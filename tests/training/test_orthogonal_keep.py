"""O-LoRA on adapters of PEFT: its algebra, folding, keeping, resuming, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, batch, llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from cl_fast.integrations.keeping import KeepCallback
from cl_fast.models.adapters import lora_layers
from cl_fast.ops import orthogonal_penalty
from cl_fast.training import orthogonal as room
from cl_fast.training.keeping import Task
from cl_fast.training.orthogonal import Orthogonal, lora_penalty, row_basis

TARGETS = ["q_proj", "v_proj", "down_proj"]
BATCHES = [batch(seed) for seed in range(4)]


def adapted(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    options = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, **changes}
    base = llama(seed).to(dtype)
    torch.manual_seed(seed + 100)
    return get_peft_model(base, LoraConfig(**options))


def trained(model: nn.Module, keep: Orthogonal, steps: int = 3, check: Any = None) -> None:
    """Steps of AdamW, with the hooks where a trainer has them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(steps):
        model(**BATCHES[step % 4]).loss.backward()
        keep.on_gradients(model)
        optimizer.step()
        keep.on_update(model)
        optimizer.zero_grad()
        if check:
            check()


def task(model: nn.Module, keep: Orthogonal, name: str, steps: int = 3, check: Any = None) -> None:
    keep.before_task(model, Task(name))
    trained(model, keep, steps, check)
    keep.after_task(model, Task(name))


def factors(model: nn.Module, adapter: str = "default") -> dict[str, tuple[Tensor, Tensor, float]]:
    return {
        x.name: (x.down.detach().clone(), x.up.detach().clone(), x.scale)
        for x in lora_layers(model, adapter)
    }


def span(rows: list[Tensor]) -> np.ndarray[Any, Any]:
    """An orthonormal basis [d, k], in float64 and by another way than the keep's."""
    return np.linalg.qr(torch.cat(rows).double().numpy().T)[0]


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(BATCHES[0]["input_ids"]).logits
    model.train()
    return out


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the projection ----------------------------------------------------------------------------


@pytest.mark.parametrize("past", ["fold", "keep"])
def test_new_tasks_stay_out_of_the_span_of_all_earlier_ones(past: Any) -> None:
    model, keep = adapted(torch.float32), Orthogonal(past=past)
    found: list[dict[str, tuple[Tensor, Tensor, float]]] = []
    names = ["a", "b", "c"]
    for i, name in enumerate(names):
        adapter = name if past == "keep" and i else "default"
        keep.before_task(model, Task(name))

        def clean(adapter: str = adapter) -> None:
            for layer, (down, *_) in factors(model, adapter).items():
                if found:
                    q = span([x[layer][0] for x in found])
                    a = down.double().numpy()
                    assert np.linalg.norm(a @ q) < 1e-6 * np.linalg.norm(a)

        clean()
        start = factors(model, adapter)
        trained(model, keep, 3, clean)
        moved = factors(model, adapter)
        assert all(not torch.equal(moved[n][0], start[n][0]) for n in moved)
        measured = keep.measures()
        assert (measured == {}) if not i else (measured["orthogonal/overlap"] < 1e-6)
        found.append(moved)
        keep.after_task(model, Task(name))
    # What the last task adds to a layer's answer is nothing where the input is in the past.
    layer, (down, up, scale) = next(iter(found[-1].items()))
    past_rows = torch.cat([x[layer][0] for x in found[:-1]]).double()
    inside = torch.randn(5, past_rows.size(0), dtype=torch.float64) @ past_rows
    delta = scale * up.double() @ down.double()
    assert float((inside @ delta.T).norm()) < 1e-6 * float(delta.norm()) * float(inside.norm())
    outside = torch.randn(5, past_rows.size(1), dtype=torch.float64)
    assert float((outside @ delta.T).norm()) > 1e-2 * float(delta.norm())


def test_adam_leaves_the_subspace_without_the_hook() -> None:
    """What the projection is for: gradients that are orthogonal do not keep the weights so."""
    model, keep = adapted(torch.float32), Orthogonal()
    task(model, keep, "a")
    keep.before_task(model, Task("b"))
    keep.on_update = lambda model: None  # type: ignore[method-assign]
    trained(model, keep)
    assert keep.measures()["orthogonal/overlap"] > 1e-2


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    repeated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_basis_grows_by_what_is_new(ranks: list[int], repeated: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis, rows = None, [torch.empty(0, 20)]
    for rank in ranks:
        more = torch.randn(rank, 20, generator=generator) * 10 ** (rank - 2)
        if repeated and rank:
            more = torch.cat([more, more[:1] - 3 * more[-1:], torch.zeros(1, 20)])
        before = basis
        basis = row_basis(more, basis)
        rows.append(more)
        if before is not None:
            assert torch.equal(basis[: len(before)], before)
    assert basis is not None
    everything = torch.cat(rows).double()
    scaled = everything / everything.norm(dim=1, keepdim=True).clamp(min=1e-30)
    assert len(basis) == sum(ranks) == torch.linalg.matrix_rank(scaled, rtol=1e-5)
    gram = basis.double() @ basis.double().T
    assert float((gram - torch.eye(len(basis))).abs().max() if len(basis) else 0) < 1e-6
    rest = scaled - (scaled @ basis.double().T) @ basis.double()
    assert float(rest.norm()) < 1e-5


# --- the penalties -----------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "value", "grad"), [("l1", 3, [3, 4]), ("squared", 9, [18, 24])])
def test_values_by_hand(form: Any, value: float, grad: list[float]) -> None:
    base = nn.Sequential(nn.Linear(2, 3, bias=False))
    model: Any = get_peft_model(base, LoraConfig(r=1, target_modules=["0"]))
    keep = Orthogonal(form, weight=1.0)
    (layer,) = lora_layers(model, "default")
    keep.before_task(model, Task("a"))
    layer.down.data = torch.tensor([[3.0, 4.0]])
    keep.after_task(model, Task("a"))
    keep.before_task(model, Task("b"))
    layer.down.data = torch.tensor([[1.0, 0.0]])
    keep.on_gradients(model)
    assert layer.down.grad is not None
    assert layer.down.grad.tolist() == [grad]
    assert keep.measures() == {"orthogonal/penalty": value}
    assert lora_penalty(model, keep.past_rows(model), form=form).item() == value


def naive(a: Tensor, p: Tensor, form: str) -> float:
    """Entry by entry."""
    total = 0.0
    for x in a.tolist():
        for y in p.tolist():
            s = sum(u * v for u, v in zip(x, y, strict=True))
            total += abs(s) if form == "l1" else s * s
    return total


@pytest.mark.parametrize("form", ["l1", "squared"])
def test_the_gradient_is_that_of_the_penalty(form: Any) -> None:
    model, keep = adapted(), Orthogonal(form, weight=0.3)
    for name in "ab":
        task(model, keep, name)
    keep.before_task(model, Task("c"))
    past = keep.past_rows(model)
    layers = lora_layers(model, "default")
    for layer in layers:
        assert past[layer.name].shape == (4, layer.down.shape[1])
        layer.down.grad = torch.ones_like(layer.down)
    keep.on_gradients(model)
    wanted = sum(0.3 * naive(x.down, past[x.name], form) for x in layers)
    assert math.isclose(keep.measures()["orthogonal/penalty"], wanted, rel_tol=1e-12)
    layer, step = layers[2], 1e-6
    p = past[layer.name]
    for i, j in [(0, 0), (1, 7), (1, 31)]:
        up, down = layer.down.detach().clone(), layer.down.detach().clone()
        up[i, j] += step
        down[i, j] -= step
        slope = 0.3 * (naive(up, p, form) - naive(down, p, form)) / (2 * step)
        assert layer.down.grad is not None
        assert math.isclose(float(layer.down.grad[i, j]), 1 + slope, rel_tol=1e-6, abs_tol=1e-7)
    # and as a term of a loss
    (found,) = torch.autograd.grad(0.3 * lora_penalty(model, past, form=form), [layer.down])
    torch.testing.assert_close(found + 1, layer.down.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["l1", "squared"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_call_for_all_modules_adds_the_same(form: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    news = [torch.randn(2, d, generator=generator).to(dtype) for d in (16, 16, 24)]
    pasts = [torch.randn(6, a.size(1), generator=generator) for a in news]
    start = [torch.randn(a.shape, generator=generator).to(dtype) for a in news]
    one, many = [g.clone() for g in start], [g.clone() for g in start]
    x = room._add_one_by_one(news, pasts, one, form, 0.7)
    y = room._add_at_once([a.clone() for a in news], pasts, many, form, 0.7)
    wide = [a.double() for a in news]
    values = sum(naive(a, p, form) for a, p in zip(wide, pasts, strict=True))
    eps = torch.finfo(dtype).eps
    for value in (x, y):
        assert math.isclose(float(value), 0.7 * values, rel_tol=1e-5)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=8 * eps * float(a.abs().max()))


@pytest.mark.parametrize("form", ["l1", "squared"])
def test_a_weight_of_zero_does_nothing(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, keep = adapted(), Orthogonal(form, weight=0)
    task(model, keep, "a")
    keep.before_task(model, Task("b"))
    monkeypatch.setattr(room, "_add_one_by_one", None)
    keep.on_gradients(model)
    assert all(p.grad is None for p in model.parameters())
    assert keep.measures() == {}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Sixteen rows of equal length, so that means of micro-batches are the mean of all."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, VOCABULARY, (16, 8), generator=generator)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "save_strategy": "no",
        "learning_rate": 2e-2, "max_steps": 4, "logging_steps": 2, "disable_tqdm": True,
        "per_device_train_batch_size": 4, "seed": 3, **changes,
    }  # fmt: skip
    return TrainingArguments(**options)


@pytest.fixture(scope="module")
def after_one_task() -> tuple[Any, Orthogonal]:
    model, keep = adapted(), Orthogonal("squared", weight=2.0)
    task(model, keep, "a")
    return model, keep


@pytest.mark.parametrize("form", ["project", "squared", "l1"])
def test_accumulation_changes_nothing_in_the_trainer(
    form: Any, after_one_task: tuple[Any, Orthogonal], tmp_path: Path
) -> None:
    found = []
    for accumulated, size in ((1, 4), (4, 1)):
        model, first = copy.deepcopy(after_one_task)
        keep = Orthogonal(form, weight=None if form == "project" else 2.0)
        keep.load_state_dict(first.state_dict())
        args = arguments(
            tmp_path,
            gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=size,
        )
        trainer = Trainer(
            model, args, train_dataset=Rows(), callbacks=[KeepCallback(keep, name="b")]
        )
        trainer.train()
        logs = [x for x in trainer.state.log_history if "loss" in x]
        key = "orthogonal/overlap" if form == "project" else "orthogonal/penalty"
        assert all(key in x for x in logs)
        assert keep.tasks == ["a", "b"]
        found.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for name, one in found[0].items():
        torch.testing.assert_close(found[1][name], one, rtol=1e-5, atol=1e-6, msg=name)
    start = dict(after_one_task[0].named_parameters())
    assert any(not torch.equal(start[n], p) for n, p in found[0].items() if "base_layer" in n)


# --- past tasks --------------------------------------------------------------------------------


def test_the_folded_model_answers_as_the_adapted_one() -> None:
    model, keep = adapted(), Orthogonal()
    for name in "abc":
        keep.before_task(model, Task(name))
        trained(model, keep)
        before = logits(model)
        sums = {x.name: x.base.weight + x.scale * x.up @ x.down
                for x in lora_layers(model, "default")}  # fmt: skip
        keep.after_task(model, Task(name))
        for x in lora_layers(model, "default"):
            torch.testing.assert_close(x.base.weight, sums[x.name], rtol=1e-13, atol=1e-13)
        # The model's norms compute in float32.
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
        for _, up, _ in factors(model).values():
            assert not up.any()
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(model))
            torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert len(list(model.parameters())) == len(list(adapted().parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fold_rounds_once(dtype: torch.dtype) -> None:
    model, keep = adapted(dtype), Orthogonal()
    keep.before_task(model, Task("a"))
    trained(model, keep)
    layers = lora_layers(model, "default")
    exact = {x.name: (x.base.weight.double() + x.scale * x.up.double() @ x.down.double()).detach()
             for x in layers}  # fmt: skip
    keep.after_task(model, Task("a"))
    for x in layers:
        assert x.base.weight.dtype == dtype
        error = (x.base.weight.double() - exact[x.name]).abs()
        half = exact[x.name].abs() * torch.finfo(dtype).eps / 2
        # half a unit of the last place, and what float32 products leave
        assert bool((error <= half * 1.0001 + 1e-6 * float(exact[x.name].abs().max())).all())


def test_kept_adapters_are_the_formula() -> None:
    """y = W x + sum_t s B_t A_t x, and each is a stock adapter of its own."""
    model, keep = adapted(), Orthogonal(past="keep")
    base = {x.name: x.base.weight.detach().clone() for x in lora_layers(model, "default")}
    for name in "abc":
        task(model, keep, name)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == []
    assert list(model.peft_config) == ["default", "b", "c"]
    plain = llama(0).double()
    with torch.no_grad():
        for name, weight in base.items():
            total = weight.clone()
            for adapter in ("default", "b", "c"):
                down, up, scale = factors(model, adapter)[name]
                total += scale * up @ down
            plain.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(total)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    for x in lora_layers(model, "default"):
        assert torch.equal(x.base.weight, base[x.name])


def test_only_the_new_adapter_is_trained_beside_kept_ones() -> None:
    model, keep = adapted(), Orthogonal(past="keep")
    task(model, keep, "a")
    keep.before_task(model, Task("b"))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".b.weight" in n for n in trainable)
    assert model.active_adapters == ["b", "default"]


def test_removal_of_a_kept_task_is_exact() -> None:
    model, keep = adapted(), Orthogonal(past="keep")
    task(model, keep, "a")
    before = logits(model)
    task(model, keep, "b")
    assert not torch.equal(logits(model), before)
    keep.remove(model, "b")
    assert torch.equal(logits(model), before)
    assert keep.tasks == ["a"]
    assert list(model.peft_config) == ["default"]
    task(model, keep, "c")  # goes on
    keep.remove(model, "a")
    assert list(model.peft_config) == ["c"]
    with pytest.raises(ValueError, match="last adapter"):
        keep.remove(model, "c")


def test_removal_of_a_folded_task_is_up_to_rounding() -> None:
    model, keep = adapted(torch.float32), Orthogonal()
    task(model, keep, "a")
    after_a = {x.name: x.base.weight.detach().clone() for x in lora_layers(model, "default")}
    task(model, keep, "b")
    keep.remove(model, "b")
    for x in lora_layers(model, "default"):
        big = max(float(after_a[x.name].abs().max()), 1.0)
        assert float((x.base.weight - after_a[x.name]).abs().max()) < 1e-6 * big
    assert keep.tasks == ["a"]
    assert all(len(rows) == 2 for rows in keep.past_rows(model).values())
    keep.before_task(model, Task("c"))
    trained(model, keep)
    assert keep.measures()["orthogonal/overlap"] < 1e-6


def test_a_removed_task_is_no_longer_avoided() -> None:
    model, keep = adapted(torch.float32), Orthogonal()
    keep.before_task(model, Task("a"))
    trained(model, keep)
    gone = factors(model)
    keep.after_task(model, Task("a"))
    task(model, keep, "b")
    keep.remove(model, "a")
    keep.before_task(model, Task("c"))
    for name, (down, *_) in factors(model).items():
        a = down.double().numpy()
        assert np.linalg.norm(a @ span([gone[name][0]])) > 1e-3 * np.linalg.norm(a)
        left = span([keep.past_rows(model)[name]])
        assert left.shape[1] == 2
        assert np.linalg.norm(a @ left) < 1e-6 * np.linalg.norm(a)


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["project", "squared"])
@pytest.mark.parametrize("past", ["fold", "keep"])
def test_a_run_that_is_resumed_between_tasks_has_the_same_bits(form: Any, past: Any) -> None:
    straight, keep = adapted(torch.float32), Orthogonal(form, past=past)
    for name in "ab":
        task(straight, keep, name)
    weights = copy.deepcopy(straight.state_dict())
    state = through_a_file(keep.state_dict())
    task(straight, keep, "c")

    resumed, other = adapted(torch.float32), Orthogonal(form, past=past)
    other.restore(resumed, [Task("a"), Task("b")])
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    task(resumed, other, "c")
    for (name, one), two in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert other.tasks == ["a", "b", "c"]


def test_loading_a_state_within_a_task_leaves_the_weights_alone() -> None:
    model, keep = adapted(torch.float32), Orthogonal()
    for name in "ab":
        task(model, keep, name)
    keep.before_task(model, Task("c"))
    trained(model, keep, 5)
    before = factors(model)
    keep.load_state_dict(through_a_file(keep.state_dict()))
    assert all(torch.equal(x, before[n][0]) for n, (x, *_) in factors(model).items())


@pytest.mark.parametrize("past", ["fold", "keep"])
def test_the_trainer_resumes_within_a_task(past: Any, tmp_path: Path) -> None:
    def start() -> tuple[Any, Orthogonal]:
        model, keep = adapted(torch.float32), Orthogonal(past=past)
        task(model, keep, "a")
        return model, keep

    def train(model: Any, keep: Orthogonal, resume: Any = None, steps: int = 4) -> None:
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        callback = KeepCallback(keep, name="b")
        trainer = Trainer(model, args, train_dataset=Rows(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)

    straight, keep = start()
    train(straight, keep)
    resumed, other = start()
    train(resumed, other, str(tmp_path / "checkpoint-2"))
    for (name, one), two in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert resumed.active_adapters == straight.active_adapters


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"form": "hard"}, ValueError, "form must be one of 'project', 'squared', 'l1'"),
        ({"past": "merge"}, ValueError, "past must be one of 'fold', 'keep'; got 'merge'"),
        ({"weight": 0.5}, ValueError, "leave weight out"),
        ({"form": "l1", "weight": -1}, ValueError, "weight must be 0 or more, and finite"),
        ({"form": "l1", "weight": math.nan}, ValueError, "weight must be 0 or more"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
    ],
)
def test_arguments(arguments: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Orthogonal(**arguments)


def _quantised(model: Any) -> None:
    layer = lora_layers(model, "default")[1].base
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


def _packed(model: Any) -> None:
    layer = lora_layers(model, "default")[1].base
    layer.weight = nn.Parameter(layer.weight.reshape(-1, 1), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_quantised, r"layers.0.self_attn.v_proj: the base is quantised \(Linear, torch.int8\)"),
        (_packed, r"layers.0.self_attn.v_proj: the weight of the base has the shape"),
        (lambda m: m.merge_adapter(), "call unmerge_adapter first"),
        (lambda m: m.requires_grad_(False), "q_proj: the adapter 'default' is frozen"),
    ],
)
def test_bases_that_cannot_be_folded_are_refused_before_training(change: Any, words: str) -> None:
    model = adapted()
    change(model)
    with pytest.raises(ValueError, match=words):
        Orthogonal().before_task(model, Task("a"))


def test_a_quantised_base_can_keep_its_past() -> None:
    model = adapted()
    _quantised(model)
    Orthogonal(past="keep").before_task(model, Task("a"))


def test_tied_weights_are_not_folded() -> None:
    base = llama(0, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tied"):
        model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="lm_head: its weight is tied"):
        Orthogonal().before_task(model, Task("a"))


def test_no_adapter() -> None:
    with pytest.raises(ValueError, match="has no adapters"):
        Orthogonal().before_task(nn.Linear(2, 2), Task("a"))
    with pytest.raises(
        ValueError, match=r"no layer has a LoRA called 'b'; there are \['default'\]"
    ):
        Orthogonal(adapter="b").before_task(adapted(), Task("a"))
    with pytest.raises(ValueError, match="before_task must be called first"):
        Orthogonal().on_update(adapted())


def test_a_past_that_fills_a_layer() -> None:
    model, keep = adapted(r=16, target_modules=["q_proj"]), Orthogonal()
    task(model, keep, "a", steps=1)
    with pytest.raises(ValueError, match="q_proj: the past tasks span all 16 of its inputs"):
        keep.before_task(model, Task("b"))


def test_a_task_is_named_once() -> None:
    model, keep = adapted(), Orthogonal()
    task(model, keep, "a", steps=1)
    with pytest.raises(ValueError, match="the task 'a' is finished already"):
        keep.before_task(model, Task("a"))
    with pytest.raises(ValueError, match=r"unknown task 'z'; finished are \['a'\]"):
        keep.remove(model, "z")


@pytest.fixture(scope="module")
def finished() -> dict[str, Any]:
    model, keep = adapted(), Orthogonal()
    task(model, keep, "a", steps=1)
    state: dict[str, Any] = through_a_file(keep.state_dict())
    return {"state": state, "weights": model.state_dict()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["q_proj"]}, "down_proj had an adapter in the task 'a' and has none"),
        ({"target_modules": [*TARGETS, "o_proj"]}, "o_proj has an adapter now, but had none"),
        ({}, "q_proj: its weight is not the one that the tasks"),
    ],
)
def test_states_of_other_adapters_or_another_base(
    changes: Any, words: str, finished: dict[str, Any]
) -> None:
    for bound in (False, True):
        model, keep = adapted(**changes), Orthogonal()
        if bound:
            keep.before_task(model, Task("b"))
            with pytest.raises(ValueError, match=words):
                keep.load_state_dict(finished["state"])
            assert keep.tasks == []
        else:
            keep.load_state_dict(finished["state"])
            with pytest.raises(ValueError, match=words):
                keep.before_task(model, Task("b"))


def test_states_of_other_shapes(finished: dict[str, Any]) -> None:
    model: Any = get_peft_model(
        llama(0, hidden_size=24, head_dim=8), LoraConfig(r=2, target_modules=TARGETS)
    )
    keep = Orthogonal()
    keep.before_task(model, Task("b"))
    with pytest.raises(ValueError, match=r"q_proj: the task 'a' left factors of a weight \(16, 16"):
        keep.load_state_dict(finished["state"])
    with pytest.raises(ValueError, match="the state is of past='fold'; this is 'keep'"):
        Orthogonal(past="keep").load_state_dict(finished["state"])


def test_ranks_may_differ_between_tasks(finished: dict[str, Any]) -> None:
    model, keep = adapted(r=3), Orthogonal()
    model.load_state_dict(
        {k: v for k, v in finished["weights"].items() if "lora_" not in k}, strict=False
    )
    keep.load_state_dict(finished["state"])
    task(model, keep, "b")
    assert all(len(rows) == 5 for rows in keep.past_rows(model).values())


def test_kept_adapters_that_are_gone() -> None:
    model, keep = adapted(), Orthogonal(past="keep")
    for name in "ab":
        task(model, keep, name, steps=1)
    fresh = Orthogonal(past="keep")
    fresh.load_state_dict(through_a_file(keep.state_dict()))
    with pytest.raises(ValueError, match="no adapter 'b', which earlier tasks left"):
        fresh.before_task(adapted(), Task("c"))


def test_nothing_is_folded_that_is_not_finite() -> None:
    model, keep = adapted(), Orthogonal()
    keep.before_task(model, Task("a"))
    layers = lora_layers(model, "default")
    before = [x.base.weight.detach().clone() for x in layers]
    layers[-1].up.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="down_proj: lora_B holds NaN"):
        keep.after_task(model, Task("a"))
    assert all(torch.equal(x.base.weight, w) for x, w in zip(layers, before, strict=True))
    assert keep.tasks == []


def test_rows_of_unknown_layers() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="past has rows of nowhere"):
        lora_penalty(model, {"nowhere": torch.zeros(1, 16)})
    name = lora_layers(model, "default")[0].name
    with pytest.raises(ValueError, match=r"past has the shape \(1, 3\); 16 columns"):
        lora_penalty(model, {name: torch.zeros(1, 3)})
    one = {name: torch.ones(1, 16, dtype=torch.float64)}
    down = lora_layers(model, "default")[0].down
    expected = orthogonal_penalty([down], [one[name]], form="squared")
    torch.testing.assert_close(lora_penalty(model, one), expected)
