"""Recipes: what is read, what each variant means, and that nothing is ever ignored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cl_fast.errors import RecipeError
from cl_fast.merging.methods import CHOICES, METHODS, Method, make_policy
from cl_fast.merging.recipe import Recipe, load_recipe, parse_recipe
from cl_fast.ops.policy import Policy, trim_keep_count


def recipe(method: str = "ties", /, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "merge_method": method,
        "base_model": "/m/base",
        "models": [{"model": "/m/a"}, {"model": "/m/b"}],
    }
    if method == "linear":
        del content["base_model"]
    content.update(changes)
    return {key: value for key, value in content.items() if value is not ...}


def parameters(method: str = "ties", **values: Any) -> dict[str, Any]:
    return recipe(method, parameters=values)


# What the methods mean.

DEFAULTS = {
    "linear": Policy(difference=False, reduce="mean"),
    "task_arithmetic": Policy(),
    "ties": Policy(sparsify="trim", elect="mass", reduce="mean"),
    "dare_linear": Policy(sparsify="drop", rescale="l1"),
    "dare_ties": Policy(sparsify="drop", rescale="l1", elect="mass"),
}

POLICIES = [
    *((name, {}, policy) for name, policy in DEFAULTS.items()),
    *((name, {"variant": "mergekit"}, policy) for name, policy in DEFAULTS.items()),
    ("linear", {"normalize": False}, Policy(difference=False, reduce="sum")),
    ("linear", {"divisor": "count"}, Policy(difference=False, reduce="mean", divisor="count")),
    ("task_arithmetic", {"normalize": True}, Policy(reduce="mean")),
    (
        "task_arithmetic",
        {"reduce": "mean", "divisor": "count"},
        Policy(reduce="mean", divisor="count"),
    ),
    ("ties", {"normalize": False}, Policy(sparsify="trim", elect="mass")),
    ("ties", {"normalize": True, "reduce": "mean"}, DEFAULTS["ties"]),
    ("ties", {"rescale": True}, Policy(sparsify="trim", elect="mass", reduce="mean", rescale="l1")),
    ("ties", {"rescale": False}, DEFAULTS["ties"]),
    ("ties", {"reduce": "max"}, Policy(sparsify="trim", elect="mass", reduce="max")),
    (
        "ties",
        {"elect": "frequency", "elect_on": "unweighted", "divisor": "count"},
        Policy(
            sparsify="trim",
            elect="frequency",
            elect_on="unweighted",
            reduce="mean",
            divisor="count",
        ),
    ),
    (
        "ties",
        {"trim_scope": "model"},
        Policy(sparsify="trim", trim_scope="model", trim_ties="all", elect="mass", reduce="mean"),
    ),
    (
        "ties",
        {"trim_scope": "model", "trim_ties": "none", "trim_count": "floor"},
        Policy(
            sparsify="trim",
            trim_scope="model",
            trim_ties="none",
            trim_count="floor",
            elect="mass",
            reduce="mean",
        ),
    ),
    (
        "ties",
        {"variant": "peft"},
        Policy(
            sparsify="trim",
            trim_count="floor",
            elect="mass",
            elect_on="unweighted",
            reduce="mean",
            divisor="count",
        ),
    ),
    (
        "ties",
        {"variant": "paper"},
        Policy(
            sparsify="trim",
            trim_scope="model",
            trim_count="floor_plus_one",
            trim_ties="all",
            elect="mass",
            elect_on="unweighted",
            reduce="mean",
            divisor="count",
        ),
    ),
    (
        "ties",
        {"variant": "paper", "trim_scope": "tensor", "reduce": "sum"},
        Policy(
            sparsify="trim",
            trim_count="floor_plus_one",
            trim_ties="all",
            elect="mass",
            elect_on="unweighted",
            divisor="count",
        ),
    ),
    (
        "ties",
        {"variant": "peft", "rescale": True, "normalize": False},
        Policy(
            sparsify="trim",
            trim_count="floor",
            rescale="keep_rate",
            elect="mass",
            elect_on="unweighted",
            divisor="count",
        ),
    ),
    ("dare_linear", {"rescale": False}, Policy(sparsify="drop")),
    ("dare_linear", {"rescale_by": "keep_rate"}, Policy(sparsify="drop", rescale="keep_rate")),
    ("dare_linear", {"variant": "paper"}, Policy(sparsify="drop", rescale="keep_rate")),
    ("dare_linear", {"variant": "peft"}, Policy(sparsify="drop", rescale="keep_rate")),
    (
        "dare_linear",
        {"variant": "peft", "rescale_by": "l1"},
        Policy(sparsify="drop", rescale="l1"),
    ),
    (
        "dare_ties",
        {"variant": "peft"},
        Policy(
            sparsify="drop",
            rescale="keep_rate",
            elect="mass",
            elect_on="unweighted",
            reduce="mean",
            divisor="count",
        ),
    ),
]


@pytest.mark.parametrize(("method", "given_", "policy"), POLICIES)
def test_policies(method: str, given_: dict[str, Any], policy: Policy) -> None:
    assert parse_recipe(parameters(method, **given_)).policy == policy
    assert make_policy(method, given_) == policy


@pytest.mark.parametrize("name", METHODS)
def test_every_variant_builds_and_its_parameters_are_accepted(name: str) -> None:
    method = METHODS[name]
    for variant, preset in method.variants.items():
        make_policy(method, {"variant": variant})
        assert set(preset) <= {*method.parameters}


def test_a_new_method_is_one_entry() -> None:
    magnitude = Method(
        name="magnitude_prune",
        summary="trim each delta, add the weighted sum",
        policy=Policy(sparsify="trim"),
        variants={"peft": {"trim_count": "floor"}},
    )
    assert magnitude.needs_base
    assert not magnitude.random
    assert "density" in magnitude.parameters
    assert "elect" not in magnitude.parameters
    assert make_policy(magnitude, {"variant": "peft", "rescale": True}) == Policy(
        sparsify="trim", trim_count="floor", rescale="l1"
    )
    with pytest.raises(RecipeError, match="no effect"):
        make_policy(magnitude, {"elect": "mass"})


@pytest.mark.parametrize(
    ("density", "n", "rule", "count"),
    [
        (0.2, 3, "at_least_one", 1),
        (0.2, 3, "floor", 0),
        (0.2, 3, "floor_plus_one", 1),
        (0.2, 10, "at_least_one", 2),
        (0.2, 10, "floor_plus_one", 3),
        (0.999, 1, "floor_plus_one", 1),
        (1.0, 7, "floor_plus_one", 7),
        (0.5, 0, "at_least_one", 0),
        (0.0, 5, "at_least_one", 1),
        (0.29, 100, "floor", 28),  # 0.29 * 100 = 28.999... in float64
        (0.2, 2**33, "floor", 1717986918),
    ],
)
def test_keep_count(density: float, n: int, rule: Any, count: int) -> None:
    assert trim_keep_count(density, n, rule) == count


@pytest.mark.parametrize(
    ("density", "n", "rule"),
    [(-0.1, 3, "floor"), (float("nan"), 3, "floor"), (0.1, -1, "floor"), (0.1, 3, "x")],
)
def test_keep_count_refuses(density: float, n: int, rule: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        trim_keep_count(density, n, rule)


# Reading.

MERGEKIT = """
merge_method: ties
base_model: /m/base
models:
  - model: /m/base
    # no parameters necessary for base model
  - model: /m/a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: /m/b
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
parameters:
  normalize: true
  int8_mask: true
  lambda: 1e-1
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
"""


def test_a_recipe_written_for_mergekit() -> None:
    found = parse_recipe(MERGEKIT)
    assert found.terms == (1, 2)
    assert found.policy == DEFAULTS["ties"]
    assert found.output_dtype == "BF16"
    assert found.tokenizer_reference == "/m/base"
    assert found.seed is None
    assert found.text() == MERGEKIT
    used: set[str] = set()
    (density,) = found.parts[0].chain(0, "density")
    assert [density.evaluate("x", t, used) for t in (0, 0.25, 0.5, 0.75, 1)] == [
        1,
        pytest.approx(0.85),
        0.7,
        pytest.approx(0.4),
        0.1,
    ]
    (weight,) = found.parts[0].chain(1, "weight")
    assert weight.evaluate("layers.0.mlp.up", 0, used) == 0.5
    assert weight.evaluate("layers.0.attn", 0, used) == 0
    (lam,) = found.parts[0].chain(None, "lambda")
    assert lam.evaluate("x", 0, used) == 0.1
    assert list(weight.filters()) == [("models[2].parameters.weight[0]", "mlp")]


def test_precedence_and_fall_through() -> None:
    found = parse_recipe(
        recipe(
            models=[
                {"model": "/m/a", "parameters": {"weight": [{"filter": "q", "value": 3}]}},
                {"model": "/m/b"},
            ],
            parameters={
                "weight": [{"filter": "mlp", "value": [1, 2]}, {"filter": "*", "value": 5}]
            },
        )
    )
    own, everywhere = found.parts[0].chain(0, "weight")
    assert found.parts[0].chain(1, "weight") == (everywhere,)
    used: set[str] = set()
    assert own.evaluate("a.q.b", 0, used) == 3
    assert own.evaluate("a.k.b", 0, used) is None
    assert everywhere.evaluate("mlp", 0.5, used) == 1.5
    assert everywhere.evaluate("other", 0.5, used) == 5
    assert [s.key for s in found.settings()] == [
        "parameters.weight",
        "models[0].parameters.weight",
    ]


def test_first_filter_wins_and_filters_nest() -> None:
    inner = [{"filter": "up", "value": [0, 1]}, {"value": 9}]
    found = parse_recipe(
        parameters(
            weight=[{"filter": "mlp", "value": inner}, {"filter": "m", "value": 7}, {"value": 8}]
        )
    )
    (weight,) = found.parts[0].chain(0, "weight")
    used: set[str] = set()
    assert weight.evaluate("mlp.up", 0.5, used) == 0.5
    assert weight.evaluate("mlp.down", 0.5, used) == 9
    assert weight.evaluate("norm", 0.5, used) == 7
    assert weight.evaluate("q", 0.5, used) == 8
    assert weight.has_gradient
    assert dict(weight.leaves())["parameters.weight[0].value[0].value[1]"] == 1


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_gradients_stay_between_their_neighbours(values: list[float], t: float) -> None:
    (weight,) = parse_recipe(parameters(weight=values)).parts[0].chain(0, "weight")
    value = weight.evaluate("x", t, set())
    assert value is not None
    assert min(values) - 1e-9 <= value <= max(values) + 1e-9
    assert weight.evaluate("x", 0.0, set()) == values[0]
    assert weight.evaluate("x", 1.0, set()) == values[-1]


def test_values_without_base_parameters_are_no_term(tmp_path: Path) -> None:
    content = recipe(models=[{"model": "/m/./base"}, {"model": "/m/a", "parameters": None}])
    assert parse_recipe(content).terms == (1,)
    soup = recipe("linear", base_model="/m/a")
    assert parse_recipe(soup).terms == (0, 1)


def test_empty_values_are_as_absent() -> None:
    found = parse_recipe(recipe(parameters=None, dtype=None, tokenizer=None, slices=None))
    assert found.parameters == {}


def test_seed() -> None:
    assert parse_recipe(recipe("dare_ties", seed=7)).seed == 7


def test_paths_are_references() -> None:
    found = parse_recipe(recipe(base_model=Path("/m/base"), models=[{"model": Path("/m/a")}]))
    assert found.base_model == "/m/base"
    assert found.models[0].model == "/m/a"


def test_round_trip_through_yaml() -> None:
    found = parse_recipe(MERGEKIT)
    again = parse_recipe(found.to_yaml())
    assert again.model_dump() == found.model_dump()
    assert next(iter(yaml.safe_load(found.to_yaml()))) == "merge_method"
    assert parse_recipe(recipe()).text() == parse_recipe(recipe()).to_yaml()


def test_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(recipe()).dtype = "float32"


@pytest.mark.parametrize(
    ("block", "reference"),
    [
        ({"tokenizer_source": "base"}, "/m/base"),
        ({"tokenizer_source": "/m/a"}, "/m/a"),
        ({"tokenizer_source": "model:/m/a"}, "/m/a"),
        ({"tokenizer": {"source": "base"}}, "/m/base"),
        ({"tokenizer": {"source": "/m/a", "pad_to_multiple_of": 8}}, "/m/a"),
        ({"tokenizer": {}}, "/m/base"),
        ({}, None),
    ],
)
def test_tokenizer(block: dict[str, Any], reference: str | None) -> None:
    assert parse_recipe(recipe(**block)).tokenizer_reference == reference


# Every wrong key has its path in the message.

WEIGHT = "models[0].parameters.weight"


def weight(value: Any) -> dict[str, Any]:
    return recipe(models=[{"model": "/m/a", "parameters": {"weight": value}}])


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [{"filter": "a", "value": value}]
    return value


BAD: list[Any] = [
    ([], "a recipe is a mapping"),
    (3, "a recipe is a mapping"),
    ("", "a recipe is a mapping"),
    ("just text", "a recipe is a mapping"),
    ("a: [", "not valid YAML"),
    ("a: b: c", "line 1"),
    ("merge_method: ties\nmerge_method: linear", "'merge_method' appears twice (line 2"),
    ("models:\n- {model: a, model: b}", "'model' appears twice"),
    ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ("\0", "not valid YAML"),
    ("a: &x [*x]", "unknown key"),
    ("[" * 3000, "not valid YAML"),
    (recipe(merge_method=...), "merge_method: is required"),
    (recipe(models=...), "models: is required"),
    (recipe(merge_method=3), "merge_method: must be text; got 3"),
    (recipe(merge_method=["ties"]), "merge_method: must be text; got a list"),
    (recipe(merge_method="tise"), "did you mean 'ties'?"),
    (recipe(merge_method="slerp"), "models: merge_method 'slerp' merges 2 models"),
    (recipe(merge_methd="ties"), "merge_methd: unknown key; did you mean 'merge_method'?"),
    (recipe(density=0.5), "density: unknown key; it belongs under 'parameters'"),
    (recipe(wieght=0.5), "did you mean 'weight'? (under 'parameters')"),
    ({**recipe(), 3: 4}, "a key must be text"),
    (recipe(models=None), "models: must be a list"),
    (recipe(models={}), "models: must be a list (each entry begins with '-'); got a mapping"),
    (recipe(models="a"), "models: must be a list"),
    (recipe(models=[]), "models: is empty"),
    (recipe(models=["/m/a"]), "models[0]: must be a mapping with 'model'"),
    (recipe(models=[None]), "models[0]: must be a mapping"),
    (recipe(models=[{}]), "models[0].model: is required"),
    (recipe(models=[{"model": 3}]), "models[0].model: must be text; got 3"),
    (recipe(models=[{"model": None}]), "models[0].model: must be text; got nothing"),
    (recipe(models=[{"model": " "}]), "models[0].model: is empty"),
    (recipe(models=[{"model": "a\0"}]), "models[0].model: 'a\\x00' is not a path"),
    (recipe(models=[{"model": {"modle": "x"}}]), "models[0].model: a reference has 'model'"),
    (recipe(models=[{"model": {"lora": "x"}}]), "models[0].model: a reference needs a 'model'"),
    (recipe(models=[{"model": {"model": 3}}]), "models[0].model: model: must be a path, or"),
    (recipe(models=[{"model": {"path": "x", "rev": "y"}}]), "models[0].model: has 'path' and"),
    (recipe(models=[{"model": {"path": "x", "revision": 3}}]), "revision must be text; got"),
    (recipe(base_model={"model": "x", "lora": []}), "base_model: lora: must be a path"),
    (
        recipe(models=[{"model": {"model": "x", "override_architecture": "LlamaForCausalLM"}}]),
        "models[0].model: override_architecture has no counterpart",
    ),
    (recipe(override_architecture="Llama"), "override_architecture: has no counterpart: tensors"),
    (
        recipe(models=[{"model": "x", "override_architecture": "Llama"}]),
        "models[0].override_architecture: has no counterpart: tensors",
    ),
    (recipe(models=[{"model": "/m/a", "weight": 1}]), "models[0].weight: unknown key; it belongs"),
    (
        recipe(models=[{"model": "/m/a", "parameters": 3}]),
        "models[0].parameters: must be a mapping",
    ),
    (recipe(models=[{"model": "/m/a", "parameters": [1]}]), "models[0].parameters: must be a map"),
    (recipe(models=[{"model": "/m/a", "parameters": {1: 2}}]), "a key must be text"),
    (recipe(base_model=...), "base_model: is required by merge_method 'ties'"),
    (recipe(base_model=3), "base_model: must be text"),
    (recipe(base_model=""), "base_model: is empty"),
    (recipe("linear", base_model="/m/c"), "averages the models themselves"),
    (recipe(models=[{"model": "/m/base"}]), "holds only the base_model"),
    (
        recipe(models=[{"model": "/m/base"}, {"model": "/m/base/"}, {"model": "/m/a"}]),
        "models[1].model: the base_model is listed twice",
    ),
    (
        recipe(models=[{"model": "/m/base", "parameters": {"weight": 1}}, {"model": "/m/a"}]),
        "models[0].parameters: the model is the base_model",
    ),
    (recipe(parameters=3), "parameters: must be a mapping; got 3"),
    (recipe(parameters=[{"weight": 1}]), "parameters: must be a mapping; got a list"),
    (parameters(wieght=1), "parameters.wieght: unknown parameter; did you mean 'weight'?"),
    (parameters(xyzzy=1), "parameters.xyzzy: unknown parameter; 'ties' takes weight, density"),
    (parameters(t=0.5), "'t' has no effect with merge_method 'ties' (it is for slerp, nearswap)"),
    (parameters(similarity_threshold=0.5), "belongs to other merge methods"),
    (parameters("linear", density=0.5), "'density' has no effect with merge_method 'linear'"),
    (parameters("linear", **{"lambda": 1}), "'lambda' has no effect"),
    (parameters("linear", rescale=True), "'rescale' has no effect"),
    (parameters("task_arithmetic", density=1), "'density' has no effect"),
    (parameters("task_arithmetic", elect="mass"), "'elect' has no effect"),
    (parameters("dare_ties", trim_ties="all"), "'trim_ties' has no effect"),
    (parameters("dare_linear", elect_on="weighted"), "'elect_on' has no effect"),
    (parameters(weight=None), "parameters.weight: has no value"),
    (parameters(variant=None), "parameters.variant: has no value"),
    (parameters(variant="papr"), "parameters.variant: must be one of mergekit, peft, paper"),
    (parameters(variant=3), "parameters.variant: must be one of"),
    (parameters("linear", variant="peft"), "'peft' has no effect with merge_method 'linear'"),
    (parameters(normalize="yes please"), "parameters.normalize: must be true or false"),
    (parameters(normalize=1), "parameters.normalize: must be true or false"),
    (parameters(rescale=[True]), "parameters.rescale: must be true or false"),
    (parameters(int8_mask=1), "parameters.int8_mask: must be true or false"),
    *((parameters(**{name: "x"}), f"parameters.{name}: must be one of") for name in CHOICES),
    *((parameters(**{name: 3}), f"parameters.{name}: must be one of") for name in CHOICES),
    *((parameters(**{name: ["x"]}), f"parameters.{name}: must be one of") for name in CHOICES),
    (parameters(elect="frequncy"), "did you mean 'frequency'?"),
    (parameters(normalize=True, reduce="sum"), "contradict"),
    (parameters(normalize=False, reduce="max"), "contradict"),
    (parameters(normalize=False, divisor="count"), "parameters.divisor: has no effect"),
    (parameters("dare_ties", divisor="count"), "parameters.divisor: has no effect"),
    (parameters("dare_linear", reduce="max"), "needs an elected sign"),
    (parameters(rescale_by="l1"), "parameters.rescale_by: has no effect"),
    (parameters("dare_ties", rescale=False, rescale_by="l1"), "rescale_by: has no effect"),
    (parameters(trim_scope="model", trim_ties="first"), "needs trim_scope: tensor"),
    (recipe(models=[{"model": "/m/a", "parameters": {"lambda": 1}}]), "move it to the top-level"),
    (recipe(models=[{"model": "/m/a", "parameters": {"normalize": True}}]), "move it to the top"),
    (recipe(models=[{"model": "/m/a", "parameters": {"elect": "mass"}}]), "move it to the top"),
    (recipe("linear", models=[{"model": "a", "parameters": {"density": 1}}]), "has no effect"),
    (weight("0.5"), f"{WEIGHT}: must be a number"),
    (
        weight(True),
        f"{WEIGHT}: must be a number, a list of numbers (gradient) or a list of filters",
    ),
    (weight(None), f"{WEIGHT}: has no value"),
    (weight([]), f"{WEIGHT}: is an empty list"),
    (weight([1, "x"]), f"{WEIGHT}[1]: must be a number"),
    (weight([1, True]), f"{WEIGHT}[1]: must be a number"),
    (weight([1, [2]]), f"{WEIGHT}: mixes"),
    (weight([1, {"value": 2}]), f"{WEIGHT}: mixes"),
    (weight([{"filter": "a"}]), f"{WEIGHT}[0]: has no 'value'"),
    (weight([{"filter": 3, "value": 1}]), f"{WEIGHT}[0].filter: must be a part of tensor names"),
    (weight([{"filter": "", "value": 1}]), f"{WEIGHT}[0].filter: is empty"),
    (
        weight([{"filtr": "a", "value": 1}]),
        f"{WEIGHT}[0].filtr: unknown key; did you mean 'filter'",
    ),
    (weight([{1: "a", "value": 1}]), f"{WEIGHT}[0].1: unknown key"),
    (weight([{"value": 1}, {"filter": "a", "value": 1}]), "put the default last"),
    (weight([{"filter": "a", "value": "x"}]), f"{WEIGHT}[0].value: must be a number"),
    (weight([{"filter": "a", "value": [1, None]}]), f"{WEIGHT}[0].value[1]: must be a number"),
    (weight(nested(30)), "nested more than"),
    (weight(float("nan")), f"{WEIGHT}: must be a finite number"),
    (weight(float("inf")), "must be a finite number"),
    (weight([0, float("-inf")]), f"{WEIGHT}[1]: must be a finite number"),
    (weight(1e39), "beyond float32"),
    (weight(10**400), "beyond float32"),
    (parameters(**{"lambda": float("nan")}), "parameters.lambda: must be a finite number"),
    (parameters(**{"lambda": "x"}), "parameters.lambda: must be a number"),
    (parameters(density=0), "parameters.density: density is the fraction that is kept"),
    (parameters(density=-0.1), "above 0 and at most 1"),
    (parameters(density=20), "for 20 percent write 0.2"),
    (parameters(density=[0.5, 1.5]), "parameters.density[1]: density is"),
    (parameters(density=[{"filter": "a", "value": 0}]), "parameters.density[0].value: density"),
    (recipe(dtype="bf16"), "dtype: must be one of float32, bfloat16, float16; got 'bf16'"),
    (recipe(dtype="bfloat"), "did you mean 'bfloat16'?"),
    (recipe(out_dtype="float64"), "out_dtype: must be one of"),
    (recipe(out_dtype="float8_e4m3fn"), "quantise the result"),
    (recipe(out_dtype="int8"), "quantise the result"),
    (recipe(dtype=3), "dtype: must be text; got 3"),
    (recipe(out_dtype=["float32"]), "out_dtype: must be text; got a list"),
    (recipe(tokenizer_source=3), "tokenizer_source: must be text"),
    (recipe(tokenizer_source=""), "tokenizer_source: is empty"),
    (recipe(tokenizer="base"), "tokenizer: must be a mapping with 'source'"),
    (recipe(tokenizer={"source": 3}), "tokenizer.source: must be"),
    (recipe(tokenizer={"sorce": "base"}), "tokenizer.sorce: unknown key; did you mean 'source'?"),
    (recipe(tokenizer={"source": "base"}, tokenizer_source="base"), "give one"),
    (recipe("dare_ties", seed="x"), "seed: must be a whole number"),
    (recipe("dare_ties", seed=1.5), "seed: must be a whole number"),
    (recipe("dare_ties", seed=True), "seed: must be a whole number"),
    (recipe("dare_ties", seed=-1), "seed: must be at least 0"),
    (recipe("dare_ties", seed=2**64), "seed: must be below 2**64"),
    (recipe("ties", seed=0), "seed: has no effect with merge_method 'ties'"),
]


@pytest.mark.parametrize(("content", "words"), BAD)
def test_bad_recipes(content: Any, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["filter", "value", "source", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = [*Recipe.model_fields, "tokenizer", "slices", "weigth"]


@given(st.sampled_from(list(METHODS)), st.dictionaries(st.sampled_from(KEYS), JSONISH, max_size=3))
def test_any_value_at_any_key(method: str, changes: dict[str, Any]) -> None:
    try:
        parse_recipe({**recipe(method), **changes})
    except RecipeError as error:
        assert str(error)  # noqa: PT017 (either outcome is fine, any other error is not)


@given(
    st.sampled_from([name for name, method in METHODS.items() if method.rule is None]),
    st.dictionaries(
        st.sampled_from(
            ["weight", "density", "lambda", "rescale", "variant", "int8_mask", *CHOICES]
        ),
        JSONISH,
        max_size=3,
    ),
    st.booleans(),
)
def test_any_value_at_any_parameter(method: str, values: dict[str, Any], own: bool) -> None:
    content = recipe(method)
    if METHODS[method].most == 1:
        del content["models"][1:]
    target = content["models"][0] if own else content
    target["parameters"] = values
    try:
        parse_recipe(content)
    except RecipeError as error:
        assert "parameters" in str(error)  # noqa: PT017


@given(st.text(max_size=60))
def test_any_text(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text)


# Files.


def test_a_file_is_named_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(MERGEKIT)
    found = load_recipe(path)
    assert found.source == path
    assert found.text() == MERGEKIT
    path.write_text("\ufeff" + MERGEKIT)
    assert load_recipe(str(path)).terms == (1, 2)
    path.write_text("merge_method: tise\nmodels: [{model: a}]")
    with pytest.raises(RecipeError, match=r"r\.yml: merge_method: unknown method"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "cannot be read"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_bytes(b"a: \xff"), "not UTF-8"),
        (lambda p: p.write_bytes(b""), "a recipe is a mapping"),
        (lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_RDWR), 2**30), "not a recipe"),
    ],
)
def test_unreadable_files(tmp_path: Path, make: Any, words: str) -> None:
    path = tmp_path / "r.yml"
    make(path)
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)


# The page that documents all this.

PAGE = Path(__file__).parents[2] / "docs" / "merge-recipes.md"


def test_every_recipe_on_the_page_is_valid() -> None:
    blocks = PAGE.read_text().split("```yaml\n")[1:]
    assert len(blocks) >= 2
    for block in blocks:
        for document in block.split("```")[0].split("---\n"):
            parse_recipe(document)


def test_the_page_names_every_key_and_choice() -> None:
    text = PAGE.read_text()
    names = {*Recipe.model_fields, "tokenizer", "int8_mask", *METHODS}
    names |= {name for method in METHODS.values() for name in method.parameters}
    words = {word for choice in CHOICES.values() for word in choice}
    words |= {variant for method in METHODS.values() for variant in method.variants}
    missing = [name for name in sorted(names | words) if f"`{name}`" not in text]
    assert missing == []
    assert (
        sum(line.startswith(tuple(f"| {i} |" for i in range(1, 15))) for line in text.splitlines())
        == 14
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"difference": 1}, "difference must be one of True, False"),
        ({"sparsify": "prune"}, "sparsify must be one of 'none', 'trim', 'drop'"),
        ({"elect": ["mass"]}, "elect must be one of"),
        ({"sparsify": "trim", "trim_scope": "model"}, "trim_ties='first' needs"),
        ({"rescale": "l1"}, "no effect with sparsify='none'"),
        ({"reduce": "max"}, "needs an elected sign"),
    ],
)
def test_policies_without_meaning(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="Policy") as caught:
        Policy(**values)
    assert words in str(caught.value)
