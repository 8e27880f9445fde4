"""The CUDA kernels, run by the processor: they keep what the tests of the ops ask of a backend.

The fixture `backend` of this folder takes the place of the one that those tests were written for.
"""

from __future__ import annotations

import nasty
import pytest
import test_combine
import torch
from test_combine import (  # noqa: F401
    test_backends_agree_bit_for_bit,
    test_eight_bit_floats_are_read,
    test_inputs_are_not_changed,
    test_nan_reaches_the_output_and_stays_where_it_is,
    test_shapes_strides_and_mixtures,
    test_trim_keeps_exactly_k_and_the_first_of_ties,
    test_within_half_a_spacing_of_float64,
)
from test_in_place import (  # noqa: F401
    test_many_bases,
    test_not_finite_in_place,
    test_the_same_bits_in_place,
    test_what_is_not_contiguous,
)
from test_magnitude import (  # noqa: F401
    test_density_rules,
    test_exact,
    test_fp8_and_mixed_base,
    test_nan_comes_first,
    test_nothing_to_keep,
    test_strides_and_point,
)

from cl_fast.backends import cuda_ops, device_ops
from cl_fast.ops import (
    Policy,
    combine,
    combine_many,
    dare,
    magnitude_threshold,
    pack,
    stream_key,
)
from cl_fast.ops.dropping import absolute_sum

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("k", [2, 5, 8, 9, 32])
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_ties", "ties_frequency"])
def test_any_number_of_models(name: str, k: int, backend: str) -> None:
    policy = test_combine.POLICIES[name]
    for dtype in (torch.bfloat16, torch.float32):
        base, tensors = nasty.models("normal", 4500, k, dtype)
        arguments = {
            "weights": [0.1 * (i + 1) * (-1) ** i for i in range(k)],
            "policy": policy,
            "density": 1.0 if policy.sparsify == "none" else [0.1 + 0.02 * i for i in range(k)],
            "lam": 0.6,
        }
        if policy.sparsify == "drop":
            arguments["keys"] = [stream_key(1, str(i), "w") for i in range(k)]
        want = combine(base, tensors, backend="eager", **arguments)
        assert torch.equal(combine(base, tensors, backend=backend, **arguments), want)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "ties_paper", "dare_linear"])
def test_many_rows_of_many_sizes(name: str, backend: str) -> None:
    """More rows than one launch takes, empty ones among them, mixed dtypes, unaligned views."""
    policy = test_combine.POLICIES[name]
    g = torch.Generator().manual_seed(0)
    sizes = [*torch.randint(0, 300, (170,), generator=g).tolist(), 0, 9000, 1, 4096]
    bases, rows = [], []
    for number, n in enumerate(sizes):
        base, tensors = nasty.models("normal", n + 1, 3, nasty.DTYPES[number % 3])
        shift = number % 2
        bases.append(base[shift : n + shift])
        rows.append([t[shift : n + shift] for t in tensors])
    arguments = {
        "weights": [1.0, 0.5, -0.25],
        "policy": policy,
        "density": 1.0 if policy.sparsify == "none" else [0.2, 0.37, 1.0],
    }
    if policy.sparsify == "drop":
        arguments["keys"] = [
            [stream_key(0, f"m{k}", str(row)) for k in range(3)] for row in range(len(rows))
        ]
    want = combine_many(bases, rows, backend="eager", **arguments)
    got = combine_many(bases, rows, backend=backend, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("rescale", ["none", "keep_rate", "l1"])
def test_dare(rescale: str, backend: str) -> None:
    for n in (0, 1, 16, 1023, 5000):
        for density in (1e-12, 0.1, 0.37, 1 - 2.0**-40, 1.0):
            x = torch.randn(n, generator=torch.Generator().manual_seed(n)).half()
            want = dare(x, density=density, seed=3, rescale=rescale, backend="eager")
            got = dare(x, density=density, seed=3, rescale=rescale, backend=backend)
            assert torch.equal(got, want), (n, density)


@pytest.mark.parametrize("elect", ["none", "mass"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_packed_terms(k: int, elect: str, backend: str) -> None:
    """Straight from kept values: the bits of the dense merge; dense terms among them too."""
    policy = Policy(sparsify="drop", rescale="keep_rate", elect=elect)  # type: ignore[arg-type]
    densities = [0.1 + 0.15 * i for i in range(k)]
    weights = [1.0 - 0.3 * i for i in range(k)]
    bases, rows, packed, keys = [], [], [], []
    for n in (1, 2047, 2049, 9000, 0):
        base, tensors = nasty.models("normal", n, k, torch.bfloat16)
        bases.append(base)
        rows.append(tensors)
        keys.append([stream_key(3, str(i), str(n)) for i in range(k)])
        packed.append(
            [
                pack(x, base=base, density=rho, seed=3, model=str(i), tensor=str(n))
                for i, (x, rho) in enumerate(zip(tensors, densities, strict=True))
            ]
        )
    arguments = {"weights": weights, "policy": policy, "lam": 0.7}
    want = combine_many(bases, rows, density=densities, keys=keys, backend="eager", **arguments)
    got = combine_many(bases, packed, backend=backend, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got = combine(bases[3], packed[3], backend=backend, **arguments)
    assert torch.equal(got, want[3])
    mixed = [packed[3][0], *rows[3][1:]]
    one = combine(bases[3], mixed, backend=backend, **arguments)
    assert torch.equal(one, combine(bases[3], mixed, backend="eager", **arguments))


def test_a_full_queue_of_undecided_elements(backend: str) -> None:
    """More elements than the queue holds: equal keys leave the same ones open in every term."""
    keys = [stream_key(0, "m", "t")] * 8
    _, tensors = nasty.models("normal", 8192, 8)
    policy = Policy(difference=False, sparsify="drop")
    for density in ((25 << 24 | 1) / 2**32, (25 << 24 | 0xFFFFFF) / 2**32):
        arguments = {"weights": 1.0, "policy": policy, "density": density, "keys": keys}
        want = combine(None, tensors, backend="eager", **arguments)
        assert torch.equal(combine(None, tensors, backend=backend, **arguments), want)


def spread(kind: str, n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g)
    if kind == "lattice":
        return (x * 20).round() / 16
    if kind == "two values far apart":
        return torch.where(x > 0.8, 1e30, 1e-30)
    if kind == "sorted":  # neighbours are alike, samples are not
        return x.sort().values
    if kind == "one cluster":  # 10^5 codes within one bin of any sample's bracket
        return 1.0 + torch.rand(n, generator=g) * 1e-5
    if kind == "huge range":
        return x * torch.exp2(torch.rand(n, generator=g) * 200 - 100)
    if kind == "blocks":  # long runs of equal values hide from a sample
        return torch.where(torch.arange(n) % 97 < 3, 5.0, 1.0) * torch.where(x > 0, 1.0, -1.0)
    return x


@pytest.mark.parametrize(
    "kind",
    ["normal", "lattice", "two values far apart", "sorted", "one cluster", "huge range", "blocks"],
)
def test_selection_over_several_chunks(kind: str, backend: str) -> None:
    n = 150_003  # five chunks
    x = spread(kind, n)
    for k in {1, 2, n // 50, n // 5, n // 2, n - 1, n}:
        for ties in ("first", "all", "none"):
            want = magnitude_threshold(x, k=k, ties=ties, backend="eager")
            got = magnitude_threshold(x, k=k, ties=ties, backend=backend)
            assert (got[0], got[1]) == (want[0], want[1]), (k, ties)


def test_where_the_ties_end(backend: str) -> None:
    """codes and cuts of several rows keep exactly k, the first ones by index."""
    del backend
    rows = [spread("lattice", n) for n in (100_000, 5, 32_768, 70_000)]
    counts = [20_000, 2, 6_000, -1]
    codes, cuts, at = cuda_ops.select([], rows, 1, counts, whole_model=False, ties="first")
    for x, k, code, cut, kept in zip(rows, counts, codes, cuts, at, strict=True):
        magnitude = x.abs().view(torch.int32)
        index = torch.arange(len(x))
        keep = (magnitude > code) | ((magnitude == code) & (index < cut))
        assert int(keep.sum()) == (len(x) if k < 0 else k)
        assert int((keep & (magnitude == code)).sum()) == kept
        dropped = ((magnitude == code) & ~keep).nonzero()
        if dropped.numel() and kept:
            assert dropped.min() > (keep & (magnitude == code)).nonzero().max()


def test_a_bracket_that_misses(backend: str) -> None:
    """What a sample cannot see is found all the same: its places hold other values."""
    n = 1_000_000
    x = torch.zeros(n)
    stretch = n // 4096
    slot = torch.arange(4096)
    sampled = (
        slot * stretch
        + n % 4096 * slot // 4096
        + (((slot * 2654435761) & 0xFFFFFFFF) >> 7) % stretch
    )
    x[:] = torch.linspace(2.0, 3.0, n)
    x[sampled] = 1.0
    for k in (1000, n // 2, n - 4096, n - 4000):
        want = magnitude_threshold(x, k=k, backend="eager")
        got = magnitude_threshold(x, k=k, backend=backend)
        assert (got[0], got[1]) == (want[0], want[1]), k
    x = -x
    x[sampled] = 4.0
    for k in (4000, 5000, n // 2, n):
        want = magnitude_threshold(x, k=k, backend="eager")
        got = magnitude_threshold(x, k=k, backend=backend)
        assert (got[0], got[1]) == (want[0], want[1]), k


@pytest.mark.parametrize("n", [1, 16, 255, 65_535, 65_536, 65_537, 400_000])
def test_sums_in_the_order_of_every_backend(n: int, backend: str) -> None:
    base, tensors = nasty.models("heavy", n, 2, torch.float32)
    total, kept = cuda_ops.absolute_sums(
        [base], tensors, 2, keys=[5, 7], keeps=[1 << 30, 1 << 32], codes=None
    )
    deltas = [t - base for t in tensors]
    from cl_fast.ops import keep_mask

    assert total.tolist() == [absolute_sum(d) for d in deltas]
    mask = keep_mask(5, n, 1 << 30)
    assert kept.tolist() == [absolute_sum(torch.where(mask, deltas[0], 0.0)), total[1].item()]
    codes = torch.tensor([deltas[0].abs().median().view(torch.int32).item(), -1], dtype=torch.int32)
    _, above = cuda_ops.absolute_sums([base], tensors, 2, keys=None, keeps=None, codes=codes)
    want = torch.where(deltas[0].abs().view(torch.int32) > codes[0], deltas[0], 0.0)
    assert above.tolist() == [absolute_sum(want), total[1].item()]


def test_the_module_serves_what_it_was_built_for(backend: str) -> None:
    assert device_ops.engine(torch.device("cpu")).name == backend  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="backend='cuda' cannot be used: it does not run on"):
        device_ops.require("cuda", torch.device("meta"))
