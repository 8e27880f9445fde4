"""Compile the variants of one file for real targets, without a card; print what came out as JSON.

    python compile_variants.py variants_dare.py [record.json]

What a compiler makes of a source is a function of the two. So with a record of earlier results
each variant is compiled for one of the targets, and for the others only where the compiler, the
kernel, anything that it calls, or the variant is not what the record was made from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # noqa: F401  the kernels of this checkout
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from variant import Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_of(variant: Variant) -> Any:
    names = variant.kernel.arg_names
    signature = {
        name: "constexpr" if name in variant.constexprs else variant.signature[name]
        for name in names
    }
    constexprs = {(names.index(name),): value for name, value in variant.constexprs.items()}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    return ASTSource(variant.kernel, signature, constexprs, attrs)


def digest(variant: Variant) -> str:
    """Of all that decides what a compiler makes of it: the kernel, its callees, types, options."""
    text = f"{source_of(variant).hash()} {sorted(dict(variant.options).items())}"
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def build(variant: Variant, target: GPUTarget) -> Any:
    built = triton.compile(source_of(variant), target=target, options=dict(variant.options))
    return (on_nvidia if target.backend == "cuda" else on_amd)(built)


def on_nvidia(built: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    ptx = built.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "shared": built.metadata.shared,
        "vector_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.c[ag]\S* .*0x10", ptx)),
        "vector_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "matrix": bool(re.search(r"mma\.sync|wgmma", ptx)),
        "fused": bool(re.search(r"\bfma\.", ptx)),
    }


def on_amd(built: Any) -> dict[str, Any]:
    text = built.asm["amdgcn"]
    spills = re.findall(r"\.(?:vgpr|sgpr)_spill_count: *(\d+)", text)
    return {
        "registers": int(re.search(r"\.vgpr_count: *(\d+)", text)[1]),  # type: ignore[index]
        "spilled": sum(map(int, spills)),
        "shared": built.metadata.shared,
        "vector_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        "vector_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
        "matrix": "v_mfma" in text,
        "fused": bool(re.search(r"v_(?:pk_)?(?:fma|mad|fmac)_f32", text)),
    }


def main() -> None:
    file = Path(sys.argv[1]).resolve()
    record = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")) if sys.argv[2:] else {}
    family = file.stem.removeprefix("variants_")
    known = record.get(triton.__version__, {}).get(family, {})
    found: dict[str, dict[str, Any]] = {}
    compiled = 0
    for number, variant in enumerate(load(file).VARIANTS):
        assert variant.name not in found, f"two variants called {variant.name}"
        source = digest(variant)
        earlier = known.get(variant.name, {})
        same = earlier.get("source") == source
        found[variant.name] = {"source": source}
        for turn, (name, target) in enumerate(TARGETS.items()):
            if same and name in earlier and turn != number % len(TARGETS):
                found[variant.name][name] = earlier[name]
            else:
                found[variant.name][name] = build(variant, target)
                compiled += 1
    print(json.dumps({"triton": triton.__version__, "compiled": compiled, "variants": found}))


if __name__ == "__main__":
    main()
