"""Every kernel and dtype compiles for sm_80, sm_90 and gfx942 without a card, and compiles well.

Each variants_*.py beside this file lists what its launcher asks for. compiled.json records what
each version of Triton made of each variant, and of which source: every run compiles each variant
for one target, and for all of them where the source is another one (compile_variants.py).
CL_FAST_UPDATE_SNAPSHOT=1 compiles everything and writes the record anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (pip install 'cl_fast[triton]')",
)
HERE = Path(__file__).parent
SNAPSHOT = HERE / "compiled.json"
UPDATE = os.environ.get("CL_FAST_UPDATE_SNAPSHOT") == "1"
FILES = sorted(HERE.glob("variants_*.py"))


def compiled(file: Path, cache: Path) -> dict[str, Any]:
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(HERE.parents[1])]),
        "TRITON_CACHE_DIR": str(cache),
    }
    record = [str(SNAPSHOT)] if SNAPSHOT.exists() and not UPDATE else []
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_variants.py"), str(file), *record],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("variants_"))
def test_compiles_well(file: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(HERE))
    import compile_variants

    declared = {variant.name: variant for variant in compile_variants.load(file).VARIANTS}
    result = compiled(file, tmp_path)
    wrong = []
    for name, targets in result["variants"].items():
        variant = declared[name]
        for target in compile_variants.TARGETS:
            seen = targets[target]
            at = f"{name} on {target}: {seen}"
            if seen["spilled"]:
                wrong.append(f"spills: {at}")
            if variant.vectors and not seen["vector_loads"]:
                wrong.append(f"no 16-byte loads: {at}")
            if variant.matrix and not seen["matrix"]:
                wrong.append(f"no tensor-core instruction: {at}")
            if variant.exact and seen["fused"]:
                wrong.append(f"a fused multiply-add: {at}")
            if target != "gfx942" and seen["registers"] > variant.most_registers:
                wrong.append(f"more than {variant.most_registers} registers: {at}")
    assert not wrong, "\n".join(wrong)
    assert result["compiled"] >= len(declared)
    compare(file, result)


def snapshot() -> dict[str, Any]:
    if not SNAPSHOT.exists():
        return {}
    known: dict[str, Any] = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    return known


def compare(file: Path, result: dict[str, Any]) -> None:
    known = snapshot()
    family, version = file.stem.removeprefix("variants_"), result["triton"]
    if UPDATE:
        known.setdefault(version, {})[family] = result["variants"]
        SNAPSHOT.write_text(dump(known), encoding="utf-8")
        return
    if version not in known:
        warnings.warn(f"{SNAPSHOT.name} has no row for Triton {version}", stacklevel=1)
        return
    assert known[version].get(family) == result["variants"], (
        "what came out has changed; if that is meant, run with CL_FAST_UPDATE_SNAPSHOT=1"
    )


def dump(record: dict[str, Any]) -> str:
    """A line per variant."""
    versions = []
    for version, families in sorted(record.items()):
        blocks = []
        for family, variants in sorted(families.items()):
            rows = ",\n".join(
                f"   {json.dumps(name)}: {json.dumps(seen)}" for name, seen in variants.items()
            )
            blocks.append(f"  {json.dumps(family)}: {{\n{rows}\n  }}")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(blocks) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"
