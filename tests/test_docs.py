"""What the pages say exists: links lead somewhere, Python compiles, its names are ours."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """Line numbers and contents of the blocks of Python."""
    for found in _FENCE.finditer(text):
        if found[2] == "python":
            yield text[: found.start(3)].count("\n") + 1, textwrap.dedent(found[3])


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.lower()) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def dead_links(path: Path, text: str) -> list[str]:
    dead = []
    for target in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists() or (
            anchor and there.suffix == ".md" and anchor not in anchors(there.read_text("utf-8"))
        ):
            dead.append(target)
    return dead


def wrong_names(text: str) -> list[str]:
    """Imports from cl_fast that fail; where a host is not installed, nothing is said."""
    wrong = []
    for line, block in blocks(text):
        for node in ast.walk(ast.parse(block)):
            names: list[tuple[str, str | None]] = []
            if isinstance(node, ast.ImportFrom):
                names = [(node.module or "", alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [(alias.name, None) for alias in node.names]
            for module, name in names:
                if module.split(".")[0] == "cl_fast" and not _exists(module, name):
                    wrong.append(f"line {line + node.lineno - 1}: {module} {name or ''}")
    return wrong


def _exists(module: str, name: str | None) -> bool:
    try:
        imported = importlib.import_module(module)
        if name is not None and not hasattr(imported, name):
            importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        return not (error.name or "").startswith("cl_fast")
    return True


@page
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path, path.read_text("utf-8")) == []


@page
def test_python_compiles(path: Path) -> None:
    for line, block in blocks(path.read_text("utf-8")):
        try:
            ast.parse(block)
        except SyntaxError as error:
            pytest.fail(f"{path.name}:{line + (error.lineno or 1) - 1}: {error.msg}")


@page
def test_imports_resolve(path: Path) -> None:
    assert wrong_names(path.read_text("utf-8")) == []


def test_what_is_wrong_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    text = "# A b, c\n[x](gone.md) [y](#a-b-c) [z](#d) [w](page.md#a-b-c) [v](https://x.org/y)\n"
    path.write_text(text)
    assert dead_links(path, text) == ["gone.md", "#d"]
    code = (
        "1\n\n  ```python\n  from cl_fast.training import Keep, Kept\n  import cl_fast.x\n  ```\n"
    )
    assert wrong_names(code) == ["line 4: cl_fast.training Kept", "line 5: cl_fast.x "]
