"""The drop kernels compile for real targets, without a card: for each dtype, without spills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install 'cl_fast[triton]')")

CODE = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
from triton.compiler import ASTSource, compile as build
from triton.backends.compiler import GPUTarget
from interpreted import folder
kernel = importlib.import_module(folder().__name__ + ".dare")._dare_kernel
names = kernel.arg_names
for dtype in ("bf16", "fp16", "fp32"):
    signature = dict.fromkeys(names, "i32") | {"x_ptr": "*" + dtype, "o_ptr": "*" + dtype}
    signature |= {"n": "i64", "factor": "fp32", "GROUPS": "constexpr"}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in ("x_ptr", "o_ptr")}
    for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32),
                   GPUTarget("hip", "gfx942", 64)):
        source = ASTSource(kernel, signature, {(names.index("GROUPS"),): 64}, attrs)
        built = build(source, target=target)
        if target.backend == "cuda":
            ptx = built.asm["ptx"]
            assert "ld.local" not in ptx and "st.local" not in ptx, "spills"
            assert "fma." not in ptx, "a fused multiply-add"
            assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, "no 16-byte access"
        else:
            assert ".vgpr_spill_count: 0" in built.asm["amdgcn"]
        print(dtype, target.arch)
"""


def test_compiles_for_real_targets(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(root)])}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.split("\n")) == 10
