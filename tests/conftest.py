"""What all tests share: the backends that a result must not depend on, and their order."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from cl_fast.backends import native

# How fast an example comes says how busy the machine is, and nothing about the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


LONGEST = (
    "test_ahead_of_time.py",
    "test_interpreter.py",
    "test_sanitizers.py",
    "test_gpu_lane.py",
    "test_huge.py",
    "test_examples_losses.py",
    "test_packaging.py",
)
"""Files that take a minute or more: begun first, so that no core ends with one of them alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend for `backend=`. CL_FAST_REQUIRE_NATIVE=1 turns a missing core into a failure."""
    if request.param == "native" and native.load() is None:
        if os.environ.get("CL_FAST_REQUIRE_NATIVE") == "1":
            pytest.fail(f"CL_FAST_REQUIRE_NATIVE=1, but {native.reason()}")
        pytest.skip(native.reason())
    return request.param
