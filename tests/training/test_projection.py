"""Projected full fine-tuning against the formula in float64, under AdamW."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked_ranks import on_two_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import batch, llama, tokenizer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from cl_fast.integrations.keeping import KeepCallback
from cl_fast.training.keeping import Keep, Task
from cl_fast.training.projection import Project

F64 = torch.float64
OLD = [batch(100 + i, size=1, length=5) for i in range(2)]
for _one in OLD:  # ten tokens in all, without padding
    _one["attention_mask"].fill_(1)
LAYERS = 14


def train(
    model: nn.Module,
    keep: Keep | None,
    steps: int = 10,
    lr: float = 1e-2,
    first: int = 0,
    pieces: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    for step in range(first, first + steps):
        whole = batch(step, size=4)
        whole["labels"][:] = whole["input_ids"]  # as many labels in each row
        whole["attention_mask"].fill_(1)
        for piece in range(pieces):
            rows = slice(piece * 4 // pieces, (piece + 1) * 4 // pieces)
            (model(**{k: v[rows] for k, v in whole.items()}).loss / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()
        if keep is not None:
            keep.on_update(model)
    return optimizer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def subspaces(keep: Project, start: dict[str, Tensor], rank: float = 0.5) -> dict[str, Any]:
    """Layer -> (U, M), float64 numpy, by what the test knows: an SVD, or the keep's bases."""
    out = {}
    for name, weight in start.items():
        if "_proj" not in name:
            continue
        if keep.protect == "inputs":
            out[name] = None, keep.bases[name.removesuffix(".weight")].double().numpy()
        else:
            u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
            k = round(rank * len(s))
            out[name] = u[:, :k], vt[:k].T
    return out


def leaks(keep: Project, start: dict[str, Tensor], model: nn.Module) -> list[float]:
    found = []
    end = weights(model)
    for name, (u, m) in subspaces(keep, start).items():
        update = end[name].double().numpy() - start[name].double().numpy()
        size = np.linalg.norm(update)
        assert size > 0.02 * np.linalg.norm(start[name].double().numpy())
        found.append(np.linalg.norm(update @ m) / size)
        if u is not None:
            found.append(np.linalg.norm(u.T @ update) / size)
    return found


def made(protect: str, model: nn.Module, **options: Any) -> Project:
    """A Project that protects something of `model`, before its first step."""
    if protect == "weights":
        keep = Project("weights", **options)
    else:
        keep = Project("inputs", **{"energy": 0.9, **options})
        keep.remember(model, OLD)
        assert len(keep.bases) == LAYERS
        assert all(0 < basis.size(1) < basis.size(0) for basis in keep.bases.values())
    keep.before_task(model, Task("new"))
    return keep


BOTH = pytest.mark.parametrize("protect", ["inputs", "weights"])


@BOTH
def test_nothing_leaks_under_adamw(protect: str) -> None:
    model = llama()
    start = weights(model)
    keep = made(protect, model)
    train(model, keep, steps=20, lr=2e-2)
    assert max(leaks(keep, start, model)) < 1e-6


def test_projected_gradients_leak_under_adamw() -> None:
    """Why it is the update that is projected; the measure above can fail."""

    class Gradients(Project):
        def on_gradients(self, model: nn.Module) -> None:
            for layer in self._covered:
                grad = layer.owner.weight.grad
                grad -= grad @ layer.right @ layer.right.t()

    model = llama()
    start = weights(model)
    keep = Gradients(energy=0.9)
    keep.remember(model, OLD)
    keep.before_task(model, Task("new"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.1)
    for step in range(3):
        model(**batch(step)).loss.backward()
        keep.on_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    assert min(leaks(keep, start, model)) > 0.05


@BOTH
def test_each_step_is_the_formula(protect: str) -> None:
    """In float64, against a loop that projects each step on its own: the projection is linear."""
    model = llama().double()
    start = weights(model)
    keep = made(protect, model)
    expected = copy.deepcopy(model)
    spaces = subspaces(keep, start)
    optimizer = other = None
    for step in range(4):
        before = weights(expected)
        optimizer = train(model, keep, steps=1, first=step, optimizer=optimizer)
        other = train(expected, None, steps=1, first=step, optimizer=other)
        for name, parameter in expected.named_parameters():
            if name not in spaces:
                assert torch.equal(parameter, start[name])
                continue
            u, m = spaces[name]
            update = (parameter.detach() - before[name]).numpy()
            update = update - update @ m @ m.T
            if u is not None:
                update = update - u @ (u.T @ update)
            parameter.data.copy_(before[name] + torch.from_numpy(update))
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=0, atol=1e-11)


def test_half_precision_leaks_the_rounding_of_its_weights_only() -> None:
    """Against the exact result in float64, rounded to bfloat16 once."""
    model = llama().bfloat16()
    start = weights(model)
    keep = made("weights", model)
    spaces = subspaces(keep, start)
    optimizer = train(model, keep, steps=5)
    kept = keep.on_update
    keep.on_update = lambda _: None  # type: ignore[method-assign]
    train(model, keep, steps=1, first=5, optimizer=optimizer)
    free = weights(model)
    kept(model)
    for name, (u, m) in spaces.items():
        update = (free[name].double() - start[name].double()).numpy()
        update = update - update @ m @ m.T
        update = update - u @ (u.T @ update)
        exact = torch.from_numpy(update) + start[name].double()
        weight = model.get_parameter(name).detach()
        rounded = exact.to(torch.bfloat16)
        assert weight.dtype == torch.bfloat16
        ours = (weight.double() - exact).norm()
        assert float(ours) <= 1.001 * float((rounded.double() - exact).norm())


def outputs(model: nn.Module, inputs: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([
            model(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).logits
            for x in inputs
        ])  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 2e-3)])
def test_a_protected_task_is_answered_as_before(dtype: torch.dtype, tolerance: float) -> None:
    """All the energy of ten tokens in layers of 32 inputs: their span is answered exactly."""
    model = llama(hidden_size=32, intermediate_size=48).to(dtype)
    before, elsewhere = outputs(model, OLD), outputs(model, [batch(7)])
    keep = made("inputs", model, energy=1.0)
    assert {basis.size(1) for basis in keep.bases.values()} <= set(range(5, 11))
    train(model, keep, steps=10)
    assert float((outputs(model, OLD) - before).abs().max()) < tolerance
    assert float((outputs(model, [batch(7)]) - elsewhere).abs().max()) > 0.5
    keep.after_task(model, Task("new", batches=lambda: [batch(1, size=1, length=4)]))
    before = outputs(model, OLD)
    keep.before_task(model, Task("next", 1))
    train(model, keep, steps=5, first=50)
    assert float((outputs(model, OLD) - before).abs().max()) < tolerance


def test_less_is_learned() -> None:
    """The price: a projected update cannot follow the loss everywhere."""
    ends = []
    for protect in (None, "weights"):
        model = llama()
        keep = made(protect, model) if protect else None
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 2)
        model.model.embed_tokens.weight.requires_grad_(False)
        model.lm_head.weight.requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(25):
            loss = model(**batch(3)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if keep is not None:
                keep.on_update(model)
        ends.append(float(loss.detach()))
    assert ends[0] < ends[1]


def test_others_are_frozen_while_something_is_protected() -> None:
    model = llama(attention_bias=True)
    model.model.norm.weight.requires_grad_(False)
    start = weights(model)
    keep = Project(energy=0.9)
    keep.before_task(model, Task("first"))  # nothing to protect yet: all may move
    assert sum(not p.requires_grad for p in model.parameters()) == 1
    train(model, keep, steps=1)
    assert not torch.equal(model.lm_head.weight, start["lm_head.weight"])
    assert keep.measures() == {"project/protected": 0.0}
    keep.after_task(model, Task("first", batches=lambda: OLD))

    start = weights(model)
    keep.before_task(model, Task("second", 1))
    protected = sum(b.size(1) for b in keep.bases.values())
    whole = sum(b.size(0) for b in keep.bases.values())
    assert keep.measures() == {"project/protected": pytest.approx(protected / whole)}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == LAYERS
    assert all(n.endswith("_proj.weight") for n in trained)
    train(model, keep, steps=2)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, start[n])]
    assert moved == trained
    keep.after_task(model, Task("second", 1, batches=lambda: OLD))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]

    free = made("weights", model, others="train")
    assert sum(not p.requires_grad for p in model.parameters()) == 1
    train(model, free, steps=1)
    assert not torch.equal(model.lm_head.weight, start["lm_head.weight"])


@BOTH
def test_accumulation_changes_nothing(protect: str) -> None:
    ends = []
    for pieces in (1, 4):
        model = llama().double()
        train(model, made(protect, model), steps=3, pieces=pieces)
        ends.append(weights(model))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-9, atol=1e-10)


def saved(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@BOTH
def test_a_resumed_task_ends_with_equal_bits(protect: str) -> None:
    whole = llama()
    keep = made(protect, whole)
    train(whole, keep, steps=6)

    model = llama()
    keep = made(protect, model)
    optimizer = train(model, keep, steps=3)
    state = saved({"keep": keep.state_dict(), "model": model.state_dict(),
                   "optimizer": optimizer.state_dict()})  # fmt: skip

    model = llama()
    keep = Project(protect, **({"energy": 0.9} if protect == "inputs" else {}))
    keep.before_task(model, Task("new"))
    keep.load_state_dict(state["keep"])
    shared = {id(basis) for basis in keep.bases.values()}
    assert len(shared) == (8 if protect == "inputs" else 0)  # as before: q, k, v have one
    model.load_state_dict(state["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer.load_state_dict(state["optimizer"])
    train(model, keep, steps=3, first=3, optimizer=optimizer)
    for name, weight in weights(whole).items():
        assert torch.equal(model.get_parameter(name), weight), name


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["inputs", "weights"]), st.integers(0, 8))
def test_a_second_projection_does_nothing(seed: int, protect: str, rank: int) -> None:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 11, dtype=F64), nn.Linear(11, 5, dtype=F64))
    x = torch.randn(6, 8, generator=g, dtype=F64)
    keep = Project(protect, rank=rank, energy=1.0)  # type: ignore[arg-type]
    if protect == "inputs":
        keep.remember(model, [{"input": x}])
    keep.before_task(model, Task("t"))
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=g, dtype=F64)
    moved = weights(model)
    keep.on_update(model)
    once = weights(model)
    keep.on_update(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), once[name], rtol=0, atol=1e-13)
        if rank == 0:
            torch.testing.assert_close(parameter.detach(), moved[name], rtol=0, atol=0)


def test_float32_masters_of_an_optimizer_are_projected_too() -> None:
    """An optimizer that writes its own copies back, unprojected, at each step."""
    model = llama().bfloat16()
    start = weights(model)
    keep = made("weights", model)
    masters = {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(masters.values()), lr=1e-2)
    for step in range(5):
        model(**batch(step)).loss.backward()
        for name, master in masters.items():
            master.grad = model.get_parameter(name).grad.float()  # type: ignore[union-attr]
        optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            for name, master in masters.items():
                model.get_parameter(name).copy_(master)
        keep.on_update(model)
    for name, (u, m) in subspaces(keep, start).items():
        free = (masters[name].double() - start[name].double()).numpy()
        held = (model.get_parameter(name).detach().double() - start[name].double()).numpy()
        for side in (lambda d, m=m: d @ m, lambda d, u=u: u.T @ d):
            assert np.linalg.norm(side(held)) < 0.1 * np.linalg.norm(side(free))


def test_products_are_of_whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_fast.training import projection

    model = llama()
    keep = made("weights", model)
    cuda, seen = torch.backends.cuda.matmul, []
    inner = projection._project

    def spy(group: Any) -> None:
        seen.append(cuda.fp32_precision)
        inner(group)

    monkeypatch.setattr(projection, "_project", spy)
    before = cuda.fp32_precision
    try:
        cuda.fp32_precision = "tf32"
        keep.on_update(model)
        assert cuda.fp32_precision == "tf32"
    finally:
        cuda.fp32_precision = before
    assert set(seen) == {"ieee"}


def test_options_per_task() -> None:
    model = llama()
    keep = Project("weights", rank=[0, 0.25, 0.75])
    widths = []
    for index in range(4):
        keep.before_task(model, Task(str(index), index))
        mlp = next(layer for layer in keep._covered if "mlp" in layer.name)
        widths.append(0 if mlp.right is None else mlp.right.size(1))
        keep.after_task(model, Task(str(index), index))
    assert widths == [0, 4, 12, 12]

    keep = Project(energy=[0.5, 0.9], rank=[1.0, 3])
    ranks = []
    for _ in range(2):
        keep.remember(model, OLD)
        ranks.append({name: basis.size(1) for name, basis in keep.bases.items()})
    assert all(ranks[0][n] <= k <= max(ranks[0][n], 3) for n, k in ranks[1].items())
    assert Project(layers="a.*").options() == {
        "protect": "inputs", "energy": [0.99], "rank": None, "layers": "a.*", "others": "freeze",
        "target": "weights", "adapter": None, "tokens": 65536, "moments": "float64",
    }  # fmt: skip
    assert Project("weights").options()["rank"] == [0.5]
    assert Project("weights", energy=0.5).options()["rank"] is None


def adapted(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return get_peft_model(llama(hidden_size=32, intermediate_size=48), config)


def test_lora_rows_are_kept_off_old_inputs() -> None:
    model = adapted().double()
    before, elsewhere = outputs(model, OLD), outputs(model, [batch(7)])
    keep = Project(energy=1.0, target="lora_A")
    keep.remember(model, OLD)
    assert len(keep.bases) == LAYERS
    keep.before_task(model, Task("new"))
    assert torch.equal(outputs(model, OLD), before)  # B = 0: nothing has changed
    train(model, keep, steps=10)
    assert float((outputs(model, OLD) - before).abs().max()) < 1e-9
    assert float((outputs(model, [batch(7)]) - elsewhere).abs().max()) > 0.1
    for name, basis in keep.bases.items():
        a = model.get_submodule(name).lora_A["default"].weight
        assert float((a.detach() @ basis).norm() / a.detach().norm()) < 1e-12
    keep.after_task(model, Task("new", batches=lambda: OLD))
    with pytest.raises(ValueError, match="'default' has been trained"):
        keep.before_task(model, Task("next", 1))


def test_one_adapter_through_all_tasks() -> None:
    """Its factors are linear layers of their own."""
    model = adapted().double()
    train(model, None, steps=3)
    before, elsewhere = outputs(model, OLD), outputs(model, [batch(7)])
    keep = Project(energy=1.0)
    keep.remember(model, OLD)
    assert len(keep.bases) == 2 * LAYERS
    keep.before_task(model, Task("new"))
    train(model, keep, steps=3)
    assert float((outputs(model, OLD) - before).abs().max()) < 1e-9
    assert float((outputs(model, [batch(7)]) - elsewhere).abs().max()) > 0.1


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2,
        "remove_unused_columns": False, "seed": 3, "weight_decay": 0.1,
    }  # fmt: skip
    return TrainingArguments(**{**options, **changes})


def test_in_the_trainer_of_transformers(tmp_path: Path) -> None:
    rows = [{k: v[0] for k, v in batch(i, size=1).items()} for i in range(20)]

    def trainer(**changes: Any) -> tuple[Any, Project]:
        model = llama()
        keep = Project(energy=0.9)
        keep.remember(model, OLD)
        callback = KeepCallback(keep)
        return Trainer(model, arguments(tmp_path, **changes), train_dataset=rows,
                       callbacks=[callback]), keep  # fmt: skip

    start = weights(llama())
    first, keep = trainer()
    protected = Project(energy=0.9)
    protected.bases = dict(keep.bases)
    first.train()
    assert max(leaks(protected, start, first.model)) < 1e-6
    assert first.state.log_history[0]["project/protected"] > 0
    assert keep.remembered == 2  # the task's own inputs, at its end
    assert all(p.requires_grad for p in first.model.parameters())

    again, keep = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in weights(first.model).items():
        assert torch.equal(again.model.get_parameter(name), weight), name


def test_in_the_sft_trainer_of_trl(tmp_path: Path) -> None:
    """Whose default loss replaces the model's forward."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = llama()
    start = weights(model)
    keep = Project(energy=0.9)
    keep.remember(model, OLD)
    protected = Project(energy=0.9)
    protected.bases = dict(keep.bases)
    config = SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=2e-2,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        max_length=16, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = Dataset.from_dict({"text": ["the cat sat on the mat", "a dog ran"] * 4})
    SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer(),
               callbacks=[KeepCallback(keep)]).train()  # fmt: skip
    assert max(leaks(protected, start, model)) < 1e-6
    assert keep.remembered == 2


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def narrow(**changes: Any) -> tuple[Narrow, Project]:
    torch.manual_seed(0)
    model, keep = Narrow(), Project(energy=0.5)
    keep.remember(model, [{"x": X}])
    return model, keep


def other_state(**changes: Any) -> Callable[[], object]:
    def call() -> None:
        model, keep = narrow()
        state = {**keep.state_dict(), **changes}
        keep.before_task(model, Task("a"))
        keep.load_state_dict(state)

    return call


def other_start() -> None:
    model, keep = narrow()
    keep.before_task(model, Task("a"))
    state = keep.state_dict()
    with torch.no_grad():
        model.one.weight[0, 0] += 1
    fresh = Project(energy=0.5)
    fresh.before_task(model, Task("a"))
    fresh.load_state_dict(state)


def late_state() -> None:
    model, keep = narrow()
    fresh = Project(energy=0.5)
    fresh.before_task(model, Task("a"))
    fresh.on_update(model)
    fresh.load_state_dict(keep.state_dict())


def frozen() -> None:
    model = Narrow()
    model.requires_grad_(False)
    Project().before_task(model, Task("a"))


def flattened() -> None:
    model, keep = narrow()
    keep.before_task(model, Task("a"))
    model.one.weight = nn.Parameter(torch.zeros(9))
    keep.on_update(model)


def other_model() -> None:
    _, keep = narrow()
    keep.before_task(nn.Sequential(nn.Linear(3, 3)), Task("a"))


def other_width() -> None:
    model, keep = narrow()
    model.one = nn.Linear(4, 3)
    keep.before_task(model, Task("a"))


def remembered_within() -> None:
    model, keep = narrow()
    keep.before_task(model, Task("a"))
    keep.remember(model, [{"x": X}])


def infinite_weight() -> None:
    model, _ = narrow()
    model.one.weight.data[0] = torch.inf
    Project("weights").before_task(model, Task("a"))


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Project("outputs"), ValueError, "protect must be one of"),  # type: ignore[arg-type]
    (lambda: Project(energy=1.01), ValueError, "energy must be in [0, 1]"),
    (lambda: Project(energy=[0.5, -1]), ValueError, "energy must be in [0, 1]"),
    (lambda: Project(energy=[]), ValueError, "energy must be a number, or one per task"),
    (lambda: Project(energy=float("nan")), ValueError, "energy must be a number"),
    (lambda: Project("weights", rank=1.5), ValueError, "Give an int to count"),
    (lambda: Project("weights", rank=-1), ValueError, "rank must be"),
    (lambda: Project(others="drop"), ValueError, "others must be"),  # type: ignore[arg-type]
    (lambda: Project(tokens=0), ValueError, "tokens must be"),
    (lambda: Project(moments=torch.float16), TypeError, "moments must be"),
    (lambda: Project("weights", target="lora_A"), ValueError, "protect must be 'inputs'"),
    (lambda: Project(target="lora_A", layers="x"), ValueError, "layers does not apply"),
    (lambda: Project(adapter="x"), ValueError, "adapter applies to"),
    (lambda: Project().on_update(Narrow()), ValueError, "before_task must be called"),
    (lambda: Project().before_task(nn.Sequential(nn.ReLU()), Task("a")), ValueError,
     "no linear layer"),
    (lambda: Project(target="lora_A").before_task(Narrow(), Task("a")), ValueError,
     "has no adapters"),
    (lambda: Project().after_task(Narrow(), Task("a")), ValueError, "needs batches"),
    (lambda: Project("weights").remember(Narrow(), []), ValueError, "nothing is to be remembered"),
    (lambda: narrow()[1].remember(Narrow(), [{"x": X * 0}]), ValueError, "inputs of one: moments"),
    (frozen, ValueError, "are frozen, as one"),
    (flattened, ValueError, "one.weight has become (9,)"),
    (other_model, ValueError, "the layer 0 is one of the model"),
    (other_width, ValueError, "basis of one must be [4, k]"),
    (remembered_within, ValueError, "between tasks"),
    (infinite_weight, ValueError, "one: the weight has values"),
    (other_state(protect="weights"), ValueError, "protect='weights'"),
    (other_state(bases={}, start={}, more=1), ValueError, "state must have the keys"),
    (other_state(bases={"two": torch.eye(3)}), ValueError, "the layer one is one of the model"),
    (other_state(bases={"one": torch.eye(4)}), ValueError, "basis of one must be [3, k]"),
    (other_start, ValueError, "one.weight is not what it was"),
    (late_state, ValueError, "before the first step"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_a_state_of_another_start_is_refused_in_the_other_order_too() -> None:
    model, keep = narrow()
    keep.before_task(model, Task("a"))
    fresh = Project(energy=0.5)
    fresh.load_state_dict(keep.state_dict())
    with torch.no_grad():
        model.one.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"one.weight is not what it was"):
        fresh.before_task(model, Task("a"))


def two_ranks(rank: int, protect: str, late: bool) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = llama(intermediate_size=33).double()  # not the same number of rows on both
    keep = Project(protect, **({"energy": 0.9} if protect == "inputs" else {}))  # type: ignore[arg-type]
    if protect == "inputs":
        keep.remember(model, OLD[rank : rank + 1])  # each rank has a part
    if not late:
        fully_shard(model)
    keep.before_task(model, Task("new"))
    if late:  # as accelerate does it, after the Trainer was made
        fully_shard(model)
    train(model, keep, steps=3)
    found = {
        name: parameter.full_tensor().detach()  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters()
    }
    keep.after_task(model, Task("new", batches=lambda: OLD[rank : rank + 1]))
    return {**found, **keep.bases}


@pytest.mark.parametrize(
    ("protect", "late"), [("weights", True), ("weights", False), ("inputs", False)]
)
def test_rows_split_over_two_ranks(protect: str, late: bool) -> None:
    model = llama(intermediate_size=33).double()
    keep = made(protect, model)
    train(model, keep, steps=3)
    keep.after_task(model, Task("new", batches=lambda: OLD))
    expected: dict[str, Tensor] = {**weights(model), **keep.bases}
    for found in on_two_ranks(two_ranks, protect, late):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            wanted, had = expected[name], value
            if name in keep.bases:  # the span is told, not its basis
                had, wanted = had @ had.t(), wanted @ wanted.t()
            torch.testing.assert_close(had, wanted, rtol=1e-7, atol=1e-7)
