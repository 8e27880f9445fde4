"""Layers of several models put together: what lands where, from whom, with which numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import adapter_cases
import pytest
import torch
from merge_cases import load, need_native, poison, raw, save
from torch import Tensor

from cl_fast.errors import (
    CheckpointError,
    ClFastError,
    Interrupted,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from cl_fast.merging.description import describe
from cl_fast.merging.engine import execute
from cl_fast.merging.plan import Plan, make_plan
from cl_fast.merging.recipe import parse_recipe
from cl_fast.merging.verify import verify

STACK = "model.layers."
NAMES = ("one", "two", "base")


def state(seed: int, layers: int = 4) -> dict[str, Tensor]:
    """A decoder of `layers` layers; every tensor is another."""
    shapes = {"model.embed_tokens.weight": (10, 6), "model.norm.weight": (6,)}
    for i in range(layers):
        shapes[f"{STACK}{i}.self_attn.o_proj.weight"] = (6, 6)
        shapes[f"{STACK}{i}.mlp.down_proj.weight"] = (6, 17)
    shapes["lm_head.weight"] = (10, 6)
    return {
        name: torch.randn(
            shape, generator=torch.Generator().manual_seed(seed * 1000 + i)
        ).bfloat16()
        for i, (name, shape) in enumerate(shapes.items())
    }


def write(folder: Path, tensors: Mapping[str, Tensor], layers: int = 4, **config: Any) -> Path:
    save(folder, tensors)
    content = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 10}
    content |= {"num_hidden_layers": layers, "torch_dtype": "bfloat16"} | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slices")
    for seed, name in enumerate(NAMES):
        write(folder / name, state(seed), layer_types=[f"{name}{i}" for i in range(4)])
    odd = state(3)
    odd[f"{STACK}2.mlp.down_proj.weight"] = torch.zeros(6, 3)
    write(folder / "odd", odd)
    return folder


def source(root: Path, name: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"model": str(root / name), "layer_range": [first, end]}
    return made | ({"parameters": parameters} if parameters else {})


def planned(root: Path, output: Path, *slices: Any, **recipe: Any) -> Plan:
    listed = [{"sources": part} if isinstance(part, list) else part for part in slices]
    content = {"merge_method": "passthrough", "slices": listed, **recipe}
    return make_plan(parse_recipe(content), output, out_shard_size=500)


def test_passthrough_puts_layers_together(root: Path, tmp_path: Path) -> None:
    plan = planned(
        root,
        tmp_path / "out",
        [source(root, "one", 0, 3)],
        [source(root, "two", 1, 3)],
        [source(root, "one", 2, 3)],
    )
    assert all(tensor.kind == "copy" for tensor in plan.tensors)
    execute(plan)
    made, one, two = raw(tmp_path / "out"), raw(root / "one"), raw(root / "two")
    for new, (model, old) in enumerate(
        [(one, 0), (one, 1), (one, 2), (two, 1), (two, 2), (one, 2)]
    ):
        for rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            assert made.pop(f"{STACK}{new}.{rest}") == model[f"{STACK}{old}.{rest}"]
    ends = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert made == {name: one[name] for name in ends}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == ["one0", "one1", "one2", "two1", "two2", "one2"]


def test_the_end_is_the_last_slices(root: Path, tmp_path: Path) -> None:
    plan = planned(root, tmp_path / "out", [source(root, "one", 0, 1)], [source(root, "two", 1, 2)])
    execute(plan)
    made, one, two = raw(tmp_path / "out"), raw(root / "one"), raw(root / "two")
    assert made["model.embed_tokens.weight"] == one["model.embed_tokens.weight"]
    assert made["model.norm.weight"] == two["model.norm.weight"]
    assert made["lm_head.weight"] == two["lm_head.weight"]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "task_arithmetic"])
def test_methods_work_inside_slices(root: Path, tmp_path: Path, method: str) -> None:
    """Eager is native, verify computes all again, and a layer that comes twice has two masks."""
    need_native()
    density = {} if method == "task_arithmetic" else {"density": 0.5}
    slices = [
        [source(root, "one", 0, 2, weight=[0.2, 0.8]), source(root, "two", 0, 2, weight=0.5)],
        [source(root, "one", 0, 2, weight=0.5)],
    ]
    made = []
    for backend in ("native", "eager"):
        output = tmp_path / backend
        plan = planned(
            root,
            output,
            *slices,
            merge_method=method,
            base_model=str(root / "base"),
            parameters=density,
        )
        execute(plan, backend=backend)
        report = verify(output, sample=None)
        assert report.ok, report.problems
        assert len(report.recomputed) == len(plan.tensors)
        made.append(raw(output))
    assert made[0] == made[1]
    if method == "dare_ties":
        rest = "mlp.down_proj.weight"
        alone = planned(
            root,
            tmp_path / "alone",
            [source(root, "one", 0, 1)],
            [source(root, "one", 0, 1)],
            merge_method=method,
            base_model=str(root / "base"),
            parameters=density,
        )
        execute(alone)
        twice = load(tmp_path / "alone")
        assert not torch.equal(twice[f"{STACK}0.{rest}"], twice[f"{STACK}1.{rest}"])


def test_a_whole_model_by_slices_is_the_merge_of_whole_models(root: Path, tmp_path: Path) -> None:
    """The same bytes, masks too: the names of the output are those of the models."""
    density = {"density": 0.5, "weight": [0.2, 1.0]}
    models = [{"model": str(root / name)} for name in ("one", "two")]
    everything = {"merge_method": "dare_ties", "base_model": str(root / "base"), "seed": 5}
    everything["parameters"] = density
    plan = make_plan(parse_recipe({**everything, "models": models}), tmp_path / "models")
    execute(plan)
    execute(
        planned(
            root, tmp_path / "slices", [source(root, n, 0, 4) for n in ("one", "two")], **everything
        )
    )
    assert raw(tmp_path / "models") == raw(tmp_path / "slices")
    configs = [(tmp_path / n / "config.json").read_bytes() for n in ("models", "slices")]
    assert configs[0] == configs[1] == (root / "base" / "config.json").read_bytes()


def test_a_trim_over_the_whole_model(root: Path, tmp_path: Path) -> None:
    """All slices count together, where they have the same models."""
    recipe = {"merge_method": "ties", "base_model": str(root / "base")}
    recipe["parameters"] = {"density": 0.3, "variant": "paper"}
    parts = [[source(root, n, a, a + 2) for n in ("one", "two")] for a in (0, 2)]
    outputs = []
    for i, listed in enumerate((parts, [[source(root, n, 0, 4) for n in ("one", "two")]])):
        execute(planned(root, tmp_path / str(i), *listed, **recipe))
        outputs.append(raw(tmp_path / str(i)))
    assert outputs[0] == outputs[1]
    with pytest.raises(RecipeError, match="has other models or parameters"):
        planned(root, tmp_path / "x", parts[0], [source(root, "one", 2, 4)], **recipe)


@pytest.mark.parametrize("cuts", [(0, 1, 4), (0, 1, 2, 3, 4), (0, 3, 4)])
def test_where_slices_are_cut_changes_nothing(
    root: Path, tmp_path: Path, cuts: tuple[int, ...]
) -> None:
    """Numbers that are no gradients do not know of slices."""
    recipe = {"merge_method": "dare_ties", "base_model": str(root / "base")}
    recipe["parameters"] = {
        "density": 0.5,
        "weight": [{"filter": "layers.2.", "value": 0.3}, {"value": 0.7}],
    }
    for name, ends in (("one", (0, 4)), ("many", cuts)):
        parts = [
            [source(root, model, low, high) for model in ("one", "two")]
            for low, high in pairwise(ends)
        ]
        execute(planned(root, tmp_path / name, *parts, **recipe))
    assert raw(tmp_path / "one") == raw(tmp_path / "many")


def test_config_and_tokenizer_of_a_model_that_is_not_merged(root: Path, tmp_path: Path) -> None:
    """Of the base_model, for a method that has no use for a base; and the output goes on alone."""
    donor = write(tmp_path / "donor", state(9), rope_theta=5.0)
    recipe = {"base_model": str(donor)}
    execute(planned(root, tmp_path / "out", [source(root, "one", 0, 2)], **recipe))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 5.0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    with pytest.raises(RecipeError, match=r"base_model: the output .* lies inside the input"):
        planned(root, donor / "out", [source(root, "one", 0, 2)], **recipe)
    donor.rename(tmp_path / "gone")
    report = verify(tmp_path / "out", sample=None)
    assert report.ok, report.problems
    assert report.recomputed
    with pytest.raises(CheckpointError, match="does not exist"):
        planned(root, tmp_path / "x", [source(root, "one", 0, 2)], **recipe)


def test_a_model_twice_in_a_slice(root: Path, tmp_path: Path) -> None:
    """Two layers of one model are averaged, as those of two models would be."""
    both = [source(root, "one", 0, 2, weight=3), source(root, "one", 2, 4, weight=1)]
    execute(planned(root, tmp_path / "out", both, merge_method="linear", out_dtype="float32"))
    made, one = load(tmp_path / "out"), load(root / "one")
    for i in range(2):
        name = f"{STACK}{{}}.mlp.down_proj.weight"
        low, high = (one[name.format(k)].double() for k in (i, i + 2))
        torch.testing.assert_close(
            made[name.format(i)].double(), (3 * low + high) / 4, rtol=0, atol=2**-22
        )


def test_a_base_that_is_not_listed(root: Path, tmp_path: Path) -> None:
    """It takes part with the layers of the others."""
    recipe = {"merge_method": "ties", "base_model": str(root / "base"), "out_dtype": "float32"}
    recipe["parameters"] = {"density": 0.5}
    listed = [source(root, name, 1, 3) for name in ("one", "two")]
    execute(planned(root, tmp_path / "a", listed, **recipe))
    execute(planned(root, tmp_path / "b", [source(root, "base", 1, 3), *listed], **recipe))
    assert raw(tmp_path / "a") == raw(tmp_path / "b")


def test_adapters_inside_slices(root: Path, tmp_path: Path) -> None:
    """A layer of BASE+ADAPTER is that of the model with the adapter on it; so is one beside it."""
    need_native()
    module = f"{STACK}1.mlp.down_proj"
    adapter = adapter_cases.write(
        tmp_path / "adapter", adapter_cases.factors({module: (6, 17)}, 2, size=1.0)
    )
    whole = {"merge_method": "task_arithmetic", "base_model": str(root / "base")}
    applied = {**whole, "models": [{"model": str(adapter)}]}
    execute(make_plan(parse_recipe(applied), tmp_path / "applied"))
    want, base = raw(tmp_path / "applied"), raw(root / "base")
    name = f"{module}.weight"
    assert want[name] != base[name]
    pair = {"model": f"{root / 'base'}+{adapter}", "layer_range": [1, 3]}
    plan = planned(root, tmp_path / "pair", [pair], [source(root, "base", 1, 2)])
    execute(plan)
    made = raw(tmp_path / "pair")
    rest = "mlp.down_proj.weight"
    assert [made[f"{STACK}{i}.{rest}"] for i in range(3)] == [
        want[name],
        base[f"{STACK}2.{rest}"],
        base[name],
    ]
    beside = [{"model": str(adapter), "layer_range": [1, 3]}]
    execute(planned(root, tmp_path / "beside", beside, beside, **whole))
    made = raw(tmp_path / "beside")
    assert made[f"{STACK}0.{rest}"] == made[f"{STACK}2.{rest}"] == want[name]
    for output in ("pair", "beside"):
        report = verify(tmp_path / output, sample=None)
        assert report.ok, report.problems


def test_an_interrupted_merge_goes_on(root: Path, tmp_path: Path) -> None:
    slices = [[source(root, "one", 0, 3, scale=0.5)], [source(root, "two", 1, 4)]]
    execute(planned(root, tmp_path / "whole", *slices))
    plan = planned(root, tmp_path / "out", *slices)
    assert len(plan.shards) > 3

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "merge" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        execute(plan, progress=stop)
    result = execute(planned(root, tmp_path / "out", *slices), resume=True)
    assert result.resumed > 0
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")
    record = json.loads((tmp_path / "out" / "cl_fast_merge.json").read_text())
    assert record["tensors"][f"{STACK}3.mlp.down_proj.weight"]["from"] == [
        [1, f"{STACK}1.mlp.down_proj.weight"]
    ]


def test_another_input_is_noticed(tmp_path: Path) -> None:
    """Verify looks at the layers that were read, under their own names."""
    for seed, name in enumerate(("one", "two")):
        write(tmp_path / name, state(seed))
    execute(planned(tmp_path, tmp_path / "out", [source(tmp_path, "two", 1, 3)]))
    for i, said in ((3, True), (2, False)):
        poison(tmp_path / "two", f"{STACK}{i}.mlp.down_proj.weight", 5, 3.0)
        report = verify(tmp_path / "out", sample=None)
        assert report.ok is said, report.problems
    assert "is not what was merged" in report.problems[0]


def test_copies_hold_what_they_were(tmp_path: Path) -> None:
    write(tmp_path / "one", state(0))
    poison(tmp_path / "one", f"{STACK}1.mlp.down_proj.weight", 5, float("nan"))
    recipe = [source(tmp_path, "one", 0, 4)]
    with pytest.raises(OutputError, match="--nan zero has no effect"):
        execute(planned(tmp_path, tmp_path / "out", recipe), nan="zero")
    execute(planned(tmp_path, tmp_path / "out", recipe))
    assert raw(tmp_path / "out") == raw(tmp_path / "one")
    report = verify(tmp_path / "out")
    assert report.ok
    assert "1 NaN or infinite values in tensors that were copied" in report.notes
    scaled = [source(tmp_path, "one", 0, 4, scale=0.5)]
    with pytest.raises(NonFiniteError):
        execute(planned(tmp_path, tmp_path / "scaled", scaled))


def test_the_type_of_the_output(root: Path, tmp_path: Path) -> None:
    plan = planned(root, tmp_path / "out", [source(root, "one", 1, 3)], out_dtype="float32")
    execute(plan)
    for name, value in load(tmp_path / "out").items():
        stored = name.replace(f"{STACK}1.", f"{STACK}2.").replace(f"{STACK}0.", f"{STACK}1.")
        assert torch.equal(value, load(root / "one")[stored].float())


def test_the_plan_in_words(root: Path, tmp_path: Path) -> None:
    slices = [
        {
            "sources": [source(root, "base", 0, 2), source(root, "one", 1, 3)],
            "residual_weight": 0.5,
        },
        [source(root, "two", 3, 4)],
    ]
    plan = planned(
        root,
        tmp_path / "out",
        *slices,
        merge_method="task_arithmetic",
        base_model=str(root / "base"),
    )
    said = "\n".join(describe(plan))
    assert f"layers   0 to 1: 0 to 1 of {root}/base, 1 to 2 of {root}/one" in said
    assert f"layers   2 to 2: 3 to 3 of {root}/base, 3 to 3 of {root}/two" in said
    assert "residual_weight changes nothing" in said


# Models whose layers, sizes or parts differ.


def towers(seed: int) -> dict[str, Tensor]:
    """A decoder with a vision tower and a projector."""
    shapes = {"model.language_model.embed_tokens.weight": (10, 6), "lm_head.weight": (10, 6)}
    for i in range(3):
        shapes[f"model.language_model.layers.{i}.mlp.weight"] = (6, 6)
        shapes[f"model.visual.blocks.{i}.attn.weight"] = (4, 4)
    shapes["model.visual.patch_embed.proj.weight"] = (4, 3)
    shapes["model.visual.merger.fc.weight"] = (6, 4)
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100 + i))
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    config = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"depth": 3}}
    for seed, name in enumerate(("one", "two")):
        write(folder / name, towers(seed), **config)
    return folder


def modules(root: Path, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "text_decoder": {
            "slices": [
                {"sources": [source(root, "one", 0, 2)]},
                {"sources": [source(root, "two", 1, 3)]},
            ]
        },
        "vision_tower": {"slices": [{"sources": [source(root, "two", 1, 3)]}]},
        "multi_modal_projector": {"models": [{"model": str(root / "one")}]},
    }
    return {"merge_method": "passthrough", "modules": made | changes}


def test_modules(vision: Path, tmp_path: Path) -> None:
    execute(make_plan(parse_recipe(modules(vision)), tmp_path / "out"))
    made, one, two = raw(tmp_path / "out"), raw(vision / "one"), raw(vision / "two")
    text, tower = "model.language_model.layers", "model.visual.blocks"
    want = {
        **{f"{text}.{i}.mlp.weight": one[f"{text}.{i}.mlp.weight"] for i in (0, 1)},
        **{f"{text}.{i}.mlp.weight": two[f"{text}.{i - 1}.mlp.weight"] for i in (2, 3)},
        **{f"{tower}.{i}.attn.weight": two[f"{tower}.{i + 1}.attn.weight"] for i in (0, 1)},
    }
    start, end = "model.language_model.embed_tokens.weight", "lm_head.weight"
    patch, merger = "model.visual.patch_embed.proj.weight", "model.visual.merger.fc.weight"
    want |= {start: one[start], end: two[end], patch: two[patch], merger: one[merger]}
    assert made == want
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["vision_config"]["depth"] == 2
    assert verify(tmp_path / "out", sample=None).ok


MODULE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"vision_towr": {"models": ["one"]}}, "did you mean 'vision_tower'?"),
    ({"visual": {"models": ["one"]}}, "same module as modules.vision_tower"),
    ({"vision_tower": {}}, "modules.vision_tower: must have either 'models' or 'slices'"),
    ({"vision_tower": None}, "does not name 'vision_tower'"),
    ({"vision_tower": {"slices": [("one", 1, 5)]}}, "has 3 layers in vision_tower"),
    ({"multi_modal_projector": {"slices": [("one", 0, 1)]}}, "has no layers in multi_modal_proj"),
]


@pytest.mark.parametrize(("changes", "words"), MODULE_ERRORS)
def test_modules_that_cannot_be(
    vision: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    content = modules(vision)
    for name, module in changes.items():
        if module is None:
            del content["modules"][name]
            continue
        filled: dict[str, Any] = {}
        if "models" in module:
            filled["models"] = [{"model": str(vision / model)} for model in module["models"]]
        if "slices" in module:
            filled["slices"] = [{"sources": [source(vision, *part)]} for part in module["slices"]]
        content["modules"][name] = filled
    with pytest.raises(ClFastError, match=re.escape(words)):
        make_plan(parse_recipe(content), tmp_path / "out")


def test_slices_of_a_model_with_modules(vision: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"several modules: text_decoder \(3 layers\), vision_t"):
        planned(vision, tmp_path / "out", [source(vision, "one", 0, 2)])


def test_models_of_another_kind_or_size(root: Path, tmp_path: Path) -> None:
    wide = {
        name: value.repeat(1, 2) if value.dim() > 1 else value for name, value in state(7).items()
    }
    write(tmp_path / "wide", wide)
    write(tmp_path / "gpt", state(8), model_type="gpt2", architectures=["GPT2LMHeadModel"])
    write(tmp_path / "bert", {n.replace(STACK, "encoder.layer."): v for n, v in state(9).items()})
    for name, words in (
        ("wide", "layers of models of different sizes cannot follow each other"),
        ("gpt", "of another architecture than"),
        ("bert", "only models of one architecture can be put together"),
    ):
        slices = [[source(root, "one", 0, 2)], [source(tmp_path, name, 0, 2)]]
        with pytest.raises(ClFastError, match=words):
            planned(root, tmp_path / "out", *slices)
        if name == "bert":
            continue
        plan = make_plan(
            parse_recipe(
                {"merge_method": "passthrough", "slices": [{"sources": part} for part in slices]}
            ),
            tmp_path / "out",
            allow_crimes=True,
        )
        assert len(plan.tensors) == 11
        assert any("layer_types is left out of config.json" in note for note in plan.notes)


def test_embeddings_and_head_of_different_vocabularies(root: Path, tmp_path: Path) -> None:
    more = state(5)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more[name] = more[name].repeat(2, 1)
    write(tmp_path / "more", more)
    slices = [[source(root, "one", 0, 2)], [source(tmp_path, "more", 0, 2)]]
    with pytest.raises(CheckpointError, match=r"10 rows .* 20 .*different vocabularies"):
        planned(root, tmp_path / "out", *slices)


def test_layers_of_several_kinds_are_told(tmp_path: Path) -> None:
    """The first layer has no experts; where it lands elsewhere, config.json may not say so."""
    mixed = state(0) | {f"{STACK}{i}.mlp.experts.0.weight": torch.ones(2, 2) for i in (1, 2, 3)}
    write(tmp_path / "one", mixed, first_k_dense_replace=1, mlp_only_layers=[0])
    kept = planned(tmp_path, tmp_path / "kept", [source(tmp_path, "one", 0, 3)])
    assert not any("of one kind" in note for note in kept.notes)
    moved = planned(
        tmp_path, tmp_path / "out", [source(tmp_path, "one", 1, 3)], [source(tmp_path, "one", 0, 1)]
    )
    assert any("output's layer 0 is of another kind" in note for note in moved.notes)
    [config] = [file for file in moved.sidecars if file.name == "config.json"]
    assert config.content is not None
    assert json.loads(config.content)["mlp_only_layers"] == [2]
    both = [source(tmp_path, "one", 0, 1), source(tmp_path, "one", 1, 2)]
    with pytest.raises(CheckpointError, match="does not have the same tensors"):
        planned(tmp_path, tmp_path / "x", both, merge_method="linear")


ERRORS: list[tuple[Any, dict[str, Any], str]] = [
    ([[("one", 0, 5)]], {}, "slices[0].sources[0].layer_range: [0, 5] is out of range"),
    ([[("one", 2, 1)]], {}, "must run from a layer to a later one"),
    ([[("one", -1, 1)]], {}, "must run from a layer to a later one"),
    ([[("one", 2, 2)]], {}, "holds no layer"),
    ([[("one", 0, 2), ("two", 0, 2)]], {}, "'passthrough' takes 1 model here; got 2"),
    ([[]], {}, "slices[0].sources: is empty"),
    (
        [[("one", 0, 2), ("two", 0, 3)]],
        {"merge_method": "linear"},
        "slices[0].sources[1].layer_range: has 3 layers, slices[0].sources[0] has 2",
    ),
    (
        [[("one", 0, 2), ("two", 1, 3)]],
        {"merge_method": "ties", "base_model": "base"},
        "list the base_model",
    ),
    ([[("one", 0, 2)]], {"merge_method": "ties"}, "base_model: is required"),
    (
        [[("one", 0, 2, {"density": 0.5})]],
        {},
        "slices[0].sources[0].parameters.density: 'density' has no effect with merge_method",
    ),
    (
        [[("one", 0, 2, {"lambda": 0.5})]],
        {"merge_method": "ties", "base_model": "base"},
        "slices[0].sources[0].parameters.lambda: is for the whole merge",
    ),
    (
        [[("one", 0, 2, {"scale": [{"filter": "layers.3", "value": 2}, {"value": 1}]})]],
        {},
        "the filter 'layers.3' matches no tensor",
    ),
    ([[("one", 0, 2)]], {"parameters": {"normalize": True}}, "'normalize' has no effect"),
    ([[("one", 0, 2)]], {"seed": 3}, "seed: has no effect"),
    ([[("one", 0, 2)]], {"models": [{"model": "x"}]}, "slices: stands beside 'models'"),
    ([[("none", 0, 2)]], {}, "does not exist"),
    ([[("one", 0)]], {}, "layer_range: must be two numbers"),
    (
        [[("one", 0, 1), ("odd", 2, 3)]],
        {"merge_method": "linear"},
        "('model.layers.2.mlp.down_proj.weight' there); only models of one architecture",
    ),
]


@pytest.mark.parametrize(("slices", "recipe", "words"), ERRORS)
def test_slices_that_cannot_be(
    root: Path, tmp_path: Path, slices: Any, recipe: dict[str, Any], words: str
) -> None:
    listed = []
    for part in slices:
        sources = []
        for name, *layers in part:
            own = layers.pop() if isinstance(layers[-1], dict) else {}
            sources.append({"model": str(root / name), "layer_range": layers, "parameters": own})
        listed.append(sources)
    if "base_model" in recipe:
        recipe = {**recipe, "base_model": str(root / recipe["base_model"])}
    with pytest.raises(ClFastError, match=re.escape(words)):
        planned(root, tmp_path / "out", *listed, **recipe)
    assert not (tmp_path / "out").exists()


KEYS: list[tuple[dict[str, Any], str]] = [
    ({"slices": [{"source": []}]}, "slices[0].source: unknown key; did you mean 'sources'?"),
    ({"slices": [{"sources": [{"model": "a"}]}]}, "slices[0].sources[0].layer_range: is required"),
    (
        {"slices": [{"sources": [{"model": "a", "layer_range": ["0", 1]}]}]},
        "slices[0].sources[0].layer_range[0]: must be a whole number",
    ),
    ({"slices": []}, "slices: is empty"),
    ({"modules": {}}, "modules: is empty"),
    ({}, "models: is required, or 'slices' or 'modules'"),
    ({"modules": {"x": {"model": []}}}, "modules.x.model: unknown key; did you mean 'models'?"),
]


@pytest.mark.parametrize(("content", "words"), KEYS)
def test_keys_that_are_wrong(content: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse_recipe({"merge_method": "passthrough", **content})
