"""The page of a comparison: sound HTML that asks for nothing, with the numbers of the JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch

from cl_fast.merging.diff import Comparison, compare
from cl_fast.merging.diff_page import page

_VOID = {"meta", "link", "br", "wbr", "hr", "img", "input"}
_ADDRESSES = {"href", "src", "action", "poster", "data", "srcset", "xlink:href", "background"}
HOSTILE = 'layers.0.<script>alert("1")</script>&\'"`\x01\u202e.weight'


def shown(name: str) -> str:
    """A name as the page has it: without what cannot be seen, or turns the text around."""
    return name.replace("\x01", "\ufffd").replace("\u202e", "\ufffd")


class Reader(HTMLParser):
    """Checks that what is opened is closed, and keeps addresses and the cells of tables."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.tags: set[str] = set()
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self._rows: list[list[tuple[str, str | None]]] = []
        self._cell: list[str] | None = None
        self._value: str | None = None
        self._caption = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), (tag, attrs)
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in _ADDRESSES]
        self.handlers += [name for name in given if name.startswith("on")]
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th", "caption"):
            self._cell, self._value = [], given.get("data-v")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag, (tag, self.open)
        if tag == "table":
            self.tables[self._caption] = self._rows
        elif tag in ("td", "th", "caption") and self._cell is not None:
            words = "".join(self._cell)
            if tag == "caption":
                self._caption = words
            else:
                self._rows[-1].append((words, self._value))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of a decoder, with a tensor whose name is an attack, and one left out."""
    root = tmp_path_factory.mktemp("page")
    g = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (40, 64), HOSTILE: (9,), "model.norm.weight": (64,)}
    for i in range(12):
        for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            shapes[f"model.layers.{i}.{kind}.weight"] = (64, 64)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (64,)
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    cases.save(root / "base", base | {"ids": torch.arange(3)})
    for model in ("one", "two", "three"):
        state = {
            name: x + 0.01 * torch.randn(x.shape, generator=g) for name, x in base.items()
        }
        state["model.norm.weight"] = base["model.norm.weight"]
        cases.save(root / model, state | {"ids": torch.arange(3)})
    return root


@pytest.fixture(scope="module")
def compared(root: Path) -> Comparison:
    return compare(root / "base", [root / name for name in ("one", "two", "three")])


@pytest.fixture(scope="module")
def text(compared: Comparison) -> str:
    return page(compared)


def test_the_page_is_sound_and_asks_for_nothing(text: str) -> None:
    reader = read(text)
    assert len(set(reader.ids)) == len(reader.ids)
    for address in reader.addresses:
        assert address == "data:," or (address[0] == "#" and address[1:] in reader.ids)
    assert reader.tags.isdisjoint({"img", "iframe", "object", "embed", "form", "base", "audio"})
    assert reader.handlers == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|WebSocket", text)
    assert "default-src 'none'" in text
    assert text.startswith("<!DOCTYPE html>")
    assert '<html lang="en">' in text


def test_the_same_page_again(root: Path, text: str) -> None:
    again = compare(root / "base", [root / name for name in ("one", "two", "three")], threads=2)
    assert page(again) == text


def test_names_are_escaped(text: str) -> None:
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert "\x01" not in text
    assert "\u202e" not in text
    cells = [cell[0] for row in read(text).tables["All tensors"] for cell in row]
    assert shown(HOSTILE) in cells


def test_every_number_of_the_tensors_is_that_of_the_json(compared: Comparison, text: str) -> None:
    found = json.loads(compared.to_json())
    names = [model["name"] for model in found["models"]]
    head, *rows = read(text).tables["All tensors"]
    assert [cell[0] for cell in head[3:8]] == [
        "L2 of delta",
        "relative L2",
        "L1 of delta",
        "relative L1",
        "largest",
    ]
    keys = ("l2", "relative_l2", "l1", "relative_l1", "max", "relative_max")
    keys += ("changed_share", "kept_share", "weight_outlier", "nonfinite")
    assert len(rows) == 3 * len(found["tensors"])
    listed = iter(rows)
    for tensor in found["tensors"]:
        for name, model in zip(names, tensor["models"], strict=True):
            row = next(listed)
            assert row[0][0] == shown(tensor["name"])
            assert row[1][0] == name
            for key, (words, raw) in zip(keys, row[3:], strict=True):
                if model[key] is None:
                    assert (words, raw) == ("–", None)
                else:
                    assert raw is not None
                    assert float(raw) == model[key]
    cells = read(text).tables["Relative change"][1:]
    assert [float(row[2][1] or 0) for row in cells] == [
        cell["models"][0]["relative_l2"] for cell in found["cells"]
    ]
    cosines = read(text).tables["Cosine of the task vectors"][1:]
    assert [[float(cell[1] or 0) for cell in row[1:]] for row in cosines] == (
        found["whole"]["cosine"]
    )


def test_each_drawing_has_a_title_and_a_table(text: str) -> None:
    drawings = re.findall(r"<svg (?!viewBox=\"0 0 28 8\" aria-hidden)[^>]*>(<title>)?", text)
    assert len(drawings) == 8  # scale, three maps, conflicts, cosines, magnitudes, kept
    assert all(drawings)
    tables = read(text).tables
    for caption in (
        "Relative change",
        "Agreement",
        "Magnitudes of the deltas, share of all elements",
        "Kept by a trim of the whole model to 20 %, by depth",
        "Tensors left out",
    ):
        assert len(tables[caption]) > 1


def test_a_card_names_the_relative_change(text: str) -> None:
    assert "<dt>relative L2 change</dt>" in text
    assert '.wide caption:after{content:" \\2194  scrolls sideways"' in text


def test_pages_of_little(root: Path, tmp_path: Path) -> None:
    alone = page(compare(root / "base", [root / "one"]))
    read(alone)
    assert "Whether they agree" not in alone
    same = page(compare(root / "base", [root / "base", root / "base"]), title="<b>")
    read(same)
    assert "No element was changed" in same
    assert "<h1>&lt;b&gt;</h1>" in same
    for folder, value in (("b", 1.0), ("m", 2.0)):
        cases.save(tmp_path / folder, {"w": torch.full((3,), value)})
    read(page(compare(tmp_path / "b", [tmp_path / "m", tmp_path / "m"])))


# ------------------------------------------------------------------------------------ the browser

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=2000",
]

# What a reader's browser would say, written where --dump-dom shows it.
_PROBE = """
<script>addEventListener('load',function(){
 var f=document.createElement('iframe');f.style.cssText='width:375px;height:800px;border:0';
 f.srcdoc=PAGE;f.onload=function(){
  var d=f.contentDocument,w=f.contentWindow,head=d.querySelectorAll('#tensors thead button');
  head[2].click();
  var first=d.querySelectorAll('#tensors tbody tr')[0].cells[2].dataset.v;
  var rect=d.querySelector('rect.s');
  rect.dispatchEvent(new w.PointerEvent('pointerdown',{bubbles:true,clientX:370,clientY:5}));
  var tip=d.getElementById('tip'),box=tip.getBoundingClientRect();
  d.querySelectorAll('details').forEach(function(e){e.open=true});
  w.setTimeout(function(){
  var tables=Array.prototype.slice.call(d.querySelectorAll('.scroll'));
  function over(t){return t.scrollWidth>t.clientWidth+1}
  document.body.textContent='PROBE'+JSON.stringify({width:d.documentElement.scrollWidth,
   inner:w.innerWidth,svgs:d.querySelectorAll('svg').length,first:first,
   rects:d.querySelectorAll('rect.s').length,tip:tip.hidden?'':tip.textContent,
   over:tables.filter(over).length,
   marked:tables.filter(function(t){return t.matches('.wide')===over(t)}).length,
   tables:tables.length,
   right:box.right,tall:d.documentElement.scrollHeight})+'END'},300)};
 document.body.appendChild(f)})</script>
"""


@pytest.mark.skipif(_CHROMIUM is None, reason="no chromium is installed")
def test_in_a_browser(compared: Comparison, text: str, tmp_path: Path) -> None:
    def browse(path: Path) -> subprocess.CompletedProcess[str]:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [str(_CHROMIUM), *_FLAGS, profile, "--dump-dom", path.as_uri()]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": str(tmp_path)},
        )

    # the page by itself, in a window as wide as a desktop's: it says nothing to the console
    (tmp_path / "page.html").write_text(text)
    alone = browse(tmp_path / "page.html")
    assert "CONSOLE" not in alone.stderr, alone.stderr
    assert 'aria-label="model.layers.0' in alone.stdout  # the script has run
    # in a frame of a phone's width: no browser makes its own window that narrow
    inside = json.dumps(text).replace("</", "<\\/")
    (tmp_path / "probe.html").write_text(
        f"<!DOCTYPE html><body>{_PROBE.replace('PAGE', inside, 1)}"
    )
    probed = browse(tmp_path / "probe.html")
    assert "CONSOLE" not in probed.stderr, probed.stderr
    match = re.search(r"PROBE(\{.*?\})END", probed.stdout)
    assert match, probed.stderr[-2000:]
    found: dict[str, Any] = json.loads(match[1].replace("&amp;", "&"))
    assert found["inner"] == 375
    assert found["width"] <= found["inner"]
    assert found["svgs"] == text.count("<svg")
    assert found["rects"] == text.count('class="s"') > 100
    assert found["tip"]
    assert found["right"] <= 375
    assert found["marked"] == found["tables"] > found["over"] > 0  # those that scroll say so
    largest = max(
        group.statistics.models[0].relative_l2 or 0.0
        for group in sorted(
            compared.tensors,
            key=lambda g: -max(m.relative_l2 or 0.0 for m in g.statistics.models),
        )[:20]
    )
    assert float(found["first"]) == largest

