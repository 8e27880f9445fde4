"""combine against a float64 oracle that shares no code with it, and what must always hold."""

from __future__ import annotations

import itertools
import re

import nasty
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_fast.ops import (
    Policy,
    combine,
    combine_many,
    combine_reference,
    keep_mask,
    keep_threshold,
    model_thresholds,
    stream_key,
)

TRIM = Policy(sparsify="trim", elect="mass", reduce="mean")
POLICIES = {
    "linear": Policy(difference=False, reduce="mean"),
    "linear_sum": Policy(difference=False),
    "linear_count": Policy(difference=False, reduce="mean", divisor="count"),
    "task_arithmetic": Policy(),
    "task_arithmetic_mean": Policy(reduce="mean"),
    "ties": TRIM,
    "ties_peft": Policy(
        sparsify="trim",
        trim_count="floor",
        elect="mass",
        elect_on="unweighted",
        reduce="mean",
        divisor="count",
    ),
    "ties_paper": Policy(
        sparsify="trim",
        trim_scope="model",
        trim_count="floor_plus_one",
        trim_ties="all",
        elect="mass",
        elect_on="unweighted",
        reduce="mean",
        divisor="count",
    ),
    "ties_none_sum": Policy(sparsify="trim", trim_ties="none", elect="mass"),
    "ties_frequency": Policy(sparsify="trim", elect="frequency", reduce="mean"),
    "ties_frequency_unweighted": Policy(
        sparsify="trim", elect="frequency", elect_on="unweighted", reduce="mean"
    ),
    "ties_max": Policy(sparsify="trim", trim_ties="all", elect="mass", reduce="max"),
    "trim_rescaled": Policy(sparsify="trim", rescale="l1"),
    "trim_all_rescaled": Policy(sparsify="trim", trim_ties="all", rescale="l1"),
    "trim_keep_rate": Policy(sparsify="trim", rescale="keep_rate", reduce="mean"),
    "dare_linear": Policy(sparsify="drop", rescale="l1"),
    "dare_linear_keep_rate": Policy(sparsify="drop", rescale="keep_rate"),
    "dare_linear_plain": Policy(sparsify="drop"),
    "dare_ties": Policy(sparsify="drop", rescale="l1", elect="mass"),
    "dare_ties_peft": Policy(
        sparsify="drop",
        rescale="keep_rate",
        elect="mass",
        elect_on="unweighted",
        reduce="mean",
        divisor="count",
    ),
    "dare_ties_frequency_max": Policy(
        sparsify="drop", rescale="l1", elect="frequency", elect_on="unweighted", reduce="max"
    ),
}
WEIGHTS = {1: [0.7], 3: [1.0, 0.5, -0.25], 4: [0.3, 0.3, 0.3, 0.4]}


def call(name: str, base: Tensor, tensors: list[Tensor], **more: object) -> dict:
    """The arguments of a combine by POLICIES[name]."""
    policy = POLICIES[name]
    k = len(tensors)
    arguments = {
        "weights": WEIGHTS[k],
        "policy": policy,
        "density": [1.0] * k if policy.sparsify == "none" else [0.2, 0.37, 1.0, 0.5][:k],
        "lam": 0.7,
        **more,
    }
    if policy.sparsify == "drop":
        arguments["keys"] = [stream_key(7, f"model{i}", "w") for i in range(k)]
    return arguments


def run(name: str, base: Tensor, tensors: list[Tensor], backend: str | None, **more) -> Tensor:
    arguments = call(name, base, tensors, **more)
    given_base = base if POLICIES[name].difference else None
    return combine(given_base, tensors, backend=backend, **arguments)


@pytest.mark.parametrize("kind", nasty.KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_within_half_a_spacing_of_float64(name: str, kind: str, backend: str) -> None:
    for n, k, dtype in [
        (257, 3, torch.bfloat16),
        (100, 4, torch.float16),
        (63, 1, torch.float32),
        (17, 3, torch.float32),
        (1, 3, torch.bfloat16),
    ]:
        base, tensors = nasty.models(kind, n, k, dtype)
        arguments = call(name, base, tensors)
        want = oracle.told(base, tensors, **{"keys": [0] * k, **arguments})
        out = run(name, base, tensors, backend)
        assert out.dtype == dtype
        got = out.double().numpy()
        error = np.abs(got - want.out)
        bound = oracle.allowed(want, got, dtype, k)
        bad = want.sure & ~(error <= bound)
        assert not bad.any(), (n, k, dtype, np.nonzero(bad), error[bad], bound[bad])
        if kind == "normal":
            assert want.sure.mean() > 0.98


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear"])
def test_bfloat16_stays_within_051_spacings(name: str, backend: str) -> None:
    """The promise as users read it, where deltas are small against the base."""
    base, tensors = nasty.models("normal", 2000, 3)
    arguments = call(name, base, tensors)
    want = oracle.told(base, tensors, **{"keys": [0] * 3, **arguments})
    got = run(name, base, tensors, backend).double().numpy()
    near = np.abs(want.out) > 2.0**-14  # float32 is not coarser than 0.01 spacings here
    off = np.abs(got - want.out) / oracle.spacing(want.out, torch.bfloat16)
    assert near.mean() > 0.9
    assert off[near & want.sure].max() <= 0.51


@pytest.mark.parametrize("name", POLICIES)
def test_reference_in_float64_is_the_oracle(name: str) -> None:
    for kind in ("normal", "heavy", "ties"):
        base, tensors = nasty.models(kind, 500, 3)
        arguments = call(name, base, tensors)
        want = oracle.told(base, tensors, **{"keys": [0] * 3, **arguments})
        given_base = base if POLICIES[name].difference else None
        got = combine_reference(given_base, tensors, compute_dtype=torch.float64, **arguments)
        assert got.dtype == torch.float64
        error = np.abs(got.numpy() - want.out)
        assert (error <= 1e-13 * want.scale)[want.sure].all()


@pytest.mark.parametrize("name", POLICIES)
def test_backends_agree_bit_for_bit(name: str, backend: str) -> None:
    """Every backend against the eager reference: all lengths, kinds and mixtures of dtypes."""
    if backend == "eager":
        pytest.skip("it is the reference")
    turn = itertools.cycle([None, torch.float32, torch.float16])
    cases = [(kind, n) for kind in nasty.KINDS for n in nasty.LENGTHS]
    for kind, n in [*cases, ("normal", 70_001), ("ties", 70_001)]:
        out_dtype = next(turn)
        base, tensors = nasty.models(kind, n, 1 if n == 257 else 3)
        if out_dtype is not None:
            dtypes = itertools.cycle([torch.float32, torch.float16, torch.bfloat16])
            tensors = [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=False)]
        want = run(name, base, tensors, "eager", out_dtype=out_dtype)
        got = run(name, base, tensors, backend, out_dtype=out_dtype)
        assert got.dtype == want.dtype
        assert torch.equal(bits(got), bits(want)), (kind, n, out_dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("name", POLICIES)
def test_nan_reaches_the_output_and_stays_where_it_is(name: str, backend: str) -> None:
    policy = POLICIES[name]
    for density in {1.0, 1.0 if policy.sparsify == "none" else 0.5}:
        base, tensors = nasty.models("normal", 300, 3)
        tensors[1] = tensors[1].clone()
        tensors[1][:8] = float("nan")  # the first sixteen elements are not all dropped
        out = run(name, base, tensors, backend, density=density)
        kept = keep_mask(stream_key(7, "model1", "w"), 300, keep_threshold(density))
        there = kept[:8] if policy.sparsify == "drop" else torch.ones(8, dtype=torch.bool)
        assert there.any()
        if density < 1.0 and policy.trim_ties == "none":
            continue  # equal NaN are ties at the threshold, or not
        if density < 1.0 and policy.rescale == "l1":
            assert out[:8].isnan()[there].all()
        else:
            assert torch.equal(out[:8].isnan(), there)
            assert not out[8:].isnan().any()


@pytest.mark.parametrize("name", POLICIES)
def test_shapes_strides_and_mixtures(name: str, backend: str) -> None:
    base, tensors = nasty.models("normal", 24, 3)
    flat = run(name, base, tensors, backend)
    shaped = run(name, base.view(2, 3, 4), [t.view(2, 3, 4) for t in tensors], backend)
    assert torch.equal(shaped.view(-1), flat)
    apart = [torch.stack((t, t), dim=1)[:, 0] for t in tensors]
    assert not apart[0].is_contiguous()
    assert torch.equal(run(name, torch.stack((base, base), 1)[:, 0], apart, backend), flat)
    point = run(name, base[0], [t[0] for t in tensors], backend)
    assert point.shape == ()
    assert run(name, base[:0], [t[:0] for t in tensors], backend).shape == (0,)
    turned = run(name, base.view(4, 6).t(), [t.view(4, 6).t() for t in tensors], backend)
    assert turned.is_contiguous()
    if POLICIES[name].sparsify == "none":
        assert torch.equal(turned.t().reshape(-1), flat)


def test_eight_bit_floats_are_read(backend: str) -> None:
    base, tensors = nasty.models("normal", 50, 3)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        packed = [t.to(dtype) for t in tensors]
        got = run("ties", base, packed, backend)
        assert torch.equal(got, run("ties", base, [t.float() for t in packed], backend))


def test_inputs_are_not_changed(backend: str) -> None:
    base, tensors = nasty.models("normal", 100, 3, torch.float32)
    before = [base.clone(), *(t.clone() for t in tensors)]
    run("ties", base, tensors, backend)
    run("linear", base, tensors, backend)
    assert all(torch.equal(a, b) for a, b in zip(before, [base, *tensors], strict=True))


def test_linear_of_one_model_is_a_new_tensor(backend: str) -> None:
    x = torch.randn(10)
    out = combine(None, [x], weights=1.0, policy=POLICIES["linear"], backend=backend)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()


# What must always hold.

_shapes = st.integers(1, 300)
_kinds = st.sampled_from(nasty.KINDS)
_weights = st.lists(st.floats(0.0625, 4.0, width=32), min_size=3, max_size=3)
_examples = settings(max_examples=25, deadline=None)


@_examples
@given(n=_shapes, kind=_kinds, weights=_weights, order=st.permutations(range(3)))
def test_order_of_models_is_rounding(n: int, kind: str, weights: list[float], order) -> None:
    base, tensors = nasty.models(kind, n, 3, torch.float32)
    one = run("linear", base, tensors, None, weights=weights, lam=1.0)
    other = run(
        "linear",
        base,
        [tensors[i] for i in order],
        None,
        weights=[weights[i] for i in order],
        lam=1.0,
    )
    scale = sum(w * t.double().abs() for w, t in zip(weights, tensors, strict=True)) / sum(weights)
    assert ((one.double() - other.double()).abs() <= 8 * 2.0**-24 * scale + 2.0**-147).all()


@_examples
@given(n=_shapes, name=st.sampled_from(sorted(POLICIES)), weights=_weights)
def test_zero_deltas_give_the_base(n: int, name: str, weights: list[float]) -> None:
    base, _ = nasty.models("normal", n, 1)
    if POLICIES[name].difference:
        out = run(name, base, [base.clone() for _ in range(3)], None, weights=weights)
        assert torch.equal(out, base)


@_examples
@given(n=_shapes, name=st.sampled_from(sorted(POLICIES)), weights=_weights)
def test_density_one_neither_trims_nor_drops_nor_rescales(n, name, weights) -> None:
    policy = POLICIES[name]
    base, tensors = nasty.models("normal", n, 3)
    plain = Policy(
        difference=policy.difference,
        elect=policy.elect,
        elect_on=policy.elect_on,
        reduce=policy.reduce,
        divisor=policy.divisor,
    )
    got = run(name, base, tensors, None, weights=weights, density=1.0)
    want = combine(
        base if policy.difference else None, tensors, weights=weights, policy=plain, lam=0.7
    )
    assert torch.equal(got, want)


@_examples
@given(n=_shapes, kind=_kinds, weights=_weights, twice=st.sampled_from([2.0, 0.5, 4.0]))
def test_weights_act_linearly(n: int, kind: str, weights: list[float], twice: float) -> None:
    """A power of two in the weights is the same one in lambda, exactly; and adds up."""
    base, tensors = nasty.models(kind, n, 3, torch.float32)
    doubled = run(
        "task_arithmetic", base, tensors, None, weights=[twice * w for w in weights], lam=1.0
    )
    scaled = run("task_arithmetic", base, tensors, None, weights=weights, lam=twice)
    if kind != "denormal":
        assert torch.equal(doubled, scaled)
    one_by_one = [
        run("task_arithmetic", base, [t], None, weights=[w], lam=1.0).double() - base.double()
        for t, w in zip(tensors, weights, strict=True)
    ]
    together = run("task_arithmetic", base, tensors, None, weights=weights, lam=1.0).double()
    scale = base.double().abs() + sum(
        w * (t.double() - base.double()).abs() for t, w in zip(tensors, weights, strict=True)
    )
    error = (together - base.double() - sum(one_by_one)).abs()
    assert (error <= 16 * 2.0**-24 * scale + 2.0**-146).all()


@_examples
@given(n=_shapes, kind=_kinds, k=st.sampled_from([1, 2, 4]))
def test_identical_models_under_linear_are_the_model(n: int, kind: str, k: int) -> None:
    _, (model,) = nasty.models(kind, n, 1)
    out = combine(None, [model] * k, weights=1.0, policy=POLICIES["linear"])
    assert torch.equal(out, model)


def test_trim_keeps_exactly_k_and_the_first_of_ties(backend: str) -> None:
    base = torch.zeros(10)
    x = torch.tensor([1.0, -3.0, 2.0, -2.0, 2.0, 0.5, -2.0, 3.0, 2.0, 0.0])
    plain = Policy(sparsify="trim")

    def kept(density: float, policy: Policy) -> list[int]:
        out = combine(base, [x], weights=1.0, policy=policy, density=density, backend=backend)
        return out.nonzero().reshape(-1).tolist()

    assert kept(0.4, plain) == [1, 2, 3, 7]
    assert kept(0.4, Policy(sparsify="trim", trim_ties="all")) == [1, 2, 3, 4, 6, 7, 8]
    assert kept(0.4, Policy(sparsify="trim", trim_ties="none")) == [1, 7]
    assert kept(0.01, plain) == [1]
    assert kept(0.01, Policy(sparsify="trim", trim_count="floor")) == []
    assert kept(0.15, Policy(sparsify="trim", trim_count="floor_plus_one")) == [1, 7]


def test_a_draw_elects_plus(backend: str) -> None:
    base = torch.zeros(1)
    out = combine(
        base,
        [torch.tensor([1.0]), torch.tensor([-1.0])],
        weights=1.0,
        policy=Policy(elect="mass"),
        backend=backend,
    )
    assert out.tolist() == [1.0]


def test_election_sees_weights_only_when_asked(backend: str) -> None:
    base, xs = torch.zeros(1), [torch.tensor([3.0]), torch.tensor([-2.0])]

    def elected(on: str) -> float:
        policy = Policy(elect="mass", elect_on=on, reduce="sum")
        return combine(base, xs, weights=[0.5, 1.0], policy=policy, backend=backend).item()

    assert elected("weighted") == -2.0
    assert elected("unweighted") == 1.5


def test_disjoint_divisor(backend: str) -> None:
    base, xs = torch.zeros(1), [torch.tensor([4.0]), torch.tensor([2.0]), torch.tensor([-1.0])]

    def merged(**choices: str) -> float:
        policy = Policy(elect="mass", **choices)
        return combine(base, xs, weights=[1.0, 0.5, 1.0], policy=policy, backend=backend).item()

    assert merged(reduce="mean", divisor="weights") == pytest.approx(5.0 / 1.5)
    assert merged(reduce="mean", divisor="count") == 2.5
    assert merged(reduce="sum") == 5.0
    assert merged(reduce="max") == 4.0


# Many tensors.


def model(n_tensors: int = 4) -> tuple[list[Tensor], list[list[Tensor]]]:
    bases, rows = [], []
    for i in range(n_tensors):
        base, tensors = nasty.models("normal", 50 + 37 * i, 3, nasty.DTYPES[i % 3], seed=i)
        scaled = [base.float() + (i + 1) * (t.float() - base.float()) for t in tensors]
        bases.append(base)
        rows.append([t.to(base.dtype) for t in scaled])
    bases.append(torch.zeros(0))
    rows.append([torch.zeros(0)] * 3)
    return bases, rows


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "ties_paper"])
def test_many_is_one_by_one(name: str, backend: str) -> None:
    bases, rows = model()
    policy = POLICIES[name]
    keys = [[stream_key(1, str(k), str(i)) for k in range(3)] for i in range(len(rows))]
    weights = [[1.0, 0.5, 0.25 * (i + 1)] for i in range(len(rows))]
    density = 1.0 if policy.sparsify == "none" else [0.2, 0.3, 0.4]
    many = combine_many(
        bases if policy.difference else None,
        rows,
        weights=weights,
        policy=policy,
        density=density,
        keys=keys if policy.sparsify == "drop" else None,
        backend=backend,
    )
    for i, out in enumerate(many):
        one = combine(
            bases[i] if policy.difference else None,
            rows[i],
            weights=weights[i],
            policy=policy,
            density=density,
            keys=keys[i] if policy.sparsify == "drop" else None,
            backend=backend,
        )
        assert torch.equal(out, one)


def test_whole_model_trim_is_the_trim_of_one_long_tensor(backend: str) -> None:
    bases, rows = model()
    bases = [b.float() for b in bases]
    rows = [[t.float() for t in row] for row in rows]
    many = combine_many(
        bases, rows, weights=1.0, policy=POLICIES["ties_paper"], density=[0.2, 0.3, 1.0],
        backend=backend,
    )  # fmt: skip
    long = [torch.cat([row[k] for row in rows]) for k in range(3)]
    one = combine(
        torch.cat(bases), long, weights=1.0, policy=POLICIES["ties_paper"],
        density=[0.2, 0.3, 1.0], backend=backend,
    )  # fmt: skip
    assert torch.equal(torch.cat(many), one)
    # and the thresholds found alone, given to each tensor, are the same thing
    codes = model_thresholds(bases, rows, policy=POLICIES["ties_paper"], density=[0.2, 0.3, 1.0])
    assert codes[2] == -1
    for i, out in enumerate(many):
        again = combine(
            bases[i], rows[i], weights=1.0, policy=POLICIES["ties_paper"],
            density=[0.2, 0.3, 1.0], thresholds=codes, backend=backend,
        )  # fmt: skip
        assert torch.equal(out, again)


def test_whole_model_trim_that_keeps_nothing(backend: str) -> None:
    policy = Policy(sparsify="trim", trim_scope="model", trim_count="floor", trim_ties="all")
    bases, rows = [torch.zeros(3)], [[torch.ones(3)]]
    (out,) = combine_many(bases, rows, weights=1.0, policy=policy, density=0.1, backend=backend)
    assert torch.equal(out, bases[0])


# Bad input: the same words under every backend.

X = torch.zeros(4)
DROP = Policy(sparsify="drop")
WHOLE = {
    "policy": Policy(sparsify="trim", trim_scope="model", trim_ties="all"), "density": 0.5,
}  # fmt: skip
BAD = [
    ({"tensors": []}, ValueError, "tensors must hold at least one tensor"),
    ({"tensors": X}, TypeError, "tensors must be a list of tensors"),
    ({"tensors": [X, 3]}, TypeError, "tensors[1] must be a torch.Tensor, got int"),
    ({"base": None}, ValueError, "base must be given"),
    ({"base": X[:2]}, ValueError, "tensors[0] must have the shape of base, (2,); got (4,)"),
    ({"tensors": [X, X[:3]]}, ValueError, "tensors[1] must have the shape of base, (4,)"),
    ({"tensors": [X, X.to("meta")]}, ValueError, "tensors[1] must be on the device of base, cpu"),
    ({"tensors": [X, X.double()]}, TypeError, "tensors[1] must have one of the dtypes"),
    ({"tensors": [X, X.long()]}, TypeError, "tensors[1] must have one of the dtypes"),
    ({"base": X.bool()}, TypeError, "base must have one of the dtypes"),
    ({"policy": Policy(difference=False)}, ValueError, "base has no effect"),
    ({"policy": "ties"}, TypeError, "policy must be a cl_fast.ops.Policy"),
    ({"weights": [1.0]}, ValueError, "weights must have one entry per model, 2; got 1"),
    ({"weights": ["a", 1.0]}, TypeError, "weights must hold numbers, got str"),
    ({"weights": float("nan")}, ValueError, "weights must be finite, got nan"),
    ({"density": 0.5}, ValueError, "density=0.5 has no effect with policy.sparsify='none'"),
    ({"density": 0.0, "policy": TRIM}, ValueError, "density must be in (0, 1]; got 0.0"),
    ({"density": 1.5, "policy": TRIM}, ValueError, "density must be in (0, 1]; got 1.5"),
    ({"density": [0.5], "policy": TRIM}, ValueError, "density must have one entry per model, 2"),
    ({"density": True, "policy": TRIM}, TypeError, "density must hold numbers"),
    ({"density": 0.5, "policy": DROP}, ValueError, "keys must be given"),
    ({"keys": [1, 2]}, ValueError, "keys have no effect"),
    ({"keys": [1], "policy": DROP, "density": 0.5}, ValueError, "keys must have one entry"),
    ({"keys": [1, 2**64], "policy": DROP, "density": 0.5}, ValueError, "keys must be 64-bit"),
    ({"thresholds": [1, 2]}, ValueError, "thresholds have no effect"),
    ({"policy": TRIM}, ValueError, "density must be given with policy.sparsify='trim'"),
    ({"policy": DROP, "keys": [1, 2]}, ValueError, "density must be given with"),
    ({"weights": None}, TypeError, "weights must hold numbers, one or a list"),
    ({"weights": "ab"}, TypeError, "weights must hold numbers, one or a list"),
    ({"thresholds": 0.05, **WHOLE}, TypeError, "thresholds must hold the integer codes"),
    ({"thresholds": -5, **WHOLE}, ValueError, "thresholds must be -1 or in [0, 2^31), got -5"),
    ({"thresholds": 7, **WHOLE, "density": 1.0}, ValueError, "thresholds have no effect with"),
    ({"lam": float("inf")}, ValueError, "lam must be finite, got inf"),
    ({"out_dtype": torch.float64}, TypeError, "out_dtype must be one of bfloat16, float16"),
    ({"out_dtype": torch.int8}, TypeError, "out_dtype must be one of bfloat16, float16"),
    ({"base": X.to(torch.float8_e5m2)}, TypeError, "the dtype of base: give out_dtype"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change: dict, error: type[Exception], words: str, backend: str) -> None:
    arguments = {"base": X, "tensors": [X, X], "weights": 1.0, "policy": Policy(), **change}
    for chosen in (backend, None):
        with pytest.raises(error, match=re.escape(words)):
            combine(**arguments, backend=chosen)


def test_bad_backend() -> None:
    names = "'eager', 'native', 'triton', 'cuda'"
    with pytest.raises(ValueError, match=f"backend must be one of {names} or None; got 'gpu'"):
        combine(X, [X], weights=1.0, backend="gpu")
    for backend in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"backend='{backend}' needs tensors on cuda; got cpu"):
            combine(X, [X], weights=1.0, backend=backend)


def test_bad_rows() -> None:
    with pytest.raises(ValueError, match="row 1 has 1"):
        combine_many([X, X], [[X, X], [X]], weights=1.0)
    with pytest.raises(ValueError, match=re.escape("tensors[1] of row 1 must have the shape")):
        combine_many([X, X], [[X, X], [X, X[:1]]], weights=1.0)
    with pytest.raises(ValueError, match="base must be given for each of 2 tensors"):
        combine_many([X], [[X], [X]], weights=1.0)
    policy = POLICIES["ties_paper"]
    with pytest.raises(ValueError, match="density must be one number per model"):
        combine_many([X, X], [[X], [X]], weights=1.0, policy=policy, density=[[0.1], [0.2]])


def test_what_the_core_does_not_take_is_done_all_the_same() -> None:
    policy = Policy(sparsify="trim", trim_scope="model", trim_ties="all", rescale="l1")
    base, tensors = nasty.models("normal", 300, 3)
    arguments = {"weights": 1.0, "policy": policy, "density": 0.3}
    want = combine(base, tensors, backend="eager", **arguments)
    assert torch.equal(combine(base, tensors, **arguments), want)
    many = combine(base, tensors * 100, weights=0.01)
    assert torch.equal(many, combine(base, tensors * 100, weights=0.01, backend="eager"))
