"""Selection by magnitude and float64 sums by Triton on a card, against the eager reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cl_fast.backends import triton
from cl_fast.ops import keep_mask, keep_threshold, magnitude_threshold, stream_key
from cl_fast.ops.dropping import absolute_sum

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1, 4095, 4097, 32_769, 1_000_003, 1 << 24)
select_step = functools.partial(magnitude_threshold, backend="triton")
eager = functools.partial(magnitude_threshold, backend="eager")


def kernels(name: str) -> ModuleType:
    module = triton.load(name)
    assert module is not None, "Triton is needed for these tests"
    return module


def pair(n: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A base and a finetuned tensor: bfloat16 weights that differ by a few units have many ties."""
    g = torch.Generator(device).manual_seed(seed + n)
    base = 0.02 * torch.randn(n, device=device, generator=g)
    delta = 1e-4 * torch.randn(n, device=device, generator=g)
    return base.to(dtype), (base + delta).to(dtype)


def codes_of(base: Tensor | None, x: Tensor) -> Tensor:
    d = x.float() if base is None else x.float() - base.float()
    return d.abs().view(torch.int32)


def check_select(
    bases: Sequence[Tensor], tensors: Sequence[Tensor], models: int, counts: Sequence[int],
    ties: str,
) -> None:  # fmt: skip
    """Every entry against a sort of its codes."""
    codes, cuts, at = kernels("magnitude").select(
        bases, tensors, models, counts, whole_model=False, ties=ties
    )
    for entry, (x, k) in enumerate(zip(tensors, counts, strict=True)):
        base = bases[entry // models] if bases else None
        got = int(codes[entry]), int(cuts[entry]), int(at[entry])
        if k < 1:
            assert got == ((-1, 0, 0) if k else (0x7FFFFFFF, 0, 0))
            continue
        code = codes_of(base, x)
        threshold = int(code.sort(descending=True).values[k - 1])
        above, tied = int((code > threshold).sum()), (code == threshold).nonzero().reshape(-1)
        if ties == "first":
            # Any cut behind the last kept tie, and before the next one.
            wanted = k - above
            assert (got[0], got[2]) == (threshold, wanted)
            assert int(tied[wanted - 1]) < got[1]
            assert wanted == tied.numel() or got[1] <= int(tied[wanted])
        elif ties == "all":
            assert (got[0], got[2]) == (threshold, tied.numel())
            assert got[1] >= x.numel()
        else:
            assert got == (threshold, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_op(n: int, dtype: torch.dtype, device: torch.device) -> None:
    base, x = pair(n, dtype, device)
    for given in (None, base):
        for k in {0, 1, max(1, n // 5), n}:
            for ties in ("first", "all", "none"):
                want = eager(x, k=k, base=given, ties=ties)
                got = select_step(x, k=k, base=given, ties=ties)
                assert torch.equal(got[0], want[0]), (k, ties)
                assert torch.equal(got[1], want[1]), (k, ties)


def test_op_on_a_view_and_equal_values(device: torch.device) -> None:
    base, x = pair(1_000_001, torch.bfloat16, device)
    zero = torch.zeros_like(x)
    for values, given in ((x[1:], base[1:]), (x[:1_000_000].view(1000, 1000).t(), None)):
        assert select_step(values, k=777, base=given) == eager(values, k=777, base=given)
    for k in (1, 500_000, x.numel()):
        assert select_step(zero, k=k) == eager(zero, k=k)
        assert select_step(x, k=k, base=x) == eager(x, k=k, base=x)


@pytest.mark.parametrize("ties", ["first", "all", "none"])
def test_many_rows(ties: str, device: torch.device) -> None:
    """Mixed dtypes, empty rows, unaligned views and three models in one call."""
    bases, tensors, counts = [], [], []
    for row, n in enumerate((*SIZES, 0, 12_345, 100_000, 7)):
        base, _ = pair(n, DTYPES[row % 3], device)
        bases.append(base)
        for model in range(3):
            kind = DTYPES[(row + model) % 3] if row % 2 else DTYPES[row % 3]
            _, x = pair(n + row % 2, kind, device, seed=model + 1)
            tensors.append(x[row % 2 :])
            counts.append(n if not n else (n // 2, -1, max(1, n // 5))[model])
    check_select(bases, tensors, 3, counts, ties)
    check_select([], tensors, 3, counts, ties)


def test_whole_model(device: torch.device) -> None:
    rows = [pair(n, dtype, device) for n, dtype in zip((999_999, 5, 1 << 20), DTYPES, strict=True)]
    codes = torch.cat([codes_of(base, x) for base, x in rows])
    k = codes.numel() // 5
    got = kernels("magnitude").select(
        [base for base, _ in rows], [x for _, x in rows], 1, [k], whole_model=True, ties="all"
    )
    threshold = codes.sort(descending=True).values[k - 1]
    assert got[0].eq(threshold).all()
    assert got[1].ge(1 << 20).all()
    assert got[2].eq((codes == threshold).sum()).all()


def test_same_bits_twice_and_on_another_stream(device: torch.device) -> None:
    base, x = pair(1 << 24, torch.bfloat16, device)
    select, sums = kernels("magnitude").select, kernels("sums").absolute_sums

    def both() -> tuple[Tensor, ...]:
        codes, cuts, at = select([base], [x], 1, [3_000_000], whole_model=False, ties="first")
        return codes, cuts, at, *sums([base], [x], 1, codes=codes)

    once = both()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        again = both()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_graph(device: torch.device) -> None:
    """Captured without a sync; a replay follows what the tensors hold by then."""
    base, x = pair(300_000, torch.bfloat16, device)
    _, other = pair(300_000, torch.bfloat16, device, seed=9)
    select, sums = kernels("magnitude").select, kernels("sums").absolute_sums
    key, keep = stream_key(1, "m", "t"), keep_threshold(0.3)

    def both() -> tuple[Tensor, ...]:
        codes, cuts, at = select([base], [x], 1, [60_000], whole_model=False, ties="first")
        trim = sums([base], [x], 1, codes=codes)
        return codes, cuts, at, *trim, *sums([base], [x], 1, keys=[key], keeps=[keep])

    both()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.copy_(other)
    graph.replay()
    want = both()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))
    code, at = eager(x, k=60_000, base=base)
    assert torch.equal(captured[0].view(torch.float32)[0], code)
    assert torch.equal(captured[2][0], at)


def test_compiled(device: torch.device) -> None:
    base, x = pair(100_000, torch.float16, device)

    def threshold(x: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        return magnitude_threshold(x, k=1000, base=base)

    got = torch.compile(threshold, fullgraph=True)(x, base)
    assert got == eager(x, k=1000, base=base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(dtype: torch.dtype, device: torch.device) -> None:
    """The bits of the reference, around the ends of chunks and of programs."""
    lengths = (1, 16, 65_535, 65_536, 65_537, 200_000, 0, 33 * 65_536 + 5)
    rows = [pair(n, dtype, device) for n in lengths]
    bases, tensors = [base for base, _ in rows], [x for _, x in rows]
    sums = kernels("sums").absolute_sums
    keys = [stream_key(0, "m", str(n)) for n in lengths]
    keeps = [
        (keep_threshold(0.3), 1 << 32, 0, keep_threshold(0.9))[i % 4] for i in range(len(rows))
    ]
    for given in (bases, []):
        ds = [x.float() - b.float() if given else x.float() for b, x in rows]
        codes = [d.abs().view(torch.int32) for d in ds]
        levels = torch.stack([c.median() if c.numel() else c.new_zeros(()) for c in codes])
        trimmed = [torch.where(c > t, d, 0.0) for c, t, d in zip(codes, levels, ds, strict=True)]
        dropped = [
            torch.where(keep_mask(key, d.numel(), t, device=device), d, 0.0)
            for key, t, d in zip(keys, keeps, ds, strict=True)
        ]
        want = torch.tensor([absolute_sum(d.cpu()) for d in ds], dtype=torch.float64)
        for how, some in (
            ({"codes": levels}, trimmed),
            ({"keys": keys, "keeps": keeps}, dropped),
            ({}, ds),
        ):
            totals, kept = sums(given, tensors, 1, **how)
            assert torch.equal(totals.cpu(), want)
            sizes = torch.tensor([absolute_sum(d.cpu()) for d in some], dtype=torch.float64)
            assert torch.equal(kept.cpu(), sizes)


def test_beyond_31_bits(device: torch.device, need_memory: Callable[[int], None]) -> None:
    """More than 2^31 elements: counts, offsets and the cut need 64 bits."""
    n = (1 << 31) + 70_000
    need_memory(3 * n)
    x = torch.ones(n, dtype=torch.bfloat16, device=device)
    x[-5:] = 2.0
    threshold, at = select_step(x, k=n - 1)
    assert (float(threshold), int(at)) == (1.0, n - 6)
    codes, cuts, _ = kernels("magnitude").select(
        [], [x], 1, [n - 1], whole_model=False, ties="first"
    )
    assert (int(codes), int(cuts)) == (0x3F800000, n - 6)
    totals, kept = kernels("sums").absolute_sums([], [x], 1, codes=codes)
    assert (float(totals), float(kept)) == (float(n + 5), 10.0)
