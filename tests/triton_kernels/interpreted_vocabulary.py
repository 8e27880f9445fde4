"""The kernels of rows of logits against the reference in float64.

bfloat16 is read correctly here, but results are written in float32: the interpreter truncates
where it should round. Blocks are made small, so that rows of some hundred columns have several
blocks and several spans, with and without a tail.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cl_fast.triton_kernels import vocabulary as triton_kernels
from torch import Tensor

from cl_fast.ops import vocabulary_rows as rows
from cl_fast.ops.vocabulary_rows import KINDS, Extra, How

FP32, FP16, BF16 = DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = How()
WARM = How(temperature=2.5)
CAPPED = How(scale=0.7, softcap=9.0, temperature=1.5)
PROBS = How(probs=True, temperature=2.0)
UNIT = 2.0**-24
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning",
    "ignore:divide by zero:RuntimeWarning",
    "ignore:All-NaN:RuntimeWarning",
)


@pytest.fixture
def real_blocks() -> None:
    """Blocks as on a card."""


@pytest.fixture(autouse=True)
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_blocks" not in request.fixturenames:
        monkeypatch.setattr(triton_kernels, "BLOCK", 64)
        monkeypatch.setattr(triton_kernels, "LANES", 8)
        monkeypatch.setattr(triton_kernels, "SPAN", 128)


def randn(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[-1])) * std


def logits(m: int, v: int, how: How, seed: int = 0) -> Tensor:
    """Peaked, flat and heavy-tailed rows by turns, or probabilities."""
    x = randn(m, v, seed=seed, std=3.0)
    x[::3] *= 10
    x[1::3] = x[1::3].sign() * x[1::3] ** 2
    if not how.probs:
        return x
    return x.softmax(1).clamp(min=1e-30) * (1 + torch.arange(m)[:, None])


def ours(x: Tensor) -> Any:
    found = rows.kernels("triton", x)
    assert found is triton_kernels
    return found


def near(got: Tensor, exact: Tensor, plain: Tensor, size: float = 1.0) -> None:
    """Twice the error of the reference in float32, and two roundings of numbers of that size."""
    assert got.dtype == torch.float32
    infinite = ~exact.isfinite()
    assert torch.equal(got[infinite].double().nan_to_num(), exact[infinite].nan_to_num())
    error = (got.double() - exact).abs()[~infinite]
    allowed = (plain.double() - exact).abs()[~infinite]
    room = 2 * float(allowed.max()) if allowed.numel() else 0.0
    assert not error.numel() or float(error.max()) <= room + 2 * UNIT * size


def both(
    s: Tensor, t: Tensor, kind: str, mix: float, how_s: How, how_t: How, grad: Tensor,
    extra: Extra | None = None,
) -> None:  # fmt: skip
    """Loss, statistics and gradient: ours, in float64, and the reference in float32."""
    found = []
    for k, x, y in ((ours(s), s, t), (rows, s.double(), t.double()), (rows, s.float(), t.float())):
        loss, stats = k.divergence_forward(x, y, kind, mix, how_s, how_t)
        out = torch.full(s.shape, math.nan, dtype=stats.dtype)
        wide = grad.to(stats.dtype)
        added = None
        if extra is not None:
            normal = k.normalisers(x, how_s._replace(temperature=1.0))
            added = Extra(extra.grad.to(stats.dtype), normal, extra.ids)
        k.divergence_gradient(out, wide, x, y, stats, kind, mix, how_s, how_t, added)
        sums = k.divergence_sums(x, y, stats[:, :2], stats[:, 2:4], kind, mix, how_s, how_t)
        found.append((loss, stats, out, sums))
    assert found[0][0].shape == (s.size(0),)
    size = 1 + float(found[1][1][:, :4].abs().max())
    for got, exact, plain in zip(*found, strict=True):
        near(got, exact, plain, size)


GRAD = torch.tensor([1.0, -0.5, 3.0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("v", "how_s", "how_t"),
    [
        (1, PLAIN, PLAIN),
        (63, WARM, PLAIN),
        (128, CAPPED, CAPPED),
        (199, CAPPED, WARM),
        (313, PLAIN, PROBS),
    ],
)
def test_divergence(v: int, how_s: How, how_t: How, kind: str) -> None:
    both(logits(3, v, how_s), logits(3, v, how_t, 7), kind, 0.3, how_s, how_t, GRAD)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("s_dtype", "t_dtype"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP16)]
)
def test_dtypes(s_dtype: torch.dtype, t_dtype: torch.dtype, kind: str) -> None:
    """128 columns are aligned in all of them."""
    s, t = logits(3, 128, PLAIN).to(s_dtype), logits(3, 128, PLAIN, 7).to(t_dtype)
    both(s, t, kind, 0.5, WARM, WARM, GRAD)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("v", "how"), [(100, PLAIN), (150, CAPPED)])
def test_a_cross_entropy_is_added(v: int, how: How, kind: str) -> None:
    extra = Extra(torch.tensor([0.5, 0.0, 2.0]), torch.empty(0), torch.tensor([v - 1, 0, -100]))
    both(logits(3, v, how), logits(3, v, how, 7), kind, 0.3, how, WARM, GRAD, extra)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [(190, 180), (200, 64), (8, 3)])
def test_a_teacher_with_fewer_columns(columns: tuple[int, int], kind: str) -> None:
    v, vt = columns
    s, t = logits(3, v, PLAIN), logits(3, vt, PLAIN, 7)
    wide = torch.full((3, v), -math.inf)
    wide[:, :vt] = t
    k = ours(s)
    loss, _ = k.divergence_forward(s, t, kind, 0.3, PLAIN, PLAIN)
    if kind == "reverse_kl":
        assert loss.isposinf().all()
        return
    both(s, t, kind, 0.3, PLAIN, PLAIN, GRAD)
    again, _ = k.divergence_forward(s, wide, kind, 0.3, PLAIN, PLAIN)
    torch.testing.assert_close(loss, again, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [PLAIN, How(scale=0.3, temperature=0.7), CAPPED])
def test_equal_rows_give_exactly_zero(how: How, kind: str) -> None:
    for dtype, v in ((FP32, 1), (FP16, 150), (BF16, 256)):
        x = logits(2, v, how).to(dtype)
        if v > 1:
            x[:, v // 2 :: 3] = -math.inf
        loss, stats = ours(x).divergence_forward(x, x.clone(), kind, 0.3, how, how)
        out = torch.full(x.shape, math.nan)
        ours(x).divergence_gradient(
            out, torch.tensor([1.0, -2.0]), x, x.clone(), stats, kind, 0.3, how, how
        )
        assert not loss.any()
        assert not stats[:, 4].any()
        assert not out.any()


@pytest.mark.parametrize("kind", KINDS)
def test_excluded_ids(kind: str) -> None:
    """-inf on either side, on both, in whole first blocks, lanes and spans, and at the end."""
    v = 300
    s, t = logits(5, v, PLAIN), logits(5, v, PLAIN, 7)
    if kind != "reverse_kl":
        t[0, :70] = -math.inf
        t[1, :200] = -math.inf
        t[2] = -math.inf
        t[2, 299] = 1.0
        t[4, ::2] = -math.inf
    if kind != "forward_kl":
        s[0, 64:300] = -math.inf
        s[1, 150:] = -math.inf
        s[2, :128] = -math.inf
        s[3, ::3] = -math.inf
    # Where the other side has nothing either.
    if kind == "reverse_kl":
        t[3, ::3] = -math.inf
    if kind == "forward_kl":
        s[4, ::2] = -math.inf
    both(s, t, kind, 0.3, PLAIN, WARM, torch.tensor([1.0, -0.5, 2.0, 3.0, 1.0]))


def test_infinite_losses() -> None:
    """A side that must not give 0, in one lane, in a whole block, before and after the peak."""
    for v, at in ((200, 0), (200, 199), (200, 130), (5, 2)):
        x = logits(2, v, PLAIN) / 3
        y = x.clone()
        y[:, at] = -math.inf
        k = ours(x)
        assert k.divergence_forward(y, x, "forward_kl", 0.5, PLAIN, PLAIN)[0].isposinf().all()
        assert k.divergence_forward(x, y, "reverse_kl", 0.5, PLAIN, PLAIN)[0].isposinf().all()
        assert k.divergence_forward(x, y, "jsd", 0.5, PLAIN, PLAIN)[0].isfinite().all()


def test_tails_far_below_the_peak() -> None:
    """Log-probs below -104, whose probabilities are 0 in float32, on either side of the peak."""
    v = 300
    s, t = randn(3, v, std=60.0), randn(3, v, seed=3, std=60.0)
    s[0, 0], t[0, 299], s[1, 299], t[1, 0] = 400.0, 500.0, 300.0, -900.0
    for kind in ("forward_kl", "reverse_kl", "skew_forward_kl"):
        both(s, t, kind, 0.5, PLAIN, PLAIN, GRAD)


def test_a_shift_changes_nothing() -> None:
    s, t = randn(2, 200), randn(2, 200, seed=5)
    s, t = (s * 256).round() / 256, (t * 256).round() / 256  # the shifted numbers are exact
    for kind, shift in (("forward_kl", 3e3), ("reverse_kl", -1e3), ("jsd", 1e3)):
        want = ours(s).divergence_forward(s, t, kind, 0.3, PLAIN, PLAIN)[0]
        got = ours(s).divergence_forward(s + shift, t - shift, kind, 0.3, PLAIN, PLAIN)[0]
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_nan_is_not_hidden(kind: str) -> None:
    for side in (0, 1):
        for at in (0, 95):
            pair = [logits(2, 100, PLAIN), logits(2, 100, PLAIN, 7)]
            clean = [x.clone() for x in pair]
            pair[side][1, at] = math.nan
            loss, stats = ours(pair[0]).divergence_forward(*pair, kind, 0.3, PLAIN, PLAIN)
            out = torch.zeros(2, 100)
            ours(out).divergence_gradient(out, torch.ones(2), *pair, stats, kind, 0.3, PLAIN, PLAIN)
            assert loss[1].isnan()
            assert out[1].isnan().any()
            want = ours(out).divergence_forward(*clean, kind, 0.3, PLAIN, PLAIN)[0][0]
            assert torch.equal(loss[0], want)
            assert out[0].isfinite().all()


def test_rows_of_nothing_but_excluded_ids() -> None:
    x = torch.full((2, 150), -math.inf)
    got = ours(x).normalisers(x, PLAIN)
    assert torch.equal(got.nan_to_num(7.0), rows.normalisers(x, PLAIN).nan_to_num(7.0))
    loss, _ = ours(x).divergence_forward(x, randn(2, 150), "forward_kl", 0.5, PLAIN, PLAIN)
    assert loss.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_gradient_are_not_read(kind: str) -> None:
    s, t = logits(4, 200, PLAIN), logits(4, 200, PLAIN, 7)
    s[1], t[2] = math.nan, math.nan
    _, stats = ours(s).divergence_forward(s, t, kind, 0.3, PLAIN, PLAIN)
    grad = torch.tensor([1.0, 0.0, 0.0, 0.0])
    out = torch.full(s.shape, math.nan)
    ours(s).divergence_gradient(out, grad, s, t, stats, kind, 0.3, PLAIN, PLAIN)
    assert out[0].any()
    assert not out[1:].any()
    # One of the two gradients is 0: its side counts for nothing, whatever it holds.
    normal = ours(s).normalisers(s, PLAIN)
    extra = Extra(torch.tensor([0.0, 0.0, 1.0, 0.0]), normal, torch.tensor([3, 3, 3, 3]))
    ours(s).divergence_gradient(out, grad, s, t, stats, kind, 0.3, PLAIN, PLAIN, extra)
    want = s[2].softmax(0)
    want[3] -= 1
    torch.testing.assert_close(out[2], want, rtol=1e-5, atol=1e-6)
    assert not out[1].any()
    assert not out[3].any()
    assert out[0].isfinite().all()


@pytest.mark.parametrize("kind", ["forward_kl", "skew_reverse_kl"])
def test_in_place_and_strides(kind: str) -> None:
    s, t = logits(3, 100, PLAIN), logits(3, 100, PLAIN, 7)
    loss, stats = ours(s).divergence_forward(s, t, kind, 0.3, WARM, PLAIN)
    want = torch.empty_like(s)
    ours(s).divergence_gradient(want, GRAD, s, t, stats, kind, 0.3, WARM, PLAIN)
    base = torch.zeros(3, 232)
    views = [base[:, 3:103], base[:, 8:108], torch.zeros(100, 3).t(), torch.zeros(3, 200)[:, ::2]]
    for view in views:
        view.copy_(s)
        found, stats = ours(s).divergence_forward(view, t, kind, 0.3, WARM, PLAIN)
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-6)
        around = base.clone()
        grad = torch.stack([GRAD, GRAD], 1)[:, 0]
        ours(s).divergence_gradient(view, grad, view, t, stats, kind, 0.3, WARM, PLAIN)
        torch.testing.assert_close(view, want, rtol=1e-5, atol=1e-7)
        assert torch.equal(base[:, 108:], around[:, 108:])
        assert torch.equal(base[:, :3], around[:, :3])


def test_one_gradient_for_all_rows() -> None:
    s, t = logits(3, 90, PLAIN), logits(3, 90, PLAIN, 7)
    _, stats = ours(s).divergence_forward(s, t, "jsd", 0.3, PLAIN, PLAIN)
    want, got = torch.empty_like(s), torch.empty_like(s)
    ours(s).divergence_gradient(want, torch.full((3,), 0.7), s, t, stats, "jsd", 0.3, PLAIN, PLAIN)
    one = torch.tensor(0.7).expand(3)
    ours(s).divergence_gradient(got, one, s, t, stats, "jsd", 0.3, PLAIN, PLAIN)
    assert torch.equal(got, want)


@pytest.mark.parametrize("how", [PLAIN, WARM, CAPPED, PROBS])
@pytest.mark.parametrize("v", [1, 128, 313])
def test_log_probs(v: int, how: How) -> None:
    ids = torch.tensor([0, v - 1, -100, v // 2, 0])
    e = torch.tensor([0.3, 0.0, 1.0, 0.0, -2.0])
    grad = torch.tensor([1.0, -0.5, 0.0, 0.0, 2.0])
    for dtype in DTYPES if v == 128 else (FP32,):
        x = logits(5, v, how).to(dtype)
        if v > 5:
            x[:, 5::7] = 0.0 if how.probs else -math.inf
        found = []
        for k, y in ((ours(x), x), (rows, x.double()), (rows, x.float())):
            normal = k.normalisers(y, how)
            stats = k.logprob_forward(y, ids, how)
            assert torch.equal(stats[:, :2], normal)
            wide = stats.dtype
            outs = []
            if not how.probs:  # nothing needs their gradient
                for entropy in (None, e.to(wide)):
                    out = torch.full(x.shape, math.nan, dtype=wide)
                    k.logprob_gradient(out, grad.to(wide), entropy, y, ids, stats, how)
                    outs.append(out)
            found.append((stats, *outs))
        size = 1 + float(found[1][0][:, :2].abs().max())
        for got, exact, plain in zip(*found, strict=True):
            near(got, exact, plain, size)


def test_log_probs_in_place_and_idle_rows() -> None:
    x = logits(4, 130, PLAIN)
    ids = torch.tensor([1, 2, 3, 4])
    x[2] = math.nan
    stats = ours(x).logprob_forward(x, ids, PLAIN)
    assert stats[2].isnan().any()
    grad, e = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0, 0.0])
    for entropy in (None, e):
        out, inside = torch.full_like(x, math.nan), x.clone()
        ours(x).logprob_gradient(out, grad, entropy, x, ids, stats, PLAIN)
        ours(x).logprob_gradient(inside, grad, entropy, inside, ids, stats, PLAIN)
        assert torch.equal(out, inside)
        assert out[0].any()
        assert out[1].any() == (entropy is not None)
        assert not out[2:].any()


def test_without_rows_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_pair_kernel", "_single_kernel", "_sums_kernel", "_gradient_kernel"):
        monkeypatch.setattr(triton_kernels, name, None)
    monkeypatch.setattr(triton_kernels, "_logprob_gradient_kernel", None)
    x, none = torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64)
    k = ours(x)
    assert k.normalisers(x, PLAIN).shape == (0, 2)
    stats = k.logprob_forward(x, none, PLAIN)
    assert stats.shape == (0, 4)
    k.logprob_gradient(x, x[:, 0], None, x, none, stats, PLAIN)
    for kind in KINDS:
        loss, stats = k.divergence_forward(x, x, kind, 0.5, PLAIN, PLAIN)
        assert (loss.shape, stats.shape) == ((0,), (0, 5))
        k.divergence_gradient(x, loss, x, x, stats, kind, 0.5, PLAIN, PLAIN)


def test_the_bits_of_a_row_are_its_own() -> None:
    s, t = logits(3, 150, PLAIN), logits(3, 150, PLAIN, 7)
    for kind in ("reverse_kl", "jsd"):
        loss, stats = ours(s).divergence_forward(s, t, kind, 0.3, PLAIN, WARM)
        again, more = ours(s).divergence_forward(s, t, kind, 0.3, PLAIN, WARM)
        assert torch.equal(loss, again)
        assert torch.equal(stats, more)
        for i in range(3):
            one, _ = ours(s).divergence_forward(s[i : i + 1], t[i : i + 1], kind, 0.3, PLAIN, WARM)
            assert torch.equal(one[0], loss[i])


def test_parts_of_a_vocabulary() -> None:
    """Sums of parts, with the normalisers of the whole, add up."""
    s, t = logits(2, 300, PLAIN), logits(2, 300, PLAIN, 7)
    for kind in KINDS:
        loss, stats = rows.divergence_forward(s, t, kind, 0.3, PLAIN, PLAIN)
        parts = [
            ours(s).divergence_sums(
                s[:, a:b], t[:, a:b], stats[:, :2], stats[:, 2:4], kind, 0.3, PLAIN, PLAIN
            )
            for a, b in ((0, 100), (100, 103), (103, 300))
        ]
        total = torch.stack(parts).sum(0)
        torch.testing.assert_close(total[:, 0], loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(total[:, 1], stats[:, 4], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("real_blocks")
@pytest.mark.parametrize("v", [4096, 33_001])
def test_blocks_as_on_a_card(v: int) -> None:
    """Two spans at 33,001 columns; 4,096 are whole vectors and whole blocks."""
    for kind in ("forward_kl", "jsd"):
        s, t = logits(2, v, PLAIN), logits(2, v - v % 2 * 5, PLAIN, 7)
        both(s, t, kind, 0.5, WARM, PLAIN, GRAD[:2])
    x = logits(2, v, PLAIN)
    ids = torch.tensor([v - 1, 17])
    got, want = ours(x).logprob_forward(x, ids, PLAIN), rows.logprob_forward(x, ids, PLAIN)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("peak", [0.0, 12.0])
def test_an_almost_equal_student(peak: float) -> None:
    """A JSD of 1e-7 and of 1e-10 keeps its digits: what expm1 and log1p are for.

    d is 1e-3, and the roundings of its log-probs are 5 units in 2^-24, 3e-4 of it.
    """
    t = torch.zeros(2, 100)
    t[:, 0] = peak
    s = t + randn(2, 100, std=1e-3)
    loss, _ = ours(s).divergence_forward(s, t, "jsd", 0.3, PLAIN, PLAIN)
    exact, _ = rows.divergence_forward(s.double(), t.double(), "jsd", 0.3, PLAIN, PLAIN)
    assert (loss.double() - exact).abs().max() <= 2e-3 * exact.min()


def test_more_columns_than_offsets_within_a_row_can_count() -> None:
    x = torch.zeros(1, 1).expand(1, 2**31)
    with pytest.raises(ValueError, match="rows must have at most"):
        ours(x).normalisers(x, PLAIN)
