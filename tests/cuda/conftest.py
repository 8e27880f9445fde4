"""The CUDA sources without a card: built as plain C++ to be run, and by nvcc to be looked at."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cl_fast.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "ops"))  # whose tests run here on another backend


def cmake() -> str:
    beside = str(Path(sys.executable).parent)
    found = shutil.which("cmake", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    assert found is not None, "the tests need CMake"
    return found


def configure_and_build(build: Path, *options: str) -> str:
    """Builds the target _cuda; returns what the compilers printed."""
    printed = ""
    for arguments in (
        ["-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}",
         f"-DCL_FAST_OUTPUT_DIR={build / 'cl_fast'}", *options],
        ["--build", str(build), "--target", "_cuda", "--parallel", str(os.cpu_count() or 1)],
    ):  # fmt: skip
        done = subprocess.run([cmake(), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        printed += done.stdout + done.stderr
    return printed


def load(build: Path) -> ModuleType:
    (path,) = (build / "cl_fast").glob("_cuda*.so")
    spec = importlib.util.spec_from_file_location("cl_fast._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def built_as_cpp(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        if os.environ.get("CL_FAST_REQUIRE_NATIVE") == "1":
            pytest.fail("CL_FAST_REQUIRE_NATIVE=1, but there is no C++ compiler")
        pytest.skip("no C++ compiler")
    build = tmp_path_factory.mktemp("cuda_on_cpu")
    configure_and_build(build, "-DCL_FAST_CUDA_ON_CPU=ON")
    return load(build)


@pytest.fixture
def backend(built_as_cpp: ModuleType) -> Iterator[str]:
    """backend="cuda" on CPU tensors, for one test."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda, "_module", built_as_cpp)
    patch.setattr(cuda, "_failure", None)
    yield "cuda"
    patch.undo()
