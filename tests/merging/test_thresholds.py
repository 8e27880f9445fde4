"""Thresholds of a whole-model trim from histograms that are counted in parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_cases import family, load, plan, recipe

from cl_fast.merging import make_plan, parse_recipe
from cl_fast.merging.executors import NOTHING, Executor, make_executor, thresholds_by_counts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("thresholds"))


def made(case: Any, backend: str) -> Executor:
    return make_executor(case, backend=backend, threads=2, memory=None, io="auto", nan="refuse")


def in_parts(case: Any, executor: Executor) -> list[int]:
    """The histograms of single tensors, summed."""

    def count(ranges: Sequence[tuple[int, int, int]]) -> list[Any]:
        totals: list[Any] = [0] * len(ranges)
        for tensor in case.tensors:
            if tensor.kind == "combine":
                for i, part in enumerate(executor.count_codes([tensor], ranges)):
                    totals[i] = totals[i] + np.frombuffer(part, dtype=np.uint64)
        return totals

    return thresholds_by_counts(case, count)


def test_parts_add_up_to_the_kth_largest_magnitude(
    models: Path, tmp_path: Path, backend: str
) -> None:
    case = plan(models, tmp_path / "out", "ties paper")
    executor = made(case, backend)
    codes = in_parts(case, executor)
    assert codes == executor.model_thresholds(case, lambda _: None)
    base = load(models / "base")
    for name, keep, code in zip(("one", "two", "three"), case.model_keep, codes, strict=True):
        state = load(models / name)
        deltas = [
            (state[t.name].float() - base[t.name].float()).reshape(-1).abs()
            for t in case.tensors
            if t.kind == "combine"
        ]
        kth = torch.cat(deltas).sort(descending=True).values[keep - 1]
        assert code == int(kth.view(torch.int32))


def test_models_without_a_trim_need_no_count(models: Path, tmp_path: Path, backend: str) -> None:
    content = recipe(models, "ties paper")
    content["models"][0]["parameters"]["density"] = 1.0
    case = make_plan(parse_recipe(content), tmp_path / "out")
    executor = made(case, backend)
    codes = in_parts(case, executor)
    assert codes[0] == -1
    assert NOTHING not in codes
    assert codes == executor.model_thresholds(case, lambda _: None)


def test_ranges_of_the_core_are_checked() -> None:
    core = pytest.importorskip("cl_fast._native")
    for code_range in ((-1, 5, 0), (0, 1 << 31, 16), (0, 5, 32), (0, 0x7FFFFFFF, 0)):
        with pytest.raises(ValueError, match=r"31 bits|more bins"):
            core.Job(threads=1).count_codes([code_range])
