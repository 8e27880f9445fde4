"""The survey of task vectors in the core, on every instruction set, against float64."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def made(n: int, models: int, dtypes: tuple[str, ...], seed: int = 0) -> list[Tensor]:
    """A base and models near it: some elements alike, some far off."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=g)
    states = [base]
    for _ in range(models):
        delta = 0.3 * torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.7)
        states.append(base + delta)
    return [x.to(DTYPES[dtype]) for x, dtype in zip(states, itertools.cycle(dtypes))]


def run(core: ModuleType, states: list[Tensor], row: int, threads: int = 1) -> dict[str, Any]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    survey = core.Survey(threads, 4)
    survey.add(len(states[0]), row, [(names[x.dtype], x.data_ptr(), -1, 0) for x in states])
    survey.run()
    return survey.result(0)


def check(found: dict[str, Any], states: list[Tensor], row: int) -> None:
    wide = [x.float() for x in states]
    bad = [~torch.isfinite(x) for x in wide]
    base = torch.where(bad[0], 0.0, wide[0].double())
    deltas = [
        torch.where(bad[0] | b, 0.0, (x - wide[0]).double())
        for x, b in zip(wide[1:], bad[1:], strict=True)
    ]
    n = len(base)
    vectors = [base, *deltas]
    products = [
        (float((x * y).sum()), float((x * y).abs().sum()))
        for i, x in enumerate(vectors)
        for y in vectors[i:]
    ]
    for got, (exact, size) in zip(found["products"], products, strict=True):
        assert abs(got - exact) <= n * 2.0**-52 * size
    for got, x in zip(found["absolute"], vectors, strict=True):
        # at most 64 float32 sums in a lane of a piece
        assert abs(got - float(x.abs().sum())) <= 64 * 2.0**-24 * float(x.abs().sum())
    own = [torch.where(b, 0.0, x.double()) for x, b in zip(wide, bad, strict=True)]
    largest = [float(x.abs().max()) for x in [*own, *deltas]]
    assert found["largest"] == largest
    for at, x, most in zip(found["largest_at"], own, largest, strict=False):
        assert at == (int((x.abs() == most).nonzero()[0]) if most else -1)
    assert found["nonfinite"] == [int(b.sum()) for b in bad]
    signs = [x.sign() for x in deltas]
    assert found["changed"] == [int((s != 0).sum()) for s in signs]
    pairs = list(itertools.combinations(signs, 2))
    assert found["overlap"] == [int(((x != 0) & (y != 0)).sum()) for x, y in pairs]
    assert found["conflicts"] == [int((x * y < 0).sum()) for x, y in pairs]
    stacked = torch.stack(signs)
    assert found["shared"] == int((stacked.abs().sum(0) > 1).sum())
    assert found["disputed"] == int(((stacked.amax(0) > 0) & (stacked.amin(0) < 0)).sum())
    assert found["sampled"] == n
    for (first, counts), x in zip(found["bins"], deltas, strict=True):
        moved = x[x != 0].abs()
        eighths = (moved.log2().floor() + 127) * 8 + ((moved / 2 ** moved.log2().floor()) - 1) * 8
        want = torch.bincount(eighths.floor().long()) if len(moved) else torch.zeros(0)
        assert {first + i: c for i, c in enumerate(counts) if c} == {
            i: c for i, c in enumerate(want.tolist()) if c
        }
    for rows, x in zip(found["rows"], deltas, strict=True):
        if not row:
            assert rows == []
            continue
        moved, still = x.view(-1, row).square().sum(1), base.view(-1, row).square().sum(1)
        order = sorted(range(len(moved)), key=lambda i: (-float(moved[i]), i))
        assert [i for i, _, _ in rows] == [i for i in order if moved[i] > 0][:4]
        for i, delta, b in rows:
            assert math.isclose(delta, float(moved[i]), rel_tol=1e-13)
            assert math.isclose(b, float(still[i]), rel_tol=1e-13)


@pytest.mark.parametrize(
    ("n", "row", "models", "dtypes"),
    [
        (1, 0, 1, ("F32",)),
        (17, 0, 2, ("BF16",)),
        (1023, 0, 3, ("BF16",)),
        (20_000, 0, 4, ("F16", "BF16", "F32")),
        (96 * 101, 101, 3, ("BF16",)),
        (30 * 1100, 1100, 5, ("F32",)),
        (64 * 77, 77, 9, ("F32", "BF16")),
        (4096, 64, 2, ("F8_E4M3", "F8_E5M2")),
    ],
)
def test_what_is_counted_and_summed(
    core: ModuleType, n: int, row: int, models: int, dtypes: tuple[str, ...]
) -> None:
    states = made(n, models, dtypes)
    check(run(core, states, row), states, row)


def test_what_is_not_finite_counts_as_unchanged(core: ModuleType) -> None:
    states = made(5000, 3, ("F32",))
    states[0][[3, 4000]] = torch.tensor([math.nan, -math.inf])
    states[1][[3, 7, 8]] = torch.tensor([1.0, math.nan, math.inf])
    states[2][4000] = math.nan
    check(run(core, states, 100), states, 100)


def test_a_difference_that_overflows_counts_as_the_models(core: ModuleType) -> None:
    found = run(core, [torch.tensor([-3e38, 1.0]), torch.tensor([3e38, 2.0])], 0)
    assert found["nonfinite"] == [0, 1]
    assert found["changed"] == [1]
    assert found["products"][2] == 1.0


def test_the_same_bits_for_any_threads_and_instruction_set(core: ModuleType) -> None:
    states = made(150 * 1024, 3, ("BF16",))
    before = core.isa()
    core.set_isa("portable")
    want = run(core, states, 1024)
    core.set_isa(before)
    for threads in (1, 3):
        assert run(core, states, 1024, threads) == want
    assert want["sampled"] == 150 * 2 * 16


def test_the_sample_tells_of_the_whole(core: ModuleType) -> None:
    states = made(256 * 512, 1, ("F32",))
    found = run(core, states, 512)
    first, counts = found["bins"][0]
    delta = (states[1] - states[0]).abs()
    exact = torch.bincount(delta[delta > 0].view(torch.int32) >> 20)
    assert found["sampled"] == 256 * 16
    for i, count in enumerate(counts):
        share = float(exact[first + i]) / len(delta)
        # six standard deviations of a binomial sample, and where few are expected three of them
        error = abs(count - share * found["sampled"])
        assert error <= 6 * math.sqrt(share * found["sampled"]) + 3


def test_arguments_out_of_range(core: ModuleType) -> None:
    x = torch.zeros(8)
    source = ("F32", x.data_ptr(), -1, 0)
    survey = core.Survey(1, 4)
    for n, row, sources, words in (
        (-1, 0, [source] * 2, "n must not be negative"),
        (8, 3, [source] * 2, "whole rows"),
        (8, 0, [source], "1 to 64 models"),
        (8, 0, [source] * 66, "1 to 64 models"),
        (8, 0, [source, ("BYTES", x.data_ptr(), -1, 0)], "floating"),
        (8, 0, [source, ("F32", 0, 0, 0)], "neither memory nor a file"),
    ):
        with pytest.raises(ValueError, match=words):
            survey.add(n, row, sources)
    with pytest.raises(IndexError):
        survey.result(0)
    with pytest.raises(ValueError, match="top"):
        core.Survey(1, -1)
    survey.add(0, 0, [source] * 2)
    survey.run()
    assert survey.result(0)["changed"] == [0]


def test_a_tensor_outside_of_its_file(core: ModuleType, tmp_path: Any) -> None:
    (tmp_path / "short").write_bytes(bytes(16))
    survey = core.Survey(1, 4)
    file = survey.file(str(tmp_path / "short"), "pread")
    with pytest.raises(ValueError, match="outside the file"):
        survey.add(5, 0, [("F32", 0, file, 0)] * 2)
    with pytest.raises(OSError, match="absent"):
        survey.file(str(tmp_path / "absent"), "mmap")
