"""Who may import whom: read from the sources, so that the house keeps its shape."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room imports from its own floor's room and from floors below. Longest prefix wins.
FLOORS = {
    "cl_fast": 6,
    "cl_fast.__main__": 6,
    "cl_fast.cli": 6,
    "cl_fast.environment": 6,
    "cl_fast.learning": 5,
    "cl_fast.integrations": 4,
    "cl_fast.merging": 3,
    "cl_fast.editing": 3,
    "cl_fast.training": 3,
    "cl_fast.models": 2,
    "cl_fast.checkpoints": 2,
    "cl_fast.losses": 2,
    "cl_fast.ops": 1,
    "cl_fast.backends": 0,
    # Free of torch; the words and numbers that ops and backends share.
    "cl_fast.ops.policy": 0,
    "cl_fast.ops.streams": 0,
    "cl_fast._native": -1,
    "cl_fast.triton_kernels": -1,
    "cl_fast.documents": -1,
    "cl_fast.errors": -1,
    "cl_fast.options": -1,
    "cl_fast._version": -1,
}
SIDE_BY_SIDE = {"cl_fast.merging", "cl_fast.editing", "cl_fast.training"}


def room(module: str) -> str:
    parts = module.split(".")
    while ".".join(parts) not in FLOORS:
        parts.pop()
    return ".".join(parts)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "cl_fast").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules imported anywhere in a file, except for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            # `from cl_fast.ops import policy` names a module, `... import combine` does not.
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in FLOORS else node.module), node.lineno


def test_rooms_import_from_floors_below() -> None:
    wrong = []
    for module, path in modules():
        if module == "cl_fast":
            continue  # opens every room lazily
        here = room(module)
        for imported, line in imports(path):
            if imported.split(".")[0] != "cl_fast" or imported == "cl_fast":
                continue
            there = room(imported)
            beside = here != there and {here, there} <= SIDE_BY_SIDE
            if FLOORS[there] > FLOORS[here] or beside:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {here} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_floor() -> None:
    unnamed = [module for module, _ in modules() if room(module) == "cl_fast" != module]
    assert not unnamed, f"name the floor of {unnamed} in {Path(__file__).name}"


def test_triton_kernels_know_nothing_of_cl_fast() -> None:
    for path in (ROOT / "triton_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert name.split(".")[0] not in {"cl_fast", "triton_kernels"}, (path, name)


def test_csrc_knows_nothing_of_torch_and_only_the_bindings_of_python() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"))
        for include in includes:
            assert not include.startswith(("torch", "ATen", "c10")), (path, include)
            if include.startswith(("pybind11", "Python.h")):
                assert path.name == "bindings.cpp", (path, include)


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import cl_fast", ()),
        ("import cl_fast.cli", ()),
        ("import cl_fast.backends.native", ()),
        ("import cl_fast.merging.plan, cl_fast.checkpoints", ("pydantic", "yaml")),
        ("from cl_fast.ops import Policy, stream_key", ()),
    ],
)
def test_imports_are_light(statement: str, allowed: tuple[str, ...]) -> None:
    heavy = {"torch", "numpy", "transformers", "triton", "pydantic", "yaml", "tqdm"} - set(allowed)
    code = f"{statement}\nimport sys\nprint(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == ""
