"""Inner products by the core: exact products, one order of sums, whatever the tiles and threads."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch

from cl_fast.ops.blending import unpack_gram
from cl_fast.ops.inner_products import gram_matrix, gram_reference

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
NAMES |= {torch.float8_e4m3fn: "F8_E4M3"}


def gram(
    core: ModuleType,
    values: list[torch.Tensor],
    base: torch.Tensor | None = None,
    *,
    threads: int = 1,
    tile: int = 0,
    nan: str = "refuse",
) -> list[float]:
    job = core.Job(threads=threads, tile_elements=tile, nan=nan)
    task = job.add_task(
        values[0].numel(),
        "F32",
        base=None if base is None else (NAMES[base.dtype], base.data_ptr(), -1, 0),
        difference=base is not None,
        gram="only",
    )
    for x in values:
        job.add_term(task, NAMES[x.dtype], x.data_ptr())
    job.run()
    return list(job.result(task)["gram"])


def inputs(n: int, count: int, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(seed + n)
    types = (torch.bfloat16, torch.float32, torch.float16)
    base = torch.randn(n, generator=g).bfloat16()
    values = [
        (base.float() + 10.0 ** -(k % 4) * torch.randn(n, generator=g)).to(types[k % 3])
        for k in range(count)
    ]
    return values, base


@functools.cache
def expected_gram(n: int, count: int, on_base: bool) -> list[float]:
    values, base = inputs(n, count)
    return gram_reference(values, base if on_base else None)


@pytest.mark.parametrize(
    ("n", "count"), [(1, 1), (15, 2), (17, 3), (2049, 5), (65_536, 2), (65_537, 3), (140_017, 3)]
)
def test_equal_bits_as_the_reference_for_any_tiles_and_threads(
    core: ModuleType, n: int, count: int
) -> None:
    values, base = inputs(n, count)
    for start in (None, base):
        expected = expected_gram(n, count, start is not None)
        assert gram(core, values, start) == expected
        assert gram(core, values, start, threads=3, tile=65_536) == expected


def test_products_are_exact_and_sums_close_to_them(core: ModuleType) -> None:
    values, base = inputs(5000, 2)
    deltas = [(x.float() - base.float()).tolist() for x in values]
    found = unpack_gram(gram(core, values, base), 2)
    for i in range(2):
        for j in range(2):
            terms = [Fraction(a) * Fraction(b) for a, b in zip(deltas[i], deltas[j], strict=True)]
            size = float(sum(abs(term) for term in terms))
            # 5000 / 16 sums in a lane, then 16, each within half a unit of float64
            assert abs(found[i][j] - float(sum(terms))) <= 400 * 2.0**-53 * size


def test_what_is_not_finite_counts_as_zero(core: ModuleType) -> None:
    values, base = inputs(1000, 2)
    values[0][3], values[1][700], base[999] = math.nan, math.inf, -math.inf
    for start in (None, base):
        found = gram(core, values, start, nan="propagate")
        assert all(math.isfinite(value) for value in found)
        assert found == gram_reference(values, start)
    without = [x.clone() for x in values]
    without[0][3] = without[1][700] = 0.0
    assert gram(core, values) == gram(core, without)


def test_eight_bit_inputs_and_denormals(core: ModuleType) -> None:
    x = torch.linspace(-3, 3, 777).to(torch.float8_e4m3fn)
    tiny = torch.full((777,), 1e-45)
    found = gram(core, [x, tiny])
    assert found[0] == pytest.approx(float(x.double().square().sum()), rel=1e-15)
    assert found[2] == pytest.approx(777 * float(tiny[0].double()) ** 2, rel=1e-15)


def blended(core: ModuleType, blend: Any, threads: int = 2, n: int = 200_000) -> torch.Tensor:
    values, base = inputs(n, 2)
    values = [x.float() for x in values]
    job = core.Job(threads=threads, tile_elements=65_536)
    out = torch.empty(n)
    for _ in range(2):
        task = job.add_task(
            n, "F32", out.data_ptr(), base=("BF16", base.data_ptr(), -1, 0), difference=True,
            gram="blend",
        )  # fmt: skip
        for x in values:
            job.add_term(task, "F32", x.data_ptr(), weight=7.0)
    job.run(blend) if blend is not None else job.run()
    return out


def test_weights_come_from_the_caller(core: ModuleType) -> None:
    values, base = inputs(200_000, 2)
    asked: list[tuple[int, list[float]]] = []

    def blend(task: int, matrix: list[float]) -> list[float]:
        asked.append((task, matrix))
        return [0.25, 0.5]

    b = base.float()
    expected = b + ((values[0].float() - b) * 0.25 + (values[1].float() - b) * 0.5)
    for n_threads in (1, 3):
        asked.clear()
        assert torch.equal(blended(core, blend, n_threads), expected)
        assert sorted(task for task, _ in asked) == [0, 1]
        assert asked[0][1] == gram(core, [x.float() for x in values], base)


@pytest.mark.parametrize(
    ("blend", "error", "words"),
    [
        (None, ValueError, "no blend"),
        (lambda task, matrix: [1.0], ValueError, "one weight for each model"),
        (lambda task, matrix: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_a_blend_that_fails(core: ModuleType, blend: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        blended(core, blend)


def test_tasks_that_have_no_gram(core: ModuleType) -> None:
    job = core.Job(threads=1)
    with pytest.raises(ValueError, match="plain sums"):
        job.add_task(4, "F32", 1, reduce="mean", gram="only")


def test_the_function_on_tensors() -> None:
    values, base = inputs(5000, 3)
    matrix = gram_matrix(values, base)
    assert matrix.tolist() == unpack_gram(gram_reference(values, base), 3)
    wide = torch.stack([x.double() for x in values])
    exact = gram_matrix([x.double() for x in values])
    assert torch.allclose(exact, wide @ wide.t(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("values", "base", "error", "words"),
    [
        ([], None, ValueError, "at least one"),
        ([torch.zeros(3), torch.zeros(4)], None, ValueError, r"tensors\[1\] must have the shape"),
        ([torch.zeros(3)], torch.zeros(4), ValueError, "base must have the shape"),
        ([torch.zeros(3, dtype=torch.int64)], None, TypeError, "floating type"),
    ],
)
def test_bad_tensors(values: list[torch.Tensor], base: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        gram_matrix(values, base)
