"""The plots, as PNG and SVG."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.growth import COSTS, Curve, curves
from benchmarks.peers import C_SERVER, PEERS
from benchmarks.report import label_of
from benchmarks.results import Results, RowResult

__all__ = ["plot"]

OURS, OTHERS = "#7b3fa0", "#b9bcc4"
LINES = {"psofa": OURS, "gevent": "#4c9f70", "uvloop": "#d08a2e"}
COLUMNS = 3
TITLE_WIDTH = 34
"""Letters in a line of a title, so that titles of neighbouring plots do not overlap."""
OVERVIEW = ("echo-100", "async-100", "pipelined", "accept", "broadcast", "sessions-15000")
"""The rows that the README shows."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "svg.hashsalt": "psofa",  # the same figures give the same file
    "svg.fonttype": "none",
}


def plot(results: Results, directory: Path) -> list[Path]:
    """Write the plots into `directory`: ``overview``, ``benchmarks`` and ``growth``."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    bars = {
        name: result
        for name, result in results.rows.items()
        if not name.startswith("growth-") and result.measured
    }
    overview = [bars[name] for name in OVERVIEW if name in bars]
    lines = list(curves(results))
    about = results.about
    subject = f"{about['implementation']} {about['python']}, {about['processor']}"
    with mpl.rc_context(STYLE):
        for name, chosen in (("overview", overview), ("benchmarks", list(bars.values()))):
            if chosen:
                figure = _bar_figure(chosen)
                figure.suptitle(f"Medians, least to most; the server on one core; {subject}")
                written += _save(figure, directory / name)
        if lines:
            figure = _growth_figure(lines)
            figure.suptitle(f"Cost of one item by number of sessions; {subject}")
            written += _save(figure, directory / "growth")
    return written


def _save(figure: Figure, path: Path) -> list[Path]:
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=110, facecolor="white", metadata=metadata)
    return files


def _axes(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.4 * columns, height * rows + 0.5), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    return figure, axes


def _bar_figure(bars: list[RowResult]) -> Figure:
    figure, axes = _axes(len(bars), 2.3)
    for ax, result in zip(axes, bars, strict=True):
        _bars(ax, result)
    return figure


def _bars(ax: Axes, result: RowResult) -> None:
    metric = result.row.shown
    spreads = {
        peer: spread
        for peer in reversed(result.row.peers)
        if peer != C_SERVER and (spread := result.spread(peer, metric))
    }
    medians = [spread.median for spread in spreads.values()]
    down = [spread.median - spread.low for spread in spreads.values()]
    up = [spread.high - spread.median for spread in spreads.values()]
    ax.barh(
        [PEERS[peer].label for peer in spreads],
        medians,
        xerr=[down, up],
        color=[OURS if peer.startswith("psofa") else OTHERS for peer in spreads],
        error_kw={"elinewidth": 1, "ecolor": "#333"},
    )
    ax.set_title(textwrap.fill(result.row.title, TITLE_WIDTH), loc="left")
    ax.set_xlabel(label_of(metric, result))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.locator_params(axis="x", nbins=3)


def _growth_figure(lines: list[Curve]) -> Figure:
    costs = [cost for cost in COSTS if any(curve.cost == cost for curve in lines)]
    figure, axes = _axes(len(costs), 2.6)
    for ax, cost in zip(axes, costs, strict=True):
        for curve in (curve for curve in lines if curve.cost == cost):
            sizes, values = list(curve.per_item), list(curve.per_item.values())
            label = PEERS[curve.peer].label
            if curve.exponent is not None:
                label += f" (exponent {curve.exponent:.2f})"
            ax.plot(sizes, values, "o-", color=LINES[curve.peer], label=label, markersize=4)
        ax.set_xscale("log")
        ax.set_ylim(bottom=0)
        ax.set_title(cost.label, loc="left")
        ax.set_xlabel("sessions")
        ax.legend(fontsize=7, frameon=False)
    return figure
