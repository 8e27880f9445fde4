"""Recipes in the shape of those that mergekit shows are planned as they stand.

The files of its examples, its README and its pages on methods and on several merges, each with
models of other names: decoders of forty layers, in folders that are called like models of a hub.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoints import CONFIG, write_checkpoint

from cl_fast.merging.stages import load_stages, merge_stages, plan_stages

LAYERS = 40
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("F16", (10, 4)),
    **{
        f"model.layers.{i}.{rest}.weight": ("F16", shape)
        for i in range(LAYERS)
        for rest, shape in (("self_attn.o_proj", (4, 4)), ("mlp.down_proj", (4, 6)))
    },
    "model.norm.weight": ("F16", (4,)),
    "lm_head.weight": ("F16", (10, 4)),
}
MODELS = ("garden/root-13b", "garden/rose-13b", "meadow/clover-v1", "meadow/moss-v1.2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for name in MODELS:
        write_checkpoint(folder / name, TENSORS, config={**CONFIG, "num_hidden_layers": LAYERS})
    return folder


#: name -> recipe, number of layers of the output.
RECIPES: dict[str, tuple[str, int]] = {
    "examples: linear": (
        """
models:
  - model: garden/rose-13b
    parameters:
      weight: 1.0
  - model: meadow/clover-v1
    parameters:
      weight: 0.3
  - model: meadow/moss-v1.2
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
""",
        40,
    ),
    "examples: layers of two models": (
        """
slices:
  - sources:
    - model: garden/rose-13b
      layer_range: [0, 24]
  - sources:
    - model: meadow/clover-v1
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
""",
        44,
    ),
    "examples: slerp by layers": (
        """
slices:
  - sources:
      - model: garden/rose-13b
        layer_range: [0, 40]
      - model: meadow/clover-v1
        layer_range: [0, 40]
# or, the equivalent models: syntax:
# models:
#   - model: garden/rose-13b
#   - model: meadow/clover-v1
merge_method: slerp
base_model: garden/rose-13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.4, 0.2, 0.8, 1]
    - filter: mlp
      value: [1, 0.6, 0.8, 0.2, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
        40,
    ),
    "examples: slerp of models": (
        """
models:
  - model: garden/rose-13b
  - model: meadow/clover-v1
merge_method: slerp
base_model: garden/rose-13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.4, 0.2, 0.8, 1]
    - value: 0.5
dtype: float16
""",
        40,
    ),
    "examples: ties with gradients": (
        """
models:
  - model: garden/rose-13b
    parameters:
      density: [1, 0.6, 0.2] # density gradient
      weight: 1.0
  - model: meadow/clover-v1
    parameters:
      density: 0.5
      weight: [0, 0.2, 0.6, 1] # weight gradient
  - model: meadow/moss-v1.2
    parameters:
      density: 0.3
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: garden/root-13b
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
        40,
    ),
    "examples: ties not normalized": (
        """
models:
  - model: garden/rose-13b
    parameters:
      density: 0.5
      weight: 0.5
  - model: meadow/clover-v1
    parameters:
      density: 0.5
      weight: 0.5
merge_method: ties
base_model: garden/root-13b
parameters:
  normalize: false
  int8_mask: true
dtype: float16
""",
        40,
    ),
    "pages: several merges, the last without a name": (
        """
name: first-bouquet
merge_method: linear
models:
  - model: garden/root-13b
  - model: garden/rose-13b
parameters:
  weight: 0.5
---
name: second-bouquet
merge_method: slerp
base_model: first-bouquet  # Reference previous merge
models:
  - model: meadow/clover-v1
parameters:
  t: 0.5
---
# Final merge (no name)
merge_method: dare_ties
base_model: garden/root-13b
models:
  - model: second-bouquet
    parameters:
      density: 0.6
      weight: 0.5
  - model: meadow/moss-v1.2
    parameters:
      density: 0.8
      weight: 0.5
""",
        40,
    ),
    "pages: a scale for some tensors": (
        """
slices:
  - sources:
      - model: garden/rose-13b
        layer_range: [0, 8]
        parameters:
          scale: {"filter": "down_proj", "value": 0.5}
merge_method: passthrough
dtype: bfloat16
""",
        8,
    ),
    "pages: layers that come twice": (
        """
slices:
  - sources: [{model: garden/rose-13b, layer_range: [0, 8]}]
  - sources:
      - model: garden/rose-13b
        layer_range: [4, 12]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.0
            - value: 1.0
  - sources: [{model: garden/rose-13b, layer_range: [8, 40]}]
merge_method: passthrough
dtype: bfloat16
tokenizer_source: garden/rose-13b
""",
        48,
    ),
    "pages: parameters at every level": (
        """
merge_method: dare_linear
base_model: garden/root-13b
slices:
  - sources:
      - model: garden/root-13b
        layer_range: [0, 20]
      - model: garden/rose-13b
        layer_range: [0, 20]
        parameters: {weight: 0.5, density: 0.5}
      - model: meadow/clover-v1
        layer_range: [0, 20]
    parameters:
      density: [0.4, 0.9]
      rescale: false
  - sources:
      - model: garden/root-13b
        layer_range: [20, 40]
      - model: meadow/clover-v1
        layer_range: [20, 40]
parameters:
  weight: 0.4
  density: 0.7
  lambda: 1.1
dtype: float32
out_dtype: bfloat16
""",
        40,
    ),
    "pages: a union of vocabularies": (
        """
merge_method: linear
models:
  - model: garden/rose-13b
    parameters: {weight: 0.5}
  - model: meadow/clover-v1
    parameters: {weight: 0.5}
tokenizer:
  source: union
  tokens:
    t3:
      source: garden/rose-13b
    t4:
      source: meadow/clover-v1
      force: true
    <|petal|>:
      source:
        kind: model_token
        model: garden/rose-13b
        token: t5
    <|leaf|>:
      source:
        kind: zero
  pad_to_multiple_of: 8
chat_template: chatml
""",
        40,
    ),
    "references as mappings": (
        """
merge_method: task_arithmetic
base_model: {model: {path: garden/root-13b, revision: null}, lora: null}
models:
  - model: {model: garden/rose-13b}
    parameters: {weight: 1.0}
  - model: {path: meadow/clover-v1}
    parameters: {weight: -0.5}
""",
        40,
    ),
}
RECIPES["examples: arcee fusion"] = (
    """
models:
  - model: garden/rose-13b
  - model: meadow/clover-v1
merge_method: arcee_fusion
base_model: garden/rose-13b
dtype: bfloat16
""",
    40,
)
RECIPES["pages: nearswap"] = (
    """
slices:
  - sources:
      - model: garden/rose-13b
        layer_range: [0, 40]
      - model: meadow/clover-v1
        layer_range: [0, 40]
merge_method: nearswap
base_model: garden/rose-13b
parameters:
  t:
    - value: 0.0001
dtype: bfloat16
""",
    40,
)
for _method, _base, _parameters in (
    ("sce", True, "{select_topk: 0.5}"),
    ("ram", True, "{}"),
    ("ramplus_tl", True, "{}"),
    ("nuslerp", False, "{}"),
    ("nuslerp", True, "{nuslerp_flatten: false, nuslerp_row_wise: true}"),
    ("multislerp", True, "{normalize_weights: true, eps: 1e-8}"),
    ("karcher", False, "{max_iter: 12, tol: 1e-6}"),
    ("model_stock", True, "{filter_wise: false}"),
    ("breadcrumbs", True, "{density: 0.9, gamma: 0.01, normalize: true}"),
    ("breadcrumbs_ties", True, "{density: 0.9, gamma: 0.01}"),
    ("della", True, "{density: 0.6, epsilon: 0.1, lambda: 1.0, normalize: true}"),
    ("della_linear", True, "{density: 0.6, epsilon: 0.1}"),
):
    _unweighted = ("karcher", "model_stock", "sce", "ram", "ramplus_tl")
    _weight = "" if _method in _unweighted else "{weight: 0.5}"
    RECIPES[f"pages: {_method} {_parameters}"] = (
        f"""
merge_method: {_method}
{"base_model: garden/root-13b" if _base else ""}
models:
  - model: garden/rose-13b
    parameters: {_weight}
  - model: meadow/clover-v1
    parameters: {_weight}
parameters: {_parameters}
dtype: bfloat16
""",
        40,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_planned_as_it_stands(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, layers = RECIPES[name]
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    monkeypatch.chdir(root)
    plans = plan_stages(load_stages(path, tmp_path / "out"))
    assert len(plans) == text.count("---") + 1
    assert len(plans[-1].tensors) == 2 * layers + 3
    found = {tensor.name for tensor in plans[-1].tensors}
    assert f"model.layers.{layers - 1}.mlp.down_proj.weight" in found
    assert not (tmp_path / "out").exists()


def test_one_of_them_is_carried_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPES["pages: several merges, the last without a name"][0])
    monkeypatch.chdir(root)
    result = merge_stages(load_stages(path, tmp_path / "out"))
    assert result.output == tmp_path / "out"
    assert sorted(p.name for p in (tmp_path / "out.stages").iterdir()) == [
        "first-bouquet",
        "second-bouquet",
    ]
