"""breadcrumbs, della, sce, nearswap, arcee_fusion and ram: recipes, what they refuse and tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch

from cl_fast.backends import native
from cl_fast.errors import Interrupted, RecipeError
from cl_fast.merging import execute, make_plan, parse_recipe
from cl_fast.merging.description import describe
from cl_fast.merging.state_dicts import breadcrumbs, breadcrumbs_ties, della, della_linear, sce
from cl_fast.merging.verify import verify
from cl_fast.ops import Policy, combine, selective


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.family(tmp_path_factory.mktemp("family"))


def recipe(root: Path, method: str, *models: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    given = models or ({}, {}, {})
    return {
        "merge_method": method,
        "base_model": str(root / "base"),
        "models": [
            {"model": str(root / name), "parameters": {"weight": weight, **more}}
            for name, weight, more in zip(
                ("one", "two", "three"), (1.0, 0.5, 0.25), given, strict=False
            )
        ],
        "parameters": parameters,
    }


CASES: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = [
    # function, its keywords, what a recipe says for the same
    (breadcrumbs, {"density": 0.4}, {"density": 0.4}),
    (
        breadcrumbs_ties,
        {"density": 0.6, "gamma": 0.1, "trim_count": "at_least_one", "rescale": True},
        {"density": 0.6, "gamma": 0.1, "trim_count": "at_least_one", "rescale": True},
    ),
    (della_linear, {"density": 0.3}, {"density": 0.3}),
    (
        della,
        {"density": 0.5, "epsilon": 0.3, "variant": "paper", "lam": 0.5},
        {"density": 0.5, "epsilon": 0.3, "variant": "paper", "lambda": 0.5},
    ),
    (
        della,
        {"density": 0.5, "normalize": False, "elect": "frequency", "elect_on": "unweighted"},
        {"density": 0.5, "normalize": False, "elect": "frequency", "elect_on": "unweighted"},
    ),
]


@pytest.mark.parametrize(("function", "keywords", "parameters"), CASES)
def test_in_memory_and_from_a_recipe(
    root: Path,
    tmp_path: Path,
    function: Callable[..., Any],
    keywords: dict[str, Any],
    parameters: dict[str, Any],
    backend: str,
) -> None:
    content = recipe(root, function.__name__, **parameters)
    execute(make_plan(parse_recipe(content), tmp_path / "out"), backend=backend, fsync=False)
    states = {name: cases.load(root / name) for name in ("base", "one", "two", "three")}
    ours = function(
        states["base"], {name: states[name] for name in ("one", "two", "three")},
        weight=[1.0, 0.5, 0.25], backend=backend, **keywords,
    )  # fmt: skip
    merged = cases.load(tmp_path / "out")
    assert merged.keys() == ours.keys()
    assert all(torch.equal(merged[name], ours[name]) for name in merged)


def test_each_model_and_tensor_has_its_own_numbers(root: Path, tmp_path: Path) -> None:
    one = {"density": 0.5, "gamma": [{"filter": "norm", "value": 0.2}, {"value": [0.0, 0.1]}]}
    content = recipe(root, "breadcrumbs", one, {"density": 1.0}, {"density": 0.2}, gamma=0.05)
    plan = make_plan(parse_recipe(content), tmp_path / "out")
    terms = {tensor.name: tensor.terms for tensor in plan.tensors}
    assert [t.gamma for t in terms["model.norm.weight"]] == [0.2, 0.05, 0.05]
    assert [t.gamma for t in terms["model.layers.1.mlp.up_proj.weight"]] == [0.1, 0.05, 0.05]
    assert [t.gamma for t in terms["model.embed_tokens.weight"]] == [0.0, 0.05, 0.05]
    words = "\n".join(describe(plan))
    assert "gamma 0 to 0.2" in words
    assert "outliers and small entries dropped" in words


def test_defaults_are_those_of_mergekit(root: Path, tmp_path: Path) -> None:
    plan = make_plan(parse_recipe(recipe(root, "della", density=0.5)), tmp_path / "out")
    assert {t.epsilon for tensor in plan.tensors for t in tensor.terms} == {0.15}
    assert "by the rank in the row" in "\n".join(describe(plan))
    policy = plan.tensors[0].policy
    assert (policy.rescale, policy.reduce, policy.elect) == ("l1", "mean", "mass")
    policy = parse_recipe(recipe(root, "della_linear", density=0.5)).parts[0].policy
    assert (policy.rescale, policy.reduce, policy.elect) == ("l1", "sum", "none")
    plan = make_plan(parse_recipe(recipe(root, "breadcrumbs", density=0.5)), tmp_path / "out")
    assert {t.gamma for tensor in plan.tensors for t in tensor.terms} == {0.01}
    assert plan.seed is None
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        policy = parse_recipe(recipe(root, method, density=0.5)).parts[0].policy
        assert (policy.rescale, policy.reduce) == ("none", "sum")


BAD: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    # method, of the first model, of all, words
    ("breadcrumbs", {"density": 0.5, "gamma": 1.5}, {}, "gamma is the fraction of largest"),
    ("breadcrumbs", {"density": 0.5, "gamma": -0.1}, {}, r"models\[0\].parameters.gamma: gamma is"),
    ("breadcrumbs", {"density": 0.5, "epsilon": 0.1}, {}, "'epsilon' has no effect"),
    ("breadcrumbs", {"density": 0.5}, {"trim_scope": "model"}, "'trim_scope' has no effect"),
    ("breadcrumbs", {"density": 0.5}, {"variant": "paper"}, "variant: 'paper' has no effect"),
    ("breadcrumbs", {"density": 0.5}, {"elect": "mass"}, "'elect' has no effect"),
    ("breadcrumbs", {"density": 0.5}, {"rescale_by": "l1"}, "has no effect without rescale: true"),
    ("ties", {"density": 0.5, "gamma": 0.1}, {}, "'gamma' has no effect"),
    ("della", {"density": 0.5}, {"trim_count": "floor"}, "'trim_count' has no effect"),
    ("della", {"density": 0.5}, {"variant": "peft"}, "variant: 'peft' has no effect"),
    ("della", {"density": 0.1}, {}, r"models\[0\].parameters.epsilon: .* of at most 0.1"),
    ("della", {"density": 0.9}, {"epsilon": 0.2}, r"parameters.epsilon: .* at most 0.1 \(tensor"),
    ("della", {"density": 0.5, "epsilon": 0.6}, {}, "epsilon of at most 0.5"),
    ("della", {"density": 0.5, "epsilon": -0.1}, {}, "epsilon is half the range"),
    ("della", {"density": 0.5, "epsilon": "half"}, {}, "must be a number"),
]


@pytest.mark.parametrize(("method", "own", "parameters", "words"), BAD)
def test_refused(
    root: Path,
    tmp_path: Path,
    method: str,
    own: dict[str, Any],
    parameters: dict[str, Any],
    words: str,
) -> None:
    content = recipe(root, method, own, {"density": 0.5}, {"density": 0.5}, **parameters)
    with pytest.raises(RecipeError, match=words):
        make_plan(parse_recipe(content), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"density": 0.1}, ValueError, r"epsilon of models\['0'\] for tensor 'w'.*at most 0.1"),
        ({"density": 0.5, "epsilon": [0.1, 0.2]}, ValueError, "one entry per model, 1; got 2"),
        ({"density": 0.5, "epsilon": "x"}, TypeError, "epsilon of models"),
        ({"density": 0.5, "variant": "peft"}, RecipeError, "'peft' has no effect"),
    ],
)
def test_in_memory_refuses(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    state = {"w": torch.ones(4, 4)}
    with pytest.raises(error, match=words):
        della(state, [{"w": torch.zeros(4, 4)}], **arguments)
    with pytest.raises(ValueError, match=r"gamma of models\['0'\] must be in \[0, 1\]"):
        breadcrumbs(state, [{"w": torch.zeros(4, 4)}], density=0.5, gamma=2.0)


def test_numbers_beside_density_1_are_told(root: Path, tmp_path: Path) -> None:
    content = recipe(
        root, "breadcrumbs", {"density": 1, "gamma": 0.5}, {"density": 0.5}, {"density": 0.5}
    )
    notes = make_plan(parse_recipe(content), tmp_path / "out").notes
    assert any("models[0].parameters.gamma: has no effect" in note for note in notes)


def test_density_1_is_task_arithmetic(root: Path) -> None:
    states = {name: cases.load(root / name) for name in ("base", "one", "two")}
    base, models = states.pop("base"), list(states.values())
    for function, more in ((breadcrumbs, {"gamma": 0.5}), (della_linear, {"epsilon": 0.9})):
        merged = function(base, models, weight=0.5, density=1.0, **more)
        for name, value in merged.items():
            if value.is_floating_point():
                plain = combine(base[name], [m[name] for m in models], weights=0.5, policy=Policy())
                assert torch.equal(value, plain)


@pytest.mark.parametrize("method", ["breadcrumbs_ties", "della"])
def test_interrupted_and_resumed(
    root: Path, tmp_path: Path, method: str, backend: str
) -> None:
    """The masks do not depend on where a run began."""
    content = recipe(root, method, density=0.5)

    def plan(name: str) -> Any:
        return make_plan(parse_recipe(content), tmp_path / name / "out", out_shard_size=150_000)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "merge" and done > total // 2:
            raise KeyboardInterrupt

    whole = execute(plan("whole"), backend=backend, fsync=False)
    with pytest.raises(Interrupted):
        execute(plan("cut"), backend=backend, progress=stop, fsync=False)
    resumed = execute(plan("cut"), backend=backend, resume=True, fsync=False)
    assert resumed.digest == whole.digest


def test_magprune_within_little_memory(root: Path, tmp_path: Path) -> None:
    """Where the masks of the sums are not kept they are drawn again, to the same bytes."""
    cases.need_native()
    content = recipe(root, "della", density=0.5)
    core = native.load()
    assert core is not None
    digests = set()
    for memory in (None, 16 << 20):
        out = tmp_path / str(memory) / "out"
        plan = make_plan(parse_recipe(content), out)
        digests.add(execute(plan, memory=memory, threads=3, fsync=False).digest)
    # and with an allowance that no mask fits into
    x = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    outs = []
    for memory in (0, 100_000):
        job = core.Job(threads=2, nan="propagate", checksums=False, memory=memory)
        out = torch.empty_like(x)
        task = job.add_task(
            n=x.numel(), out_dtype="F32", out_ptr=out.data_ptr(), sparsify="magprune",
            rescale="l1", row=1000,
        )  # fmt: skip
        job.add_term(
            task, dtype="F32", ptr=x.data_ptr(), density=0.5, key=3, epsilon=0.2
        )
        job.run()
        outs.append(out)
    assert len(digests) == 1
    assert torch.equal(outs[0], outs[1])


# ------------------------------------------------------------------------ functions of tensors


def whole(root: Path, method: str, models: tuple[str, ...], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(root / "base"),
        "models": [{"model": str(root / name)} for name in models],
        "parameters": parameters,
    }


WHOLE: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    # method, models, what the recipe says, what the function is given
    ("sce", 3, {}, {"select_topk": 1.0}),
    ("sce", 3, {"select_topk": 0.2}, {"select_topk": 0.2}),
    ("nearswap", 1, {"t": 0.01}, {"t": 0.01}),
    ("arcee_fusion", 1, {}, {}),
    ("ram", 3, {}, {"epsilon": 1e-5}),
    ("ram", 2, {"epsilon": 0.02}, {"epsilon": 0.02}),
    ("ramplus_tl", 3, {"epsilon": 0.02}, {"r": 0.1, "alpha": 0.2, "epsilon": 0.02}),
    ("ramplus_tl", 2, {"r": 1, "alpha": 3, "epsilon": 0.03}, {"r": 1, "alpha": 3, "epsilon": 0.03}),
]


@pytest.mark.parametrize(("method", "count", "parameters", "settings"), WHOLE)
def test_functions_of_tensors(
    root: Path,
    tmp_path: Path,
    method: str,
    count: int,
    parameters: dict[str, Any],
    settings: dict[str, Any],
    backend: str,
) -> None:
    names = ("one", "two", "three")[:count]
    content = whole(root, method, names, **parameters)
    plan = make_plan(parse_recipe(content), tmp_path / "out", out_shard_size=150_000)
    execute(plan, backend=backend, threads=2, fsync=False)
    states = [cases.load(root / name) for name in ("base", *names)]
    for name, merged in cases.load(tmp_path / "out").items():
        base, *models = (state[name] for state in states)
        if not base.is_floating_point():
            assert torch.equal(merged, base)
            continue
        wanted = getattr(selective, method)(
            [m.float() for m in models], base.float(), weights=[], **settings
        )
        assert torch.equal(merged, wanted.to(base.dtype)), name
    assert verify(tmp_path / "out", sample=None, threads=1).ok
    words = "\n".join(describe(plan))
    assert all(word in words for word in parameters)


def test_sce_in_memory(root: Path, tmp_path: Path) -> None:
    names = ("one", "two", "three")
    content = whole(root, "sce", names, select_topk=0.4)
    execute(make_plan(parse_recipe(content), tmp_path / "out"), fsync=False)
    states = {name: cases.load(root / name) for name in ("base", *names)}
    ours = sce(states["base"], {name: states[name] for name in names}, select_topk=0.4)
    merged = cases.load(tmp_path / "out")
    assert all(torch.equal(merged[name], ours[name]) for name in merged)
    wide = sce(states["base"], [states["one"]], out_dtype=torch.float32)
    assert wide["model.norm.weight"].dtype == torch.float32
    for bad, error in ((1.5, ValueError), (-0.1, ValueError), ("x", TypeError), (True, TypeError)):
        with pytest.raises(error, match="select_topk"):
            sce(states["base"], [states["one"]], select_topk=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "models", "parameters", "words"),
    [
        ("nearswap", ("one",), {}, "parameters.t: is required by merge_method 'nearswap'"),
        ("nearswap", ("one",), {"t": -1}, "parameters.t: t is the furthest that an element moves"),
        ("nearswap", ("one", "two"), {"t": 1}, "merges 1 model beside the base_model; got 2"),
        ("arcee_fusion", ("one", "two"), {}, "merges 1 model beside the base_model; got 2"),
        ("arcee_fusion", ("one",), {"t": 1}, "'t' has no effect"),
        ("sce", ("one",), {"select_topk": 1.5}, "select_topk is the fraction"),
        ("sce", ("one",), {"weight": 0.5}, "'weight' has no effect"),
        ("sce", ("one",), {"lambda": 0.5}, "'lambda' has no effect"),
        ("ram", ("one", "two"), {"epsilon": -1}, "epsilon is the magnitude up to which"),
        ("ram", ("one", "two"), {"r": 1}, "'r' has no effect"),
        ("ramplus_tl", ("one", "two"), {"alpha": -1}, "alpha is the largest ratio"),
        ("ramplus_tl", ("one", "two"), {"r": "x"}, "must be a number"),
    ],
)
def test_functions_of_tensors_refuse(
    root: Path,
    tmp_path: Path,
    method: str,
    models: tuple[str, ...],
    parameters: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(RecipeError, match=words):
        make_plan(parse_recipe(whole(root, method, models, **parameters)), tmp_path / "out")


def test_t_may_follow_the_layers(root: Path, tmp_path: Path) -> None:
    content = whole(root, "nearswap", ("one",))
    content["parameters"] = {"t": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}]}
    plan = make_plan(parse_recipe(content), tmp_path / "out")
    found = {t.name: dict(t.rule.settings)["t"] for t in plan.tensors if t.rule is not None}
    assert found["model.layers.0.mlp.up_proj.weight"] == 0.0
    assert found["model.layers.1.mlp.up_proj.weight"] == 1.0
    assert found["model.norm.weight"] == 0.5
    content["parameters"] = {"t": [{"filter": "mlp", "value": 1.0}]}
    with pytest.raises(RecipeError, match="no filter matches tensor"):
        make_plan(parse_recipe(content), tmp_path / "out")
