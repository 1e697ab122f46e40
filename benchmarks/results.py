"""The results of a run: every sample of every round, with medians and ratios."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import Sample
from benchmarks.rows import ROWS, Row, growth_rows
from benchmarks.targets import Target

__all__ = ["DISTURBED", "SATURATED", "Results", "RowResult", "Spread", "judged_metric"]

SATURATED = 95.0
"""Percent of its core above which the load generator may be the limit of a rate."""
DISTURBED = 5.0
"""Percent of the time that other programs may use the server's core before a row is marked."""


class Spread(NamedTuple):
    """The median, the least and the greatest value of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class RowResult:
    """The samples of one row: by peer, in the order of the rounds."""

    row: Row
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def values(self, peer: str, metric: str) -> list[float]:
        return [sample[metric] for sample in self.samples.get(peer, ()) if metric in sample]

    @property
    def measured(self) -> list[str]:
        """The peers of which there are samples, in the row's order."""
        return [peer for peer, samples in self.samples.items() if samples]

    def spread(self, peer: str, metric: str) -> Spread | None:
        return Spread.of(self.values(peer, metric))

    def ratio(self, ours: str, peer: str, metric: str) -> Spread | None:
        """Ours divided by the peer's, round by round: the speed of the machine cancels out."""
        pairs = zip(self.values(ours, metric), self.values(peer, metric), strict=False)
        return Spread.of([mine / other for mine, other in pairs if other])

    def is_load_limited(self, peer: str) -> bool:
        busy = self.spread(peer, "load_busy")
        return busy is not None and busy.median > SATURATED

    def is_disturbed(self, peer: str) -> bool:
        waited = self.spread(peer, "waited")
        return waited is not None and waited.median > DISTURBED


@dataclass
class Results:
    """The results of a whole run."""

    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: dict[str, RowResult] = field(default_factory=dict)

    @property
    def python(self) -> str:
        """The version of the Python that was measured: major and minor."""
        return ".".join(str(self.about["python"]).split(".")[:2])

    def spread_of(self, target: Target) -> tuple[Spread | None, str]:
        """The value to compare with the target's bound, and its metric."""
        result = self.rows.get(target.row)
        if result is None:
            return None, target.metric
        if target.peer is not None:
            metric = judged_metric(result, target)
            return result.ratio(target.ours, target.peer, metric), metric
        if target.other_row is not None:
            other = self.rows.get(target.other_row, RowResult(result.row))
            mine = result.values(target.ours, target.metric)
            others = other.values(target.ours, target.metric)
            pairs = zip(mine, others, strict=False)
            return Spread.of([a / b for a, b in pairs if b]), target.metric
        return result.spread(target.ours, target.metric), target.metric

    def write(self, path: Path) -> None:
        """Write all samples, with their medians, as JSON."""
        rows = {
            name: {
                "title": result.row.title,
                "peers": {
                    peer: {
                        "rounds": samples,
                        "median": {
                            metric: statistics.median(result.values(peer, metric))
                            for metric in samples[0]
                        },
                    }
                    for peer, samples in result.samples.items()
                    if samples
                },
            }
            for name, result in self.rows.items()
        }
        document = {"about": self.about, "notes": self.notes, "rows": rows}
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote."""
        document = json.loads(path.read_text())
        known = {row.name: row for row in (*ROWS, *growth_rows())}
        results = cls(document["about"], document["notes"])
        for name, kept in document["rows"].items():
            samples = {peer: entry["rounds"] for peer, entry in kept["peers"].items()}
            results.rows[name] = RowResult(known[name], samples)
        return results


def judged_metric(result: RowResult, target: Target) -> str:
    """The target's metric; CPU time if the load or other programs limited a rate."""
    limited = any(
        result.is_load_limited(peer) or result.is_disturbed(peer)
        for peer in (target.ours, target.peer)
        if peer is not None
    )
    return "per_cpu_second" if target.metric == "rate" and limited else target.metric
