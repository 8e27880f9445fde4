"""The package as a user installs it: sdist, wheel, editable; with a compiler, without, declined.

Builds a copy of the sources in a temporary folder, with what this environment has: no network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from tiny_checkpoints import TINY, write_file

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = (  # noqa: SIM905
    "cl_fast csrc triton_kernels docs CMakeLists.txt setup.py pyproject.toml MANIFEST.in "
    "LICENSE README.md CHANGELOG.md CONTRIBUTING.md constraints.txt Makefile"
).split()
RECIPE = """\
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
dtype: bfloat16
"""


def run(command: list[str], *, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without the variables that steer builds; fails with what it printed."""
    done = attempt(command, cwd=cwd, **variables)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def attempt(command: list[str], *, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    dropped = ("CL_FAST_", "PYTHONPATH", "CMAKE_ARGS", "PIP_CONSTRAINT")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    beside = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([beside, environment.get("PATH", "")])
    return subprocess.run(
        command, cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False
    )


def hook(name: str, target: Path, *, source: Path, **variables: str) -> Path:
    """Calls a hook of the build backend in `source`: what pip and build do, without their cost."""
    code = f"import sys, setuptools.build_meta as b; print(b.{name}(sys.argv[1]))"
    target.mkdir(parents=True, exist_ok=True)
    done = run([sys.executable, "-c", code, str(target)], cwd=source, **variables)
    return target / done.stdout.strip().splitlines()[-1]


def copy_sources(target: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "_native*", "_cuda*", "*.egg-info")
    target.mkdir(parents=True)
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, target / name)
    return target


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def install(wheel: Path, target: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-index", "--target", str(target), str(wheel)]
    run(pip, cwd=wheel.parent)
    return target


def isolated(site: Path) -> tuple[list[str], dict[str, str]]:
    """An interpreter that finds cl_fast in `site` only, and the libraries of this environment.

    -S leaves .pth files out: the import hook of an editable cl_fast would lend its own modules.
    """
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    path = os.pathsep.join([str(site), *sorted(libraries)])
    return [sys.executable, "-S"], {"PYTHONPATH": path}


def python(code: str, site: Path, *, cwd: Path) -> str:
    """What a fresh interpreter, that finds cl_fast in `site`, prints."""
    command, variables = isolated(site)
    return run([*command, "-c", code], cwd=cwd, **variables).stdout.strip()


def has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "c++")) is not None


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as they come out of an sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    archive = hook("build_sdist", folder / "dist", source=copy_sources(folder / "source"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built with CL_FAST_NATIVE=0."""
    target = tmp_path_factory.mktemp("pure")
    return hook("build_wheel", target, source=sdist, CL_FAST_NATIVE="0")


def test_sdist_holds_all_that_a_build_needs(sdist: Path) -> None:
    for name in ("CMakeLists.txt", "csrc/bindings.cpp", "triton_kernels/__init__.py", "LICENSE"):
        assert (sdist / name).exists(), name
    assert not list(sdist.rglob("_native*"))


def test_wheel_maps_the_triton_kernels_into_the_package(pure_wheel: Path) -> None:
    names = names_in(pure_wheel)
    assert "cl_fast/triton_kernels/__init__.py" in names
    assert "cl_fast/py.typed" in names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"cl_fast"}
    for path in (ROOT / "cl_fast").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names


def test_version_has_one_place(pure_wheel: Path) -> None:
    scope: dict[str, str] = {}
    exec((ROOT / "cl_fast" / "_version.py").read_text(encoding="utf-8"), scope)
    assert pure_wheel.name.split("-")[1] == scope["__version__"]


def test_declined_native_makes_a_pure_wheel(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not any("_native" in Path(name).name for name in names_in(pure_wheel) if ".so" in name)


def test_without_the_module_a_merge_works_and_says_so_once(
    pure_wheel: Path, tmp_path: Path
) -> None:
    site = install(pure_wheel, tmp_path / "site")
    for model in ("a", "b"):
        write_file(tmp_path / model / "model.safetensors", TINY)
        (tmp_path / model / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "recipe.yml").write_text(RECIPE, encoding="utf-8")
    command, variables = isolated(site)
    merge = [*command, "-m", "cl_fast", "merge", "recipe.yml"]
    done = run([*merge, "out"], cwd=tmp_path, **variables)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert done.stderr.count("slower eager reference") == 1, done.stderr
    assert "C++ core is not built" in done.stderr

    declined = run([*merge, "again"], cwd=tmp_path, CL_FAST_NATIVE="0", **variables)
    assert "eager reference" not in declined.stderr
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("lacking", ["compiler", "cmake"])
def test_installs_without_a_compiler_or_cmake(sdist: Path, tmp_path: Path, lacking: str) -> None:
    variables = {"CXX": "/bin/false"} if lacking == "compiler" else {"PATH": "/nonexistent"}
    wheel = hook("build_wheel", tmp_path / "dist", source=sdist, **variables)
    assert not any(name.endswith((".so", ".dylib")) for name in names_in(wheel))
    site = install(wheel, tmp_path / "site")
    code = "from cl_fast.backends import native; print(native.load(), native.reason())"
    assert python(code, site, cwd=tmp_path).startswith("None the C++ core is not built")


def test_demanded_native_fails_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    done = attempt([sys.executable, "-c", code], cwd=sdist, CXX="/bin/false", CL_FAST_NATIVE="1")
    assert done.returncode != 0
    assert "the native module was not built" in done.stdout + done.stderr


def test_demanded_cuda_fails_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    done = attempt(
        [sys.executable, "-c", code], cwd=sdist, CUDACXX="/bin/false", CL_FAST_CUDA="ON"
    )
    assert done.returncode != 0
    assert "CL_FAST_CUDA=ON needs a CUDA compiler" in done.stdout + done.stderr


def test_editable_install_finds_both_folders(tmp_path: Path) -> None:
    """From outside the sources: -S leaves this environment's own installation out."""
    source = copy_sources(tmp_path / "source")
    wheel = hook("build_editable", tmp_path / "dist", source=source, CL_FAST_NATIVE="0")
    site = install(wheel, tmp_path / "site")
    code = (
        f"import site; site.addsitedir({str(site)!r}); import cl_fast, cl_fast.triton_kernels as t;"
        "print(cl_fast.__file__, t.__file__)"
    )
    printed = run([sys.executable, "-S", "-c", code], cwd=tmp_path).stdout.split()
    assert [Path(path).parent for path in printed] == [
        source / "cl_fast",
        source / "triton_kernels",
    ]


@pytest.mark.slow
def test_wheel_with_the_native_module(sdist: Path, tmp_path: Path) -> None:
    if not has_compiler():
        assert os.environ.get("CL_FAST_REQUIRE_NATIVE") != "1", "no compiler"
        pytest.skip("no C++ compiler")
    wheel = hook("build_wheel", tmp_path / "dist", source=sdist, CL_FAST_NATIVE="1")
    (module,) = [name for name in names_in(wheel) if "_native" in name and ".so" in name]
    assert module.startswith("cl_fast/_native.")
    site = install(wheel, tmp_path / "site")
    code = (
        "import cl_fast._native as n, cl_fast.triton_kernels as t;"
        "print(n.__file__, t.__file__, *n.supported_isas())"
    )
    native_file, triton_file, *isas = python(code, site, cwd=tmp_path).split()
    assert Path(native_file) == site / module
    assert Path(triton_file) == site / "cl_fast" / "triton_kernels" / "__init__.py"
    assert "portable" in isas
    check_no_weak_symbols(sdist / "build")


def check_no_weak_symbols(build: Path) -> None:
    """Code for one instruction set must not be what the linker picks for everybody.

    An inline function that several translation units emit is kept once, from any of them: if it
    came from one compiled for AVX-512, other machines would crash in it.
    """
    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        return
    for isa in ("avx2", "avx512", "clmul"):
        for path in build.rglob(f"*{isa}.cpp.o"):
            symbols = run([nm, "-C", str(path)], cwd=build).stdout.splitlines()
            weak = [line for line in symbols if " W " in line]
            assert not weak, f"{path.name}: {weak[:5]}"
