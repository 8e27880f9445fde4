"""The CUDA module built by nvcc for sm_80 and sm_90, on machines without a card: and built well.

No kernel spills, the loops of a merge load 16 bytes at a time and fuse no product with a sum, and
the registers of every kernel are those of registers.json; CL_FAST_UPDATE_SNAPSHOT=1 writes it anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from conftest import configure_and_build, load

SNAPSHOT = Path(__file__).with_name("registers.json")
ARCHITECTURES = ("sm_80", "sm_90")
pytestmark = pytest.mark.slow


def nvcc() -> str:
    places = [os.environ.get("PATH", "")]
    places += [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found = shutil.which("nvcc", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))
    if found is None:
        if os.environ.get("CL_FAST_REQUIRE_NVCC") == "1":
            pytest.fail("CL_FAST_REQUIRE_NVCC=1, but nvcc is not found")
        pytest.skip("nvcc is not found: the CUDA sources are not compiled for a card")
    return found


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The build folder, and what the compilers said."""
    folder = tmp_path_factory.mktemp("nvcc")
    printed = configure_and_build(folder, "-DCL_FAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc()}")
    return folder, printed


def kernels(printed: str) -> dict[str, dict[str, dict[str, int]]]:
    """kernel -> architecture -> what ptxas says of it."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for part in printed.split("Compiling entry function '")[1:]:
        symbol, architecture = re.match(r"(\w+)' for '(\w+)'", part).groups()  # type: ignore[union-attr]
        stack, stores, loads = map(
            int,
            re.search(  # type: ignore[union-attr]
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        seen = {"stack": stack, "spills": stores + loads, "registers": registers}
        found.setdefault(readable(symbol), {})[architecture] = seen
    return found


def readable(symbol: str) -> str:
    """combine_kernel<4, wide, Drop, elect> and so on, from the mangled name."""
    name = re.search(r"\d([a-z]+_kernel)", symbol)[1]  # type: ignore[index]
    return " ".join([name, *re.findall(r"L[bi](\d+)E|DropFormE(\d)", symbol) and [
        "".join(pair) for pair in re.findall(r"L[bi](\d+)E|DropFormE(\d)", symbol)
    ]])  # fmt: skip


def test_no_kernel_spills(build: tuple[Path, str]) -> None:
    found = kernels(build[1])
    assert len(found) >= 30, sorted(found)
    for name, targets in found.items():
        assert set(targets) >= set(ARCHITECTURES), name
        for architecture, seen in targets.items():
            assert seen["stack"] == seen["spills"] == 0, (name, architecture, seen)


def test_registers_are_those_of_the_snapshot(build: tuple[Path, str]) -> None:
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release ([\d.]+)", version.stdout)[1]  # type: ignore[index]
    now = {
        name: {architecture: targets[architecture]["registers"] for architecture in ARCHITECTURES}
        for name, targets in kernels(build[1]).items()
    }
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8")) if SNAPSHOT.exists() else {}
    if os.environ.get("CL_FAST_UPDATE_SNAPSHOT") == "1":
        snapshot[release] = now
        SNAPSHOT.write_text(json.dumps(snapshot, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    elif release not in snapshot:
        warnings.warn(f"{SNAPSHOT.name} has no row for CUDA {release}", stacklevel=1)
    else:
        assert now == snapshot[release], (
            "registers changed; if that is meant, run this test with CL_FAST_UPDATE_SNAPSHOT=1"
        )


def disassembled(build: Path) -> str:
    """The machine code of the module, by the tool that Triton's package carries."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (module,) = (build / "cl_fast").glob("_cuda*.so")
    return subprocess.run(
        [str(tool), "--dump-sass", str(module)], capture_output=True, text=True, check=True
    ).stdout


def test_wide_loads_and_no_fused_products(build: tuple[Path, str]) -> None:
    seen = set()
    for part in disassembled(build[0]).split("Function : ")[1:]:
        name = readable(part.split()[0])
        seen.add(name.split()[0])
        assert not re.search(r"\b(FFMA|DFMA|HFMA2)\b", without_divisions(part)), name
        if name.startswith(("combine_kernel", "scan_kernel", "sums_kernel")):
            assert "LDG.E.128" in part, name
        if name.startswith("combine_kernel"):
            assert "STG.E.128" in part, name
    assert seen >= {"combine_kernel", "scan_kernel", "sums_kernel", "descend_kernel"}


def without_divisions(code: str) -> str:
    """An IEEE division is made of fused steps around a reciprocal; nothing else may be."""
    return "" if "MUFU.RCP" in code or "MUFU.RSQ" in code else code


def test_ptx_for_later_cards_and_a_module_that_imports(build: tuple[Path, str]) -> None:
    folder, _ = build
    (module,) = (folder / "cl_fast").glob("_cuda*.so")
    assert b".target sm_90" in module.read_bytes() or "compute_90" in build[1] or has_ptx(module)
    info = load(folder).build_info()
    assert info["on_cpu"] is False
    assert info["cuda"] >= 12000


def has_ptx(module: Path) -> bool:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run(
        [str(tool), "--list-ptx", str(module)], capture_output=True, text=True, check=True
    ).stdout
    return "sm_90.ptx" in listed
