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
import sys
import warnings
from pathlib import Path

import pytest
from conftest import configure_and_build

SNAPSHOT = Path(__file__).with_name("registers.json")
ARCHITECTURES = ("sm_80", "sm_90")
pytestmark = pytest.mark.slow


def nvcc() -> str:
    places = [os.environ.get("PATH", "")]
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    places += [f"{home}/bin" for home in homes if home]
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
    """The kernel and its template arguments as numbers, from the mangled name."""
    name = re.search(r"\d([a-z]+_kernel)", symbol)[1]  # type: ignore[index]
    arguments = re.findall(r"L(?:[bi]|NS_8DropFormE)(\d+)E", symbol)
    return " ".join([name, *arguments])


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


def dumped(build: Path, what: str) -> str:
    """The code inside the module, by the tool that Triton's package carries."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (module,) = (build / "cl_fast").glob("_cuda*.so")
    command = [str(tool), what, str(module)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_memory_is_read_and_written_16_bytes_at_a_time(build: tuple[Path, str]) -> None:
    seen = set()
    for part in dumped(build[0], "--dump-sass").split("Function : ")[1:]:
        name = readable(part.split()[0])
        seen.add(name.split()[0])
        if name.startswith(("combine_kernel", "scan_kernel", "sums_kernel")):
            assert re.search(r"LDG\.E\.(\w+\.)*128", part), name
        # An election over groups of terms writes word by word; it serves nine models and up.
        if name.startswith("combine_kernel") and not name.endswith("1 1"):
            assert re.search(r"STG\.E\.(\w+\.)*128", part), name
    assert seen >= {"combine_kernel", "scan_kernel", "sums_kernel", "descend_kernel"}


def test_no_product_is_fused_with_a_sum(build: tuple[Path, str]) -> None:
    """In the PTX, which is also what later cards will run: there a division is still one."""
    ptx = dumped(build[0], "--dump-ptx")
    assert ".target sm_90" in ptx
    assert "div.rn.f32" in ptx
    assert not re.search(r"\bfma\.", ptx)
    assert not re.search(r"\.(ftz|approx)\b", ptx)


def test_the_module_imports_without_a_card(build: tuple[Path, str]) -> None:
    # In a process of its own: one process holds one module of that name.
    code = "import _cuda; info = _cuda.build_info(); print(info['on_cpu'], info['cuda'] >= 12010)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=build[0] / "cl_fast", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(build[0] / "cl_fast")}, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True"]
