"""How each cost grows with the number of sessions: per item, and the exponent of the total."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.peers import PEERS
from benchmarks.report import show_number, table
from benchmarks.results import Results
from benchmarks.rows import GROWTH_PEERS, GROWTH_SIZES

__all__ = ["COSTS", "Cost", "Curve", "curves", "growth_report"]

FIT_FROM = 1_000
"""Sessions. With fewer, costs that do not depend on sessions make the exponent too small."""
TOLERATED = 1.1
"""Exponent. 15,000 sessions are too many for the caches, which costs the peers as much as us."""


@dataclass(frozen=True)
class Cost:
    """One cost: `metric` of the rows ``growth-KIND-…``."""

    label: str
    kind: str
    metric: str


COSTS = (
    Cost("echo, CPU µs a message", "echo", "cpu_us"),
    Cost("accept and first echo, CPU µs a session", "sessions", "open_cpu_us"),
    Cost("idle, CPU µs a session and second", "sessions", "idle_cpu_percent"),
    Cost("close by shutdown, CPU µs a session", "sessions", "close_cpu_us"),
    Cost("broadcast, CPU µs a delivery", "broadcast", "cpu_us"),
)


@dataclass(frozen=True)
class Curve:
    """One peer's cost per item, in microseconds, by number of sessions."""

    cost: Cost
    peer: str
    per_item: dict[int, float]

    @property
    def exponent(self) -> float | None:
        """The exponent of the total cost by number of sessions; 1: linear. None: too few points."""
        sizes = [size for size in self.per_item if size >= FIT_FROM and self.per_item[size] > 0]
        if len(sizes) < 2:
            return None
        logs = [math.log(size) for size in sizes]
        totals = [math.log(self.per_item[size] * size) for size in sizes]
        return statistics.linear_regression(logs, totals).slope


def curves(results: Results) -> Iterator[Curve]:
    """The curves that `results` has."""
    for cost in COSTS:
        for peer in GROWTH_PEERS:
            per_item = dict(_points(results, cost, peer))
            if per_item:
                yield Curve(cost, peer, per_item)


def growth_report(results: Results) -> str:
    """The table of growth; an empty string if growth was not measured."""
    lines = [_line(curve) for curve in curves(results)]
    if not lines:
        return ""
    header = ("cost", "", *(f"{size:,}" for size in GROWTH_SIZES), "exponent", "")
    title = (
        f"### Growth\n\nMedians by number of sessions; the exponent of the total, fitted from"
        f" {FIT_FROM:,} sessions on (1: linear).\n\n"
    )
    return title + table(header, lines)


def _points(results: Results, cost: Cost, peer: str) -> Iterator[tuple[int, float]]:
    for size in GROWTH_SIZES:
        result = results.rows.get(f"growth-{cost.kind}-{size}")
        spread = result.spread(peer, cost.metric) if result else None
        if spread is None:
            continue
        percent = cost.metric == "idle_cpu_percent"
        yield size, spread.median / 100 * 1e6 / size if percent else spread.median


def _line(curve: Curve) -> Sequence[str]:
    costs = [
        show_number(curve.per_item[size], 2) if size in curve.per_item else ""
        for size in GROWTH_SIZES
    ]
    exponent = curve.exponent
    verdict = "faster than linear" if exponent is not None and exponent > TOLERATED else ""
    shown = "" if exponent is None else f"{exponent:.2f}"
    return [curve.cost.label, PEERS[curve.peer].label, *costs, shown, verdict]
