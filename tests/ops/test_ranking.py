"""Band and magprune: what is kept against a plain sort in float64 and a plain stream, and that
every backend gives the same bits."""

from __future__ import annotations

import math
from typing import Any

import nasty
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import need_native
from torch import Tensor

from cl_fast.backends import device_ops, native
from cl_fast.ops import (
    Policy,
    band_counts,
    combine,
    combine_,
    combine_many,
    magnitude_band,
    magprune,
    stream_key,
)
from cl_fast.ops.combining import Call
from cl_fast.ops.policy import check_keep_probabilities
from cl_fast.ops.streams import uniform32

KEYS = [stream_key(7, f"m{k}", "w") for k in range(3)]
BAND = Policy(sparsify="band", trim_count="floor")
MAGPRUNE = Policy(sparsify="magprune", elect="mass", reduce="mean")


def order(values: list[float]) -> list[int]:
    """Indices by falling magnitude; of equal ones the first comes first."""
    return sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))


def kept_by_band(values: list[float], top: int, keep: int) -> set[int]:
    return set(order(values)[top : top + keep])


def kept_by_magprune(
    rows: list[list[float]], density: float, epsilon: float, key: int
) -> tuple[list[list[bool]], list[list[float]]]:
    """The mask, and the probability that each element had."""
    mask, chances, index = [], [], 0
    for row in rows:
        place = {i: j for j, i in enumerate(order(row))}
        chance = [
            density
            if len(row) == 1
            else (density - epsilon) + 2 * epsilon * (len(row) - 1 - place[i]) / (len(row) - 1)
            for i in range(len(row))
        ]
        mask.append(
            [
                uniform32(key, index + i) < math.floor(p * 2**32 + 0.5)
                for i, p in enumerate(chance)
            ]
        )
        chances.append(chance)
        index += len(row)
    return mask, chances


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("kind", nasty.KINDS)
@pytest.mark.parametrize("n", [1, 2, 17, 257])
def test_band_is_a_slice_of_the_sorted_magnitudes(kind: str, n: int, backend: str) -> None:
    base, (x,) = nasty.models(kind, n, 1)
    deltas = (x.double() - base.double()).float().tolist()
    for density, gamma in ((0.2, 0.01), (0.5, 0.3), (0.5, 0.9), (0.9, 0.0), (1e-3, 0.1), (1, 0.5)):
        top, keep = band_counts(density, gamma, n)
        wanted = kept_by_band(deltas, top, keep)
        out = combine(
            None, [(x.float() - base.float())], weights=1.0,
            policy=Policy(difference=False, sparsify="band", trim_count="floor"),
            density=density, gamma=gamma, backend=backend,
        )  # fmt: skip
        expected = [d if i in wanted else 0.0 for i, d in enumerate(deltas)]
        assert out.tolist() == expected, (density, gamma)
        mask = magnitude_band(x, density=density, gamma=gamma, base=base)
        assert set(mask.nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize(
    ("density", "gamma", "n", "expected"),
    [
        (0.5, 0.01, 1000, (10, 500)),
        (0.5, 0.0, 1000, (0, 500)),
        (0.9, 0.3, 10, (1, 9)),  # the density comes first
        (0.001, 0.5, 10, (5, 0)),
        (1.0, 0.5, 10, (0, 10)),
        (0.29, 0.57, 100, (56, 28)),  # int() of the float64 product, as in mergekit
        (0.5, 0.5, 0, (0, 0)),
    ],
)
def test_band_counts(density: float, gamma: float, n: int, expected: tuple[int, int]) -> None:
    assert band_counts(density, gamma, n) == expected
    assert band_counts(density, gamma, n, "at_least_one")[1] == max(min(n, 1), expected[1])


@pytest.mark.parametrize("shape", [(1,), (6, 1), (3, 5), (40,), (2, 3, 7), (4, 600), ()])
@pytest.mark.parametrize("kind", ["normal", "ties", "zero_delta", "denormal"])
def test_magprune_follows_rank_and_stream(
    shape: tuple[int, ...], kind: str, backend: str
) -> None:
    n = math.prod(shape)
    base, (x,) = nasty.models(kind, n, 1, torch.float32)
    base, x = base.view(shape), x.view(shape)
    delta = x - base
    rows = delta.reshape(-1, shape[-1] if shape else 1).tolist()
    for density, epsilon in ((0.3, 0.2), (0.5, 0.5 - 2**-20), (0.7, 0.0)):
        mask, chances = kept_by_magprune(rows, density, epsilon, KEYS[0])
        keep, chance = (torch.tensor(t, dtype=torch.float64).view(shape) for t in (mask, chances))
        for rescale, factor in (
            ("none", torch.ones(shape, dtype=torch.float64)),
            ("keep_rate", 1 / chance),
            ("l1", _ratio(delta, keep)),
        ):
            out = combine(
                base, [x], weights=1.0, density=density, epsilon=epsilon, keys=KEYS[:1],
                policy=Policy(sparsify="magprune", rescale=rescale),  # type: ignore[arg-type]
                backend=backend,
            )  # fmt: skip
            expected = base.double() + delta.double() * keep * factor
            bound = 4 * 2.0**-24 * (base.double().abs() + (delta.double() * factor).abs()) + 1e-42
            assert ((out.double() - expected).abs() <= bound).all(), (density, rescale)


def _ratio(delta: Tensor, keep: Tensor) -> Tensor:
    every, kept = (float(t.double().abs().sum()) for t in (delta, delta * keep))
    value = 1.0 if every < 1e-7 or kept < 1e-7 else every / kept
    return torch.full(delta.shape, value, dtype=torch.float64)


def test_the_largest_of_a_row_are_kept_most_often() -> None:
    row = torch.linspace(0.1, 1.0, 11).repeat(4_000, 1)
    kept = magprune(row, density=0.5, epsilon=0.4, rescale="none").ne(0).double().mean(0)
    assert torch.allclose(kept, torch.linspace(0.1, 0.9, 11).double(), atol=0.04)
    rescaled = magprune(row, density=0.5, epsilon=0.4).double().mean(0)
    assert torch.allclose(rescaled, row[0].double(), rtol=0.2)


@pytest.mark.parametrize("sparsify", ["band", "magprune"])
@pytest.mark.parametrize("rescale", ["none", "keep_rate", "l1"])
def test_native_and_eager_agree_in_every_bit(sparsify: str, rescale: str) -> None:
    """Also where rows cross tiles (131,072 elements), and on every instruction set."""
    need_native()
    core = native.load()
    assert core is not None
    before = core.isa()
    generator = torch.Generator().manual_seed(5)
    for shape in ((2, 70_001), (90, 1700), (140_000,), (33, 1), (0, 4), (5,)):
        for dtype in (torch.bfloat16 if shape[0] == 90 else torch.float32,):
            base = (0.05 * torch.randn(shape, generator=generator)).to(dtype)
            steps = 0.002 * torch.randint(-3, 4, shape, generator=generator)
            noise = 0.005 * torch.randn(shape, generator=generator)
            tensors = [(base.float() + d).to(dtype) for d in (noise, steps, torch.zeros(shape))]
            policy = Policy(
                sparsify=sparsify, rescale=rescale, elect="mass", reduce="mean"  # type: ignore[arg-type]
            )  # fmt: skip
            more: dict[str, Any] = {"gamma": [0.01, 0.3, 0.0]}
            if sparsify == "magprune":
                more = {"epsilon": [0.15, 0.05, 0.0], "keys": KEYS}
            arguments: dict[str, Any] = {
                "weights": [1.0, 0.5, 0.25], "policy": policy, "density": [0.3, 0.6, 1.0], **more,
            }  # fmt: skip
            eager = combine(base, tensors, backend="eager", **arguments)
            for isa in core.supported_isas() if shape[0] in (90, 5) else [before]:
                core.set_isa(isa)
                try:
                    ours = combine(base, tensors, backend="native", **arguments)
                finally:
                    core.set_isa(before)
                assert torch.equal(raw(ours), raw(eager)), (shape, dtype, isa)
            combine_(base, tensors, **arguments)
            assert torch.equal(raw(base), raw(eager)), (shape, dtype, "in place")


@settings(max_examples=25)
@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), min_size=1),
    density=st.floats(0.01, 1.0),
    gamma=st.floats(0.0, 1.0),
)
def test_band_of_ties(values: list[float], density: float, gamma: float) -> None:
    top, keep = band_counts(density, gamma, len(values))
    mask = magnitude_band(torch.tensor(values), density=density, gamma=gamma)
    assert set(mask.nonzero().flatten().tolist()) == kept_by_band(values, top, keep)
    assert keep + top <= len(values)


def test_rows_of_many_tensors_have_numbers_of_their_own(backend: str) -> None:
    base, tensors = nasty.models("normal", 60, 2)
    rows = [(base.view(6, 10), [t.view(6, 10) for t in tensors]), (base, tensors)]
    epsilon = [[0.1, 0.2], [0.05, 0.0]]
    keys = [[1, 2], [3, 4]]
    together = combine_many(
        [b for b, _ in rows], [t for _, t in rows], weights=0.5, policy=MAGPRUNE, density=0.4,
        epsilon=epsilon, keys=keys, backend=backend,
    )  # fmt: skip
    for out, (b, t), e, k in zip(together, rows, epsilon, keys, strict=True):
        alone = combine(
            b, t, weights=0.5, policy=MAGPRUNE, density=0.4, epsilon=e, keys=k, backend=backend
        )
        assert torch.equal(raw(out), raw(alone))


def test_rows_too_long_to_scale_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cl_fast.backends.native_ops", "cl_fast.ops.combining"):
        monkeypatch.setattr(f"{module}.LONGEST_SCALED_ROW", 8)
    said: list[str] = []
    monkeypatch.setattr("cl_fast.ops.combining.say_once", said.append)
    out = magprune(torch.ones(2, 9), density=0.5)
    if native.load() is not None:
        assert any("rows of more than" in words for words in said)
        with pytest.raises(ValueError, match="rows of more than"):
            magprune(torch.ones(2, 9), density=0.5, backend="native")
    assert torch.equal(out, magprune(torch.ones(2, 9), density=0.5, backend="eager"))


X = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("policy", "arguments", "words"),
    [
        (BAND, {"density": 0.5}, "gamma must be given"),
        (BAND, {"density": 0.5, "gamma": 1.5}, r"gamma must be in \[0, 1\]; got 1.5"),
        (BAND, {"density": 0.5, "gamma": float("nan")}, r"gamma must be in"),
        (BAND, {"density": 0.5, "gamma": 0.1, "epsilon": 0.1}, "epsilon has no effect"),
        (BAND, {"density": 0.5, "gamma": 0.1, "keys": [1]}, "keys have no effect"),
        (MAGPRUNE, {"density": 0.5, "keys": [1]}, "epsilon must be given"),
        (MAGPRUNE, {"density": 0.5, "epsilon": 0.1}, "keys must be given"),
        (MAGPRUNE, {"density": 0.1, "epsilon": 0.15, "keys": [1]}, "an epsilon of at most 0.1"),
        (MAGPRUNE, {"density": 0.9, "epsilon": 0.15, "keys": [1]}, "an epsilon of at most 0.1"),
        (MAGPRUNE, {"density": 0.5, "epsilon": -0.1, "keys": [1]}, "epsilon"),
        (MAGPRUNE, {"density": 0.5, "epsilon": float("nan"), "keys": [1]}, "epsilon"),
        (MAGPRUNE, {"density": 0.5, "epsilon": 0.1, "gamma": 0.1, "keys": [1]}, "gamma has no"),
        (Policy(), {"gamma": 0.1}, "gamma has no effect"),
    ],
)
def test_refused(policy: Policy, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        combine(X, [X + 1], weights=1.0, policy=policy, **arguments)


@pytest.mark.parametrize(
    "fields", [{"trim_ties": "all"}, {"trim_scope": "model", "trim_ties": "all"}]
)
def test_a_band_is_of_one_tensor(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sparsify='band' takes"):
        Policy(sparsify="band", **fields)


def test_keep_probabilities_at_their_bounds() -> None:
    assert check_keep_probabilities(0.5, 0.5 - 2.0**-32) is None
    assert check_keep_probabilities(0.75, 0.25) is None  # the largest is always kept
    assert check_keep_probabilities(1.0, 0.9) is None  # density 1 leaves everything alone
    assert check_keep_probabilities(0.5, 0.5) is not None
    kept = magprune(torch.rand(100, 50) + 1, density=0.75, epsilon=0.25, rescale="none")
    assert (kept.abs().max(dim=1).values > 0).all()


def test_what_has_no_kernel_for_gpus_is_left_to_the_eager_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr("cl_fast.ops.combining.say_once", said.append)
    for policy, taken in ((BAND, False), (MAGPRUNE, False), (Policy(), True)):
        sparse = policy.sparsify != "none"
        call = Call(
            bases=[X], tensors=[X], models=1, weights=[1.0], densities=[0.5 if sparse else 1.0],
            gammas=[0.0], epsilons=[0.1], keys=[1], thresholds=[-1], policy=policy, lam=1.0,
            out_dtype=None,
        )  # fmt: skip
        assert device_ops.takes(call) is taken
        if not taken:  # on tensors that are on the CPU here: what run_device does when it declines
            assert torch.equal(call.run_device()[0], call.run_eager()[0])
            assert said[-1].startswith(f"combine with sparsify={policy.sparsify!r} has no kernel")


def test_nan_ranks_before_every_number(backend: str) -> None:
    """As the largest magnitude: an outlier to a band, and likeliest kept by magprune."""
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    x[1, 7] = math.nan
    x[2, 9] = math.inf
    both = [(1, 7), (2, 9)]
    plain = Policy(difference=False, sparsify="band", trim_count="floor")
    for gamma, present in ((0.0, True), (2 / 200, False)):
        out = combine(
            None, [x], weights=1.0, policy=plain, density=0.5, gamma=gamma, backend=backend
        )
        assert [bool(out[at].isfinite()) for at in both] == [not present, not present]
        if not present:
            assert [float(out[at]) for at in both] == [0.0, 0.0]
    out = magprune(x, density=0.5, epsilon=0.5 - 2.0**-31, rescale="none", backend=backend)
    assert out[1, 7].isnan()
    assert out[2, 9].isinf()
