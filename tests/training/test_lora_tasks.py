"""One LoRA per task: what is trained, composed and merged, against sums of products in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import batch, llama
from torch import Tensor, nn

from cl_fast.models.adapters import lora_layers
from cl_fast.training.keeping import Task
from cl_fast.training.lora_tasks import LoraTasks, compose, merged_state_dict, use

TARGETS = ["q_proj", "down_proj"]
INPUTS = batch(0)["input_ids"]


def adapted(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    options = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, **changes}
    return get_peft_model(llama(0).to(dtype), LoraConfig(**options))


def filled(model: Any, names: str, **changes: Any) -> Any:
    """Adapters with random factors."""
    for i, name in enumerate(names):
        if name not in model.peft_config:
            config = copy.deepcopy(model.peft_config["default"])
            for key, value in changes.get(name, {}).items():
                setattr(config, key, value)
            model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(i)
        for layer in lora_layers(model, name):
            for factor in (layer.down, layer.up):
                factor.data = 0.3 * torch.randn(
                    factor.shape, generator=generator, dtype=torch.float64
                ).to(factor.dtype)
    return model


def trained(model: nn.Module, seed: int = 0) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    for step in range(2):
        optimizer.zero_grad()
        model(**batch(seed + step)).loss.backward()
        optimizer.step()


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(INPUTS).logits
    model.train()
    return out


def summed(model: Any, weights: dict[str, float]) -> Tensor:
    """What a plain model answers with W + sum w s B A."""
    plain = llama(0).double()
    with torch.no_grad():
        for name, weight in weights.items():
            for x in lora_layers(model, name):
                target = plain.get_submodule(x.name.removeprefix("base_model.model."))
                target.weight += weight * x.scale * x.up.double() @ x.down.double()
    return logits(plain)


def same(found: Tensor, expected: Tensor) -> None:
    """The model's norms compute in float32."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def same_deltas(model: Any, composed: str, weights: dict[str, float]) -> None:
    parts = {name: {x.name: x for x in lora_layers(model, name)} for name in weights}
    for layer in lora_layers(model, composed):
        total = sum(
            w * x.scale * x.up @ x.down
            for name, w in weights.items()
            if (x := parts[name].get(layer.name))
        )
        found = layer.scale * layer.up @ layer.down
        torch.testing.assert_close(found, total, rtol=1e-12, atol=1e-12)


# --- training ----------------------------------------------------------------------------------


def test_each_task_trains_an_adapter_of_its_own() -> None:
    model, keep = adapted(), LoraTasks(seed=5)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    answers = {}
    for i, name in enumerate("abc"):
        keep.before_task(model, Task(name, i))
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(trainable) == 8
        assert all(f".{name}.weight" in n for n in trainable)
        same(logits(model), summed(model, {}))  # B is 0
        trained(model, i)
        keep.after_task(model, Task(name, i))
        answers[name] = logits(model)
        assert not any(p.requires_grad for p in model.parameters())
    assert keep.tasks == ["a", "b", "c"]
    for name in "cab":
        use(model, name)
        assert torch.equal(logits(model), answers[name])  # nothing is forgotten
        same(answers[name], summed(model, {name: 1.0}))
        assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_fresh_adapters_follow_from_the_seed_and_the_name_alone() -> None:
    def drawn(seed: int, name: str, noise: int) -> Tensor:
        model = adapted()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        LoraTasks(seed=seed).before_task(model, Task(name))
        assert torch.equal(torch.get_rng_state(), state)
        layers = lora_layers(model, name)
        assert not any(x.up.any() for x in layers)
        for x in layers:
            assert 0.5 < float(x.down.detach().abs().max()) * x.down.shape[1] ** 0.5 < 1
        return torch.cat([x.down.detach().reshape(-1) for x in layers])

    first = drawn(0, "a", 1)
    assert torch.equal(drawn(0, "a", 2), first)
    assert not torch.equal(drawn(1, "a", 1), first)
    assert not torch.equal(drawn(0, "b", 1), first)
    assert len(first.unique()) == len(first)


def test_a_task_may_begin_where_the_one_before_it_ended() -> None:
    model, keep = adapted(), LoraTasks(start="previous")
    keep.before_task(model, Task("a"))
    trained(model)
    keep.after_task(model, Task("a"))
    ended = logits(model)
    keep.before_task(model, Task("b"))
    assert torch.equal(logits(model), ended)
    trained(model)
    use(model, "a")
    assert torch.equal(logits(model), ended)


def test_a_stream_is_resumed_with_equal_bits() -> None:
    straight, keep = adapted(torch.float32), LoraTasks(start="previous")
    for name in "ab":
        keep.before_task(straight, Task(name))
        trained(straight)
        keep.after_task(straight, Task(name))
    weights, state = copy.deepcopy(straight.state_dict()), keep.state_dict()
    resumed, other = adapted(torch.float32), LoraTasks(start="previous")
    other.restore(resumed, [Task("a"), Task("b")])
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    for model, one in ((straight, keep), (resumed, other)):
        one.before_task(model, Task("c"))
        trained(model)
        one.after_task(model, Task("c"))
    pairs = zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True)
    for (name, x), (_, y) in pairs:
        assert torch.equal(x, y), name
    assert other.tasks == ["a", "b", "c"]


# --- at inference ------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_cat_is_exactly_the_weighted_sum(rslora: bool) -> None:
    changes = {"b": {"r": 3, "lora_alpha": 5}}
    model = filled(adapted(use_rslora=rslora), "abc", **changes)
    weights = {"a": 0.7, "b": -0.4, "c": 1.5}
    assert compose(model, weights) == "composed"
    same(logits(model), summed(model, weights))
    same_deltas(model, "composed", weights)
    assert lora_layers(model, "composed")[0].down.shape[0] == 7
    assert model.active_adapters == ["composed"]
    assert not any(p.requires_grad for p in model.parameters())
    compose(model, {"b": 2.0}, replace=True)
    same(logits(model), summed(model, {"b": 2.0}))
    same_deltas(model, "composed", {"b": 2.0})
    use(model, "a")
    same(logits(model), summed(model, {"a": 1.0}))


def test_layers_that_only_some_adapters_have() -> None:
    model = filled(adapted(), "ab", b={"target_modules": {"q_proj", "v_proj"}})
    weights = {"a": 0.7, "b": -0.4}
    compose(model, weights)
    assert len(lora_layers(model, "composed")) == 6
    same_deltas(model, "composed", weights)
    plain = llama(3).double()
    plain.load_state_dict(merged_state_dict(model, weights))
    same(logits(plain), logits(model))


def test_adapters_are_saved_and_loaded_by_peft(tmp_path: Path) -> None:
    """Under any name, also one that PEFT warns of because it is a part of its prefix."""
    model = filled(adapted(), "ab")
    compose(model, {"a": 0.7, "b": -0.4}, name="lora")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(0).double(), tmp_path / "lora", adapter_name="lora")
    assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(tmp_path / "a", "a")
    use(loaded, "a")
    same(logits(loaded), summed(model, {"a": 1.0}))


def test_other_merges_are_those_of_peft() -> None:
    weights = {"a": 0.7, "b": 0.6}
    for how, options in (
        ("linear", {}), ("svd", {"svd_rank": 4}), ("ties", {"density": 0.5}),
        ("ties_svd", {"density": 0.5}), ("magnitude_prune", {"density": 0.5}),
        ("dare_ties", {"density": 0.5}), ("dare_linear_svd", {"density": 0.5}),
    ):  # fmt: skip
        ours, theirs = filled(adapted(), "ab"), filled(adapted(), "ab")
        state = torch.get_rng_state()
        compose(ours, weights, how, seed=11, **options)  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(11)
        theirs.add_weighted_adapter(
            ["a", "b"], [0.7, 0.6], "merged", combination_type=how, **options
        )
        theirs.set_adapter("merged")
        assert torch.equal(logits(ours), logits(theirs)), how
        if how == "svd":  # of the full rank of the sum
            torch.testing.assert_close(logits(ours), summed(ours, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["a", {"a": 0.7, "b": -0.4}])
def test_the_merged_state_dict_is_a_plain_model(weights: Any) -> None:
    model = filled(adapted(), "ab")
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    merged = merged_state_dict(model, weights)
    plain = llama(3).double()
    plain.load_state_dict(merged)  # strictly: all names, and no more
    same(logits(plain), summed(model, weights if isinstance(weights, dict) else {"a": 1.0}))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_merged_state_dict_is_rounded_once() -> None:
    model = filled(adapted(torch.bfloat16), "ab")
    merged = merged_state_dict(model, {"a": 0.7, "b": 0.3})
    for x, y in zip(lora_layers(model, "a"), lora_layers(model, "b"), strict=True):
        assert x.down.dtype == torch.float32
        exact = x.base.weight.double()
        exact = exact + 0.7 * x.scale * x.up.double() @ x.down.double()
        exact = exact + 0.3 * y.scale * y.up.double() @ y.down.double()
        found = merged[x.name.removeprefix("base_model.model.") + ".weight"]
        assert found.dtype == torch.bfloat16
        error = (found.double() - exact).abs() - exact.abs() * 2.0**-8 * 1.001
        assert float(error.detach().max()) < 1e-6


def test_biases_and_whole_modules_are_merged() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], lora_bias=True)
    model: Any = get_peft_model(base, config)
    x = torch.randn(5, 4, dtype=torch.float64)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_()
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    plain.load_state_dict(merged_state_dict(model, "default"))
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="1 is in modules_to_save of the task 'default'"):
        merged_state_dict(model, {"default": 0.5})
    with pytest.raises(ValueError, match="lora_bias=True"):
        compose(model, {"default": 1.0})


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> Any:
    return filled(adapted(), "ab")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: use(m, "z"), ValueError, r"unknown task 'z'; the model has adapters of \['d"),
        (lambda m: compose(m, {"z": 1.0}), ValueError, "unknown task 'z'"),
        (lambda m: merged_state_dict(m, "z"), ValueError, "unknown task 'z'"),
        (lambda m: compose(m, {}), ValueError, "weights must name at least one task"),
        (lambda m: compose(m, ["a"]), TypeError, "weights must map names of tasks to numbers"),
        (lambda m: compose(m, {"a": "1"}), TypeError, r"weights\['a'\] must be a number"),
        (lambda m: compose(m, {"a": float("inf")}), ValueError, r"weights\['a'\] must be finite"),
        (lambda m: compose(m, {"a": 1, "b": 1}, "mean"), ValueError, "how must be one of 'cat', "),
        (lambda m: compose(m, {"a": 1, "b": 1}, "ties"), ValueError, "'ties' needs density"),
        (lambda m: compose(m, {"a": 1}, name="b"), ValueError, "there is an adapter called 'b'"),
        (lambda m: compose(m, {"a": 1}, name="a", replace=True), ValueError, "called 'a'"),
        (lambda m: compose(m, {"a": 1}, seed=1.5), TypeError, "seed must be an int"),
        (lambda m: use(nn.Linear(2, 2), "a"), ValueError, "Linear is not a PeftModel"),
        (lambda m: LoraTasks(start="last"), ValueError, "start must be one of"),
        (lambda m: LoraTasks(seed="1"), TypeError, "seed must be an int"),
        (lambda m: LoraTasks().before_task(m, Task("x.y")), ValueError, "or hold a dot"),
        (lambda m: LoraTasks().before_task(m, Task("")), ValueError, "must not be empty"),
        (lambda m: LoraTasks(adapter="q").before_task(m, Task("x")), ValueError, "no adapter 'q'"),
    ],
)
def test_errors(call: Any, error: Any, words: str, two: Any) -> None:
    before = list(two.peft_config)
    with pytest.raises(error, match=words):
        call(two)
    assert list(two.peft_config) == before


def test_a_task_is_trained_once() -> None:
    model, keep = adapted(), LoraTasks()
    keep.before_task(model, Task("a"))
    keep.after_task(model, Task("a"))
    with pytest.raises(ValueError, match="the task 'a' was trained before"):
        keep.before_task(model, Task("a"))


def test_a_quantised_base_is_not_merged() -> None:
    model = filled(adapted(), "a")
    layer = lora_layers(model, "a")[0].base
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj: the base is quantised .*Load the base in"):
        merged_state_dict(model, "a")
