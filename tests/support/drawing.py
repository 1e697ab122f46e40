"""Draw docs/architecture.svg: the packages, their files, and who imports from whom.

Usage: ``python tests/support/drawing.py``. `tests/whole/test_drawing.py` fails when the file is not
what this draws. The imports come from `imports.py` beside it, so nothing of the package is imported
or run, and this works without dependencies.

Each row is a layer of `LAYERS`. An import that follows from others is left out: where A imports
from B and C, and B from C, the drawing has A–B and B–C. `LOOKS_UP` is left out, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from textwrap import wrap

from imports import LAYERS, LOOKS_UP, ROOT, Module, package_graph, read_modules

FILE = ROOT / "docs" / "architecture.svg"
MARGIN = 24
BETWEEN_ROWS = 34
BETWEEN_BOXES = 26
PADDING = 10
LINE = 15
"""Height of a line of text."""
LETTER = 6.6
"""Width of a letter of the file names, at most."""
LETTERS = 58
"""In a line of file names, at most."""
SWEEPS = 12
"""How often the rows are put in order by their neighbours. The order stays the same after a few."""
SHOWN = {"__init__": "psofa_gevent (the public names)"}

Graph = dict[str, set[str]]


@dataclass
class Place:
    """Where a package stands in the drawing, or where a line passes a row (`lines` is empty)."""

    lines: list[str] = field(default_factory=list)
    x: float = 0.0
    top: float = 0.0
    bottom: float = 0.0

    @property
    def width(self) -> float:
        if not self.lines:
            return 0.0
        return max(len(line) for line in self.lines) * LETTER + 2 * PADDING

    @property
    def height(self) -> float:
        return len(self.lines) * LINE + PADDING if self.lines else 0.0


def drawn(modules: Mapping[str, Module]) -> str:
    """The drawing, as the text of an SVG file."""
    graph = shortened(package_graph(modules))
    rows, places, lines = arranged(graph, modules)
    width = max(_width(row, places) for row in rows) + 2 * MARGIN
    y = float(MARGIN)
    for row in rows:
        x = (width - _width(row, places)) / 2
        height = max(places[name].height for name in row)
        for name in row:
            place = places[name]
            place.x = x + place.width / 2
            tall = place.height or height  # a line passes its row straight
            place.top = y + (height - tall) / 2
            place.bottom = place.top + tall
            x += place.width + BETWEEN_BOXES
        y += height + BETWEEN_ROWS
    parts = [*_start(width, y - BETWEEN_ROWS + MARGIN)]
    parts += [_line([places[name] for name in line]) for line in lines]
    for name in graph:
        parts += _box(places[name])
    return "\n".join([*parts, "</svg>", ""])


def shortened(graph: Mapping[str, set[str]]) -> Graph:
    """The graph without `LOOKS_UP`, and without the imports that follow from others."""
    left = {name: others - LOOKS_UP for name, others in graph.items() if name not in LOOKS_UP}
    below: Graph = {}
    for layer in reversed(LAYERS):
        for name in layer:
            if name in left:
                below[name] = set().union(left[name], *(below[other] for other in left[name]))
    return {
        name: {
            other for other in others if not any(other in below[each] for each in others - {other})
        }
        for name, others in left.items()
    }


def arranged(
    graph: Graph, modules: Mapping[str, Module]
) -> tuple[list[list[str]], dict[str, Place], list[list[str]]]:
    """The rows, what stands in them, and the lines: each by the names of its places."""
    places = {name: Place(_text(name, modules)) for name in graph}
    rows = [[name for name in layer if name in graph] for layer in LAYERS]
    rows = [row for row in rows if row]
    rank = {name: number for number, row in enumerate(rows) for name in row}
    lines = []
    for name in rank.copy():
        for other in sorted(graph[name], key=lambda other: (rank[other], other)):
            passed = [f"{name} {other} {at}" for at in range(rank[name] + 1, rank[other])]
            for at, each in enumerate(passed, rank[name] + 1):
                rows[at].append(each)
                places[each] = Place()
            lines.append([name, *passed, other])
    _put_in_order(rows, lines)
    return rows, places, lines


def _put_in_order(rows: list[list[str]], lines: list[list[str]]) -> None:
    """Sort each row by the mean place of its neighbours above, then below: few lines cross."""
    above, below = defaultdict(list), defaultdict(list)
    for line in lines:
        for upper, lower in pairwise(line):
            above[lower].append(upper)
            below[upper].append(lower)
    for number in range(SWEEPS):
        neighbours = below if number % 2 else above
        for row in reversed(rows) if number % 2 else rows:
            at = {
                name: (place + 0.5) / len(each) for each in rows for place, name in enumerate(each)
            }
            means = {
                name: sum(at[other] for other in neighbours[name]) / len(neighbours[name])
                if neighbours[name]
                else at[name]
                for name in row
            }
            row.sort(key=means.__getitem__)


def _text(name: str, modules: Mapping[str, Module]) -> list[str]:
    files = [each.partition(".")[2] for each in modules if each.startswith(f"{name}.")]
    title = f"{name}/" if files else SHOWN.get(name, f"{name}.py")
    return [title, *wrap(", ".join(sorted(files)), LETTERS)]


def _width(row: list[str], places: Mapping[str, Place]) -> float:
    return sum(places[name].width for name in row) + BETWEEN_BOXES * (len(row) - 1)


def _start(width: float, height: float) -> Iterator[str]:
    size = f"{width:.0f} {height:.0f}"
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-size="12">'
    yield "<title>Packages of psofa_gevent: each imports from those below it</title>"
    yield "<style>"
    yield "text { font-family: monospace; text-anchor: middle; font-size: 11px; fill: #333 }"
    yield ".name { font-weight: bold; font-size: 12px; fill: #000 }"
    yield "rect { fill: #f4f6fa; stroke: #5b6b86; rx: 4px }"
    yield "path { fill: none; stroke: #8a97ad; marker-end: url(#arrow) }"
    yield "</style>"
    yield '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
    yield 'orient="auto"><polygon points="0,1 7,4 0,7" fill="#5b6b86"/></marker>'
    yield '<rect width="100%" height="100%" style="fill: #fff; stroke: none; rx: 0"/>'


def _line(passed: list[Place]) -> str:
    first = passed[0]
    x, y = first.x, first.bottom
    path = f"M{x:.0f},{y:.0f}"
    for place in passed[1:]:
        middle = (y + place.top) / 2
        path += f" C{x:.0f},{middle:.0f} {place.x:.0f},{middle:.0f} {place.x:.0f},{place.top:.0f}"
        if not place.lines:
            path += f" V{place.bottom:.0f}"
        x, y = place.x, place.bottom
    return f'<path d="{path}"/>'


def _box(place: Place) -> Iterator[str]:
    left = place.x - place.width / 2
    size = f'width="{place.width:.0f}" height="{place.height:.0f}"'
    yield f'<rect x="{left:.0f}" y="{place.top:.0f}" {size}/>'
    for number, line in enumerate(place.lines):
        kind = "" if number else ' class="name"'
        y = place.top + (number + 0.9) * LINE
        yield f'<text x="{place.x:.0f}" y="{y:.0f}"{kind}>{escape(line)}</text>'


if __name__ == "__main__":
    FILE.write_text(drawn(read_modules()), encoding="utf-8")
