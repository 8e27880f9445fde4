"""Layers of several models put together: what lands where, from whom, with which numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_cases import load, need_native, raw, save
from torch import Tensor

from cl_fast.errors import ClFastError
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


ERRORS: list[tuple[Any, str]] = [
    ([[("one", 0, 5)]], "slices[0].sources[0].layer_range: [0, 5] is out of range"),
    ([[("one", 2, 1)]], "must run from a layer to a later one"),
    ([[("one", 2, 2)]], "holds no layer"),
]


@pytest.mark.parametrize(("slices", "words"), ERRORS)
def test_slices_that_cannot_be(root: Path, tmp_path: Path, slices: Any, words: str) -> None:
    listed = [[source(root, *entry) for entry in part] for part in slices]
    with pytest.raises(ClFastError, match=words.replace("[", r"\[").replace("]", r"\]")):
        planned(root, tmp_path / "out", *listed)
