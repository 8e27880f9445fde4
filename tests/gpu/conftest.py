"""Tests here need a card: skipped without one, failed without one under CL_FAST_REQUIRE_GPU=1."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable

import pytest
import torch

GIB = 2**30


@functools.cache
def missing() -> str:
    """Why these tests cannot run; empty where they can."""
    return "" if torch.cuda.is_available() else "needs a CUDA device"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: called for the tests of this folder only."""
    if not missing():
        return
    if os.environ.get("CL_FAST_REQUIRE_GPU") == "1":
        pytest.fail(f"CL_FAST_REQUIRE_GPU=1, but: {missing()}", pytrace=False)
    pytest.skip(missing())


@pytest.fixture
def device() -> torch.device:
    """The current CUDA device."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def need_memory(device: torch.device) -> Callable[[int], None]:
    """need_memory(bytes) skips the test unless the card has as much free."""

    def need(count: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if free < count:
            pytest.skip(
                f"needs {count / GIB:.1f} GiB of memory on the card, {free / GIB:.1f} GiB are free"
            )

    return need
