"""Fisher merging and RegMean: their formulas, the files of statistics, and recipes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import merge_cases as cases
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cl_fast.errors import CheckpointError, NonFiniteError, RecipeError
from cl_fast.merging import execute, make_plan, parse_recipe
from cl_fast.merging import state_dicts as merges
from cl_fast.merging.statistics import collect_fisher, collect_gram, write_statistics
from cl_fast.merging.verify import verify
from cl_fast.ops.weighted_means import fisher_mean, regmean


class Conv1D(nn.Module):
    """As GPT-2's: the weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Tiny(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = Conv1D()
        self.norm = nn.LayerNorm(5)
        self.down = nn.Linear(5, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None, attention_mask: Any = None) -> Any:
        logits = self.down(self.norm(torch.tanh(self.up(x))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def batches(seed: int, count: int = 3, rows: int = 4) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(rows, 6, generator=g),
            "labels": torch.randint(4, (rows,), generator=g),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    for seed, name in enumerate(("one", "two")):
        model = Tiny(seed)
        cases.save(folder / name, model.state_dict())
        collect_fisher(model, batches(seed), folder / f"{name}.fisher.safetensors")
        collect_gram(model, batches(seed), folder / f"{name}.gram.safetensors")
    return folder


def recipe(root: Path, method: str, **changes: Any) -> dict[str, Any]:
    kind = {"fisher": "fisher", "regmean": "gram"}[method]
    return {
        "merge_method": method,
        "models": [
            {
                "model": str(root / name),
                "parameters": {"weight": w, kind: str(root / f"{name}.{kind}.safetensors")},
            }
            for name, w in (("one", 1.0), ("two", 3.0))
        ],
    } | changes


# The statistics.


def test_fisher_is_the_mean_of_squared_gradients(root: Path) -> None:
    model, expected = Tiny(0).double(), dict[str, Tensor]()
    for batch in batches(0):
        for i in range(4):
            logits = model(batch["x"][i : i + 1].double()).logits
            chosen = logits.log_softmax(-1)[0, batch["labels"][i]]
            grads = torch.autograd.grad(chosen, list(model.parameters()))
            for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
                expected[name] = expected.get(name, 0.0) + grad.square() / 12
    found = load_file(root / "one.fisher.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-4, atol=1e-9), name
    with safe_open(root / "one.fisher.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["kind"], said["group"]) == ("fisher", "sequence")
    assert set(json.loads(said["counts"]).values()) == {12}


def test_a_fisher_of_batches_is_another_and_says_so(root: Path, tmp_path: Path) -> None:
    model = Tiny(0).train()
    model.down.weight.grad = torch.ones(4, 5)
    path = collect_fisher(model, batches(0), tmp_path / "f.safetensors", group="batch")
    assert model.training
    assert torch.equal(model.down.weight.grad, torch.ones(4, 5))
    with safe_open(path, "pt") as file:
        assert file.metadata()["group"] == "batch"
        assert set(json.loads(file.metadata()["counts"]).values()) == {3}
    rows, whole = load_file(root / "one.fisher.safetensors"), load_file(path)
    assert not torch.allclose(rows["down.weight"], whole["down.weight"])


def test_gram_is_the_second_moment_of_the_inputs(root: Path, tmp_path: Path) -> None:
    x = torch.cat([batch["x"] for batch in batches(0)]).double()
    found = load_file(root / "one.gram.safetensors")
    assert found.keys() == {"up.weight", "down.weight"}
    assert torch.allclose(found["up.weight"].double(), x.t() @ x / 12, rtol=1e-5, atol=1e-6)
    with safe_open(root / "one.gram.safetensors", "pt") as file:
        assert json.loads(file.metadata()["in_first"]) == ["up.weight"]
    # what a mask leaves out does not count
    linear = nn.Linear(3, 2)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x)

    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    path = collect_gram(Masked(), [{"x": x, "attention_mask": mask}], tmp_path / "g.safetensors")
    kept = x[mask.bool()].double()
    assert torch.allclose(load_file(path)["layer.weight"].double(), kept.t() @ kept / 4, rtol=1e-5)


# The formulas.


def test_fisher_mean() -> None:
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(3, 5, generator=g) for _ in range(3)]
    fs = [torch.rand(3, 5, generator=g) * 1e-12 for _ in range(3)]
    for f in fs:
        f[0, 0] = 0.0
    found = fisher_mean(xs, fs, [1.0, 2.0, 0.5])
    for i in range(15):
        x = [float(v.flatten()[i]) for v in xs]
        f = [w * float(v.flatten()[i]) for v, w in zip(fs, (1.0, 2.0, 0.5), strict=True)]
        f = f if sum(f) else [1.0, 2.0, 0.5]
        exact = sum(a * b for a, b in zip(f, x, strict=True)) / sum(f)
        assert float(found.flatten()[i]) == pytest.approx(exact, rel=1e-12)
    assert torch.equal(fisher_mean(xs[:1], fs[:1]), xs[0].double())


@pytest.mark.parametrize("in_first", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_regmean_is_the_least_squares_solution(in_first: bool, alpha: float) -> None:
    """What lstsq finds on the stacked inputs; for alpha < 1 with the ridge that it stands for."""
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(40, 6, generator=g, dtype=torch.float64) for _ in range(2)]
    layers = [torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(2)]
    grams = [x.t() @ x for x in inputs]
    given = [w.t().contiguous() for w in layers] if in_first else layers
    found = regmean(given, grams, [1.0, 2.0], alpha=alpha, in_first=in_first)
    # rows of the reduced problem: sqrt(alpha) X, and sqrt(1 - alpha) times the diagonal's root
    rows = [
        torch.cat([alpha**0.5 * x, (1 - alpha) ** 0.5 * torch.diag(g_.diagonal().sqrt())])
        for x, g_ in zip(inputs, grams, strict=True)
    ]
    scaled = [rows[0], 2.0**0.5 * rows[1]]
    targets = torch.cat([x @ w.t() for x, w in zip(scaled, layers, strict=True)])
    exact = torch.linalg.lstsq(torch.cat(scaled), targets).solution
    assert torch.allclose(found if in_first else found.t(), exact, rtol=1e-8, atol=1e-10)
    same = regmean(given[:1], grams[:1], alpha=alpha, in_first=in_first)
    assert torch.allclose(same, given[0], rtol=1e-9, atol=1e-12)


def test_regmean_without_data_in_some_direction_is_the_mean_there() -> None:
    a, b = torch.eye(3), 3.0 * torch.eye(3)
    seen = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    found = regmean([a, b], [seen, 3.0 * seen], [1.0, 1.0], alpha=1.0)
    assert torch.allclose(found.diagonal(), torch.tensor([2.5, 2.5, 2.0], dtype=torch.float64))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: fisher_mean([], []), "at least one"),
    (lambda: fisher_mean([torch.ones(2)], []), "as many fishers"),
    (lambda: fisher_mean([torch.ones(2)], [torch.ones(3)]), "must have the shape"),
    (lambda: fisher_mean([torch.ones(2)], [-torch.ones(2)]), "negative, NaN or infinite"),
    (lambda: fisher_mean([torch.ones(2)] * 2, [torch.ones(2)] * 2, [1, -1]), "gives no mean"),
    (lambda: regmean([torch.eye(2)], [torch.eye(2)], alpha=2.0), "alpha must be from 0 to 1"),
    (lambda: regmean([torch.ones(2)], [torch.eye(2)]), "is for matrices"),
    (lambda: regmean([torch.eye(2)], [torch.eye(3)]), r"grams\[0\] \(2, 2\)"),
    (lambda: regmean([torch.eye(2)], [torch.tensor([[1.0, 5.0], [0.0, 1.0]])]), "not symmetric"),
    (lambda: regmean([torch.eye(2)], [torch.full((2, 2), torch.nan)]), "NaN or infinite"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_tensors(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# Recipes.


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_merge_is_what_the_functions_say(
    root: Path, tmp_path: Path, method: str, backend: str
) -> None:
    plan = make_plan(parse_recipe(recipe(root, method)), tmp_path / "out")
    execute(plan, backend=backend)
    merged = cases.load(tmp_path / "out")
    models = [cases.load(root / name) for name in ("one", "two")]
    kind = {"fisher": "fisher", "regmean": "gram"}[method]
    known = [load_file(root / f"{name}.{kind}.safetensors") for name in ("one", "two")]
    if method == "fisher":
        same = merges.fisher(models, known, weight=[1.0, 3.0])
        for name, value in merged.items():
            exact = fisher_mean([m[name] for m in models], [k[name] for k in known], [1.0, 3.0])
            assert torch.equal(value, exact.float()), name
    else:
        same = merges.regmean(models, known, weight=[1.0, 3.0], in_first=["up.weight"])
        mean = (models[0]["norm.weight"] + 3.0 * models[1]["norm.weight"]) / 4.0
        assert torch.allclose(merged["norm.weight"], mean)
        assert not torch.allclose(
            merged["down.weight"], (models[0]["down.weight"] + 3 * models[1]["down.weight"]) / 4
        )
    for name, value in merged.items():
        assert torch.allclose(value, same[name], rtol=1e-6, atol=1e-7), name
    assert verify(tmp_path / "out", sample=None, backend=backend).ok


def test_the_fingerprint_knows_the_statistics(root: Path, tmp_path: Path) -> None:
    one = make_plan(parse_recipe(recipe(root, "regmean")), tmp_path / "out")
    two = recipe(root, "regmean", parameters={"alpha": 0.5})
    assert one.fingerprint != make_plan(parse_recipe(two), tmp_path / "out").fingerprint
    assert one.memory > 300_000_000  # torch


def test_verify_finds_the_statistics_from_anywhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [tmp_path / f"{name}.fisher.safetensors" for name in ("one", "two")]
    for path in known:
        path.write_bytes((root / path.name).read_bytes())
    content = recipe(root, "fisher")
    for entry, path in zip(content["models"], known, strict=True):
        entry["parameters"]["fisher"] = path.name
    monkeypatch.chdir(tmp_path)
    execute(make_plan(parse_recipe(content), tmp_path / "out"))
    monkeypatch.chdir(root)
    report = verify(tmp_path / "out", sample=None)
    assert report.ok
    assert report.recomputed
    assert not report.notes
    changed(known[1], known[1], lambda values, _: values.pop("norm.bias"))
    [problem] = verify(tmp_path / "out").problems
    assert "two.fisher.safetensors are not what was merged with" in problem
    known[1].unlink()
    report = verify(tmp_path / "out")
    assert report.ok
    assert not report.recomputed
    assert any("two.fisher.safetensors are not there any more" in note for note in report.notes)


def changed(path: Path, target: Path, change: Callable[[dict, dict], object]) -> str:
    values = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    change(values, metadata)
    save_file(values, target, metadata=metadata)
    return str(target)


@pytest.mark.parametrize(
    ("method", "change", "error", "words"),
    [
        ("fisher", lambda v, m: m.update(kind="gram"), CheckpointError, "no file of fisher"),
        ("fisher", lambda v, m: m.update(version="9"), CheckpointError, "has version '9'"),
        ("fisher", lambda v, m: m.update(crc64="["), CheckpointError, "metadata is damaged"),
        ("fisher", lambda v, m: v.pop("up.weight"), CheckpointError, "statistics of 'up.weight'"),
        ("fisher", lambda v, m: v.update({"up.weight": torch.ones(2)}), CheckpointError, "must be"),
        ("fisher", lambda v, m: v["up.weight"].neg_(), CheckpointError, "up.weight: fishers"),
        ("regmean", lambda v, m: m.update(in_first="[]"), CheckpointError, r"float32 of \[5, 5\]"),
        (
            "regmean",
            lambda v, m: m.update(crc64=json.dumps({"up.weight": "0" * 16})),
            CheckpointError,
            "collected on another model than two",
        ),
    ],
)
def test_bad_files(
    root: Path, tmp_path: Path, method: str, change: Any, error: type, words: str
) -> None:
    kind = {"fisher": "fisher", "regmean": "gram"}[method]
    content = recipe(root, method)
    name = changed(root / f"two.{kind}.safetensors", tmp_path / "bad.safetensors", change)
    content["models"][1]["parameters"][kind] = name
    with pytest.raises(error, match=words):
        execute(make_plan(parse_recipe(content), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["models"][0]["parameters"].pop("fisher"), "parameters.fisher: is required"),
        (lambda c: c["models"][0]["parameters"].update(fisher=3), "must be the path of a file"),
        (lambda c: c["models"][0]["parameters"].update(fisher="nowhere"), "is not a file"),
        (lambda c: c["models"][0]["parameters"].update(gram="x"), "'gram' has no effect with"),
        (lambda c: c.update(parameters={"fisher": "x"}), "parameters.fisher: is of one model"),
        (lambda c: c.update(parameters={"alpha": 0.5}), "'alpha' has no effect with"),
        (lambda c: c["models"][0]["parameters"].update(weight=-3.0), "sum to 0"),
    ],
)
def test_bad_recipes(root: Path, tmp_path: Path, change: Any, words: str) -> None:
    content = recipe(root, "fisher")
    change(content)
    with pytest.raises(RecipeError) as caught:
        make_plan(parse_recipe(content), tmp_path / "out")
    assert words in str(caught.value)


def test_bad_collections(tmp_path: Path) -> None:
    model, path = Tiny(0), tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="batches is empty"):
        collect_fisher(model, [], path)
    with pytest.raises(ValueError, match="batches is empty"):
        collect_gram(model, [], path)
    with pytest.raises(ValueError, match="nothing to collect"):
        collect_gram(nn.LayerNorm(3), [{}], path)
    with pytest.raises(ValueError, match="group must be"):
        collect_fisher(model, [], path, group="token")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give log_likelihood"):
        collect_fisher(model, [{"x": torch.zeros(1, 6)}], path)
    with pytest.raises(ValueError, match="equally many rows"):
        collect_fisher(model, [{"x": torch.zeros(2, 6), "labels": torch.zeros(1)}], path)
    with pytest.raises(NonFiniteError, match=r"fisher of up.weight"):
        collect_fisher(model, [{"x": torch.full((1, 6), torch.nan), "labels": torch.tensor([1])}],
                       path)  # fmt: skip
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        write_statistics(path, "gram", {"nothing": torch.eye(2)}, model, counts={"nothing": 1})
    with pytest.raises(ValueError, match="kind must be"):
        write_statistics(path, "hessian", {"a": torch.eye(2)}, model, counts={"a": 1})  # type: ignore[arg-type]
    for frozen in model.parameters():
        frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="requires grad"):
        collect_fisher(model, batches(0), path)
    assert not path.exists()


# In memory.


def test_spherical_merges_of_state_dicts(tmp_path: Path) -> None:
    states = {name: Tiny(seed).state_dict() for seed, name in enumerate(("base", "one", "two"))}
    for name, state in states.items():
        cases.save(tmp_path / name, state)
    base, models = states["base"], {"one": states["one"], "two": states["two"]}
    paths = [{"model": str(tmp_path / name)} for name in models]
    on_base = {"base_model": str(tmp_path / "base")}
    pairs: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        (
            merges.slerp(models["one"], models["two"], t=lambda name: 0.2 if "up" in name else 0.6),
            {"merge_method": "slerp", "base_model": str(tmp_path / "one"),
             "parameters": {"t": [{"filter": "up", "value": 0.2}, {"value": 0.6}]}},
        ),
        (merges.nuslerp(models, base=base, along="rows"),
         {"merge_method": "nuslerp", "parameters": {"nuslerp_flatten": False}} | on_base),
        (merges.multislerp(models, base=base), {"merge_method": "multislerp"} | on_base),
        (merges.karcher(models), {"merge_method": "karcher"}),
        (merges.model_stock(base, models), {"merge_method": "model_stock"} | on_base),
    ]  # fmt: skip
    for i, (ours, content) in enumerate(pairs):
        plan = make_plan(parse_recipe({"models": paths} | content), tmp_path / f"out{i}")
        execute(plan)
        written = cases.load(tmp_path / f"out{i}")
        for name, value in ours.items():
            assert torch.equal(value, written[name]), (content["merge_method"], name)
    module = Tiny(9)
    merges.karcher(models, into=module)
    assert torch.equal(module.up.weight, pairs[3][0]["up.weight"])


def test_bad_state_dicts() -> None:
    one = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="merges two models"):
        merges.nuslerp([one])
    with pytest.raises(ValueError, match="2 models need as many; got 1"):
        merges.fisher([one, one], [one])
    with pytest.raises(ValueError, match="some of the models have 'w'"):
        merges.regmean([one, one], [{"w": torch.eye(2)}, {}])
    with pytest.raises(NonFiniteError, match="'w' of models"):
        merges.karcher([one, {"w": torch.tensor([1.0, torch.nan])}])
    with pytest.raises(ValueError, match="nan must be"):
        merges.karcher([one], nan="zero")  # type: ignore[arg-type]
