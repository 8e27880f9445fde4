"""anchor_gradient_, anchor_pull_, anchor_penalty: against float64, in constant memory."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cl_fast.ops import anchor_gradient_, anchor_penalty, anchor_pull_, anchoring

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(), (0, 3), (1,), (7, 5), (3, 4, 5), (300, 301)]
LAM = 0.7


def inputs(
    dtype: torch.dtype, shapes: Sequence[Sequence[int]] = SHAPES, kind: str = "normal"
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """grads, weights near their anchors, anchors, F of many sizes."""
    g = torch.Generator().manual_seed(len(kind) + dtype.itemsize)
    grads, weights, anchors, fisher = [], [], [], []
    for shape in shapes:
        a = torch.randn(shape, generator=g, dtype=torch.float64)
        near = 1e-2 * torch.randn(shape, generator=g, dtype=torch.float64)
        if kind == "far":
            near = 1e3 * near
        grads.append(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype))
        weights.append((a + near).to(dtype))
        anchors.append(a.to(dtype))
        f = torch.randn(shape, generator=g, dtype=torch.float64).exp().square()
        if kind == "zeros":
            f = f * (f > 1)
        fisher.append(f.to(dtype))
    return grads, weights, anchors, fisher


def twice(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """No further from float64 than twice the same formula in plain torch, in the same dtype."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-14, atol=1e-14)
        return
    error, theirs = ((x.double() - exact).abs().max() for x in (got, plain))
    assert error <= 2 * theirs + 2.0**-60, (error, theirs)


@pytest.mark.parametrize("kind", ["normal", "far", "zeros"])
@pytest.mark.parametrize("with_fisher", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(dtype: torch.dtype, with_fisher: bool, kind: str) -> None:
    grads, weights, anchors, fisher = inputs(dtype, kind=kind)
    before = [g.clone() for g in grads]
    anchor_gradient_(grads, weights, anchors, fisher if with_fisher else None, strength=LAM)
    for g, b, w, a, f in zip(grads, before, weights, anchors, fisher, strict=True):
        if not g.numel():
            continue
        f = f if with_fisher else torch.ones_like(f)
        plain = b + LAM * f * (w - a)
        exact = b.double() + LAM * f.double() * (w.double() - a.double())
        assert g.dtype == dtype
        twice(g, plain, exact)


@pytest.mark.parametrize("kind", ["normal", "far", "zeros"])
@pytest.mark.parametrize("with_fisher", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pull(dtype: torch.dtype, with_fisher: bool, kind: str) -> None:
    _, weights, anchors, fisher = inputs(dtype, kind=kind)
    before = [w.clone() for w in weights]
    anchor_pull_(weights, anchors, fisher if with_fisher else None, amount=0.3)
    for w, b, a, f in zip(weights, before, anchors, fisher, strict=True):
        if not w.numel():
            continue
        f = f if with_fisher else torch.ones_like(f)
        plain = b - (0.3 * f).clamp(max=1.0) * (b - a)
        part = (0.3 * f.double()).clamp(max=1.0)
        exact = b.double() - part * (b.double() - a.double())
        assert w.dtype == dtype
        twice(w, plain, exact)


def test_mixed_dtypes_round_once() -> None:
    """bfloat16 weights and gradients, float32 anchors and F: what float64 gives, rounded."""
    g, w, _, _ = inputs(torch.bfloat16, [(200, 30)])
    _, _, a, f = inputs(torch.float32, [(200, 30)])
    exact = g[0].double() + LAM * f[0].double() * (w[0].double() - a[0].double())
    anchor_gradient_(g, w, a, f, strength=LAM)
    differ = g[0] != exact.bfloat16()  # ties of the last bit of float32 at most
    assert differ.float().mean() < 1e-3
    exact = w[0].double() - (0.3 * f[0].double()).clamp(max=1) * (w[0].double() - a[0].double())
    anchor_pull_(w, a, f, amount=0.3)
    assert (w[0] != exact.bfloat16()).float().mean() < 1e-3


def test_a_difference_that_bfloat16_cannot_hold() -> None:
    """The pull of an anchor a hair away is not lost in the difference."""
    g, w = [torch.zeros(1, dtype=torch.bfloat16)], [torch.ones(1, dtype=torch.bfloat16)]
    anchor_gradient_(g, w, [torch.tensor([1.0 - 2.0**-14])])
    assert float(g[0]) == 2.0**-14


@pytest.mark.parametrize("amount", [1.0, 1.5, 2.5, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pull_never_overshoots(dtype: torch.dtype, amount: float) -> None:
    _, weights, anchors, _ = inputs(dtype, [(40, 3)])
    other = weights[0].clone()
    anchor_pull_(weights, anchors, amount=amount)
    assert torch.equal(weights[0], anchors[0])
    anchor_pull_([other], anchors, [torch.ones_like(other)], amount=amount)
    assert torch.equal(other, anchors[0])


def test_one_strength_for_each_tensor() -> None:
    g, w, a, f = inputs(torch.float32, [(3,), (4, 2)])
    apart = [x.clone() for x in g]
    anchor_gradient_(g, w, a, f, strength=[0.5, 2.0])
    for i, lam in enumerate((0.5, 2.0)):
        anchor_gradient_([apart[i]], [w[i]], [a[i]], [f[i]], strength=lam)
        assert torch.equal(apart[i], g[i])


def test_not_contiguous() -> None:
    for shape in ((300, 301), (2, 70_001), (0, 4)):
        g, w, a, f = inputs(torch.float32, [shape])
        want, (b,) = [g[0].clone()], [w[0].clone()]
        anchor_gradient_(want, w, a, f, strength=LAM)
        turned = g[0].t().contiguous().t()
        anchor_gradient_([turned], w, a, [f[0].t().contiguous().t()], strength=LAM)
        assert torch.equal(turned, want[0])
        anchor_pull_(w, a, f, amount=0.1)
        turned = b.t().contiguous().t()
        anchor_pull_([turned], a, f, amount=0.1)
        assert torch.equal(turned, w[0])


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    g, w, a, f = inputs(torch.bfloat16, [(37, 29)])
    want = [g[0].clone()]
    anchor_gradient_(want, w, a, f)
    for tile in (1, 28, 30, 1000):
        monkeypatch.setattr(anchoring, "TILE", tile)
        got = [g[0].clone()]
        anchor_gradient_(got, w, a, f)
        assert torch.equal(got[0], want[0])


@given(st.integers(0, 2**31), st.floats(0, 10), st.floats(0, 10))
def test_linear_in_its_strength_and_zero_at_the_anchor(seed: int, x: float, y: float) -> None:
    gen = torch.Generator().manual_seed(seed)
    w, a, f = (torch.randn(11, generator=gen, dtype=torch.float64) for _ in range(3))
    one, two = [torch.zeros(11, dtype=torch.float64)], [torch.zeros(11, dtype=torch.float64)]
    anchor_gradient_(one, [w], [a], [f.square()], strength=x)
    anchor_gradient_(one, [w], [a], [f.square()], strength=y)
    anchor_gradient_(two, [w], [a], [f.square()], strength=x + y)
    torch.testing.assert_close(one[0], two[0])
    zero = torch.zeros(11, dtype=torch.float64)
    anchor_gradient_([zero], [a.clone()], [a], [f.square()], strength=x)
    assert not zero.any()


@pytest.mark.parametrize("with_fisher", [False, True])
def test_penalty_and_its_gradient(with_fisher: bool) -> None:
    g, w, a, f = inputs(torch.float64)
    for x in w:
        x.requires_grad_()
    ones = [torch.ones_like(x) for x in f]
    used = f if with_fisher else ones
    value = sum(LAM / 2 * (k * (x - y) ** 2).sum() for x, y, k in zip(w, a, used, strict=True))
    got = anchor_penalty(w, a, f if with_fisher else None, strength=LAM)
    torch.testing.assert_close(got, value.detach())
    want = torch.autograd.grad(value, w)
    zero = [torch.zeros_like(x) for x in g]
    anchor_gradient_(zero, w, a, f if with_fisher else None, strength=LAM)
    torch.testing.assert_close(zero, list(want))
    low = [[x.detach().bfloat16() for x in xs] for xs in (w, a, f)]
    exact = sum(
        LAM / 2 * (k.double() * (x.double() - y.double()) ** 2).sum()
        for x, y, k in zip(*low, strict=True)
    )
    torch.testing.assert_close(anchor_penalty(*low, strength=LAM), exact, rtol=1e-6, atol=0)


class Allocations(TorchDispatchMode):
    """The bytes of the storages that ops make anew."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def storages(x: Any) -> set[int]:
            flat = torch.utils._pytree.tree_leaves(x)
            return {t.untyped_storage().data_ptr() for t in flat if isinstance(t, Tensor)}

        known = storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.made[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                self.alive.append(t)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_does_not_grow_with_the_model(dtype: torch.dtype) -> None:
    """All that is ever allocated, even if it were never freed: the tiles."""
    tile = anchoring.TILE * 4
    for count in (1, 5):
        shapes = [(3, anchoring.TILE + 7), (2 * anchoring.TILE,)] * count
        g, w, a, f = inputs(dtype, shapes)
        # The bodies of the ops: a mode sees an op as one.
        strengths = [0.1] * len(g)
        with Allocations() as gradient:
            anchoring._gradient_eager(g, w, a, f, strengths)
        with Allocations() as pull:
            anchoring._pull_eager(w, a, f, strengths)
        with Allocations() as penalty:
            anchor_penalty(w, a, f)
        assert 0 < sum(gradient.made.values()) <= 2 * tile
        assert 0 < sum(pull.made.values()) <= 3 * tile
        assert sum(penalty.made.values()) <= 2 * tile + 8 * (1 + 5 * len(shapes))
    with Allocations() as expression:  # the count sees what a plain expression makes
        _ = g[1] + LAM * f[1] * (w[1] - a[1])
    assert sum(expression.made.values()) >= 3 * g[1].nbytes


def test_opcheck_and_compile() -> None:
    g, w, a, f = inputs(torch.float32, [(5, 3), (4,)])
    torch.library.opcheck(torch.ops.cl_fast.anchor_gradient_, (g, w, a, f, [0.1, 0.2], None))
    torch.library.opcheck(torch.ops.cl_fast.anchor_pull_, (w, a, [], [0.1, 0.2], None))

    def step(g: Tensor, w: Tensor, a: Tensor, f: Tensor) -> Tensor:
        g, w = g + 0.0, w + 0.0
        anchor_gradient_([g], [w], [a], [f], strength=LAM)
        anchor_pull_([w], [a], [f], amount=0.1)
        return g + w

    args = (g[0], w[0], a[0], f[0])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), step(*args))


def test_leaves_that_require_grad() -> None:
    w = torch.ones(3, requires_grad=True)
    anchor_pull_([w], [torch.zeros(3)], amount=0.5)
    assert w.requires_grad
    assert w.is_leaf
    assert torch.equal(w.detach(), torch.full((3,), 0.5))
    with pytest.raises(ValueError, match=r"weights\[0\] was computed by autograd"):
        anchor_pull_([w * 2], [torch.zeros(3)], amount=0.5)


X, Y, Z = torch.zeros(3), torch.ones(3), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([], [], []), ValueError, "grads must hold at least one tensor"),
        ((X, [Y], [Z]), TypeError, "grads must be a list or tuple of tensors, got Tensor"),
        (([X], [3.0], [Z]), TypeError, "weights[0] must be a torch.Tensor, got float"),
        (([X], [Y, Y], [Z]), ValueError, "weights must hold one tensor for each of the 1 of grads"),
        (([X], [Y], [Z[:2]]), ValueError, "anchors[0] must have the shape of grads[0], (3,)"),
        (([X], [Y], [Z], []), ValueError, "fisher must hold one tensor for each"),
        (([X], [Y], [Z], [Z[:1]]), ValueError, "fisher[0] must have the shape of grads[0]"),
        (([X], [Y], [Z.long()]), TypeError, "anchors[0] must have one of the dtypes bfloat16"),
        (([X], [Y], [Z.to("meta")]), ValueError, "anchors[0] must be on the device of grads[0]"),
        (([X], [Y], [Y]), ValueError, "anchors[0] must not be the memory of weights[0]"),
        (([X], [X], [Z]), ValueError, "weights[0] must not be the memory of grads[0]"),
        (([X[:1].expand(3)], [Y], [Z]), ValueError, "grads[0] must not overlap itself"),
    ],
)
def test_bad_tensors(arguments: Any, error: type[Exception], words: str) -> None:
    before = [t.clone() for t in (X, Y, Z)]
    if len(arguments) > 3 and not arguments[3]:
        arguments = (*arguments[:3], [Z, Z])
    with pytest.raises(error, match=re.escape(words)):
        anchor_gradient_(*arguments)
    assert all(torch.equal(t, b) for t, b in zip((X, Y, Z), before, strict=True))


@pytest.mark.parametrize(
    ("strength", "error", "words"),
    [
        (-0.1, ValueError, "must be 0 or more, and finite; got -0.1"),
        (math.inf, ValueError, "must be 0 or more, and finite; got inf"),
        (math.nan, ValueError, "must be 0 or more, and finite; got nan"),
        ([0.1, 0.2], ValueError, "must be one number, or one for each of the 1 of"),
        ("0.1", TypeError, "must be a number, or a list of them; got str"),
        (True, TypeError, "must be a number, or a list of them; got bool"),
    ],
)
def test_bad_strengths(strength: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(f"strength {words}")):
        anchor_gradient_([X], [Y], [Z], strength=strength)
    with pytest.raises(error, match=re.escape(f"amount {words}")):
        anchor_pull_([Y], [Z], amount=strength)
    with pytest.raises(ValueError, match="backend"):
        anchor_gradient_([X], [Y], [Z], backend="gpu")


def test_on_a_card_the_kernels_get_what_is_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided tensors go to the reference; kernels here are stand-ins that note what they get."""
    seen: list[int] = []

    class Kernels:
        @staticmethod
        def gradient(*lists: Any) -> None:
            assert all(x.is_contiguous() for xs in lists[:4] for x in xs)
            seen.append(len(lists[0]))
            anchoring._gradient_eager(*lists)

        @staticmethod
        def pull(*lists: Any) -> None:
            assert all(x.is_contiguous() for xs in lists[:3] for x in xs)
            seen.append(len(lists[0]))
            anchoring._pull_eager(*lists)

    monkeypatch.setattr(anchoring.triton, "load", lambda _: Kernels)
    shapes = [(4, 5), (6, 3), (7,)]
    for with_fisher in (False, True):
        g, w, a, f = inputs(torch.float32, shapes)
        g2, w2 = ([x.clone() for x in xs] for xs in (g, w))
        g2[1] = g2[1].t().contiguous().t()
        w2[1] = w2[1].t().contiguous().t()
        fisher, strengths = f if with_fisher else [], [0.1, 0.2, 0.3]
        anchoring._gradient(g2, w2, a, fisher, strengths, None, "triton")
        anchoring._pull(w2, a, fisher, strengths, None, "triton")
        anchor_gradient_(g, w, a, fisher or None, strength=strengths)
        anchor_pull_(w, a, fisher or None, amount=strengths)
        torch.testing.assert_close([g2, w2], [g, w], rtol=0, atol=0)
    assert seen == [2] * 4
    double = [x.double() for x in g]
    anchoring._gradient(double, w, a, [], strengths, None, "triton")  # float64: the reference
    assert seen == [2] * 4
