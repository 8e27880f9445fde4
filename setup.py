"""Builds the native module through CMake; everything else about the package is in pyproject.toml.

Environment variables read at build time:

* ``CL_FAST_NATIVE=0``    leave the native module out; cl_fast then runs on its eager reference.
* ``CL_FAST_NATIVE=1``    the native module must build: a failure fails the installation.
* ``CL_FAST_CUDA``        ``OFF`` (default); ``ON``: build the CUDA module too, and fail the
  installation if that fails; ``AUTO``: build it where a CUDA compiler is found.
* ``CL_FAST_SANITIZE``    for example ``address,undefined``, handed to CMake.
* ``CMAKE_ARGS``          further arguments of the CMake configure step.
* ``CMAKE_BUILD_PARALLEL_LEVEL``  compile jobs (default: the CPUs this process may use).

With ``CL_FAST_NATIVE`` unset, a missing compiler or CMake is no error: the package installs without
the module, and cl_fast says so once when a merge runs without it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("CL_FAST_NATIVE", "").strip()
CMAKE_OPTIONS = ("CL_FAST_CUDA", "CL_FAST_SANITIZE")


class CMakeBuild(build_ext):
    """``build_ext`` that hands the one extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build_with_cmake(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            # distutils turns a CompileError of an optional extension into a warning.
            raise CompileError(
                f"cl_fast: the native module was not built ({error}). The package works without "
                "it on the slower eager reference; for the fast path install a C++17 compiler and "
                "CMake >= 3.20 and reinstall."
            ) from error

    def _build_with_cmake(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise FileNotFoundError("cmake is not on PATH")
        output = (ROOT / self.get_ext_fullpath(ext.name)).resolve().parent
        build = (ROOT / self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        # A cache made for another interpreter or build environment would be believed: drop it.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCL_FAST_OUTPUT_DIR={output}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        configure += [f"-D{key}={os.environ[key]}" for key in CMAKE_OPTIONS if os.environ.get(key)]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        if shutil.which("ninja") and not os.environ.get("CMAKE_GENERATOR"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(available_cpus())
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def extensions() -> list[Extension]:
    """The native module, unless it was declined."""
    if NATIVE == "0":
        return []
    demanded = NATIVE == "1" or os.environ.get("CL_FAST_CUDA", "").upper() == "ON"
    return [Extension("cl_fast._native", sources=[], optional=not demanded)]


setup(
    packages=[*find_packages(include=["cl_fast", "cl_fast.*"]), "cl_fast.triton_kernels"],
    package_dir={"cl_fast.triton_kernels": "triton_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
