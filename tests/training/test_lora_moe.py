"""LoRAMoE in models: start, training in the Trainer, saving, and the balancing loss in float64."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from cl_fast.errors import CheckpointError
from cl_fast.integrations.keeping import KeepMixin
from cl_fast.models.heads import hidden_states
from cl_fast.training.keeping import Task
from cl_fast.training.lora_moe import (
    Balance,
    LoRAMoE,
    WithColumn,
    add_lora_moe,
    load_lora_moe,
    lora_moe_layers,
    lora_moe_state_dict,
    remove_lora_moe,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")


def trained(seed: int = 0, model: Any = None, **options: Any) -> Any:
    """A tiny llama whose experts do something."""
    model = tiny_models.llama() if model is None else model
    add_lora_moe(model, **{"experts": 4, "rank": 2, "alpha": 4.0, "seed": seed, **options})
    g = torch.Generator().manual_seed(seed + 1)
    for layer in lora_moe_layers(model).values():
        layer.up.data.copy_(0.3 * torch.randn(layer.up.shape, generator=g))
        layer.gate.data.mul_(8.0)
    return model


def typed_batch(size: int = 4, types: tuple[int, ...] = (1, 0, 0, 1)) -> dict[str, Tensor]:
    return {**tiny_models.batch(size=size), "task_type": torch.tensor(types)}


def slow_experts(layer: LoRAMoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over experts in float64: output and gate."""
    w = {name: p.detach().double() for name, p in layer.named_parameters()}
    x = x.double()
    p = F.softmax(x @ w["gate"].t(), -1)
    y = x @ w["base_layer.weight"].t()
    if "base_layer.bias" in w:
        y = y + w["base_layer.bias"]
    for i in range(layer.experts):
        rows = slice(i * layer.rank, (i + 1) * layer.rank)
        y = y + layer.scale * p[..., i : i + 1] * (x @ w["down"][rows].t() @ w["up"][:, rows].t())
    return y, p


# --- the layer in a model ----------------------------------------------------------------------


def test_a_model_starts_as_it_was_and_only_experts_learn() -> None:
    batch = tiny_models.batch()
    base, model = tiny_models.llama(), tiny_models.llama()
    names = add_lora_moe(model, experts=4, rank=2, seed=3)
    assert len(names) == 6
    assert names == list(lora_moe_layers(model))
    assert names[0] == "model.layers.0.mlp.gate_proj"
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    model(**batch).loss.backward()
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{n}.{part}" for n in names for part in ("down", "gate", "up")}
    layer = lora_moe_layers(model)[names[0]]
    bound = 16**-0.5
    for part in (layer.down, layer.gate):
        assert 0.7 * bound < part.abs().max() <= bound
    assert layer.training is model.training is base.training
    assert not LoRAMoE(nn.Linear(3, 3), 2, 1).base_layer.weight.requires_grad
    assert not layer.up.any()
    assert layer.up.grad is not None
    assert layer.up.grad.any()
    again, other = tiny_models.llama(), tiny_models.llama()
    add_lora_moe(again, experts=4, rank=2, seed=3)
    add_lora_moe(other, experts=4, rank=2, seed=4)
    for same, one in ((True, again), (False, other)):
        assert torch.equal(lora_moe_layers(one)[names[0]].down, layer.down) is same


def test_layer_equals_the_loop() -> None:
    model = trained()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    for name, layer in lora_moe_layers(model).items():
        given = x if name.endswith(("gate_proj", "up_proj")) else torch.cat([x, x], -1)
        want, _ = slow_experts(layer, given)
        error = (layer(given).double() - want).abs().max()
        assert error <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gpt2_and_biases(kind: str) -> None:
    if kind == "linear":
        layer = LoRAMoE(nn.Linear(6, 9), 4, 2, 4.0)
        layer.up.data.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(3, 6)
        torch.testing.assert_close(layer(x).double(), slow_experts(layer, x)[0])
        return
    config = GPT2Config(vocab_size=67, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    batch = tiny_models.batch()
    want = model(**batch).logits
    add_lora_moe(model, ("mlp.c_fc", "mlp.c_proj"), experts=2, rank=2)
    assert not model.transformer.h[0].mlp.c_fc.training
    assert torch.equal(model(**batch).logits, want)
    layer = model.transformer.h[0].mlp.c_fc
    assert (layer.in_features, layer.out_features) == (16, 64)
    layer.up.data.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model(**batch).logits, want)


def test_dropout_hides_inputs_of_the_experts_in_training_only() -> None:
    layer = LoRAMoE(nn.Linear(64, 8, bias=False), 2, 2, 2.0, dropout=0.25)
    layer.up.data.fill_(1.0)
    layer.down.data.fill_(1.0)
    x = torch.eye(64)
    base = layer.base_layer(x)
    layer.eval()
    torch.testing.assert_close(layer(x) - base, torch.full((64, 8), 2.0))
    layer.train()
    torch.manual_seed(0)
    added = layer(x) - base
    hidden = added.abs().amax(1) < 1e-5
    torch.testing.assert_close(added[~hidden], torch.full_like(added[~hidden], 2.0 / 0.75))
    assert 0 < hidden.sum() < 32
    torch.manual_seed(0)
    assert torch.equal(layer(x) - base, added)


def test_a_base_of_bfloat16_has_experts_of_float32() -> None:
    model = tiny_models.llama().bfloat16()
    add_lora_moe(model, experts=4, rank=2)
    layer = lora_moe_layers(model)["model.layers.0.mlp.up_proj"]
    assert layer.down.dtype == layer.up.dtype == torch.float32
    loss = model(**tiny_models.batch()).loss
    loss.backward()
    assert loss.dtype in (torch.bfloat16, torch.float32)
    assert layer.up.grad is not None
    assert layer.up.grad.dtype == torch.float32


def test_generate_with_a_cache_is_generate_without() -> None:
    model = trained().eval()
    prompt = {k: v[1:] for k, v in tiny_models.batch().items() if k != "labels"}
    given = {**prompt, "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        fast, slow = (model.generate(**given, use_cache=c) for c in (True, False))
    assert torch.equal(fast, slow)


def test_one_layer_under_two_names_stays_one() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    assert add_lora_moe(model, "0", experts=2, rank=1) == ["a.0", "b.0"]
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], LoRAMoE)
    remove_lora_moe(model)
    assert model["a"][0] is model["b"][0] is shared


def test_removing_gives_the_base_back() -> None:
    base, model = tiny_models.llama(), trained()
    assert remove_lora_moe(model) is model
    want = base.state_dict()
    assert {k: v for k, v in model.state_dict().items() if not torch.equal(v, want[k])} == {}
    assert list(want) == list(model.state_dict())
    with pytest.raises(ValueError, match="has no layer with experts"):
        remove_lora_moe(model)


# --- saving ------------------------------------------------------------------------------------


def test_round_trip_by_a_file(tmp_path: Path) -> None:
    model, batch = trained(), tiny_models.batch()
    want = model(**batch).logits
    state = lora_moe_state_dict(model)
    assert len(state) == 5 * 6
    save_file(state, tmp_path / "experts.safetensors")
    read = load_file(tmp_path / "experts.safetensors")
    fresh = tiny_models.llama()
    names = load_lora_moe(fresh, read, dropout=0.1)
    assert names == list(lora_moe_layers(fresh)) == list(lora_moe_layers(model))
    assert torch.equal(fresh.eval()(**batch).logits, want)
    assert all(x.dropout == 0.1 for x in lora_moe_layers(fresh).values())
    assert not fresh.lm_head.weight.requires_grad
    there = trained(seed=5)
    load_lora_moe(there, read)
    assert torch.equal(there(**batch).logits, want)


def test_the_base_may_be_rounded_but_not_another() -> None:
    state = lora_moe_state_dict(trained())
    load_lora_moe(tiny_models.llama().bfloat16(), state)
    with pytest.raises(CheckpointError, match="gate_proj was trained on another base"):
        load_lora_moe(tiny_models.llama(seed=1), state)
    load_lora_moe(tiny_models.llama(seed=1), state, check_base=False)


def wrong_states() -> list[tuple[str, dict[str, Any], str]]:
    """(change of the state, options of the model that it is loaded into, words)."""
    return [
        ("empty", {}, "state is empty"),
        ("alien", {}, "model.embed_tokens.weight is not a part of LoRAMoE"),
        ("cut", {}, "state has no model.layers.0.mlp.gate_proj.up"),
        ("", {"rank": 3, "alpha": 6.0}, "gate_proj.down has the shape (8, 16), where the model "
                                        "needs (12, 16)"),
        ("", {"experts": 2}, "gate_proj.down has the shape (8, 16), where the model needs (4, 16)"),
        ("", {"alpha": 8.0}, "was trained with the scale 2, the model has 4"),
        ("", {"targets": ["up_proj"]}, "model has no experts in the layer "
                                       "model.layers.0.mlp.gate_proj and 3 more"),
        ("fewer", {}, "state has no experts for the layer model.layers.0.mlp.gate_proj and 1"),
        ("wide", {"hidden_size": 24}, "gate_proj.down has the shape (8, 16), where the model "
                                      "needs (8, 24)"),
        ("elsewhere", {"base": True}, "model has no experts in the layer model.layers.9.mlp.up"),
        ("ragged", {"base": True}, "gate_proj.down has the shape (7, 16)"),
        ("norm", {"base": True}, "model.norm must be an nn.Linear"),
    ]  # fmt: skip


@pytest.mark.parametrize(("change", "options", "words"), wrong_states())
def test_wrong_states_change_nothing(change: str, options: dict[str, Any], words: str) -> None:
    state = lora_moe_state_dict(trained())
    first = "model.layers.0.mlp.gate_proj"
    if change == "empty":
        state = {}
    elif change == "alien":
        state["model.embed_tokens.weight"] = torch.zeros(1)
    elif change == "cut":
        state.pop(f"{first}.up")
    elif change == "fewer":
        state = {k: v for k, v in state.items() if ".gate_proj." not in k}
    elif change == "ragged":
        state[f"{first}.down"] = state[f"{first}.down"][1:]
    elif change in ("elsewhere", "norm"):
        other = "model.norm" if change == "norm" else "model.layers.9.mlp.up_proj"
        state = {k.replace("model.layers.0.mlp.up_proj", other): v for k, v in state.items()}
    options = dict(options)
    sizes = {"hidden_size": options.pop("hidden_size")} if "hidden_size" in options else {}
    model = tiny_models.llama(**sizes)
    if not options.pop("base", False):
        trained(seed=2, model=model, **options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_lora_moe(model, state)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- the balancing loss ------------------------------------------------------------------------


def slow_balance(
    gates: list[Tensor], types: list[int], weight: float, delta: float, form: str
) -> float:
    """Number by number in float64; gates hold the tokens that count, one list per layer and row."""
    total = 0.0
    for rows in gates:
        z = []
        for p, kind in zip(rows, types, strict=True):
            n = p.shape[1]
            for i in range(n):
                q = sum(float(p[t, i]) for t in range(p.shape[0]))
                z.append(q * (1 + delta if (i < n // 2) == (kind == 1) else 1 - delta))
        mean = sum(z) / len(z)
        variance = sum((v - mean) ** 2 for v in z) / (len(z) - 1)
        total += weight * variance / ((mean**2 if form == "code" else mean) + 1e-10)
    return total


def gates_of(model: nn.Module, batch: dict[str, Tensor], masked: bool) -> list[Any]:
    """The gates of a forward pass in float64, recorded by hooks of the test."""
    taken, hooks = [], []
    for layer in lora_moe_layers(model).values():
        hooks.append(
            layer.register_forward_hook(
                lambda layer, args, _: taken.append(slow_experts(layer, args[0].detach())[1])
            )
        )
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    mask = batch["attention_mask"].bool()
    return [[row[mask[b]] if masked else row for b, row in enumerate(p)] for p in taken]


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("masked", [False, True])
def test_balance_equals_the_formula(masked: bool, form: Any) -> None:
    model, batch = trained(), typed_batch()
    plain = {k: v for k, v in batch.items() if k != "task_type"}
    gates = gates_of(model, plain, masked)
    keep = Balance(0.3, 0.2, form=form, mask_padding=masked)
    keep.before_task(model, Task("a"))
    out = model(**batch)
    assert torch.equal(out.logits, model(**plain).logits)
    value = keep.loss(model, batch)
    assert value is not None
    want = slow_balance(gates, batch["task_type"].tolist(), 0.3, 0.2, form)
    assert value.item() == pytest.approx(want, rel=1e-5)
    assert keep.measures() == {"balance/loss": pytest.approx(want, rel=1e-5)}
    value.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "model.layers.0.mlp.gate_proj.gate" in touched
    assert all(n.endswith((".gate", ".down", ".up")) for n in touched)
    swapped = Balance(0.3, 0.2, form=form, mask_padding=masked)
    keep.after_task(model, Task("a"))
    swapped.before_task(model, Task("a"))
    other = {**batch, "task_type": 1 - batch["task_type"]}
    model(**other)
    assert swapped.loss(model, other) != value


def test_equal_gates_cost_nothing_but_the_preference() -> None:
    """All p = 1/n: Z is (1 +- delta) L / n, half of each; the relative variance is known."""
    model, batch = trained(), typed_batch()
    for layer in lora_moe_layers(model).values():
        layer.gate.data.zero_()
    for delta in (0.0, 0.1, -0.1):
        keep = Balance(1.0, delta)
        keep.before_task(model, Task("a"))
        model(**batch)
        count = 4 * 4
        want = 6 * delta**2 * count / (count - 1)
        value = keep.loss(model, batch)
        assert value is not None
        assert value.item() == pytest.approx(want, rel=1e-5, abs=1e-9)
        keep.after_task(model, Task("a"))


def test_gradient_of_balance_equals_autograd_of_the_formula() -> None:
    """One layer as the model: the gate's gradient against the formula written out in float64."""
    layer = LoRAMoE(nn.Linear(5, 4), 4, 2)
    layer.gate.data.normal_(generator=torch.Generator().manual_seed(0))

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out

    model, x = One(), torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
    types = torch.tensor([0, 1, 1])
    keep = Balance(0.5, 0.3)
    keep.before_task(model, Task("a"))
    model(x, task_type=types)
    value = keep.loss(model, {"x": x, "task_type": types})
    assert value is not None
    value.backward()
    gate = layer.gate.detach().double().requires_grad_()
    q = F.softmax(x.double() @ gate.t(), -1).sum(1)
    other, mine = [0.7, 0.7, 1.3, 1.3], [1.3, 1.3, 0.7, 0.7]
    z = q * torch.tensor([other, mine, mine], dtype=torch.float64)
    mean = z.sum() / 12
    (want,) = torch.autograd.grad(0.5 * (z - mean).square().sum() / 11 / mean.square(), gate)
    assert layer.gate.grad is not None
    assert (layer.gate.grad.double() - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_balance_under_checkpointing(checkpointing: bool) -> None:
    """Layers run again in the backward pass; nothing is collected then, and nothing changes."""
    model, batch = trained().train(), typed_batch()
    want = None
    for how in (False, checkpointing):
        model.zero_grad()
        if how:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        keep = Balance(0.5)
        keep.before_task(model, Task("a"))
        loss = model(**batch).loss + keep.loss(model, batch)
        loss.backward()
        assert all(layer.gates is None for layer in lora_moe_layers(model).values())
        assert keep._found is None
        keep.after_task(model, Task("a"))
        got = tiny_models.gradients(model)
        for name, g in (want or got).items():
            torch.testing.assert_close(got[name], g)
        want = got
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        keep.before_task(model, Task("a"))
        model(**batch)
        with pytest.raises(ValueError, match="reentrant gradient checkpointing hides them"):
            keep.loss(model, batch)


def test_other_passes_leave_no_gates() -> None:
    """Those of other keeps, without gradients, in eval mode; the host's are freed when used."""
    model, batch = trained().train(), typed_batch()
    plain = {k: v for k, v in batch.items() if k != "task_type"}
    keep = Balance()
    keep.before_task(model, Task("a"))
    model(**batch)
    hidden_states(model, input_ids=batch["input_ids"])
    model(**{**plain, "input_ids": plain["input_ids"].flip(0)})
    with torch.no_grad():
        model(**batch)
    model.eval()
    model(**batch)
    model.train()
    first = keep.loss(model, batch)
    model(**batch)
    assert keep.loss(model, batch) == first
    for spoil in (lambda: model.eval(), lambda: None):
        spoil()
        if not model.training:
            model(**batch)
        with pytest.raises(ValueError, match="was not called with the column"):
            keep.loss(model, batch)
        model.train()
    keep.after_task(model, Task("a"))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_failing_pass_leaves_nothing_behind() -> None:
    model, batch = trained().train(), typed_batch()
    keep = Balance()
    keep.before_task(model, Task("a"))
    with pytest.raises(IndexError):
        model(**{**batch, "input_ids": batch["input_ids"] + 1000})
    assert all(layer.gates is None for layer in lora_moe_layers(model).values())


# --- bad input ---------------------------------------------------------------------------------


BAD_LAYERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"targets": ["c_fc"]}, ValueError, "no layer's name ends in 'c_fc'; the linear layers end in "
                                        "['down_proj', 'gate_proj', 'k_proj', 'lm_head'"),
    ({"targets": []}, ValueError, "targets must name at least one layer"),
    ({"targets": "mlp"}, TypeError, "model.layers.0.mlp must be an nn.Linear or a Conv1D"),
    ({"targets": ["embed_tokens"]}, TypeError, "embed_tokens must be an nn.Linear"),
    ({"experts": 0}, ValueError, "experts must be at least 1; got 0"),
    ({"experts": 2.0}, TypeError, "experts must be an int; got 2.0"),
    ({"rank": -1}, ValueError, "rank must be"),
    ({"alpha": 0.0}, ValueError, "alpha must be positive"),
    ({"dropout": 1.0}, ValueError, "dropout must be in [0, 1)"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "words"), BAD_LAYERS)
def test_bad_options_change_nothing(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = tiny_models.llama()
    with pytest.raises(error, match=re.escape(words)):
        add_lora_moe(model, **options)
    assert not lora_moe_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_layers_that_cannot_be_wrapped() -> None:
    model = trained()
    with pytest.raises(TypeError, match="it has experts already; remove_lora_moe"):
        add_lora_moe(model)
    with pytest.raises(ValueError, match="cannot be folded into the weight"):
        lora_moe_layers(model)["model.layers.0.mlp.up_proj"].merge()
    with torch.device("meta"):
        empty = tiny_models.llama()
    with pytest.raises(ValueError, match=r"has no weights yet \(meta device\)"):
        add_lora_moe(empty)
    adapted = nn.Sequential(nn.Identity())
    adapted[0].lora_A = nn.ModuleDict()
    with pytest.raises(TypeError, match="it has adapters of PEFT already"):
        add_lora_moe(adapted, "0")


BAD_BALANCE: list[tuple[dict[str, Any], str]] = [
    ({"weight": -0.1}, "weight must be 0 or more"),
    ({"weight": float("nan")}, "weight must be"),
    ({"delta": 1.0}, "delta must be in (-1, 1)"),
    ({"form": "squared"}, "form must be one of 'code', 'paper'; got 'squared'"),
    ({"column": "labels"}, "column must be one that the model does not need"),
]


@pytest.mark.parametrize(("options", "words"), BAD_BALANCE)
def test_bad_balance(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Balance(**options)


BAD_BATCHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"task_type": torch.tensor([0, 1, 2, 7])}, ValueError, "task_type must be 0 or 1 for each "
                                                            "sequence; got [2, 7]"),
    ({"task_type": torch.tensor([0.0, 1.0, 0.0, 1.0])}, TypeError, "whole numbers, one per"),
    ({"task_type": ["qa", "qa", "x", "x"]}, TypeError, "whole numbers, one per sequence; got list"),
    ({"task_type": torch.tensor([0, 1])}, ValueError, "tells the types of 2 sequences, where a "
                                                      "layer saw the shape (4, 9)"),
    ({"task_type": None}, ValueError, "the batch has no column 'task_type': keep it in the "
                                      "dataset (remove_unused_columns=False)"),
    ({"attention_mask": None}, ValueError, "mask_padding=True needs an attention_mask"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), BAD_BATCHES)
def test_bad_batches(change: dict[str, Any], error: type[Exception], words: str) -> None:
    model = trained().train()
    keep = Balance(mask_padding=True)
    keep.before_task(model, Task("a"))
    batch = {k: v for k, v in {**typed_batch(), **change}.items() if v is not None}
    model(**batch)
    with pytest.raises(error, match=re.escape(words)):
        keep.loss(model, batch)


def test_balance_needs_halves() -> None:
    with pytest.raises(ValueError, match="has no layer with experts: call add_lora_moe first"):
        Balance().before_task(tiny_models.llama(), Task("a"))
    with pytest.raises(ValueError, match=r"gate_proj has 3 experts, which cannot be halved"):
        Balance().before_task(trained(experts=3), Task("a"))
    with pytest.raises(ValueError, match="example 1 of the batch has no column 'task_type'"):
        WithColumn(dict)([{"task_type": 1}, {"x": 1}])
    with pytest.raises(ValueError, match="task_type must be 0 or 1; example 0 has 'qa'"):
        WithColumn(dict)([{"task_type": "qa"}])
    with pytest.raises(TypeError, match="collate must be a collator; got str"):
        WithColumn("task_type")  # type: ignore[arg-type]


# --- in the Trainer ----------------------------------------------------------------------------


class Keeping(KeepMixin, Trainer):  # type: ignore[misc]
    pass


def collate(examples: list[Any]) -> dict[str, Tensor]:
    ids = torch.stack([torch.tensor(e["input_ids"]) for e in examples])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def examples(count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny_models.VOCABULARY, (count, 8), generator=g)
    return [{"input_ids": row.tolist(), "task_type": i % 2} for i, row in enumerate(ids)]


def train(
    folder: Path, data: list[Any], model: Any = None, resume: Any = None, **options: Any
) -> tuple[Any, Trainer]:
    model = trained() if model is None else model
    given = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "logging_steps": 1,
        "disable_tqdm": True, "remove_unused_columns": False, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential", **options,
    }  # fmt: skip
    keep = [Balance(0.5)]
    trainer = Keeping(
        model, TrainingArguments(str(folder), **given), train_dataset=data,
        data_collator=WithColumn(collate), keep=keep,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_trains_in_the_trainer(tmp_path: Path) -> None:
    """Checkpointing on; the base stays, the experts move, the loss is logged, and resumed."""
    data = examples(4)
    base = tiny_models.llama()
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    model, trainer = train(
        tmp_path / "a", data, gradient_checkpointing=True, eval_strategy="no", **options
    )
    logs = [x["balance/loss"] for x in trainer.state.log_history if "balance/loss" in x]
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert len(logs) == len(losses) == 6
    assert losses[-1] < losses[0]
    start, end = lora_moe_layers(trained()), lora_moe_layers(model)
    for name, layer in end.items():
        assert torch.equal(layer.weight, base.get_submodule(name).weight)
        for part in ("down", "gate", "up"):
            assert not torch.equal(getattr(layer, part), getattr(start[name], part))
    again, _ = train(
        tmp_path / "a", data, trained(seed=9), tmp_path / "a" / "checkpoint-3", **options
    )
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name


def test_accumulation_does_not_change_the_weight_of_the_loss(tmp_path: Path) -> None:
    """The same micro-batch four times is the micro-batch once, whatever the host divides."""
    once = examples(4)
    one, _ = train(tmp_path, once, max_steps=1, optim="sgd")
    four, _ = train(tmp_path, once * 4, max_steps=1, optim="sgd", gradient_accumulation_steps=4)
    start = trained().state_dict()
    moved = 0.0
    for name, p in one.state_dict().items():
        moved = max(moved, float((p - start[name]).abs().max()))
        torch.testing.assert_close(four.state_dict()[name], p, rtol=0, atol=1e-7)
    assert moved > 1e-4


def test_evaluation_ignores_the_column(tmp_path: Path) -> None:
    data = examples()
    _, trainer = train(tmp_path, data, eval_strategy="no")
    model = trainer.model
    keep = Balance()
    keep.before_task(model, Task("a"))
    with_column = trainer.evaluate(data)["eval_loss"]
    trainer.data_collator = lambda rows: collate(rows)
    assert trainer.evaluate(data)["eval_loss"] == with_column
    assert keep._found is None


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_page_in_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "lora-moe.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {
        "model": tiny_models.llama(), "fresh_base": tiny_models.llama(), "out": str(tmp_path),
        "train_dataset": examples(), "collate": collate, "batches": [typed_batch()],
    }  # fmt: skip
    for block in blocks:
        exec(block, names)
    assert list(lora_moe_layers(names["fresh_base"])) == names["names"]
    assert names["trainer"].state.global_step == 2
