"""What all tests share: the backends that a result must not depend on."""

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


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend for `backend=`. CL_FAST_REQUIRE_NATIVE=1 turns a missing core into a failure."""
    if request.param == "native" and native.load() is None:
        if os.environ.get("CL_FAST_REQUIRE_NATIVE") == "1":
            pytest.fail(f"CL_FAST_REQUIRE_NATIVE=1, but {native.reason()}")
        pytest.skip(native.reason())
    return request.param
