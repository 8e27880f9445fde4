"""A `Comparison` as one HTML page that needs nothing beside itself.

No request leaves the page: styles, drawings (SVG) and the little script are in it, and a policy in
its head forbids the rest. The script only shows what a cell says and sorts tables; without it all
is there. It follows the reader's light or dark setting and fits a phone. The same comparison gives
the same bytes.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from math import floor, log, log10
from typing import TYPE_CHECKING

from cl_fast._version import __version__
from cl_fast.merging.places import KINDS

if TYPE_CHECKING:
    from cl_fast.merging.diff import Comparison, Group, ModelStatistics

__all__ = ["page"]

_MOST = 20  # tensors in the table of those that moved most
_ALL = 2000  # tensors up to which the page lists all
_PAIRS = 28  # pairs up to which the cosine by depth is drawn

_WIDTH = 360.0  # of a drawing, in its own units: about a pixel on a phone

_COLUMN = {"embed": "emb", "norm": "norm", "router": "rout", "down": "down", "other": "oth"}

_UNMOVED = 'style="fill:transparent;stroke:var(--edge)"'

# Control characters, halves of pairs, and what turns the direction of the text around it.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def page(comparison: Comparison, *, title: str | None = None) -> str:
    """The page. title: by default what is compared with what."""
    c = comparison
    heading = title or f"What {_listed(c.models)} changed of {_short(c.base)}"
    parts = [
        _intro(c, heading),
        _models(c),
        _heat(c),
        _agreement(c) if len(c.models) > 1 else "",
        _magnitudes(c),
        _kept(c),
        _tensors(c),
        _rows(c),
        _outliers(c),
        _all(c),
        _left_out(c),
    ]
    return _FRAME.format(
        title=_text(heading),
        style=_STYLE,
        script=_SCRIPT,
        body="\n".join(filter(None, parts)),
        version=_text(__version__),
    )


# ------------------------------------------------------------------------------------------ words


def _text(value: object) -> str:
    """Text for HTML, also inside of an attribute."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value)))


def _short(reference: str) -> str:
    """The end of a path."""
    return reference.rstrip("/").rsplit("/", 1)[-1] or reference


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{len(names)} models"
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    if value is None:
        return "–"
    if value and abs(value) < 1e-4:
        return f"{100 * value:.1e} %"
    return f"{100 * value:.3g} %" if abs(value) < 0.9995 else f"{100 * value:.4g} %"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _at(index: Sequence[int]) -> str:
    return f"[{', '.join(map(str, index))}]"


# ----------------------------------------------------------------------------------------- pieces

_Cell = tuple[float | str | None, str]
"""What it is sorted by, and what it shows."""
_Line = Sequence[_Cell | str]


def _table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[_Line],
    *,
    tint: Callable[[int, float], str] | None = None,
) -> str:
    """A table that scrolls inside of itself. A cell that is a string heads its row."""
    rows = list(rows)
    texts = {i for row in rows for i, cell in enumerate(row) if _is_text(cell)}
    lines = [
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}">',
        f"<table{' class=small' if tint else ''}><caption>{_text(caption)}</caption><thead><tr>",
        *(
            f'<th scope="col"{" class=t" if i in texts else ""}>{_text(name)}</th>'
            for i, name in enumerate(head)
        ),
        "</tr></thead><tbody>",
    ]
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            if isinstance(cell, str):
                named = _text(cell).replace(".", ".<wbr>")
                whole = f' title="{_text(cell)}"' if tint else ""
                cells.append(f'<th scope="row"{whole}>{named}</th>')
                continue
            value, shown = cell
            raw = "" if value is None else f' data-v="{_text(value)}"'
            style = tint(i, value) if tint and isinstance(value, float) else ""
            kind = ' class="t"' if _is_text(cell) else ""
            cells.append(f"<td{kind}{raw}{style}>{_text(shown)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "".join(lines) + "</tbody></table></div>"


def _is_text(cell: _Cell | str) -> bool:
    return isinstance(cell, str) or isinstance(cell[0], str)


def _details(words: str, inner: str) -> str:
    return f"<details><summary>{_text(words)}</summary>{inner}</details>"


def _section(identifier: str, title: str, words: str, inner: str) -> str:
    return (
        f'<section id="{identifier}"><h2>{_text(title)}</h2>\n<p class="words">{_text(words)}</p>\n'
        f"{inner}\n</section>"
    )


def _figure(title: str, drawing: str, note: str = "") -> str:
    below = f'<p class="note">{note}</p>' if note else ""
    return f"<figure><figcaption>{_text(title)}</figcaption>{drawing}{below}</figure>"


def _svg(title: str, height: float, inner: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{_text(title)}">'
        f"<title>{_text(title)}</title>{''.join(inner)}</svg>"
    )


def _box(x: float, y: float, w: float, h: float, said: str, style: str) -> str:
    return (
        f'<rect class="s" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" {style}>'
        f"<title>{_text(said)}</title></rect>"
    )


def _label(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _nice(top: float) -> list[float]:
    """Ticks from 0 to a round number not far above `top`."""
    if top <= 0:
        return [0.0, 1.0]
    size = 10.0 ** floor(log10(top))
    step = next(s * size for s in (0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0) if top / (s * size) <= 4.5)
    count = -int(-top // step)
    return [step * i for i in range(count + 1)]


def _numbered(c: Comparison) -> bool:
    """Whether numbers stand for the models where there is no place for their names."""
    return len(c.models) > 1 and max(map(len, c.models)) > 8


def _titles(c: Comparison) -> list[str]:
    if not _numbered(c):
        return list(c.models)
    return [f"{i} {name}" for i, name in enumerate(c.models, 1)]


def _layers_of(c: Comparison) -> list[tuple[str, str, Group]]:
    """Stack, number, group."""
    return [(*group.layer.rpartition(".")[::2], group) for group in c.layers]


# --------------------------------------------------------------------------------------- sections


def _intro(c: Comparison, heading: str) -> str:
    whole = c.whole.statistics
    words = (
        f"{len(c.tensors)} tensors with {_count(whole.elements)} elements each, compared with "
        f"{c.base}. A delta is what a model adds to the base: the model's weight minus the base's."
    )
    warnings = []
    if c.left_out:
        warnings.append(
            f"{len(c.left_out)} tensor{'s' if len(c.left_out) > 1 else ''} could not be compared: "
            '<a href="#left-out">which, and why</a>.'
        )
    for name, count in [
        (c.base, whole.base.nonfinite),
        *((n, m.nonfinite) for n, m in zip(c.models, whole.models, strict=True)),
    ]:
        if count:
            warnings.append(
                f"{_text(name)} holds {count} NaN or infinite elements; they count as unchanged."
            )
    listed = "".join(f'<p class="warn">{warning}</p>' for warning in warnings)
    return f"<header><h1>{_text(heading)}</h1><p>{_text(words)}</p>{listed}</header>"


def _models(c: Comparison) -> str:
    whole = c.whole.statistics
    cards = []
    for i, (name, reference, model) in enumerate(
        zip(_titles(c), c.references, whole.models, strict=True)
    ):
        facts = [
            ("relative L2 change", _percent(model.relative_l2)),
            ("of the elements changed", _percent(model.changed_share)),
            ("largest change", _number(model.max)),
        ]
        listed = "".join(
            f"<div><dd>{_text(value)}</dd><dt>{_text(words)}</dt></div>" for words, value in facts
        )
        cards.append(
            f'<article class="card m{i % 6}"><h3>{_text(name)}</h3>'
            f'<p class="path">{_text(reference)}</p><dl>{listed}</dl></article>'
        )
    head = ["model", *_NUMBERS]
    rows: list[_Line] = [
        [name, *_numbers(model)] for name, model in zip(c.models, whole.models, strict=True)
    ]
    return _section(
        "models",
        "The models",
        "How far each model is from the base, over all tensors together.",
        f'<div class="cards">{"".join(cards)}</div>'
        + _details("All numbers", _table("Whole model", head, rows)),
    )


#: What stands above the cells of `_numbers`.
_NUMBERS = (
    "L2 of delta",
    "relative L2",
    "L1 of delta",
    "relative L1",
    "largest",
    "relative largest",
    "changed",
    "kept by a 20 % trim",
    "largest weight / rms",
    "NaN, inf",
)


def _numbers(m: ModelStatistics) -> list[_Cell]:
    return [
        (m.l2, _number(m.l2)),
        (m.relative_l2, _percent(m.relative_l2)),
        (m.l1, _number(m.l1)),
        (m.relative_l1, _percent(m.relative_l1)),
        (m.max, _number(m.max)),
        (m.relative_max, _percent(m.relative_max)),
        (m.changed_share, _percent(m.changed_share)),
        (m.kept_share, _percent(m.kept_share)),
        (m.weight_outlier, _number(m.weight_outlier)),
        (float(m.nonfinite), str(m.nonfinite)),
    ]


def _heat(c: Comparison) -> str:
    kinds = [kind for kind in KINDS if any(cell.kind == kind for cell in c.cells)]
    values = sorted(
        model.relative_l2
        for cell in c.cells
        for model in cell.statistics.models
        if model.relative_l2
    ) or [1.0]
    # The few that moved by far more, or less, than all others would leave these in one colour.
    low, high = values[len(values) // 8], values[-1 - len(values) // 50]

    def depth(value: float) -> float:
        at = log(value / low) / log(high / low) if high > low else 1.0
        return 0.06 + 0.76 * min(1.0, max(0.0, at))

    figures = [_figure(name, _heat_map(c, k, kinds, depth)) for k, name in enumerate(c.models)]
    legend = _svg(
        f"Scale from {_percent(low)} to {_percent(high)}",
        30,
        [
            *(
                _box(
                    60 + 8 * i,
                    2,
                    8,
                    12,
                    _percent(low * (high / low) ** (i / 29)),
                    f'fill="#e06020" fill-opacity="{0.06 + 0.76 * i / 29:.2f}"',
                )
                for i in range(30)
            ),
            _label(60, 26, f"≤ {_percent(low)}", "start"),
            _label(180, 26, _percent((low * high) ** 0.5)),
            _label(300, 26, f"≥ {_percent(high)}", "end"),
        ],
    )
    rows: list[_Line] = []
    for cell in c.cells:
        place = cell.layer or "outside the layers"
        rows.append(
            [
                place,
                (cell.kind, KINDS[cell.kind]),
                *((m.relative_l2, _percent(m.relative_l2)) for m in cell.statistics.models),
            ]
        )
    return _section(
        "where",
        "Where they changed",
        "Relative change, ||delta|| / ||base||, of each kind of module in each layer; one scale "
        "for all models, logarithmic. The bottom row is what stands outside the layers.",
        f'<div class="legend">{legend}</div><div class="grid">{"".join(figures)}</div>'
        + _details(
            "The same in numbers",
            _table("Relative change", ["layer", "kind", *c.models], rows),
        ),
    )


def _heat_map(c: Comparison, k: int, kinds: list[str], depth: Callable[[float], float]) -> str:
    layers = list(dict.fromkeys(cell.layer for cell in c.cells if cell.layer))
    stacks = dict.fromkeys(layer.rpartition(".")[0] for layer in layers)
    found = {(cell.layer, cell.kind): cell.statistics.models[k] for cell in c.cells}
    left = 34.0
    width = (_WIDTH - left) / max(1, len(kinds))
    height = max(7.0, min(16.0, 420.0 / max(1, len(layers))))
    parts = [
        _label(left + (i + 0.5) * width, 10, _COLUMN.get(kind, kind))
        for i, kind in enumerate(kinds)
    ]
    y, stack = 15.0, None
    every = 1 if height >= 10 else 2
    for layer in [*layers, ""]:
        before, _, number = layer.rpartition(".")
        if layer and before != stack and len(stacks) > 1:
            parts.append(_label(0, y + 11, before, "start"))
            y += 15.0
        stack = before
        if not layer:
            y += 4.0
        if not layer or int(number) % every == 0:
            parts.append(_label(left - 5, y + height / 2 + 4, number or "–", "end"))
        for i, kind in enumerate(kinds):
            model = found.get((layer, kind))
            if model is None:
                continue
            said = (
                f"{layer or 'outside the layers'}, {KINDS[kind]}: {_percent(model.relative_l2)} "
                f"relative change, {_percent(model.changed_share)} of the elements changed"
            )
            shade = (
                f'fill="#e06020" fill-opacity="{depth(model.relative_l2):.2f}"'
                if model.relative_l2
                else _UNMOVED
            )
            parts.append(_box(left + i * width + 0.5, y, width - 1, height - 1, said, shade))
        y += height
    return _svg(f"Relative change of {c.models[k]} by layer and kind of module", y + 2, parts)


def _tint(value: float) -> str:
    colour = "40,110,220" if value >= 0 else "224,96,32"
    return f' style="background:rgba({colour},{0.8 * min(1.0, abs(value)):.2f})"'


def _agreement(c: Comparison) -> str:
    whole = c.whole.statistics
    names = c.models
    rows = _titles(c)
    columns = [title.split(" ")[0] if _numbered(c) else title for title in rows]
    cosines: list[_Line] = [
        [name, *((value, _signed(value)) for value in whole.cosine[i])]
        for i, name in enumerate(rows)
    ]
    cosine = _table(
        "Cosine of the task vectors",
        ["", *columns],
        cosines,
        tint=lambda _, value: _tint(value),
    )
    conflicts: list[_Line] = [
        [
            name,
            *(
                (None, "–") if i == j else (value, _percent(value))
                for j, value in enumerate(whole.conflict[i])
            ),
        ]
        for i, name in enumerate(rows)
    ]
    conflict = _table(
        "Sign conflicts of two models, share of all elements",
        ["", *columns],
        conflicts,
        tint=lambda _, value: _tint(-value),
    )
    of_shared = whole.conflicts / whole.shared if whole.shared else 0.0
    words = (
        "Cosine near 0: the models changed unrelated things, and their deltas add. Near 1: they "
        "learned the same. Below 0: they work against each other. A sign conflict is an element "
        f"that models pull in opposite directions: {_percent(whole.conflict_share)} of all "
        f"elements, {_percent(of_shared)} of those that two or more models change. TIES elects one "
        "direction there; a plain sum cancels."
    )
    figures = [_conflict_bars(c)] if c.layers else []
    pairs = len(names) * (len(names) - 1) // 2
    if c.layers and pairs <= _PAIRS:
        figures.append(_cosine_map(c))
    layers: list[_Line] = [
        [
            group.layer,
            (group.statistics.conflict_share, _percent(group.statistics.conflict_share)),
            *(
                (value, _signed(value))
                for i in range(len(names))
                for value in group.statistics.cosine[i][i + 1 :]
            ),
        ]
        for group in c.layers
    ]
    head = [
        "layer",
        "sign conflicts",
        *(
            f"cosine {names[i]}, {names[j]}"
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ),
    ]
    return _section(
        "agreement",
        "Whether they agree",
        words,
        f'<div class="{"grid" if len(names) < 5 else "stack"}">{cosine}{conflict}</div>'
        f'<div class="grid">{"".join(figures)}</div>'
        + (_details("By layer, in numbers", _table("Agreement", head, layers)) if layers else ""),
    )


def _axes(
    ticks: Sequence[float], bottom: float, top: float, left: float, shown: Callable[[float], str]
) -> list[str]:
    parts = []
    for tick in ticks:
        y = bottom - (bottom - top) * tick / ticks[-1]
        parts += [_line(left, y, _WIDTH, y, "grid"), _label(left - 4, y + 4, shown(tick), "end")]
    return parts


def _depth_ticks(layers: Sequence[tuple[str, str, Group]], left: float, y: float) -> list[str]:
    step = (_WIDTH - left) / len(layers)
    every = max(1, -(-len(layers) // 12))
    return [
        _label(left + (i + 0.5) * step, y, number)
        for i, (_, number, _) in enumerate(layers)
        if int(number) % every == 0
    ]


def _conflict_bars(c: Comparison) -> str:
    layers = _layers_of(c)
    left, top, bottom = 44.0, 8.0, 150.0
    shares = [group.statistics.conflict_share for _, _, group in layers]
    ticks = _nice(max(shares))
    step = (_WIDTH - left) / len(layers)
    parts = _axes(ticks, bottom, top, left, _percent)
    for i, ((_, _, group), share) in enumerate(zip(layers, shares, strict=True)):
        s = group.statistics
        height = (bottom - top) * share / ticks[-1]
        of = s.conflicts / s.shared if s.shared else 0.0
        said = (
            f"{group.layer}: {_percent(share)} of the elements in conflict, {_percent(of)} of "
            "those that two or more models change"
        )
        x, width = left + i * step + 0.08 * step, 0.84 * step
        parts.append(_box(x, bottom - height, width, height, said, 'fill="#e06020"'))
    parts += [_line(left, bottom, _WIDTH, bottom), *_depth_ticks(layers, left, bottom + 14)]
    parts.append(_label((left + _WIDTH) / 2, bottom + 29, "layer"))
    title = "Sign conflicts by depth, share of all elements"
    return _figure(title, _svg(title, bottom + 34, parts))


def _cosine_map(c: Comparison) -> str:
    layers = _layers_of(c)
    names = c.models
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    left = 44.0
    step = (_WIDTH - left) / len(layers)
    height = max(10.0, min(30.0, 120.0 / len(pairs)))
    top = max(
        (
            abs(value)
            for group in c.layers
            for i, j in pairs
            if (value := group.statistics.cosine[i][j]) is not None
        ),
        default=1.0,
    )
    parts = []
    for row, (i, j) in enumerate(pairs):
        y = 4.0 + row * height
        parts.append(_label(left - 5, y + height / 2 + 4, f"{i + 1} · {j + 1}", "end"))
        for x, (_, _, group) in enumerate(layers):
            value = group.statistics.cosine[i][j]
            said = f"{group.layer}: cosine {_signed(value)} of {names[i]} and {names[j]}"
            colour = "#286edc" if value is None or value >= 0 else "#e06020"
            shade = (
                f'fill="{colour}" fill-opacity="{0.04 + 0.8 * abs(value) / top:.2f}"'
                if value and top
                else _UNMOVED
            )
            parts.append(_box(left + x * step + 0.3, y, step - 0.6, height - 1, said, shade))
    bottom = 4.0 + len(pairs) * height
    parts += _depth_ticks(layers, left, bottom + 14)
    parts.append(_label((left + _WIDTH) / 2, bottom + 29, "layer"))
    numbered = ", ".join(f"{i} {_text(name)}" for i, name in enumerate(names, 1))
    title = "Cosine of each two task vectors by depth"
    note = f"{numbered}. Blue: alike; orange: opposed; full colour: {_number(top)}."
    return _figure(title, _svg(title, bottom + 34, parts), note)


def _legend(c: Comparison) -> str:
    return (
        '<ul class="keys">'
        + "".join(
            f'<li><svg viewBox="0 0 28 8" aria-hidden="true"><path class="line m{i % 6}" '
            f'd="M0 4H28"/></svg>{_text(name)}</li>'
            for i, name in enumerate(c.models)
        )
        + "</ul>"
    )


def _magnitudes(c: Comparison) -> str:
    if not c.edges:
        return _section("magnitudes", "How large the changes are", "No element was changed.", "")
    elements = c.whole.statistics.elements
    shares = [[count / elements for count in counts] for counts in c.histogram]
    # from where one in a million lies in a bin: the drawing need not show the single elements below
    seen = [
        i for i in range(len(c.edges) - 1) if any(share[i] >= 1e-6 for share in shares)
    ] or list(range(len(c.edges) - 1))
    low, high = seen[0], seen[-1] + 1
    left, top, bottom = 44.0, 8.0, 170.0
    ticks = _nice(max(max(share[low:high]) for share in shares))
    step = (_WIDTH - left - 6) / (high - low)
    parts = _axes(ticks, bottom, top, left, _percent)
    exponents = [round(log(edge, 2)) for edge in c.edges]

    def x_of(magnitude: float) -> float:
        return left + step * (log(magnitude, 2) - exponents[low])

    for power in range(-45, 40):
        if c.edges[low] <= 10.0**power <= c.edges[high]:
            x = x_of(10.0**power)
            parts += [_line(x, bottom, x, bottom + 4), _label(x, bottom + 16, f"1e{power}")]
    for k, share in enumerate(shares):
        path = f"M{left:.1f} {bottom:.1f}"
        for i in range(low, high):
            y = bottom - (bottom - top) * share[i] / ticks[-1]
            path += f"V{y:.1f}H{left + step * (i - low + 1):.1f}"
        parts.append(f'<path class="line m{k % 6}" d="{path}V{bottom:.1f}"/>')
    for i in range(low, high):
        said = f"{_number(c.edges[i])} to {_number(c.edges[i + 1])}: " + ", ".join(
            f"{name} {_percent(share[i])}" for name, share in zip(c.models, shares, strict=True)
        )
        parts.append(
            _box(left + step * (i - low), top, step, bottom - top, said, 'fill="transparent"')
        )
    parts += [
        _line(left, bottom, _WIDTH, bottom),
        _label((left + _WIDTH) / 2, bottom + 31, "|delta|"),
    ]
    title = "Magnitudes of the deltas, share of all elements"
    sampled = c.sampled / elements if elements else 0.0
    how = (
        "Every element was counted."
        if c.sampled == elements
        else f"Counted on {_percent(sampled)} of the elements: 16 neighbours of each 512, and all "
        "of small tensors."
    )
    words = (
        f"Each bin is twice as wide as the one before. {how} Elements that were not changed are "
        "left out."
    )
    rows: list[_Line] = [
        [
            f"{_number(c.edges[i])} to {_number(c.edges[i + 1])}",
            *((share[i], _percent(share[i])) for share in shares),
        ]
        for i in range(len(c.edges) - 1)
    ]
    return _section(
        "magnitudes",
        "How large the changes are",
        words,
        _legend(c)
        + _figure(title, _svg(title, bottom + 36, parts))
        + _details("In numbers", _table(title, ["|delta|", *c.models], rows)),
    )


def _kept(c: Comparison) -> str:
    layers = _layers_of(c)
    if not layers:
        return ""
    left, top, bottom = 44.0, 8.0, 150.0
    step = (_WIDTH - left) / len(layers)
    shares = [
        [group.statistics.models[k].kept_share for _, _, group in layers]
        for k in range(len(c.models))
    ]
    ticks = _nice(max(0.2, *(max(share) for share in shares)))
    parts = _axes(ticks, bottom, top, left, _percent)
    y = bottom - (bottom - top) * 0.2 / ticks[-1]
    parts.append(_line(left, y, _WIDTH, y, "mark"))
    for k, share in enumerate(shares):
        points = " ".join(
            f"{left + (i + 0.5) * step:.1f},{bottom - (bottom - top) * value / ticks[-1]:.1f}"
            for i, value in enumerate(share)
        )
        parts.append(f'<polyline class="line m{k % 6}" points="{points}"/>')
    for i, (_, _, group) in enumerate(layers):
        said = f"{group.layer}: " + ", ".join(
            f"{name} {_percent(share[i])}" for name, share in zip(c.models, shares, strict=True)
        )
        parts.append(_box(left + i * step, top, step, bottom - top, said, 'fill="transparent"'))
    parts += [_line(left, bottom, _WIDTH, bottom), *_depth_ticks(layers, left, bottom + 14)]
    parts.append(_label((left + _WIDTH) / 2, bottom + 29, "layer"))
    title = "Kept by a trim of the whole model to 20 %, by depth"
    rows: list[_Line] = [
        [group.layer, *((share[i], _percent(share[i])) for share in shares)]
        for i, (_, _, group) in enumerate(layers)
    ]
    cuts = ", ".join(
        f"{_number(cut)} in {name}" for name, cut in zip(c.models, c.thresholds, strict=True)
    )
    cuts = f": what is kept lies above {cuts}" if len(c.models) < 5 else ""
    return _section(
        "kept",
        "What a trim keeps",
        "TIES keeps the largest 20 % of each delta. Taken over the whole model, layers that moved "
        "far keep more than those that did not (dashed: 20 %). Estimated from the sample"
        f"{cuts}.",
        _legend(c)
        + _figure(title, _svg(title, bottom + 34, parts))
        + _details("In numbers", _table(title, ["layer", *c.models], rows)),
    )


def _most(group: Group) -> float:
    return max(model.relative_l2 or 0.0 for model in group.statistics.models)


def _tensors(c: Comparison) -> str:
    moved = sorted(c.tensors, key=_most, reverse=True)[:_MOST]
    rows: list[_Line] = [
        [
            group.name,
            (group.kind, KINDS[group.kind]),
            *((m.relative_l2, _percent(m.relative_l2)) for m in group.statistics.models),
            (group.statistics.conflict_share, _percent(group.statistics.conflict_share)),
        ]
        for group in moved
        if _most(group) > 0
    ]
    if not rows:
        return ""
    head = ["tensor", "kind", *(f"{name}, relative L2" for name in c.models), "sign conflicts"]
    return _section(
        "tensors",
        "The tensors that moved most",
        "By their largest relative change. Small tensors such as biases come first easily: their "
        "base is near zero.",
        _table("Tensors that moved most", head, rows),
    )


def _rows(c: Comparison) -> str:
    if not c.rows:
        return ""
    most = max(5, 60 // len(c.models))
    rows: list[_Line] = [
        [
            row.tensor,
            (_at(row.index), _at(row.index)),
            (row.model, row.model),
            (row.l2, _number(row.l2)),
            (row.relative_l2, _percent(row.relative_l2)),
        ]
        for name in c.models
        for row in [row for row in c.rows if row.model == name][:most]
    ]
    return _section(
        "rows",
        "The rows that moved farthest",
        "A row is one output of a weight matrix, or one token of the embeddings. By the L2 norm of "
        "its delta, for each model.",
        _table("Rows that moved farthest", ["tensor", "row", "model", "L2", "relative L2"], rows),
    )


def _outliers(c: Comparison) -> str:
    if not c.outliers:
        return ""
    rows: list[_Line] = [
        [
            outlier.tensor,
            (_at(outlier.index), _at(outlier.index)),
            (outlier.model, outlier.model),
            (outlier.magnitude, _number(outlier.magnitude)),
            (outlier.ratio, _number(outlier.ratio)),
        ]
        for outlier in c.outliers
    ]
    return _section(
        "outliers",
        "Weights that stand out",
        "The largest weight of a matrix over the root mean square of the matrix. Much above 30, "
        "quantisation by a common scale loses the others.",
        _table("Weight outliers", ["tensor", "place", "in", "magnitude", "over rms"], rows),
    )


def _all(c: Comparison) -> str:
    if len(c.tensors) > _ALL:
        words = f"There are {len(c.tensors)} tensors; the JSON file (--json) lists them all."
        return _section("all", "All tensors", words, "")
    head = ["tensor", "model", "shape", *_NUMBERS]
    rows: list[_Line] = [
        [group.name, (name, name), (_at(group.shape or ()), _at(group.shape or ())), *_numbers(m)]
        for group in c.tensors
        for name, m in zip(c.models, group.statistics.models, strict=True)
    ]
    return _section(
        "all",
        "All tensors",
        "",
        _details(f"{len(c.tensors)} tensors", _table("All tensors", head, rows)),
    )


def _left_out(c: Comparison) -> str:
    if not c.left_out:
        return ""
    rows: list[_Line] = [
        [tensor.name, (tensor.reason, tensor.reason)] for tensor in c.left_out[:_ALL]
    ]
    return _section(
        "left-out",
        "Not compared",
        "Tensors that only some of the models have, in another shape, or that hold no numbers to "
        "compare.",
        _table("Tensors left out", ["tensor", "why"], rows),
    )


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; \
form-action 'none'">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>cl_fast {version}</footer>
<div id="tip" role="status" hidden></div>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root{--ink:#1a1d21;--soft:#5c646e;--paper:#fff;--panel:#f5f6f8;--edge:#d9dde3;--warn:#8a4b00;
--m0:#1f6fd6;--m1:#d6540f;--m2:#1a8a4b;--m3:#8a3fc4;--m4:#b0205e;--m5:#6b6f00}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a2aab4;--paper:#14171b;
--panel:#1d2126;--edge:#343b44;--warn:#f0b35a;
--m0:#6fa8f5;--m1:#f28a4f;--m2:#58c68a;--m3:#c08cf0;--m4:#f07aa8;--m5:#c9cc5a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,footer{max-width:1180px;margin:0 auto;padding:0 16px}
header{padding:28px 0 8px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:0 0 4px}
h3{font-size:1rem;margin:0;overflow-wrap:anywhere}
p{margin:0 0 12px;overflow-wrap:anywhere}
section{padding:22px 0;border-top:1px solid var(--edge)}
.words,.note,.path,dt,footer{color:var(--soft)}
.words{max-width:72ch}.note,.path,footer{font-size:.85rem}
.warn{color:var(--warn);font-weight:600}
a{color:inherit}
.cards,.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));
margin-bottom:16px}
.card{background:var(--panel);border-radius:8px;border-left:4px solid;padding:12px 14px;min-width:0}
.card.m0{border-color:var(--m0)}.card.m1{border-color:var(--m1)}.card.m2{border-color:var(--m2)}
.card.m3{border-color:var(--m3)}.card.m4{border-color:var(--m4)}.card.m5{border-color:var(--m5)}
dl{display:grid;grid-template-columns:repeat(3,1fr);gap:8px;margin:0}
dl div{display:flex;flex-direction:column}
dt{font-size:.78rem;line-height:1.3}dd{margin:0;font-size:1.15rem;font-weight:600}
figure{margin:0;min-width:0;background:var(--panel);border-radius:8px;padding:12px}
figcaption{font-weight:600;margin-bottom:6px;overflow-wrap:anywhere}
section>figure{max-width:640px;margin-bottom:12px}
svg{display:block;width:100%;height:auto}
svg text{font-size:10.5px;fill:var(--soft)}
.legend{max-width:400px}
.axis{stroke:var(--soft)}.grid line,line.grid{stroke:var(--edge)}
line.mark{stroke:var(--soft);stroke-dasharray:5 4}
rect.s:hover,rect.s.on{stroke:var(--ink);stroke-width:1.2}
.line{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}
.line.m0{stroke:var(--m0)}.line.m1{stroke:var(--m1);stroke-dasharray:7 3}
.line.m2{stroke:var(--m2);stroke-dasharray:2 3}.line.m3{stroke:var(--m3);stroke-dasharray:9 3 2 3}
.line.m4{stroke:var(--m4);stroke-dasharray:4 4}.line.m5{stroke:var(--m5);stroke-dasharray:1 4}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:0 0 10px}
.keys li{display:flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.keys svg{width:28px;height:8px;flex:none}
.scroll{overflow-x:auto;max-width:100%;min-width:0;background:
linear-gradient(90deg,var(--paper) 30%,transparent) 0 0/48px 100% no-repeat local,
linear-gradient(270deg,var(--paper) 30%,transparent) 100% 0/48px 100% no-repeat local,
linear-gradient(90deg,var(--soft),transparent) 0 0/12px 100% no-repeat scroll,
linear-gradient(270deg,var(--soft),transparent) 100% 0/12px 100% no-repeat scroll}
.wide caption:after{content:" \\2194  scrolls sideways";font-weight:400;color:var(--soft)}
details .scroll{max-height:70vh;overflow-y:auto}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:0 0 6px}
th,td{padding:4px 10px;border-bottom:1px solid var(--edge);text-align:right;white-space:nowrap}
tbody th{font-weight:400;text-align:left;white-space:normal;overflow-wrap:anywhere;
min-width:9.5rem;max-width:26rem}
thead th{font-weight:600;vertical-align:bottom;white-space:normal;max-width:9rem}
thead th.t,td.t{text-align:left}
table.small tbody th{min-width:0;max-width:8.5rem;overflow:hidden;text-overflow:ellipsis;
white-space:nowrap}
.stack>*{margin-bottom:16px}
td.t{white-space:normal;overflow-wrap:anywhere;min-width:6rem}
thead button{all:unset;cursor:pointer}
thead button:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--m0)}
th[aria-sort=descending] button:after{content:" \\2193"}
th[aria-sort=ascending] button:after{content:" \\2191"}
summary{cursor:pointer;padding:6px 0;color:var(--soft)}
#tip{position:fixed;z-index:2;max-width:min(320px,90vw);padding:6px 9px;border-radius:6px;
background:var(--ink);color:var(--paper);font-size:.82rem;pointer-events:none;
overflow-wrap:anywhere}
footer{padding:16px 16px 40px}
@media print{details .scroll{max-height:none}#tip{display:none}}
"""

_SCRIPT = """
(function(){
var tip=document.getElementById('tip'),on=null;
document.querySelectorAll('rect.s').forEach(function(r){
  var t=r.querySelector('title');r.dataset.say=t.textContent;t.remove();
  r.setAttribute('aria-label',r.dataset.say)});
function show(r,e){
  if(on)on.classList.remove('on');on=r;
  if(!r){tip.hidden=true;return}
  r.classList.add('on');tip.textContent=r.dataset.say;tip.hidden=false;
  var w=tip.offsetWidth,h=tip.offsetHeight,x=e.clientX+12,y=e.clientY+14;
  if(x+w>innerWidth-8)x=Math.max(8,innerWidth-8-w);
  if(y+h>innerHeight-8)y=Math.max(8,e.clientY-h-12);
  tip.style.left=x+'px';tip.style.top=y+'px'}
['pointermove','pointerdown'].forEach(function(n){document.addEventListener(n,function(e){
  show(e.target.closest?e.target.closest('rect.s'):null,e)})});
document.addEventListener('scroll',function(){show(null)},{passive:true});
if(window.ResizeObserver){
  var wide=new ResizeObserver(function(all){all.forEach(function(entry){
    var d=entry.target;d.classList.toggle('wide',d.scrollWidth>d.clientWidth+1)})});
  document.querySelectorAll('.scroll').forEach(function(d){wide.observe(d)})}
document.querySelectorAll('table').forEach(function(table){
  var body=table.tBodies[0];if(body.rows.length<3)return;
  Array.prototype.forEach.call(table.tHead.rows[0].cells,function(th,i){
    if(!th.textContent)return;
    var b=document.createElement('button');b.type='button';b.textContent=th.textContent;
    th.textContent='';th.appendChild(b);
    b.addEventListener('click',function(){
      var down=th.getAttribute('aria-sort')!=='descending';
      Array.prototype.forEach.call(th.parentNode.cells,function(o){o.removeAttribute('aria-sort')});
      th.setAttribute('aria-sort',down?'descending':'ascending');
      function key(row){var c=row.cells[i];return c.hasAttribute('data-v')?c.dataset.v:
        c.tagName==='TH'?c.textContent:''}
      Array.prototype.slice.call(body.rows).sort(function(p,q){
        var x=key(p),y=key(q),d;
        if(x===''||y==='')return(x==='')-(y==='');
        d=isNaN(x)||isNaN(y)?(x<y?-1:x>y?1:0):x-y;
        return down?-d:d}).forEach(function(row){body.appendChild(row)})})})});
})();
"""
