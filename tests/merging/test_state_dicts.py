"""Merging in memory: the same bits as the recipe path, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import merge_cases
import pytest
import torch
from torch import Tensor, nn

from cl_fast import merging
from cl_fast.errors import CheckpointError, NonFiniteError, RecipeError
from cl_fast.merging import dare_linear, dare_ties, linear, task_arithmetic, ties
from cl_fast.merging.engine import execute
from cl_fast.merging.plan import make_plan
from cl_fast.merging.recipe import parse_recipe
from cl_fast.ops import Policy, combine

NAMES = ("math", "code", "chat")


def model(seed: int, near: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (64, 12),
        "model.layers.0.mlp.up_proj.weight": (40, 12),
        "model.layers.0.norm.weight": (12,),
        "model.layers.1.mlp.up_proj.weight": (40, 12),
        "model.layers.1.norm.weight": (12,),
    }
    state = {}
    for name, shape in shapes.items():
        dtype = torch.float32 if "norm" in name else torch.bfloat16
        value = 0.05 * torch.randn(shape, generator=g)
        if near is not None:
            value = near[name].float() + 0.1 * value
        state[name] = value.to(dtype)
    state["model.position_ids"] = torch.arange(7)
    return state


def family() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    base = model(0)
    return base, {name: model(i + 1, base) for i, name in enumerate(NAMES)}


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    # name: function, keywords, what a recipe says for the same
    "linear": (linear, {"weight": [1.0, 0.5, 2.0]}, {}),
    "linear_sum": (linear, {"weight": 0.4, "normalize": False}, {"normalize": False}),
    "linear_fp16": (linear, {"out_dtype": torch.float16}, {}),
    "task_arithmetic": (task_arithmetic, {"weight": [1.0, -0.5, 0.3], "lam": 0.8}, {"lambda": 0.8}),
    "ties": (ties, {"density": 0.2, "weight": [1.0, 0.5, 0.25]}, {}),
    "ties_densities": (ties, {"density": [0.2, 1.0, 0.7], "lam": 0.5}, {"lambda": 0.5}),
    "ties_peft": (ties, {"density": 0.3, "variant": "peft"}, {"variant": "peft"}),
    "ties_paper": (ties, {"density": 0.2, "variant": "paper"}, {"variant": "paper"}),
    "ties_choices": (
        ties,
        {
            "density": 0.4,
            "trim_count": "floor",
            "trim_ties": "all",
            "elect": "frequency",
            "elect_on": "unweighted",
            "reduce": "max",
            "rescale": True,
            "rescale_by": "l1",
        },
        {
            "trim_count": "floor",
            "trim_ties": "all",
            "elect": "frequency",
            "elect_on": "unweighted",
            "reduce": "max",
            "rescale": True,
            "rescale_by": "l1",
        },
    ),
    "ties_all": (ties, {"density": 1.0, "weight": 0.5}, {}),
    "dare_linear": (dare_linear, {"density": 0.3, "seed": 5}, {}),
    "dare_linear_plain": (dare_linear, {"density": 0.3, "rescale": False}, {"rescale": False}),
    "dare_linear_paper": (
        dare_linear,
        {"density": [0.3, 0.5, 1.0], "variant": "paper", "weight": 0.6},
        {"variant": "paper"},
    ),
    "dare_ties": (dare_ties, {"density": 0.5, "seed": 1}, {}),
    "dare_ties_peft": (dare_ties, {"density": 0.5, "variant": "peft"}, {"variant": "peft"}),
}


def merged(name: str, **more: Any) -> dict[str, Tensor]:
    function, keywords, _ = CASES[name]
    base, models = family()
    arguments = (models,) if function is linear else (base, models)
    return function(*arguments, **keywords, **more)


def each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] * len(NAMES)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_the_recipe(name: str, backend: str, tmp_path: Path) -> None:
    function, keywords, extra = CASES[name]
    base, models = family()
    for who, state in {"base": base, **models}.items():
        merge_cases.save(tmp_path / who, state)
    recipe: dict[str, Any] = {"merge_method": function.__name__, "parameters": extra, "models": []}
    for k, who in enumerate(NAMES):
        parameters = {"weight": each(keywords.get("weight", 1.0))[k]}
        if "density" in keywords:
            parameters["density"] = each(keywords["density"])[k]
        recipe["models"].append({"model": str(tmp_path / who), "parameters": parameters})
    if function is not linear:
        recipe["base_model"] = str(tmp_path / "base")
    if "seed" in keywords:
        recipe["seed"] = keywords["seed"]
    if "out_dtype" in keywords:
        recipe["out_dtype"] = str(keywords["out_dtype"]).removeprefix("torch.")
    execute(make_plan(parse_recipe(recipe), tmp_path / "out"), backend=backend)
    wanted = merge_cases.load(tmp_path / "out")

    got = merged(name, backend=backend)
    assert got.keys() == wanted.keys()
    for key, tensor in got.items():
        assert tensor.dtype == wanted[key].dtype
        assert torch.equal(tensor, wanted[key]), key


@pytest.mark.parametrize("name", CASES)
def test_backends_agree(name: str, backend: str) -> None:
    want, got = merged(name, backend="eager"), merged(name, backend=backend)
    assert all(torch.equal(want[key], got[key]) for key in want)


def test_names_and_order_are_those_of_the_base() -> None:
    base, models = family()
    shuffled = {name: dict(reversed(state.items())) for name, state in models.items()}
    out = ties(base, shuffled, density=0.5)
    assert list(out) == list(base)
    assert all(torch.equal(out[k], v) for k, v in ties(base, models, density=0.5).items())


def test_a_list_is_named_by_position() -> None:
    base, models = family()
    listed = dare_linear(base, list(models.values()), density=0.5)
    named = dare_linear(base, dict(zip("012", models.values(), strict=True)), density=0.5)
    other = dare_linear(base, models, density=0.5)
    key = "model.embed_tokens.weight"
    assert torch.equal(listed[key], named[key])
    assert not torch.equal(listed[key], other[key])


def test_inputs_and_outputs_share_nothing() -> None:
    base, models = family()
    before = {k: v.clone() for k, v in base.items()}
    out = linear([base])
    for key, tensor in out.items():
        assert tensor.data_ptr() != base[key].data_ptr()
        assert torch.equal(tensor, base[key])
    ties(base, models, density=0.2)
    assert all(torch.equal(before[k], v) for k, v in base.items())


def test_negation_takes_a_task_out() -> None:
    base, models = family()
    added = task_arithmetic(base, [models["math"]], out_dtype=torch.float32)
    back = task_arithmetic(added, [models["math"]], weight=0.0)
    assert all(torch.equal(back[k], added[k]) for k in back)
    negated = task_arithmetic(base, [models["math"]], weight=-1.0, out_dtype=torch.float32)
    for key, tensor in base.items():
        if tensor.is_floating_point():
            middle = (added[key].double() + negated[key].double()) / 2
            torch.testing.assert_close(middle, tensor.double(), rtol=1e-6, atol=1e-7)


def test_weights_by_tensor_name() -> None:
    base, models = family()

    def early(name: str) -> float:
        return 1.0 if "layers.0" in name else 0.0

    out = task_arithmetic(base, models, weight=[early, 0.0, 0.0])
    for key, tensor in base.items():
        expected = models["math"][key] if "layers.0" in key else tensor
        torch.testing.assert_close(out[key], expected, rtol=1e-2, atol=1e-3)
    table = {key: early(key) for key in base}
    again = task_arithmetic(base, models, weight=[table, 0.0, 0.0])
    assert all(torch.equal(out[key], again[key]) for key in out)
    everywhere = task_arithmetic(base, models, weight=early)
    assert torch.equal(everywhere["model.layers.1.norm.weight"], base["model.layers.1.norm.weight"])


def test_model_scope_trims_over_all_tensors(backend: str) -> None:
    base, models = family()
    floats = [key for key, tensor in base.items() if tensor.is_floating_point()]
    out = ties(base, models, density=0.1, variant="paper", out_dtype=torch.float32, backend=backend)
    policy = Policy(
        sparsify="trim",
        trim_scope="model",
        trim_count="floor_plus_one",
        trim_ties="all",
        elect="mass",
        elect_on="unweighted",
        reduce="mean",
        divisor="count",
    )
    long = [torch.cat([m[key].float().reshape(-1) for key in floats]) for m in models.values()]
    whole = combine(
        torch.cat([base[key].float().reshape(-1) for key in floats]),
        long, weights=1.0, policy=policy, density=0.1,
    )  # fmt: skip
    assert torch.equal(torch.cat([out[key].reshape(-1) for key in floats]), whole)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight


def tied(seed: int) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def test_modules_and_tied_weights() -> None:
    base, models = tied(0), {"a": tied(1), "b": tied(2)}
    target = tied(3)
    out = dare_linear(base, models, density=0.5, into=target)
    assert out["embed.weight"] is out["head.weight"]
    assert out["norm.num_batches_tracked"] == 0
    assert torch.equal(target.embed.weight, out["embed.weight"])
    assert target.head.weight is target.embed.weight
    untied = {
        name: {k: v.clone() for k, v in module.state_dict().items() if k != "head.weight"}
        for name, module in models.items()
    }
    alone = {k: v for k, v in base.state_dict().items() if k != "head.weight"}
    again = dare_linear(alone, untied, density=0.5)
    assert all(torch.equal(out[key], again[key]) for key in again)
    assert not out["embed.weight"].requires_grad


def test_tied_weights_count_once_for_the_whole_model() -> None:
    base, models = tied(0), [tied(1), tied(2)]
    out = ties(base, models, density=0.3, variant="paper")
    alone = [{k: v for k, v in m.state_dict().items() if k != "head.weight"} for m in models]
    states = {k: v for k, v in base.state_dict().items() if k != "head.weight"}
    again = ties(states, alone, density=0.3, variant="paper")
    assert all(torch.equal(out[key], again[key]) for key in again)


def test_nan_is_refused_or_let_through() -> None:
    base, models = family()
    models["code"]["model.layers.0.norm.weight"][3] = float("nan")
    words = "tensor 'model.layers.0.norm.weight' of models['code'] holds NaN or infinity"
    with pytest.raises(NonFiniteError, match=re.escape(words)):
        task_arithmetic(base, models)
    out = task_arithmetic(base, models, nan="propagate")
    assert out["model.layers.0.norm.weight"].isnan().tolist() == [i == 3 for i in range(12)]


def test_overflow_of_the_output_is_refused() -> None:
    big = {"w": torch.full((4,), 60000.0)}
    with pytest.raises(NonFiniteError, match="the merge overflows"):
        linear([big, big], normalize=False, out_dtype=torch.float16)


def changed(**changes: Any) -> dict[str, dict[str, Tensor]]:
    """The models, with one tensor of 'code' replaced; None takes it out."""
    _, models = family()
    for key, value in changes.items():
        name = "model." + key.replace("__", ".")
        if value is None:
            del models["code"][name]
        else:
            models["code"][name] = value
    return models


@pytest.mark.parametrize(
    ("models", "error", "words"),
    [
        (changed(embed_tokens__weight=None), CheckpointError,
         "models['code'] lacks tensor 'model.embed_tokens.weight'"),
        (changed(extra__weight=torch.ones(2)), CheckpointError,
         "tensor 'model.extra.weight'"),
        (changed(embed_tokens__weight=torch.ones(65, 12)), CheckpointError,
         "tensor 'model.embed_tokens.weight' has shape [64, 12] in base and [65, 12] in models['c"),
        (changed(position_ids=torch.zeros(7, dtype=torch.long)), CheckpointError,
         "tensor 'model.position_ids' holds integers or booleans that differ"),
        (changed(position_ids=torch.zeros(7)), CheckpointError,
         "tensor 'model.position_ids' is torch.int64 in base and torch.float32"),
        (changed(embed_tokens__weight=torch.ones(64, 12, dtype=torch.float64)), CheckpointError,
         "tensor 'model.embed_tokens.weight' of models['code'] is torch.float64"),
        (changed(embed_tokens__weight=torch.ones(64, 12, device="meta")), CheckpointError,
         "is on cpu in base and on meta in models['code']"),
        (changed(embed_tokens__weight=[1.0]), TypeError,
         "models['code']['model.embed_tokens.weight'] must be a tensor, got list"),
        ([], ValueError, "models must hold at least one model"),
        ({}, ValueError, "models must hold at least one model"),
        (3, TypeError, "models must be a list of models or a mapping"),
        (model(1), TypeError, "got one state dict; put it into a list"),
        ([3], TypeError, "models['0'] must be a state dict or an nn.Module, got int"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(models: Any, error: type[Exception], words: str) -> None:
    base, _ = family()
    with pytest.raises(error, match=re.escape(words)):
        task_arithmetic(base, models)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"weight": [1.0]}, ValueError, "weight must have one entry per model, 3; got 1"),
        ({"weight": "a"}, TypeError, "weight of models['math'] must be a number"),
        ({"weight": float("inf")}, ValueError, "weight of models['math'] must be finite"),
        ({"weight": {"w": 1.0}}, ValueError, "has no entry for tensor 'model.embed_tokens.weight'"),
        ({"density": 0.0}, ValueError, "density of models['math'] must be in (0, 1]"),
        ({"density": 2}, ValueError, "density of models['math'] must be in (0, 1]"),
        ({"lam": float("nan")}, ValueError, "lam must be finite"),
        ({"variant": "mergkit"}, RecipeError, "variant"),
        ({"elect": "total"}, RecipeError, "elect"),
        ({"rescale_by": "l1"}, RecipeError, "rescale_by"),
        ({"normalize": 1}, RecipeError, "normalize"),
        ({"nan": "ignore"}, ValueError, "nan must be 'refuse' or 'propagate'; got 'ignore'"),
        ({"into": {}}, TypeError, "into must be an nn.Module, got dict"),
        ({"out_dtype": torch.float64}, TypeError, "out_dtype must be one of"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        (
            {"variant": "paper", "density": len},
            ValueError,
            "density of models['math'] must be in (0, 1]",
        ),
        (
            {"variant": "paper", "density": lambda name: 0.1 + 0.2 * ("norm" in name)},
            RecipeError,
            "trim_scope='model' has one density for a whole model",
        ),
    ],
)
def test_bad_arguments(keywords: dict, error: type[Exception], words: str) -> None:
    base, models = family()
    with pytest.raises(error, match=re.escape(words)):
        ties(base, models, **{"density": 0.5, **keywords})


def test_bad_seed_and_zero_weights() -> None:
    base, models = family()
    with pytest.raises(TypeError, match="seed must be an int"):
        dare_ties(base, models, density=0.5, seed=1.5)
    with pytest.raises(RecipeError, match="sum to 0"):
        linear(models, weight=[1.0, -1.0, 0.0])


def test_all_names_of_the_room() -> None:
    for name in merging.__all__:
        assert getattr(merging, name) is not None
