"""The gated low-rank layer against a loop over experts in float64, and what torch asks of ops."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_fast.ops import gated_low_rank

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NAMES = ("x", "down", "gate", "up", "base")


def tensors(
    shape: tuple[int, ...] = (3, 7, 20),
    out: int = 13,
    n: int = 4,
    r: int = 3,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sharp: float = 1.0,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    wide = shape[-1]
    made = {
        "x": torch.randn(shape, generator=g),
        "down": torch.randn(n * r, wide, generator=g) / max(wide, 1) ** 0.5,
        "gate": torch.randn(n, wide, generator=g) * sharp / max(wide, 1) ** 0.5,
        "up": torch.randn(out, n * r, generator=g),
        "base": torch.randn(*shape[:-1], out, generator=g),
    }
    return {name: t.to(dtype).requires_grad_() for name, t in made.items()}


def loop(t: dict[str, Tensor], scale: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One LoRA after the other; each makes an output, which its gate scales."""
    n = t["gate"].shape[0]
    r = t["down"].shape[0] // n
    p = F.softmax(F.linear(t["x"], t["gate"]), dim=-1)
    x = t["x"] if kept is None else t["x"] * kept
    y = t["base"]
    for i in range(n):
        a, b = t["down"][i * r : (i + 1) * r], t["up"][:, i * r : (i + 1) * r]
        y = y + scale * p[..., i : i + 1] * F.linear(F.linear(x, a), b)
    return y, p


def ours(t: dict[str, Tensor], scale: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return gated_low_rank(
        t["x"], t["down"], t["gate"], t["up"], scale=scale, base=t["base"], kept=kept
    )


def doubled(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in t.items()}


def results(
    f: Callable[..., tuple[Tensor, Tensor]],
    t: dict[str, Tensor],
    scale: float = 1.7,
    kept: Tensor | None = None,
) -> dict[str, Tensor]:
    """y, p, and the gradients of a value that uses both."""
    y, p = f(t, scale, kept)
    g = torch.Generator().manual_seed(99)
    dy = torch.randn(y.shape, generator=g).to(y.dtype)
    dp = torch.randn(p.shape, generator=g).to(p.dtype)
    grads = torch.autograd.grad((y, p), [t[name] for name in NAMES], (dy, dp))
    return {"y": y, "p": p, **{f"d{name}": g for name, g in zip(NAMES, grads, strict=True)}}


def assert_equal(
    got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, floor: float = 1e-30
) -> None:
    """Relative to the largest number of each tensor."""
    for name, true in want.items():
        error = (got[name].double() - true).abs().max().item() if true.numel() else 0.0
        size = true.abs().max().item() if true.numel() else 0.0
        assert error <= tolerance * size + floor, (name, error, size)


# --- the formula -------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equals_the_loop_over_experts(dtype: torch.dtype, tolerance: float, masked: bool) -> None:
    """Outputs and all gradients."""
    for seed, (n, r) in enumerate([(8, 4), (4, 3), (1, 5), (6, 1)]):
        t = tensors((3, 7, 40), 24, n, r, seed=seed, dtype=dtype)
        kept = None
        if masked:
            kept = torch.rand(3, 7, 40, generator=torch.Generator().manual_seed(5)) > 0.3
        got, want = results(ours, t, kept=kept), results(loop, doubled(t), kept=kept)
        assert_equal(got, want, tolerance, 1e-8 if dtype == torch.float32 else 1e-16)


def test_peaked_gates_are_as_exact_as_in_the_loop() -> None:
    """Rounded logits of 60 move a softmax by more than 1e-6, whoever computes it."""
    t = tensors((3, 64, 40), 24, 8, 4, sharp=20.0)
    got, naive, want = results(ours, t), results(loop, t), results(loop, doubled(t))
    assert want["p"].max() > 1 - 1e-9
    for name, true in want.items():
        mine, theirs = (
            (x[name].double() - true).abs().square().mean().sqrt().item() for x in (got, naive)
        )
        assert mine <= 1.5 * theirs + 1e-7 * true.abs().max().item(), (name, mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_as_the_loop(dtype: torch.dtype) -> None:
    t = tensors((4, 32, 64), 48, 8, 4, dtype=dtype)
    got, naive, want = results(ours, t), results(loop, t), results(loop, doubled(t))
    assert got["p"].dtype == torch.float32
    for name, true in want.items():
        mine, theirs = (
            (x[name].double() - true).abs().square().mean().sqrt().item() for x in (got, naive)
        )
        assert mine <= 1.1 * theirs, (name, mine, theirs)
        if name != "p":
            assert got[name].dtype == dtype


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 9),
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_any_shapes(shape: list[int], wide: int, out: int, n: int, r: int, seed: int) -> None:
    t = tensors((*shape, wide), out, n, r, seed=seed, dtype=torch.float64)
    assert_equal(results(ours, t), results(loop, doubled(t)), 1e-12, 1e-14)


def test_order_of_experts_does_not_matter() -> None:
    t = tensors(dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    rows = (order[:, None] * 3 + torch.arange(3)).flatten()
    moved = {**t, "down": t["down"][rows], "gate": t["gate"][order], "up": t["up"][:, rows]}
    (y, p), (y2, p2) = ours(t, 1.0), ours(moved, 1.0)
    torch.testing.assert_close(y2, y)
    torch.testing.assert_close(p2, p[..., order])


def test_one_expert_is_a_lora_and_its_gate_learns_nothing() -> None:
    t = tensors(n=1, r=4, dtype=torch.float64)
    y, p = ours(t, 2.0)
    torch.testing.assert_close(y, t["base"] + 2.0 * (t["x"] @ t["down"].t()) @ t["up"].t())
    assert (p == 1).all()
    (g,) = torch.autograd.grad(y.square().sum(), t["gate"])
    assert not g.any()


def test_without_a_base_and_strides() -> None:
    t = tensors(dtype=torch.float64)
    want, _ = ours(t, 1.3)
    y, _ = gated_low_rank(t["x"], t["down"], t["gate"], t["up"], scale=1.3)
    torch.testing.assert_close(y + t["base"], want)
    turned = {name: v.detach().transpose(0, 1).contiguous().transpose(0, 1) for name, v in
              t.items()}  # fmt: skip
    torch.testing.assert_close(ours(turned, 1.3)[0], want)


def test_an_input_used_twice_and_only_what_needs_a_gradient() -> None:
    t = tensors(out=20, dtype=torch.float64)

    def twice(f: Callable[..., tuple[Tensor, Tensor]], t: dict[str, Tensor]) -> Tensor:
        y, p = f(t, 0.7)
        again, q = f({**t, "x": y + t["x"]}, 0.7)
        return (again**2).sum() + (p * q).sum()

    t64 = doubled(t)
    want = torch.autograd.grad(twice(loop, t64), list(t64.values()))
    got = torch.autograd.grad(twice(ours, t), list(t.values()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for name in NAMES:
        alone = {k: v.detach().requires_grad_(k == name) for k, v in t.items()}
        (g,) = torch.autograd.grad(twice(ours, alone), alone[name])
        torch.testing.assert_close(g, got[NAMES.index(name)])


def test_parts_of_the_result() -> None:
    """Only y, only p: the other one's gradient is absent."""
    t, t64 = tensors(dtype=torch.float64), doubled(tensors(dtype=torch.float64))
    for part in (0, 1):
        inputs = NAMES if part == 0 else ("x", "gate")
        value, want = ours(t, 1.1)[part].square().sum(), loop(t64, 1.1)[part].square().sum()
        got = torch.autograd.grad(value, [t[k] for k in inputs])
        true = torch.autograd.grad(want, [t64[k] for k in inputs])
        for a, b in zip(got, true, strict=True):
            torch.testing.assert_close(a, b)
    grads = torch.autograd.grad(ours(t, 1.1)[1].sum(), [t["down"], t["up"]], allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


# --- memory ------------------------------------------------------------------------------------


def saved(f: Callable[[], Any], known: list[Tensor]) -> int:
    """Bytes that autograd keeps, beyond the memory of `known`."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = f()
    mine = {t.untyped_storage().data_ptr() for t in known}
    del result
    return sum(size for at, size in kept.items() if at not in mine)


def test_saves_what_the_docs_say_and_much_less_than_the_loop() -> None:
    n, r, tokens = 8, 4, 128
    t = tensors((2, 64, 96), 160, n, r)
    few = saved(lambda: ours(t, 1.0), list(t.values()))
    many = saved(lambda: loop(t, 1.0), list(t.values()))
    assert few == tokens * (n * r + n) * 4
    assert many >= n * tokens * 160 * 4
    x = t["x"].numel() * 4
    assert many + x >= 3 * (few + x), (many, few)


# --- what torch asks of an op ------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool) -> None:
    t = tensors((2, 3, 5), 4, 3, 2, dtype=torch.float64)
    kept = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)) > 0.3

    def f(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ours(dict(zip(NAMES, values, strict=True)), 1.7, kept if masked else None)

    def whole(x: Tensor, down: Tensor, gate: Tensor, up: Tensor, base: Tensor) -> Tensor:
        """The op itself, whose third result is H; gradients come to all three at once."""
        mask = kept if masked else None
        results = torch.ops.cl_fast.gated_low_rank(x, down, gate, up, 1.7, base, mask)
        return torch.cat([part.flatten() for part in results])

    values = tuple(t[name] for name in NAMES)
    assert torch.autograd.gradcheck(f, values)
    assert torch.autograd.gradgradcheck(f, values)
    assert torch.autograd.gradcheck(whole, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool, dtype: torch.dtype) -> None:
    t = tensors((2, 3, 6), 4, 2, 2, dtype=dtype)
    kept = torch.ones(2, 3, 6, dtype=torch.bool) if masked else None
    base = None if masked else t["base"]
    op = torch.ops.cl_fast.gated_low_rank
    torch.library.opcheck(op, (t["x"], t["down"], t["gate"], t["up"], 1.5, base, kept))


def test_compile_fullgraph() -> None:
    t = tensors()

    def step(x: Tensor, down: Tensor, gate: Tensor, up: Tensor, base: Tensor) -> Tensor:
        y, p = gated_low_rank(x * 1.0, down, gate, up, scale=1.5, base=base)
        return (y**2).sum() + (p**2).sum()

    values = [t[name] for name in NAMES]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want, got = step(*values), compiled(*values)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, values), torch.autograd.grad(want, values),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_autocast_casts_as_for_a_product() -> None:
    t = tensors()
    low = {name: v.detach().bfloat16().requires_grad_() for name, v in t.items()}
    want, want_p = ours(low, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        y, p = ours({**t, "base": low["base"]}, 1.5)
        wide, _ = ours({**t, "base": low["base"].detach().float()}, 1.5)
    assert (y.dtype, p.dtype, wide.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(y, want)
    assert torch.equal(p, want_p)
    y.float().sum().backward()
    assert all(t[name].grad.dtype == torch.float32 for name in NAMES[:4])  # type: ignore[union-attr]
    double = tensors(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = ours(double, 1.5)
    torch.testing.assert_close(y, loop(double, 1.5)[0])


def test_weights_of_another_dtype_are_cast_and_keep_theirs() -> None:
    t = tensors()
    low = {name: v.detach().bfloat16().requires_grad_() for name, v in t.items()}
    for weights, rest in ((t, low), (low, t)):
        mixed = {**rest, **{k: weights[k] for k in ("down", "gate", "up")}}
        cast = {k: v.detach().to(mixed["x"].dtype).requires_grad_() for k, v in mixed.items()}
        got, want = results(ours, mixed), results(ours, cast)
        assert torch.equal(got["y"], want["y"])
        for name in ("down", "gate", "up"):
            assert got[f"d{name}"].dtype == mixed[name].dtype


# --- bad input ---------------------------------------------------------------------------------


def bad() -> list[tuple[dict[str, Any], type[Exception], str]]:
    z = torch.zeros
    return [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"down": None}, TypeError, "down must be a torch.Tensor, got NoneType"),
        ({"kept": 0.1}, TypeError, "kept must be a torch.Tensor, got float"),
        ({"gate": z(4, 20).long()}, TypeError, "gate must have one of the dtypes"),
        ({"base": z(3, 7, 13).long()}, TypeError, "base must have one of the dtypes"),
        ({"x": z(())}, ValueError, "x must have the shape [..., d_in]"),
        ({"up": z(13)}, ValueError, "up must be a matrix; got the shape (13,)"),
        ({"down": z(12, 21)}, ValueError, "down must have 20 columns"),
        ({"gate": z(4, 19)}, ValueError, "gate must have 20 columns"),
        ({"gate": z(5, 20)}, ValueError, "for each of the 5 experts of gate; got 12 rows"),
        ({"gate": z(0, 20)}, ValueError, "for each of the 0 experts"),
        ({"up": z(13, 11)}, ValueError, "up must have 12 columns, the rows of down; got 11"),
        ({"base": z(3, 7, 12)}, ValueError, "base must have the shape (3, 7, 13)"),
        ({"base": z(3, 7, 12).double()}, ValueError, "base must have the shape (3, 7, 13)"),
        ({"kept": z(3, 7, 20)}, ValueError, "kept must be a mask of bool"),
        ({"kept": z(3, 20).bool()}, ValueError, "kept must be a mask of bool"),
        ({"up": z(13, 12, device="meta")}, ValueError, "up must be on the device of x"),
        ({"base": z(3, 7, 13, device="meta")}, ValueError, "base must be on the device of x"),
    ]


@pytest.mark.parametrize(("change", "error", "words"), bad())
def test_bad_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    t: dict[str, Any] = {name: v.detach() for name, v in tensors().items()}
    with pytest.raises(error, match=re.escape(words)):
        gated_low_rank(**{**t, **change})


def test_dtypes_of_the_op_itself() -> None:
    t = {name: v.detach() for name, v in tensors().items()}
    op = torch.ops.cl_fast.gated_low_rank
    with pytest.raises(TypeError, match=r"up must have the dtype of x, torch\.float32"):
        op(t["x"], t["down"], t["gate"], t["up"].double(), 1.0, None, None)
    with pytest.raises(TypeError, match=r"base must have the dtype of x, torch\.float32"):
        op(t["x"], t["down"], t["gate"], t["up"], 1.0, t["base"].double(), None)
