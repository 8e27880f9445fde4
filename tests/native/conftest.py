"""The C++ core alone: each test runs on every instruction set that this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest

from cl_fast.backends import native

_module = native.load()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "core" in metafunc.fixturenames:
        names = _module.supported_isas() if _module is not None else ["absent"]
        metafunc.parametrize("core", names, indirect=True)


@pytest.fixture
def core(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    if _module is None:
        if os.environ.get("CL_FAST_REQUIRE_NATIVE") == "1":
            pytest.fail(f"CL_FAST_REQUIRE_NATIVE=1, but {native.reason()}")
        pytest.skip(f"no C++ core: {native.reason()}")
    before = _module.isa()
    _module.set_isa(request.param)
    yield _module
    _module.set_isa(before)
