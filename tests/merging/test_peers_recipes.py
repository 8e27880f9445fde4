"""Recipes with slices and modules give what mergekit makes of them, within rounding.

Its whole program runs on tiny models in float32, and its definitions of architectures are asked
whether layers, and what stands before and after them, are found from names alone.
"""

from __future__ import annotations

import copy
import importlib.resources
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merge_cases import load
from safetensors.torch import save_file
from torch import Tensor

from cl_fast.checkpoints.layers import find_module, find_modules
from cl_fast.cli import main
from cl_fast.merging.engine import execute
from cl_fast.merging.methods import METHODS
from cl_fast.merging.plan import make_plan
from cl_fast.merging.recipe import parse_recipe

pytestmark = pytest.mark.peers

PAGE = Path(__file__).parents[2] / "docs" / "from-mergekit.md"

TEXT = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 16,
    "torch_dtype": "float32",
}
LAYER = {
    "input_layernorm.weight": (8,),
    "post_attention_layernorm.weight": (8,),
    "mlp.down_proj.weight": (8, 12),
    "mlp.gate_proj.weight": (12, 8),
    "mlp.up_proj.weight": (12, 8),
    **{f"self_attn.{p}_proj.weight": (8, 8) for p in "qkvo"},
}
LAST = {"model.norm.weight": (8,), "lm_head.weight": (16, 8)}
LLAMA = {
    "model.embed_tokens.weight": (16, 8),
    **{f"model.layers.{i}.{rest}": shape for i in range(4) for rest, shape in LAYER.items()},
    **LAST,
}


def write(folder: Path, shapes: dict[str, tuple[int, ...]], config: Any, seed: int) -> Path:
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def mergekit() -> Any:
    return pytest.importorskip("mergekit.merge", reason="mergekit is not installed")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    for seed, name in enumerate(("base", "one", "two")):
        write(folder / name, LLAMA, TEXT, seed)
    return folder


def filled(value: Any, root: Path) -> Any:
    """The recipe with the folders of its models."""
    if isinstance(value, dict):
        return {
            key: str(root / item) if key in ("model", "base_model") else filled(item, root)
            for key, item in value.items()
        }
    return [filled(item, root) for item in value] if isinstance(value, list) else value


def theirs(mergekit: Any, recipe: Any, out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from mergekit.config import MergeConfiguration

    config = MergeConfiguration.model_validate(copy.deepcopy(recipe))
    options = mergekit.MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    mergekit.run_merge(config, str(out), options)
    return load(out), json.loads((out / "config.json").read_text())


def ours(recipe: Any, out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    execute(make_plan(parse_recipe(recipe), out))
    return load(out), json.loads((out / "config.json").read_text())


RECIPES: dict[str, str] = {
    "passthrough": """
merge_method: passthrough
slices:
  - sources: [{model: one, layer_range: [0, 3]}]
  - sources:
      - model: two
        layer_range: [1, 4]
        parameters:
          scale: [{filter: layers.2, value: 0.5}, {filter: o_proj, value: [0.25, 2]}, {value: 1}]
  - sources: [{model: one, layer_range: [3, 4]}]
    parameters: {scale: 0.75}
""",
    "precedence": """
merge_method: linear
parameters:
  weight: [{filter: mlp, value: [1, 3]}, {value: 2}]
  normalize: false
slices:
  - parameters: {weight: [{filter: q_proj, value: 5}]}
    sources:
      - {model: one, layer_range: [0, 3], parameters: {weight: [{filter: layers.1, value: 7}]}}
      - {model: two, layer_range: [1, 4], parameters: {weight: [{filter: layers.3, value: 11}]}}
  - parameters: {weight: [0.1, 0.9], normalize: true}
    sources:
      - {model: one, layer_range: [3, 4]}
      - {model: two, layer_range: [0, 1], parameters: {weight: [0.3, 0.6, 0.2]}}
""",
    "deltas": """
merge_method: task_arithmetic
base_model: base
parameters: {weight: [0.2, 1.0], lambda: 0.5}
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: one, layer_range: [1, 3]}
      - {model: two, layer_range: [2, 4], parameters: {weight: [{filter: layers.2., value: -1}]}}
    parameters: {lambda: [{filter: layers.1., value: 2}, {value: 1.5}]}
  - sources: [{model: base, layer_range: [2, 4]}, {model: two, layer_range: [2, 4]}]
""",
    "own bases": """
merge_method: ties
base_model: base
parameters: {density: [0.9, 0.3], weight: 1}
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: one, layer_range: [0, 2]}
      - {model: two, layer_range: [1, 3]}
  - base_model: one
    sources:
      - {model: one, layer_range: [0, 2]}
      - {model: two, layer_range: [1, 3], parameters: {density: 0.5}}
      - {model: base, layer_range: [2, 4]}
""",
    "slerp by layers": """
merge_method: slerp
base_model: two
parameters:
  t: [{filter: self_attn, value: [0, 0.4, 0.2, 1]}, {value: 0.5}]
slices:
  - sources: [{model: one, layer_range: [0, 3]}, {model: two, layer_range: [1, 4]}]
  - sources: [{model: one, layer_range: [3, 4]}, {model: two, layer_range: [0, 1]}]
    parameters: {t: [0.9, 0.1]}
""",
    "whole models in a module": """
merge_method: linear
modules:
  default:
    parameters: {weight: [1, 2, 4]}
    models: [{model: one}, {model: two, parameters: {weight: [{filter: norm, value: 3}]}}]
""",
    "one filter without a list": """
merge_method: linear
parameters: {weight: {value: 0.5}}
models: [{model: one}, {model: two}]
""",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(mergekit: Any, root: Path, tmp_path: Path, name: str) -> None:
    recipe = filled(yaml.safe_load(RECIPES[name]), root)
    want, want_config = theirs(mergekit, recipe, tmp_path / "theirs")
    got, config = ours(recipe, tmp_path / "ours")
    assert got.keys() == want.keys()
    for key, value in want.items():
        # Sums of at most three terms below 40 in size, a few float32 roundings each.
        torch.testing.assert_close(got[key], value, rtol=2**-20, atol=2**-20, msg=key)
    assert config["num_hidden_layers"] == want_config["num_hidden_layers"]


def test_the_end_has_all_sources_of_the_last_slice(
    mergekit: Any, root: Path, tmp_path: Path
) -> None:
    """There it has as many as the first slice has, and the others are left out. Not here."""
    source = {"model": "one", "layer_range": [0, 2]}
    other = {"model": "two", "layer_range": [2, 4]}
    slices = [{"sources": [source]}, {"sources": [source, other]}]
    recipe = {"merge_method": "linear", "parameters": {"weight": 0.5}, "slices": slices}
    want, _ = theirs(mergekit, filled(recipe, root), tmp_path / "theirs")
    got, _ = ours(filled(recipe, root), tmp_path / "ours")
    one, two = load(root / "one"), load(root / "two")
    for name in LAST:
        torch.testing.assert_close(want[name], one[name])
        torch.testing.assert_close(got[name], (one[name] + two[name]) / 2)


VISION = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {**TEXT, "model_type": "gemma3_text", "head_dim": 4},
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
    },
}


def test_modules(mergekit: Any, tmp_path: Path) -> None:
    file = importlib.resources.files("mergekit._data.architectures").joinpath("gemma3vl.json")
    modules = json.loads(file.read_text())["modules"]
    shapes: dict[str, tuple[int, ...]] = {}
    for title, count in (("text_decoder", 4), ("multi_modal_projector", 0), ("vision_tower", 3)):
        pre, layers, post = names_of(modules[title], count)
        shapes |= dict.fromkeys([*pre, *post, *(n for one in layers for n in one)], (4, 4))
    for seed, name in enumerate(("one", "two")):
        write(tmp_path / name, shapes, VISION, seed)
    recipe = filled(
        yaml.safe_load("""
merge_method: passthrough
modules:
  text_decoder:
    parameters: {scale: [{filter: mlp, value: [1, 2]}, {value: 1}]}
    slices:
      - sources: [{model: one, layer_range: [0, 3]}]
      - sources: [{model: two, layer_range: [1, 4]}]
  multi_modal_projector: {models: [{model: two}]}
  vision_tower:
    slices:
      - sources: [{model: two, layer_range: [0, 2]}]
"""),
        tmp_path,
    )
    want, want_config = theirs(mergekit, recipe, tmp_path / "theirs")
    got, config = ours(recipe, tmp_path / "ours")
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=2**-23, atol=0, msg=key)
    for section, count in (("text_config", 6), ("vision_config", 2)):
        assert config[section]["num_hidden_layers"] == count
        assert want_config[section]["num_hidden_layers"] == count


#: Architectures whose definition there is not how their checkpoints are: no dot after the prefix,
#: and embeddings and head among the numbered layers.
_ODD = ("whisper.json", "phi-1.json")


def names_of(module: Any, count: int) -> tuple[list[str], list[list[str]], list[str]]:
    prefix, parts = module.get("weight_prefix") or "", module["architecture"]

    def names(listed: Any, layer: int = 0) -> list[str]:
        return [prefix + one["name"].replace("${layer_index}", str(layer)) for one in listed]

    layers = [names(parts["layer_templates"]["weights"], i) for i in range(count)]
    return names(parts["pre_weights"]), layers, names(parts["post_weights"])


def test_layers_are_found_as_its_definitions_say() -> None:
    """Of all architectures that it knows: the same layers, and the same before and after them."""
    data = pytest.importorskip("mergekit._data.architectures", reason="mergekit is not installed")
    seen = 0
    for file in importlib.resources.files(data).iterdir():
        if not file.name.endswith(".json") or file.name in _ODD:
            continue
        content = json.loads(file.read_text())
        modules = content.get("modules") or {"default": {"architecture": content}}
        parts = {title: names_of(module, 3) for title, module in modules.items()}
        every = [
            name
            for pre, layers, post in parts.values()
            for name in [*pre, *post, *(n for one in layers for n in one)]
        ]
        found = find_modules(dict.fromkeys(every))
        for title, (pre, layers, post) in parts.items():
            module = find_module(found, title)
            assert module is not None, (file.name, title)
            if module.layers:
                mine = [{module.tensor(i, r) for r in one} for i, one in enumerate(module.layers)]
                assert mine == [set(one) for one in layers], (file.name, title)
                assert set(module.pre) == set(pre), (file.name, title)
                assert set(module.post) == set(post), (file.name, title)
            else:  # nothing stands before or after no layers
                whole = {*pre, *post, *(n for one in layers for n in one)}
                assert {*module.pre, *module.post} == whole, (file.name, title)
        seen += 1
    assert seen > 50


def test_every_flag_is_accepted_and_on_the_page(root: Path, tmp_path: Path) -> None:
    options = pytest.importorskip("mergekit.options", reason="mergekit is not installed")
    page = PAGE.read_text()
    flags: list[str] = []
    for name, field in options.MergeOptions.model_fields.items():
        flag = "-v" if name == "verbosity" else f"--{name.replace('_', '-')}"
        assert f"`{flag}`" in page, flag
        if field.annotation is bool or name == "verbosity":
            flags += [flag]
        elif flag not in ("--transformers-cache", "--device"):
            flags += [flag, "bfloat16" if name == "lora_merge_dtype" else "7"]
    flags.remove("--quiet")  # it stands beside -v
    text = RECIPES["whole models in a module"].replace("linear", "dare_linear\nbase_model: base")
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(filled(yaml.safe_load(text), root)))
    assert main(["merge", str(path), str(tmp_path / "out"), *flags, "--dry-run"]) == 0


def test_every_method_is_on_the_page() -> None:
    registry = pytest.importorskip(
        "mergekit.merge_methods.registry", reason="mergekit is not installed"
    )
    page = PAGE.read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for method in registry.registered_methods():
        [row] = [row for row in rows if f"`{method.spec.name}`" in row.split("|")[1]]
        assert (method.spec.name in METHODS) is ("| same |" in row), row
