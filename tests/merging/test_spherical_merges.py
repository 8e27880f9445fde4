"""slerp, nuslerp, multislerp, karcher and model_stock from recipe to folder."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch
from torch import Tensor

from cl_fast.errors import NonFiniteError, OutputError, RecipeError
from cl_fast.merging import execute, make_plan, parse_recipe
from cl_fast.merging.deltas import apply_delta, pack_delta
from cl_fast.merging.description import describe
from cl_fast.merging.executors import make_executor
from cl_fast.merging.verify import verify
from cl_fast.ops.blending import unpack_gram
from cl_fast.ops.inner_products import gram_reference
from cl_fast.ops.spherical import karcher_mean, model_stock, multislerp, nuslerp, slerp

ROWS = {"model.embed_tokens.weight": 60, "model.layers.1.mlp.up_proj.weight": 20}


def family(root: Path) -> Path:
    """That of merge_cases, with one tensor of more than a tile."""
    base = cases.tensors(0)
    for seed, name in enumerate(("base", "one", "two", "three")):
        state = cases.tensors(seed, near=base) if seed else base
        state = {key: value[: ROWS.get(key, len(value))].clone() for key, value in state.items()}
        cases.save(root / name, state | {"model.ids": torch.arange(7)}, files=1 + seed % 2)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("family"))


T = [{"filter": "mlp", "value": [0.1, 0.9]}, {"filter": "embed", "value": -0.5}, {"value": 0.4}]

#: name -> (method, base, models with weights, parameters, the same on tensors)
CASES: dict[str, Any] = {
    "slerp": ("slerp", "one", {"two": None, "one": None}, {"t": T}),
    "slerp, base joins": ("slerp", "one", {"two": None}, {"t": 0.3}),
    "nuslerp": ("nuslerp", None, {"one": 1.0, "two": 3.0}, {}),
    "nuslerp, deltas": ("nuslerp", "base", {"one": 1.0, "two": 3.0}, {}),
    "nuslerp, rows": ("nuslerp", "base", {"one": 1.0, "two": 3.0}, {"nuslerp_flatten": False}),
    "nuslerp, columns": (
        "nuslerp", None, {"one": 1.0, "two": 3.0},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "multislerp": ("multislerp", None, {"one": 1.0, "two": 2.0, "three": 0.5}, {}),
    "multislerp, deltas": (
        "multislerp", "base", {"one": 1.0, "two": 2.0, "three": 0.5},
        {"normalize_weights": False, "eps": 1e-6},
    ),
    "karcher": ("karcher", None, dict.fromkeys(("one", "two", "three")), {"max_iter": 20}),
    "karcher, base joins": ("karcher", "one", dict.fromkeys(("two", "three")), {"tol": 1e-7}),
    "model_stock": ("model_stock", "base", dict.fromkeys(("base", "one", "two", "three")), {}),
    "model_stock, rows": (
        "model_stock", "base", dict.fromkeys(("one", "two", "three")), {"filter_wise": True},
    ),
}  # fmt: skip
BLENDS = [name for name in CASES if not name.endswith(("rows", "columns"))]


def content(root: Path, case: str, **changes: Any) -> dict[str, Any]:
    method, base, models, parameters = CASES[case]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(root / name)} | ({"parameters": {"weight": w}} if w is not None else {})
            for name, w in models.items()
        ],
    }
    if parameters:
        recipe["parameters"] = parameters
    if base is not None:
        recipe["base_model"] = str(root / base)
    return recipe | changes


def by_ops(case: str, name: str, states: dict[str, dict[str, Tensor]]) -> Tensor:
    """The same by the functions on tensors."""
    base, one, two, three = (states[model][name] for model in ("base", "one", "two", "three"))
    t = 0.4
    if "mlp" in name:
        t = 0.1 if "layers.0" in name else 0.9
    elif "embed" in name:
        t = -0.5
    return {
        "slerp": lambda: slerp(one, two, t),
        "slerp, base joins": lambda: slerp(one, two, 0.3),
        "nuslerp": lambda: nuslerp(one, two, [1.0, 3.0]),
        "nuslerp, deltas": lambda: nuslerp(one, two, [1.0, 3.0], base=base),
        "nuslerp, rows": lambda: nuslerp(one, two, [1.0, 3.0], base=base, along="rows"),
        "nuslerp, columns": lambda: nuslerp(one, two, [1.0, 3.0], along="columns"),
        "multislerp": lambda: multislerp([one, two, three], [1.0, 2.0, 0.5]),
        "multislerp, deltas": lambda: multislerp(
            [one, two, three], [1.0, 2.0, 0.5], base=base, normalize_weights=False, eps=1e-6
        ),
        "karcher": lambda: karcher_mean([one, two, three], max_iter=20),
        "karcher, base joins": lambda: karcher_mean([one, two, three], tol=1e-7),
        "model_stock": lambda: model_stock(base, [one, two, three]),
        "model_stock, rows": lambda: model_stock(base, [one, two, three], filter_wise=True),
    }[case]()


@pytest.mark.parametrize("case", list(CASES))
def test_a_merge_is_what_the_functions_say(
    root: Path, tmp_path: Path, case: str, backend: str
) -> None:
    plan = make_plan(parse_recipe(content(root, case)), tmp_path / "out", out_shard_size=30_000)
    execute(plan, backend=backend)
    states = {name: cases.load(root / name) for name in ("base", "one", "two", "three")}
    merged = cases.load(tmp_path / "out")
    for name, value in merged.items():
        if name == "model.ids":
            assert torch.equal(value, states["base"][name])
            continue
        assert torch.equal(value, by_ops(case, name, states)), name
    report = verify(tmp_path / "out", sample=None, backend=backend)
    assert report.ok, report.lines()
    assert len(report.recomputed) == len(merged)


@pytest.mark.parametrize("case", ["slerp", "model_stock", "model_stock, rows"])
def test_threads_tiles_and_resume_change_no_bit(root: Path, tmp_path: Path, case: str) -> None:
    cases.need_native()
    ways: list[dict[str, Any]] = [{"threads": 1}, {"threads": 4, "io": "pread"}]
    if case in BLENDS:
        ways.append({"threads": 2, "memory": 1 << 24})
    made = []
    for i, way in enumerate(ways):
        execute(make_plan(parse_recipe(content(root, case)), tmp_path / str(i)), **way)
        made.append(cases.raw(tmp_path / str(i)))
    assert all(other == made[0] for other in made[1:])


def test_two_reads_are_told(root: Path, tmp_path: Path) -> None:
    for case, reads in (("slerp", "twice"), ("model_stock, rows", "once")):
        plan = make_plan(parse_recipe(content(root, case)), tmp_path / "out")
        words = "\n".join(describe(plan))
        assert f"each input {'up to ' if reads == 'twice' else ''}{reads}" in words
        assert words.splitlines()[0].startswith(f"method   {CASES[case][0]}: ")
    words = "\n".join(describe(make_plan(parse_recipe(content(root, "slerp")), tmp_path / "out")))
    assert "t -0.5 to 0.9" in words


def test_the_fingerprint_knows_the_rule(root: Path, tmp_path: Path) -> None:
    prints = set()
    for changes in ({}, {"parameters": {"t": 0.3}}, {"base_model": str(root / "two")}):
        recipe = content(root, "slerp", **changes)
        prints.add(make_plan(parse_recipe(recipe), tmp_path / "out").fingerprint)
    assert len(prints) == 3


def test_grams_of_an_executor(root: Path, tmp_path: Path, backend: str) -> None:
    plan = make_plan(parse_recipe(content(root, "model_stock")), tmp_path / "out")
    executor = make_executor(
        plan, backend=backend, threads=2, memory=None, io="auto", nan="refuse"
    )
    tensors = [tensor for tensor in plan.tensors if tensor.kind == "combine"]
    found = executor.gram(tensors, lambda _: None)
    states = {name: cases.load(root / name) for name in ("base", "one", "two", "three")}
    for tensor, gram in zip(tensors, found, strict=True):
        base, *values = (states[name][tensor.name] for name in states)
        assert gram == gram_reference(values, base)
        assert unpack_gram(gram, 3)[0][0] > 0


def test_the_core_needs_neither_torch_nor_numpy(root: Path, tmp_path: Path) -> None:
    cases.need_native()
    file = cases.write_recipe(tmp_path / "recipe.yml", content(root, "model_stock"))
    code = (
        "import sys; from cl_fast.cli import main; "
        f"code = main(['merge', {str(file)!r}, {str(tmp_path / 'out')!r}]); "
        "print(code, sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("0 []"), done.stdout + done.stderr


@pytest.mark.parametrize("case", ["slerp", "model_stock", "nuslerp, rows"])
def test_nan(tmp_path: Path, case: str, backend: str) -> None:
    root = family(tmp_path / "family")
    name = "model.layers.0.mlp.up_proj.weight"
    cases.poison(root / "one", name, 5, math.nan)
    plan = make_plan(parse_recipe(content(root, case)), tmp_path / "out")
    with pytest.raises(NonFiniteError, match=rf"{name} of model one holds 1 NaN"):
        execute(plan, backend=backend)
    assert not (tmp_path / "out").exists()
    execute(plan, backend=backend, nan="propagate", restart=True)
    bad = torch.isnan(cases.load(tmp_path / "out")[name].flatten())
    width = 401 if case == "nuslerp, rows" else 1
    assert bad[5]
    assert int(bad.sum()) <= width  # nowhere but in its place, or in its row
    zero = make_plan(parse_recipe(content(root, case)), tmp_path / "zero")
    execute(zero, backend=backend, nan="zero")
    assert torch.isfinite(cases.load(tmp_path / "zero")[name]).all()


def test_memory_that_is_too_little_for_whole_tensors(root: Path, tmp_path: Path) -> None:
    plan = make_plan(parse_recipe(content(root, "model_stock, rows")), tmp_path / "out")
    with pytest.raises(OutputError, match=r"too little for merge_method 'model_stock'"):
        make_executor(plan, backend=None, threads=1, memory=1000, io="auto", nan="refuse")
    blend = make_plan(parse_recipe(content(root, "model_stock")), tmp_path / "out")
    assert plan.memory > blend.memory + 200_000_000  # torch


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("slerp", {"parameters": ...}, "parameters.t: is required by merge_method 'slerp'"),
    ("slerp", {"parameters": {"t": [{"filter": "mlp", "value": 1}]}}, "no filter matches tensor"),
    ("slerp", {"parameters": {"t": "half"}}, "parameters.t: must be a number"),
    ("slerp", {"parameters": {"t": 0.5, "weight": 1}}, "'weight' has no effect with merge_method"),
    ("slerp", {"base_model": ...}, "base_model: is required by merge_method 'slerp'"),
    ("slerp", {"base_model": "base"}, "merges 2 models, one of them the base_model"),
    ("slerp", {"models": ["one"]}, "merges 2 models, one of them the base_model"),
    ("slerp", {"models": ["one", "two", "three"]}, "merges 2 models, one of them the base_model"),
    ("slerp", {"seed": 3}, "seed: has no effect"),
    ("nuslerp", {"models": ["one", "two", "three"]}, "'nuslerp' merges 2 models; got 3"),
    ("nuslerp", {"models": ["one"]}, "'nuslerp' merges 2 models; got 1"),
    ("nuslerp, deltas", {"models": ["one", "base"]}, "2 models beside the base_model; got 1"),
    ("nuslerp", {"parameters": {"nuslerp_row_wise": True}}, "nuslerp_row_wise: has no effect"),
    ("nuslerp", {"parameters": {"nuslerp_flatten": 1}}, "nuslerp_flatten: must be true or false"),
    ("nuslerp", {"parameters": {"t": 1}}, "'t' has no effect with merge_method 'nuslerp'"),
    ("multislerp", {"parameters": {"eps": 0}}, "eps is the smallest length, a number above 0"),
    ("karcher", {"parameters": {"max_iter": 2.5}}, "max_iter is the most steps, a whole number"),
    ("karcher", {"parameters": {"tol": -1}}, "tol is the shortest step, a number above 0"),
    ("karcher", {"parameters": {"weight": 1}}, "'weight' has no effect with merge_method 'karcher"),
    ("model_stock", {"models": ["one", "base"]}, "merges 2 or more models beside the base_model"),
    ("model_stock", {"base_model": ...}, "base_model: is required by merge_method 'model_stock'"),
    ("model_stock", {"parameters": {"lambda": 1}}, "'lambda' has no effect"),
    ("model_stock", {"parameters": {"variant": "peft"}}, "'variant' has no effect"),
]


@pytest.mark.parametrize(("case", "changes", "words"), BAD)
def test_bad_recipes(
    root: Path, tmp_path: Path, case: str, changes: dict[str, Any], words: str
) -> None:
    recipe = content(root, case)
    for key, value in changes.items():
        if value is ...:
            del recipe[key]
        elif key == "models":
            recipe[key] = [{"model": str(root / name)} for name in value]
        else:
            recipe[key] = str(root / value) if key == "base_model" else value
    with pytest.raises(RecipeError) as caught:
        make_plan(parse_recipe(recipe), tmp_path / "out")
    assert words in str(caught.value)


def test_weights_that_sum_to_zero(root: Path, tmp_path: Path) -> None:
    recipe = content(root, "multislerp")
    for entry, weight in zip(recipe["models"], (1.0, -2.0, 1.0), strict=True):
        entry["parameters"] = {"weight": weight}
    with pytest.raises(RecipeError, match=r"cannot be normalized .* normalize_weights: false"):
        make_plan(parse_recipe(recipe), tmp_path / "out")
    recipe["parameters"] = {"normalize_weights": False}
    make_plan(parse_recipe(recipe), tmp_path / "out")


# Beside mergekit.


@pytest.fixture(scope="module")
def mergekit() -> Any:
    return pytest.importorskip("mergekit.merge_methods.api", reason="mergekit is not installed")


PEERS = [name for name in CASES if name not in ("slerp", "karcher, base joins")]


def by_mergekit(
    mergekit: Any, case: str, states: dict[str, dict[str, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    method, base, models, parameters = CASES[case]
    names = dict.fromkeys(([base] if base else []) + list(models))
    weights = {name: w for name, w in models.items() if w is not None}
    found: dict[str, Tensor] = mergekit.merge_state_dicts(
        {name: {k: v.clone() for k, v in states[name].items()} for name in names},
        method,
        parameters=parameters | ({"weight": weights} if weights else {}),
        base=base,
        dtype=dtype,
        out_dtype=torch.float32,
    )
    return found


def float64(case: str, states: dict[str, dict[str, Tensor]], name: str) -> Tensor:
    wide = {model: {name: state[name].double()} for model, state in states.items()}
    return by_ops(case, name, wide)


@pytest.mark.peers
@pytest.mark.parametrize("case", PEERS)
def test_mergekit_within_rounding_and_not_closer(root: Path, mergekit: Any, case: str) -> None:
    """In float64 and float32 the same within rounding; in bfloat16 never closer than ours."""
    states = {name: cases.load(root / name) for name in ("base", "one", "two", "three")}
    for state in states.values():
        del state["model.ids"]
        for name, value in state.items():
            state[name] = value[:64]
    wide = {m: {k: v.double() for k, v in state.items()} for m, state in states.items()}
    same = by_mergekit(mergekit, case, wide, torch.float64)
    float32 = by_mergekit(mergekit, case, states, torch.float32)
    narrow = by_mergekit(mergekit, case, states, torch.bfloat16)
    theirs = ours = 0.0
    for name, value in same.items():
        exact = float64(case, states, name)
        size = sum(state[name].double().abs() for state in states.values())
        # its eps of 1e-8 (1e-6 in one of the cases) beside lengths of one and more
        assert ((value.double() - exact).abs() <= 1e-6 * size).all(), name
        # its float32 norms of 25,000 elements are off by some 1e-6
        assert ((float32[name].double() - exact).abs() <= 2e-5 * size).all(), name
        mine = by_ops(case, name, states).double()
        theirs += float((narrow[name].double() - exact).square().sum())
        ours += float((mine - exact).square().sum())
    assert ours <= theirs * 1.001


@pytest.mark.peers
def test_small_angles_in_bfloat16(mergekit: Any) -> None:
    """An angle of two degrees: a bfloat16 dot cannot tell it from none, and lengths come apart."""
    g = torch.Generator().manual_seed(0)
    center = torch.randn(64, 64, generator=g)
    one, two = ((center + 0.02 * torch.randn(64, 64, generator=g)).bfloat16() for _ in range(2))
    for method, parameters, exact, mine in (
        (
            "nuslerp",
            {"weight": {"one": 1.0, "two": 1.0}},
            nuslerp(one.double(), two.double(), [1, 1]),
            nuslerp(one, two, [1, 1]),
        ),
        ("karcher", {}, karcher_mean([one.double(), two.double()]), karcher_mean([one, two])),
    ):
        theirs = mergekit.merge_state_dicts(
            {"one": {"w": one.clone()}, "two": {"w": two.clone()}}, method,
            parameters=parameters, dtype=torch.bfloat16, out_dtype=torch.bfloat16,
        )["w"]  # fmt: skip
        ours_error = (mine.double() - exact).abs().max()
        assert ours_error <= (theirs.double() - exact).abs().max()
        # half a spacing of bfloat16, and nothing else
        assert ours_error <= 2.0**-8 * 1.001 * exact.abs().max()


@pytest.mark.peers
def test_deliberate_differences(mergekit: Any) -> None:
    """The rows of docs/spherical-merges.md; each is as mergekit does it, and as it is done here."""

    def peer(method: str, base: Tensor | None, *xs: Tensor, **parameters: Any) -> Tensor:
        models = {str(k): {"w": x.clone()} for k, x in enumerate(xs)}
        if method in ("nuslerp", "multislerp"):
            parameters["weight"] = dict.fromkeys(models, 1.0)
        found: Tensor = mergekit.merge_state_dicts(
            models if base is None else {"base": {"w": base.clone()}, **models}, method,
            parameters=parameters, base=None if base is None else "base",
            dtype=torch.float32, out_dtype=torch.float32,
        )["w"]  # fmt: skip
        return found

    g = torch.Generator().manual_seed(1)
    x, y, base = (torch.randn(8, 8, generator=g) for _ in range(3))
    # multislerp: nothing has changed in this tensor
    with pytest.raises(ValueError, match="weighted sum"):
        peer("multislerp", x, x, x, x)
    assert torch.equal(multislerp([x, x, x], base=x), x)
    # karcher: a short tensor
    tiny = [1e-8 * x, 1e-8 * (x + 0.1 * y)]
    assert not peer("karcher", None, *tiny).any()
    expected = 1e-8 * karcher_mean([x, x + 0.1 * y])
    assert torch.allclose(karcher_mean(tiny), expected, rtol=1e-5, atol=0)
    # model_stock: small deltas
    near = [base + 1e-5 * x, base + 1e-5 * (x + 0.1 * y)]
    assert (peer("model_stock", base, *near) - base).norm() < 0.5e-5 * x.norm()
    assert (model_stock(base, near) - base).norm() > 0.9e-5 * x.norm()
    # slerp: a short vector
    a, b = 1e-10 * x, 1e-10 * (x + 0.5 * y)
    found = mergekit.merge_state_dicts(
        {"a": {"w": a.clone()}, "b": {"w": b.clone()}}, "slerp", parameters={"t": 0.5}, base="a",
        dtype=torch.float32, out_dtype=torch.float32,
    )["w"]  # fmt: skip
    exact = 1e-10 * slerp(x.double(), (x + 0.5 * y).double(), 0.5)
    assert (found.double() - exact).norm() > 0.2 * exact.norm()
    assert (slerp(a, b, 0.5).double() - exact).norm() < 1e-6 * exact.norm()
    # nuslerp: nearly opposite
    side = y - (y * x).sum() / x.square().sum() * x
    turned = -x + 2e-4 * x.norm() / side.norm() * side
    length = float(x.norm())
    assert float(peer("nuslerp", None, x, turned).norm()) != pytest.approx(length, rel=0.05)
    assert float(nuslerp(x, turned, [1, 1]).norm()) == pytest.approx(length, rel=0.01)


@pytest.mark.parametrize("case", ["model_stock", "model_stock, rows", "nuslerp, deltas"])
def test_packed_deltas_are_inputs(root: Path, tmp_path: Path, case: str, backend: str) -> None:
    """A packed delta counts with its factor in the angles, too."""
    for name in ("one", "two", "three"):
        path = tmp_path / f"{name}.delta.safetensors"
        pack_delta(root / "base", root / name, path, drop_rate=0.5, seed=1)
        apply_delta(root / "base", path, tmp_path / name, out_dtype="float32")
    packed, dense = content(root, case), content(root, case)
    for recipe, suffix in ((packed, ".delta.safetensors"), (dense, "")):
        for entry in recipe["models"]:
            if Path(entry["model"]).name != "base":
                entry["model"] = str(tmp_path / (Path(entry["model"]).name + suffix))
        out = tmp_path / f"out{suffix}"
        execute(make_plan(parse_recipe(recipe | {"out_dtype": "float32"}), out), backend=backend)
        assert verify(out, sample=None, backend=backend).ok
    ours, same = cases.load(tmp_path / "out.delta.safetensors"), cases.load(tmp_path / "out")
    for name, value in ours.items():
        assert torch.allclose(value.double(), same[name].double(), rtol=1e-6, atol=1e-6), name
