"""dare: the formula, the mask of the documented stream, gradients, bad input."""

from __future__ import annotations

import re

import nasty
import oracle
import pytest
import torch

from cl_fast.ops import Policy, combine, dare, keep_mask, keep_threshold, stream_key
from cl_fast.ops.dropping import absolute_sum


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("rescale", ["none", "keep_rate", "l1"])
@pytest.mark.parametrize("n", [0, 1, 17, 1000, 70_001])
def test_formula(n: int, rescale: str, dtype: torch.dtype, backend: str) -> None:
    _, (delta,) = nasty.models("normal", n, 1, dtype)
    out = dare(delta, density=0.3, seed=5, model="m", tensor="t", rescale=rescale, backend=backend)
    mask = keep_mask(stream_key(5, "m", "t"), n, keep_threshold(0.3))
    factor = 1.0
    if rescale == "keep_rate":
        factor = 2.0**32 / keep_threshold(0.3)
    elif rescale == "l1" and mask.any():
        factor = (delta.double().abs().sum() / delta[mask].double().abs().sum()).item()
    want = torch.where(mask, delta.double(), 0.0) * factor
    assert out.dtype == dtype
    assert not out[~mask].any()
    error = (out.double() - want).abs().numpy()
    assert (
        error <= 0.5 * oracle.spacing(want.numpy(), dtype) + 2.0**-22 * want.abs().numpy()
    ).all()


def test_backends_agree_bit_for_bit(backend: str) -> None:
    for kind in nasty.KINDS:
        for n in (*nasty.LENGTHS, 70_001):
            for dtype in nasty.DTYPES:
                _, (delta,) = nasty.models(kind, n, 1, dtype)
                for rescale in ("none", "keep_rate", "l1"):
                    want = dare(delta, density=0.1, rescale=rescale, backend="eager")
                    got = dare(delta, density=0.1, rescale=rescale, backend=backend)
                    view = torch.int32 if dtype == torch.float32 else torch.int16
                    assert torch.equal(got.view(view), want.view(view))


def test_drop_rate_is_one_minus_density(backend: str) -> None:
    x = torch.randn(1000)
    kept = dare(x, density=0.1, backend=backend)
    assert torch.equal(dare(x, drop_rate=0.9, backend=backend), kept)
    assert torch.equal(dare(x, drop_rate=0.0, backend=backend), x)


def test_names_and_seed_choose_the_mask() -> None:
    x = torch.ones(200)
    masks = [
        dare(x, density=0.5, **names)
        for names in ({}, {"seed": 1}, {"model": "a"}, {"tensor": "a"}, {"tensor": "b"})
    ]
    assert len({tuple(mask.tolist()) for mask in masks}) == 5


def test_density_one_is_a_copy(backend: str) -> None:
    x = torch.randn(5)
    out = dare(x, density=1.0, rescale="l1", backend=backend)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()


def test_is_the_drop_of_combine(backend: str) -> None:
    base, tensors = nasty.models("normal", 999, 1, torch.float32)
    delta = tensors[0] - base
    alone = dare(delta, density=0.2, seed=1, model="m", tensor="t", backend=backend)
    policy = Policy(sparsify="drop", rescale="keep_rate")
    merged = combine(
        base, tensors, weights=1.0, policy=policy, density=0.2,
        keys=[stream_key(1, "m", "t")], backend=backend,
    )  # fmt: skip
    assert torch.equal(base + alone, merged)


def test_strides_and_empty_and_point(backend: str) -> None:
    x = torch.randn(6, 4)
    out = dare(x.t(), density=0.5, backend=backend)
    assert out.is_contiguous()
    assert torch.equal(out, dare(x.t().contiguous(), density=0.5, backend=backend))
    assert dare(x[:0], density=0.5, backend=backend).shape == (0, 4)
    assert dare(x[0, 0], density=0.5, backend=backend).shape == ()


def test_tiny_density_keeps_nothing_and_makes_no_nan(backend: str) -> None:
    x = torch.randn(100)
    for rescale in ("keep_rate", "l1", "none"):
        assert not dare(x, density=1e-12, rescale=rescale, backend=backend).any()


@pytest.mark.parametrize("rescale", ["none", "keep_rate", "l1"])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_gradients(rescale: str, density: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        return dare(x, density=density, rescale=rescale)

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


def test_gradient_in_bfloat16_twice_used_with_upstream() -> None:
    x = torch.randn(50, dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(50, dtype=torch.bfloat16)
    (dare(x, density=0.5) * up + dare(x, density=0.5) * up).sum().backward()
    want = 2 * dare(up, density=0.5)
    assert torch.equal(x.grad, want)


def test_l1_order_is_the_documented_one() -> None:
    """Sixteen lanes of a chunk in order, chunks in order: bit for bit, by plain loops."""
    n = 65536 + 40
    x = torch.randn(n, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    total = 0.0
    values = x.abs().double().tolist()
    for start in range(0, n, 65536):
        lanes = [0.0] * 16
        for i, value in enumerate(values[start : start + 65536]):
            lanes[i % 16] += value
        chunk = 0.0
        for lane in lanes:
            chunk += lane
        total += chunk
    assert absolute_sum(x) == total


X = torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "exactly one of density and drop_rate"),
        ({"density": 0.5, "drop_rate": 0.5}, ValueError, "exactly one of density and drop_rate"),
        ({"density": 0.0}, ValueError, "density must be in (0, 1]; got 0.0"),
        ({"density": float("nan")}, ValueError, "density must be in (0, 1]; got nan"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate must be in [0, 1); got 1.0"),
        ({"drop_rate": -0.1}, ValueError, "drop_rate must be in [0, 1); got -0.1"),
        ({"density": 0.5, "rescale": "L1"}, ValueError, "rescale must be one of 'none'"),
        ({"density": 0.5, "seed": 1.5}, TypeError, "seed must be an int"),
        ({"density": 0.5, "delta": X.long()}, TypeError, "delta must have one of the dtypes"),
        ({"density": 0.5, "delta": [1.0]}, TypeError, "delta must be a torch.Tensor, got list"),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], words: str, backend: str) -> None:
    delta = arguments.get("delta", X)
    rest = {name: value for name, value in arguments.items() if name != "delta"}
    for chosen in (backend, None):
        with pytest.raises(error, match=re.escape(words)):
            dare(delta, **rest, backend=chosen)
