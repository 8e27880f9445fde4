"""The C++ core's tests once more, with the core built under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = "address,undefined"

# The unoptimised build is slow: of the largest products of parameters, one slice each.
SELECTION = (
    "not sanitizers and not 31_elements and not 300017"
    " and not (not_finite and not (66000 and dtype0))"
    " and not (same_bits and not dtype0) and not 262144"
)


def compiler() -> str:
    """The C++ compiler, or a skip where the sanitizers cannot be used."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the sanitizer's runtime is preloaded, which is done on Linux only")
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None or tool_path("cmake") is None:
        pytest.skip("no C++ compiler or no CMake")
    return found


def tool_path(name: str) -> str | None:
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))


def runtime(cxx: str, name: str) -> str:
    """The file of a runtime library of the compiler; a bare name if it has none."""
    command = [cxx, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_core_under_sanitizers(tmp_path: Path) -> None:
    cxx = compiler()
    libraries = [runtime(cxx, "libasan.so"), runtime(cxx, "libstdc++.so")]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"{cxx} has no shared AddressSanitizer runtime")
    cmake = tool_path("cmake")
    assert cmake is not None
    build = tmp_path / "build"
    configure = ["-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_CXX_COMPILER={cxx}", f"-DCL_FAST_SANITIZE={SANITIZERS}"]
    make = ["--build", str(build), "--parallel", str(os.cpu_count() or 1)]
    for arguments in (configure, make):
        done = subprocess.run([cmake, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (module,) = (build / "cl_fast").glob("_native*.so")

    environment = os.environ | {
        "CL_FAST_SANITIZED_MODULE": str(module),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
        "LD_PRELOAD": " ".join(libraries),
        # Python itself never frees some of its memory.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "sanitized",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    command += [str(Path(__file__).parent), "-k", SELECTION]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "passed" in done.stdout
