"""The low-rank kernels against the reference.

Factors are small integers here, so that float32 sums are exact in any order and results must be
equal bits. The interpreter truncates when it casts to bfloat16 and multiplies bfloat16 wrongly, so
weights rounded to nearest are float16 or float32, and the kernels widen what they multiply.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cl_fast.triton_kernels import low_rank
from torch import Tensor

from cl_fast.ops import gram, gram_, rank_update, rank_update_, rank_update_many_

HALF = (torch.bfloat16, torch.float16)


def layer(
    m: int, n: int, r: int, weight: torch.dtype, factors: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=g).to(weight)
    u = torch.randint(-3, 4, (m, r), generator=g).to(factors)
    v = torch.randint(-3, 4, (n, r), generator=g).to(factors)
    return w, u, v


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches of rank_update, in order."""
    seen: list[Any] = []
    run = low_rank._run

    def spy(kernel: Any, rows: Any, *rest: Any) -> None:
        seen.append((kernel, len(rows)))
        run(kernel, rows, *rest)

    monkeypatch.setattr(low_rank, "_run", spy)
    return seen


SHAPES = [
    (1, 1, 1, "outer"),
    (5, 7, 3, "outer"),
    (40, 136, 8, "outer"),
    (33, 72, 9, "strip"),
    (130, 264, 17, "strip"),
    (7, 64, 200, "strip"),
    (33, 70, 9, "loop"),
    (70, 8, 300, "loop"),
    (129, 136, 270, "loop"),
    (5, 24, 1500, "loop"),
]


@pytest.mark.parametrize("factors", [*HALF, torch.float32])
@pytest.mark.parametrize(("m", "n", "r", "kind"), SHAPES)
def test_every_kernel(
    m: int, n: int, r: int, kind: str, factors: torch.dtype, launches: list[Any]
) -> None:
    for dtype, alpha in ((torch.float32, 1.0), (torch.float16, -0.375)):
        w, u, v = layer(m, n, r, dtype, factors)
        want = rank_update(w, u, v, alpha=alpha, backend="eager")
        got = rank_update(w, u, v, alpha=alpha, backend="triton")
        assert torch.equal(got, want)
    used = "loop" if kind == "strip" and factors == torch.float32 else kind
    names = {"outer": low_rank._outer_kernel, "strip": low_rank._strip_kernel}
    assert {kernel for kernel, _ in launches} == {names.get(used, low_rank._loop_kernel)}


def test_little_shared_memory(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a deep U does not fit on the chip, the kernel that steps along the rank serves."""
    monkeypatch.setattr(low_rank, "_roomy", lambda device: False)
    for r in (128, 136):
        w, u, v = layer(9, 16, r, torch.float16, torch.float16)
        got = rank_update(w, u, v, backend="triton")
        assert torch.equal(got, rank_update(w, u, v, backend="eager"))
    kernels = [kernel for kernel, _ in launches]
    assert kernels == [low_rank._strip_kernel, low_rank._loop_kernel]


@pytest.mark.parametrize("r", [2, 20, 300])
def test_bfloat16_weights(r: int) -> None:
    w, u, v = layer(20, 72, r, torch.bfloat16, torch.bfloat16)
    got = rank_update(w, u, v, backend="triton")
    want = rank_update(w, u, v, backend="eager")
    torch.testing.assert_close(got, want, rtol=2.0**-7, atol=0.0)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("r", [1, 20, 300])
def test_layouts_and_bases(r: int, factors: torch.dtype) -> None:
    w, u, v = layer(40, 72, r, torch.float16, factors)
    want = rank_update(w, u, v, alpha=0.5, backend="eager")
    room = torch.zeros(2 * 40 * 80 + 1, dtype=torch.float16)
    places = {
        "transposed": torch.empty(72, 40).half().t(),
        "unaligned": room[1 : 1 + 40 * 72].view(40, 72),
        "rows apart": room[: 40 * 80].view(40, 80)[:, 8:],
        "odd rows": room[: 40 * 79].view(40, 79)[:, :72],
        "scattered": room[: 40 * 160].view(40, 160)[:, 1:145:2],
    }
    for name, place in places.items():
        room.fill_(7.0)
        place.copy_(w)
        rank_update_(place, u, v, alpha=0.5, backend="triton")
        assert torch.equal(place, want), name
        place.fill_(7.0)
        assert bool((room == 7.0).all()), name  # what lies between and beside stays
    out = torch.full_like(w, float("nan"))
    for base in (w, w.t().contiguous().t(), w.float(), w.bfloat16().float()):
        expected = rank_update(out, u, v, base=base, alpha=0.5, backend="eager")
        got = rank_update_(out.clone(), u, v, base=base, alpha=0.5, backend="triton")
        assert torch.equal(got, expected)
    odd = torch.zeros(40, r + 3).to(factors)[:, 1 : r + 1].copy_(u)
    for left in (odd, u.t().contiguous().t()):
        assert torch.equal(rank_update(w, left, v, alpha=0.5, backend="triton"), want)


def test_batches() -> None:
    for r in (3, 12):
        parts = [layer(5, 16, r, torch.float32, torch.float16, seed) for seed in range(6)]
        w, u, v = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        want = rank_update(w, u, v, backend="eager")
        assert torch.equal(rank_update(w, u, v, backend="triton"), want)
        three = [t.view(2, 3, *t.shape[1:]) for t in (w, u, v)]
        assert torch.equal(rank_update(*three, backend="triton").view(6, 5, 16), want)
        turned = w.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(rank_update_(turned, u, v, backend="triton"), want)


def test_many_layers_share_a_launch(launches: list[Any]) -> None:
    shapes = [(5, 8, 1), (40, 16, 8), (1, 24, 3), (0, 8, 2), (70, 136, 5), (3, 8, 0), (9, 8, 2)]
    layers = [layer(*shape, torch.float32, torch.float32, i) for i, shape in enumerate(shapes)]
    bases = [None if i % 2 else w.clone() for i, (w, _, _) in enumerate(layers)]
    alphas = [0.5 * i - 1.0 for i in range(len(layers))]
    want = [
        rank_update(w, u, v, base=b, alpha=a, backend="eager")
        for (w, u, v), b, a in zip(layers, bases, alphas, strict=True)
    ]
    weights = [w for w, _, _ in layers]
    rank_update_many_(
        weights, [u for _, u, _ in layers], [v for _, _, v in layers],
        bases=bases, alphas=alphas, backend="triton",
    )  # fmt: skip
    for got, expected in zip(weights, want, strict=True):
        assert torch.equal(got, expected)
    assert launches == [(low_rank._outer_kernel, 5)]


def test_ragged_ranks_and_dtypes_take_a_few_launches(launches: list[Any]) -> None:
    ranks = [1, 17, 32, 257, 30, 8, 300, 20]
    layers = [layer(9, 16, r, torch.float16, torch.bfloat16, r) for r in ranks]
    layers.append(layer(9, 16, 2, torch.float32, torch.bfloat16))
    want = [rank_update(*tensors, backend="eager") for tensors in layers]
    weights = [w for w, _, _ in layers]
    rank_update_many_(
        weights, [u for _, u, _ in layers], [v for _, _, v in layers], backend="triton"
    )
    for got, expected in zip(weights, want, strict=True):
        assert torch.equal(got, expected)
    assert len(launches) <= 8
    assert sum(count for _, count in launches) == len(layers)


def test_more_tiles_than_a_grid_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_GRID", 3)
    layers = [layer(40, 130, 2, torch.float32, torch.float32, i) for i in range(3)]
    want = [rank_update(*tensors, backend="eager") for tensors in layers]
    weights, us, vs = ([tensors[i] for tensors in layers] for i in range(3))
    rank_update_many_(weights, us, vs, backend="triton")
    for got, expected in zip(weights, want, strict=True):
        assert torch.equal(got, expected)


def test_rank_0_keeps_the_bits_of_the_base() -> None:
    base = torch.tensor([[-0.0, 0.0, 1e-9, float("inf")]])
    empty = torch.zeros(1, 0), torch.zeros(4, 0)
    for backend in ("eager", "triton"):
        got = rank_update(torch.zeros(1, 4).half(), *empty, base=base, backend=backend)
        assert torch.equal(got.view(torch.int16), base.half().view(torch.int16))
        got = rank_update(torch.zeros(1, 4), *empty, base=base, backend=backend)
        assert torch.equal(got.view(torch.int32), base.view(torch.int32))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "n", "r"), [(5, 16, 1), (7, 13, 2), (20, 72, 20), (3, 5, 300)])
def test_stochastic(m: int, n: int, r: int, dtype: torch.dtype) -> None:
    """The bits of the reference, whatever the kernel, the tile or the layout."""
    w, u, v = layer(m, n, r, dtype, torch.bfloat16)
    w[0, : n // 2] *= 1e-5  # float16: below the normal numbers
    u[0], v[1] = 0, 0
    w[-1, -3:] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    w[-1, 0] = torch.finfo(dtype).max
    view = torch.int16
    for base in (None, w.float() * (1 + 1e-4)):
        for seed in (0, -7):
            options = {"base": base, "rounding": "stochastic", "seed": seed}
            want = rank_update(w, u, v, **options, backend="eager")
            got = rank_update(w, u, v, **options, backend="triton")
            same = got.view(view) == want.view(view)
            assert bool((same | (got.isnan() & want.isnan())).all())
            turned = w.t().contiguous().t()
            rank_update_(turned, u, v, **options, backend="triton")
            assert torch.equal(turned.nan_to_num(), want.nan_to_num())


def test_stochastic_batches_and_lists() -> None:
    parts = [layer(5, 16, 2, torch.float16, torch.float16, seed) for seed in range(3)]
    w, u, v = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    w = w * 1.001
    options: dict[str, Any] = {"rounding": "stochastic", "seed": 3}
    want = rank_update(w, u, v, base=w.float() * 1.0001, **options, backend="eager")
    got = rank_update(w, u, v, base=w.float() * 1.0001, **options, backend="triton")
    assert torch.equal(got, want)
    lists = [list(t.unbind()) for t in (w, u, v)]
    bases = [x.float() * 1.0001 for x in lists[0]]
    both = []
    for backend in ("eager", "triton"):
        weights = [x.clone() for x in lists[0]]
        rank_update_many_(weights, *lists[1:], bases=bases, **options, backend=backend)
        both.append(torch.stack(weights))
    assert torch.equal(*both)


def keys(tokens: int, d: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (tokens, d), generator=g).to(dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("out", [torch.float64, torch.float32])
@pytest.mark.parametrize(("tokens", "d"), [(0, 3), (1, 1), (70, 5), (33, 70), (40, 136), (65, 264)])
def test_gram(tokens: int, d: int, out: torch.dtype, dtype: torch.dtype) -> None:
    k = keys(tokens, d, dtype)
    want = (k.double().t() @ k.double()).to(out)
    assert torch.equal(gram(k, dtype=out, backend="triton"), want)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    k[~mask] = float("nan")
    want = (k[mask].double().t() @ k[mask].double()).to(out)
    assert torch.equal(gram(k, mask=mask, dtype=out, backend="triton"), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_in_blocks_of_tokens(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "TOKENS_PER_FLUSH", 64)
    k = keys(200, 72, dtype)
    c = torch.full((72, 72), 1.0 / 3.0, dtype=torch.float64)
    want = c - 0.3 * (k.double().t() @ k.double())
    gram_(c, k, alpha=-0.3, backend="triton")
    assert torch.equal(c, c.t())
    torch.testing.assert_close(c, want, rtol=1e-14, atol=1e-14)
    # another order of the blocks' sums, the same moments
    torch.testing.assert_close(gram(k, backend="triton"), gram(k, backend="eager"), rtol=0, atol=0)


def test_gram_of_many_layers_and_layouts() -> None:
    ks = [keys(20, 72, torch.float16), keys(50, 5, torch.float16), keys(0, 9, torch.bfloat16)]
    ks += [keys(90, 5, torch.float16).view(3, 30, 5), keys(30, 16, torch.float32).t()[:, ::2]]
    ks += [keys(9, 4, torch.float64)]
    masks: list[Tensor | None] = [None, torch.arange(50) % 3 > 0, None, torch.arange(30) > 4]
    masks += [torch.arange(32)[::2] > 3, None]
    want = gram(ks, mask=masks, backend="eager")
    for got, expected in zip(gram(ks, mask=masks, backend="triton"), want, strict=True):
        assert torch.equal(got, expected)
    room = torch.zeros(72, 80, dtype=torch.float64)
    for c in (room[:, 3:75], torch.zeros(72, 72).double().t(), torch.zeros(72, 144)[:, ::2]):
        gram_(c, ks[0], alpha=0.5, backend="triton")
        torch.testing.assert_close(c.double(), 0.5 * want[0])
    assert not room[:, :3].any()
    assert not room[:, 75:].any()


def test_gram_mirrors_the_upper_triangle() -> None:
    c = torch.randn(70, 70, dtype=torch.float64)
    upper = c.triu()
    gram_(c, keys(5, 70, torch.float32), backend="triton")
    want = upper + keys(5, 70, torch.float64).t() @ keys(5, 70, torch.float64)
    assert torch.equal(c.triu(), want.triu())
    assert torch.equal(c, c.t())


def test_gram_with_rows_far_apart() -> None:
    """Offsets inside a tile are counted in 32 bits; rows that are too far apart are brought in."""
    k = keys(5, 2, torch.float32)
    c = torch.zeros((1 << 24) + 2).as_strided((2, 2), (1 << 24, 1))
    gram_(c, k, backend="triton")
    assert torch.equal(c, k.t() @ k)


def test_float64_goes_to_the_reference() -> None:
    w, u, v = (t.double() for t in layer(4, 5, 2, torch.float32, torch.float32))
    assert torch.equal(
        rank_update(w, u, v, backend="triton"), rank_update(w, u, v, backend="eager")
    )
