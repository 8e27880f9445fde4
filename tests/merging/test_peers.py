"""Where other libraries mean the same by a method, their own output is ours within rounding.

Needs them: pip install 'cl_fast[peers]'. The random tensors have no equal magnitudes, because which
of equals a sort keeps is an accident there. Random masks are compared through the formula: the
peer's generator is made to draw ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_fast.merging import dare_linear, dare_ties, linear, task_arithmetic, ties
from cl_fast.merging.state_dicts import breadcrumbs, breadcrumbs_ties, della, della_linear
from cl_fast.ops import Policy, combine, keep_mask, keep_threshold, selective, stream_key
from cl_fast.ops.magnitude import magnitude_codes
from cl_fast.ops.ranking import magprune_mask

pytestmark = pytest.mark.peers

NAMES = ("math", "code", "chat")
WEIGHTS = [1.0, 0.5, 0.25]


def family(dtype: torch.dtype = torch.float32) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    shapes = {"layers.0.up.weight": (300, 70), "layers.0.norm.weight": (300,), "head": (50, 300)}
    base = {key: (0.05 * torch.randn(s, generator=g)).to(dtype) for key, s in shapes.items()}
    models = {
        name: {
            key: (value.float() + 0.005 * torch.randn(value.shape, generator=g)).to(dtype)
            for key, value in base.items()
        }
        for name in NAMES
    }
    return base, models


def assert_equal_within_rounding(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], base: dict, models: dict[str, dict]
) -> None:
    """Sixteen float32 roundings of the largest sum that the methods form, at most."""
    assert ours.keys() == theirs.keys()
    for key, mine in ours.items():
        size = base[key].double().abs() + 25 * sum(
            (m[key].double() - base[key].double()).abs() for m in models.values()
        )
        error = (mine.double() - theirs[key].double()).abs()
        assert (error <= 16 * 2.0**-24 * size).all(), (key, (error / size).max())


# mergekit, in float32: the accurate one of its settings.


@pytest.fixture
def mergekit() -> Any:
    return pytest.importorskip("mergekit.merge_methods.api", reason="mergekit is not installed")


def by_mergekit(mergekit: Any, method: str, base: dict | None, models: dict, **parameters: Any):
    inputs = dict(models) if base is None else {"base": base, **models}
    return mergekit.merge_state_dicts(
        inputs,
        method,
        parameters=parameters,
        base=None if base is None else "base",
        dtype=torch.float32,
        out_dtype=torch.float32,
    )


def per_model(*values: float) -> dict[str, float]:
    return dict(zip(NAMES, values, strict=True))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mergekit_linear(mergekit: Any, dtype: torch.dtype, normalize: bool, backend: str) -> None:
    base, models = family(dtype)
    theirs = by_mergekit(
        mergekit, "linear", None, models, weight=per_model(*WEIGHTS), normalize=normalize
    )
    ours = linear(
        models, weight=WEIGHTS, normalize=normalize, out_dtype=torch.float32, backend=backend
    )
    assert_equal_within_rounding(ours, theirs, base, models)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mergekit_task_arithmetic(mergekit: Any, dtype: torch.dtype, backend: str) -> None:
    base, models = family(dtype)
    weights = [1.0, -0.5, 0.3]
    theirs = by_mergekit(
        mergekit, "task_arithmetic", base, models, weight=per_model(*weights), **{"lambda": 0.7}
    )
    ours = task_arithmetic(
        base, models, weight=weights, lam=0.7, out_dtype=torch.float32, backend=backend
    )
    assert_equal_within_rounding(ours, theirs, base, models)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("normalize", [None, False])
def test_mergekit_ties(mergekit: Any, density: float, normalize: bool | None, backend: str) -> None:
    base, models = family()
    parameters: dict[str, Any] = {"weight": per_model(*WEIGHTS), "density": density}
    if normalize is not None:
        parameters["normalize"] = normalize
    theirs = by_mergekit(mergekit, "ties", base, models, **parameters)
    ours = ties(base, models, weight=WEIGHTS, density=density, normalize=normalize, backend=backend)
    assert_equal_within_rounding(ours, theirs, base, models)


@pytest.mark.parametrize("method", [breadcrumbs, breadcrumbs_ties])
@pytest.mark.parametrize(
    ("density", "gamma"), [(0.3, 0.05), (0.5, 0.01), (0.95, 0.2), (0.4, 0.0), (1.0, 0.5)]
)
def test_mergekit_breadcrumbs(
    mergekit: Any, method: Any, density: float, gamma: float, backend: str
) -> None:
    base, models = family()
    gammas = (gamma, gamma / 2, gamma)
    theirs = by_mergekit(
        mergekit, method.__name__, base, models,
        weight=per_model(*WEIGHTS), density=density, gamma=per_model(*gammas),
    )  # fmt: skip
    ours = method(
        base, models, weight=WEIGHTS, density=density, gamma=list(gammas), backend=backend
    )
    assert_equal_within_rounding(ours, theirs, base, models)


@pytest.mark.parametrize("method", [della_linear, della])
@pytest.mark.parametrize(("density", "epsilon", "rescale"), [(0.3, 0.15, True), (0.5, 0.2, False)])
def test_mergekit_della(
    mergekit: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: Any,
    density: float,
    epsilon: float,
    rescale: bool,
    backend: str,
) -> None:
    """Its keep probabilities are ours; its generator is made to draw our masks."""
    whole, all_models = family()
    for key in whole:
        base = {key: whole[key]}
        models = {name: {key: state[key]} for name, state in all_models.items()}
        waiting = list(NAMES)

        def bernoulli(p: Tensor, key: str = key, waiting: list[str] = waiting) -> Tensor:
            name = waiting.pop(0)
            codes = magnitude_codes((all_models[name][key] - whole[key]).reshape(-1))
            keep, thresholds = magprune_mask(
                codes, p.shape[-1], density, epsilon, stream_key(0, name, key)
            )
            ours = (thresholds.double() / 2**32).reshape(p.shape)
            assert torch.allclose(p.double(), ours, rtol=0, atol=1e-6)
            return keep.reshape(p.shape).to(p.dtype)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "bernoulli", bernoulli)
            theirs = by_mergekit(
                mergekit, method.__name__, base, models,
                weight=per_model(*WEIGHTS), density=density, epsilon=epsilon, rescale=rescale,
            )  # fmt: skip
        assert not waiting
        ours = method(
            base, models, weight=WEIGHTS, density=density, epsilon=epsilon, rescale=rescale,
            backend=backend,
        )  # fmt: skip
        assert_equal_within_rounding(ours, theirs, base, models)


SELECTIVE: list[tuple[str, int, dict[str, Any]]] = [
    ("sce", 3, {"select_topk": 1.0}),
    ("sce", 3, {"select_topk": 0.3}),
    ("nearswap", 1, {"t": 0.003}),
    ("arcee_fusion", 1, {}),
    ("ram", 3, {"epsilon": 0.004}),
    ("ramplus_tl", 3, {"epsilon": 0.004, "r": 0.5, "alpha": 0.9}),
]


@pytest.mark.parametrize(("method", "count", "parameters"), SELECTIVE)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_mergekit_selective(
    mergekit: Any, method: str, count: int, parameters: dict[str, Any], scale: float
) -> None:
    """In both, and at deltas so large that the squares of sce give its weights."""
    base, models = family()
    models = {
        name: {key: base[key] + scale * (value - base[key]) for key, value in state.items()}
        for name, state in list(models.items())[:count]
    }
    given = {
        key: value * scale if key in ("t", "epsilon") else value
        for key, value in parameters.items()
    }
    theirs = by_mergekit(mergekit, method, base, models, **given)
    ours = {
        key: getattr(selective, method)(
            [state[key] for state in models.values()], value, weights=[], **given
        ).float()
        for key, value in base.items()
    }
    if method == "arcee_fusion":  # its float32 divergence of close rows is mostly rounding
        for key, mine in ours.items():
            state = next(iter(models.values()))[key]
            want = exact(method, base[key].double(), [state.double()], {})
            apart = {"ours": (mine.double() - want).abs(), "theirs": (theirs[key] - want).abs()}
            off = {name: int((error > 1e-6).sum()) for name, error in apart.items()}
            assert off["ours"] <= min(2, off["theirs"]), off
            assert off["theirs"] < 0.005 * mine.numel() + 2, off
            assert 0.0 < (mine != base[key]).double().mean() < 0.5, key
        return
    assert_equal_within_rounding(ours, theirs, base, models)


@pytest.mark.parametrize(("method", "count", "parameters"), SELECTIVE)
def test_selective_is_closer_than_mergekit_in_bfloat16(
    mergekit: Any, method: str, count: int, parameters: dict[str, Any]
) -> None:
    base, models = family(torch.bfloat16)
    models = dict(list(models.items())[:count])
    theirs = mergekit.merge_state_dicts(
        {"base": base, **models}, method, parameters=parameters, base="base"
    )
    error = {"ours": 0.0, "theirs": 0.0}
    for key, value in base.items():
        states = [state[key] for state in models.values()]
        ours = getattr(selective, method)(
            [x.float() for x in states], value.float(), weights=[], **parameters
        ).bfloat16()
        want = exact(method, value.double(), [x.double() for x in states], parameters)
        error["ours"] += float((ours.double() - want).abs().sum())
        rounded = theirs[key].bfloat16()  # ramplus_tl gives float32
        error["theirs"] += float((rounded.double() - want).abs().sum())
    assert error["ours"] <= error["theirs"], error


def exact(method: str, base: Tensor, models: list[Tensor], given: dict[str, Any]) -> Tensor:
    """The definitions in float64, whole tensors at once, with ordinary sorts."""
    d = torch.stack([x - base for x in models])
    if method == "nearswap":
        return base + (given["t"] / d[0].abs().clamp(min=1e-6)).clamp(max=1.0) * d[0]
    if method == "sce":
        variance = d.var(dim=0, unbiased=False).float().flatten()
        k = int(int((variance != 0).sum()) * given["select_topk"])
        if given["select_topk"] < 1:
            keep = torch.zeros_like(variance)
            keep[variance.sort(descending=True, stable=True).indices[:k]] = 1
            d = d * keep.view(base.shape)
        squares = d.square().flatten(1).mean(1)
        share = squares / squares.sum() if squares.sum() >= 1e-6 else torch.ones(3) / 3
        keep = d.sign() == torch.where(d.sum(0) >= 0, 1.0, -1.0)
        taken = keep * share.view(-1, *[1] * base.dim())
        return base + (taken * d).sum(0) / taken.sum(0).clamp(min=1e-6)
    if method == "arcee_fusion":
        p, q = (t.softmax(-1) + 1e-8 for t in (models[0], base))
        importance = d[0].abs() * (p * (p / q).log()).sum(-1, keepdim=True)
        ranked = importance.flatten().sort().values
        q1, q2, q3 = (ranked[int(f * (len(ranked) - 1))] for f in (0.25, 0.5, 0.75))
        return torch.where(importance >= q2 + 1.5 * (q3 - q1), models[0], base)
    has = d.abs() > given["epsilon"]
    alone = has & (has.sum(0) == 1)
    factor = torch.ones(len(models))
    if method == "ramplus_tl":
        ratio = (has & ~alone).flatten(1).sum(1) / alone.flatten(1).sum(1).clamp(min=1)
        factor = 1 + given["r"] * ratio.clamp(max=given["alpha"])
    scale = torch.where(alone, factor.view(-1, *[1] * base.dim()), 1.0)
    return base + (d * has * scale).sum(0) / has.sum(0).clamp(min=1)


@pytest.mark.parametrize("method", [breadcrumbs, breadcrumbs_ties])
def test_closer_than_mergekit_in_bfloat16(mergekit: Any, method: Any, backend: str) -> None:
    """At its own setting, the storage type, against the sorted definition in float64."""
    base, models = family(torch.bfloat16)
    theirs = mergekit.merge_state_dicts(
        {"base": base, **models},
        method.__name__,
        parameters={"weight": per_model(*WEIGHTS), "density": 0.5, "gamma": 0.1},
        base="base",
    )
    ours = method(base, models, weight=WEIGHTS, density=0.5, gamma=0.1, backend=backend)
    error = {"ours": 0.0, "theirs": 0.0}
    for key, b in base.items():
        total, n = [], b.numel()
        for weight, state in zip(WEIGHTS, models.values(), strict=True):
            d = (state[key].double() - b.double()).flatten()
            order = d.abs().sort(descending=True, stable=True).indices
            kept = torch.zeros_like(d)
            band = order[int(0.1 * n) : int(0.1 * n) + int(0.5 * n)]
            kept[band] = weight * d[band]
            total.append(kept.view(b.shape))
        votes = torch.stack(total)
        if method is breadcrumbs_ties:
            majority = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
            votes = torch.where(votes.sign() == majority, votes, 0.0)
        want = b.double() + votes.sum(0)
        for name, state in (("ours", ours), ("theirs", theirs)):
            error[name] += float((state[key].double() - want).abs().sum())
    assert error["ours"] < 0.9 * error["theirs"], error


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Masks that torch.bernoulli gives out, in order."""
    masks: list[Tensor] = []

    def bernoulli(p: Any = None, *_: Any, input: Any = None, **__: Any) -> Tensor:
        like = p if p is not None else input
        return masks.pop(0).reshape(like.shape).to(like.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    yield masks
    assert not masks


def masks_of(key: str, n: int, density: float, seed: int = 0) -> list[Tensor]:
    return [keep_mask(stream_key(seed, name, key), n, keep_threshold(density)) for name in NAMES]


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
@pytest.mark.parametrize("rescale", [True, False])
def test_mergekit_dare(
    mergekit: Any, drawn: list[Tensor], method: Any, rescale: bool, backend: str
) -> None:
    whole, all_models = family()
    for key in whole:
        base = {key: whole[key]}
        models = {name: {key: state[key]} for name, state in all_models.items()}
        drawn += masks_of(key, whole[key].numel(), 0.3)
        theirs = by_mergekit(
            mergekit, method.__name__, base, models,
            weight=per_model(*WEIGHTS), density=0.3, rescale=rescale,
        )  # fmt: skip
        ours = method(base, models, weight=WEIGHTS, density=0.3, rescale=rescale, backend=backend)
        assert_equal_within_rounding(ours, theirs, base, models)


# PEFT works on task tensors: deltas, here on a base of zeros.


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")


def deltas(n: int = 20_000) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(1)
    models = {name: {"w": 0.01 * torch.randn(n, generator=g)} for name in NAMES}
    return {"w": torch.zeros(n)}, models


def tensors_of(models: dict[str, dict[str, Tensor]]) -> list[Tensor]:
    return [state["w"].clone() for state in models.values()]


def test_peft_task_arithmetic(peft: Any, backend: str) -> None:
    base, models = deltas()
    theirs = peft.task_arithmetic(tensors_of(models), torch.tensor(WEIGHTS))
    ours = task_arithmetic(base, models, weight=WEIGHTS, backend=backend)
    assert_equal_within_rounding(ours, {"w": theirs}, base, models)


@pytest.mark.parametrize("density", [0.2, 0.5, 1e-5])
def test_peft_magnitude_prune(peft: Any, density: float, backend: str) -> None:
    base, models = deltas()
    theirs = peft.magnitude_prune(tensors_of(models), torch.tensor(WEIGHTS), density)
    policy = Policy(sparsify="trim", trim_count="floor")
    ours = combine(
        base["w"], tensors_of(models), weights=WEIGHTS, policy=policy, density=density,
        backend=backend,
    )  # fmt: skip
    assert_equal_within_rounding({"w": ours}, {"w": theirs}, base, models)


@pytest.mark.parametrize("rule", ["mass", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_peft_ties(peft: Any, density: float, rule: str, backend: str) -> None:
    base, models = deltas()
    theirs = peft.ties(
        tensors_of(models), torch.tensor(WEIGHTS), density,
        majority_sign_method={"mass": "total", "frequency": "frequency"}[rule],
    )  # fmt: skip
    ours = ties(
        base, models, weight=WEIGHTS, density=density, variant="peft", elect=rule, backend=backend
    )
    assert_equal_within_rounding(ours, {"w": theirs}, base, models)


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_peft_dare(peft: Any, drawn: list[Tensor], method: Any, backend: str) -> None:
    base, models = deltas()
    drawn += masks_of("w", 20_000, 0.3)
    theirs = getattr(peft, method.__name__)(tensors_of(models), torch.tensor(WEIGHTS), 0.3)
    ours = method(base, models, weight=WEIGHTS, density=0.3, variant="peft", backend=backend)
    assert_equal_within_rounding(ours, {"w": theirs}, base, models)
